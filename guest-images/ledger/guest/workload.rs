//! The main loop: write what is due, scrub what is due, report, park.

use core::fmt::Write;
use core::sync::atomic::{Ordering, compiler_fence};

use crate::block::{Block, Error};
use crate::clock::{self, Pace};
use crate::data::Data;
use crate::devices::Devices;
use crate::disk::Disk;
use crate::model::layout::{PAGE_SIZE, Ranges};
use crate::model::page::{self, Damage, Identity};
use crate::model::params::{Params, Rate};
use crate::model::stats::{STATS_PAGE, State, at};
use crate::ring::Ring;

/// Bytes of a report printed in one pass. Each costs an exit of some microseconds, so that a report line
/// printed at once would be a gap of its own.
const SERIAL_BYTES_A_PASS: usize = 8;

/// How many errors are printed; all are counted.
const PRINTED_ERRORS: u64 = 20;

const EXIT_SOUND: u32 = 0;
const EXIT_BROKEN: u32 = 1;

/// Who found an error, as the stats block numbers them.
#[derive(Clone, Copy)]
enum Finder {
    Write = 0,
    Scrub = 1,
    LastCheck = 2,
}

struct Workload {
    params: Params,
    block: Block,
    devices: Devices,
    data: Data,
    ring: Option<Ring>,
    disk: Option<Disk>,
    clock: clock::Rate,
    writes: Pace,
    scrub: Pace,
    tick_cycles: u64,
    report_cycles: u64,
    /// Iterations done; the block has the same number, and they are compared.
    iterations: u64,
    scrub_next: u64,
    start: u64,
    last: u64,
    next_report: u64,
}

/// Fills memory and works for ever, or until `stop_after=`.
pub fn run(params: Params, ranges: Ranges, block: Block, devices: Devices) -> ! {
    let clock = clock::Rate::new(params.tsc_khz);
    let mut workload = Workload {
        block,
        devices,
        data: Data::new(ranges, params.fill_pages()),
        ring: None,
        disk: None,
        clock,
        writes: Pace::never(),
        scrub: Pace::never(),
        tick_cycles: clock.cycles(params.tick_us),
        report_cycles: clock.cycles(params.report_ms * 1000),
        iterations: 0,
        scrub_next: 0,
        start: 0,
        last: 0,
        next_report: 0,
        params,
    };
    workload.devices.set_clock(clock);
    workload.fill();
    workload.begin();
    workload.work()
}

impl Workload {
    fn fill(&mut self) {
        self.block.set_state(State::Filling);
        for number in 0..self.params.fill_pages() {
            let id = self.identity(number, page::FIRST_VERSION, page::FILLED);
            page::write(self.data.page(number), &id);
            compiler_fence(Ordering::SeqCst);
            self.data.set_version(number, page::FIRST_VERSION);
            self.block.put(at::FILLED, number + 1);
        }
    }

    fn begin(&mut self) {
        let now = clock::now();
        (self.start, self.last) = (now, now);
        self.next_report = now.wrapping_add(self.report_cycles);
        self.writes = match self.params.rate {
            Rate::Idle => Pace::never(),
            Rate::Paced(mb_s) => Pace::at(u64::from(mb_s), self.clock, self.tick_cycles, now),
            Rate::Max => Pace::always(),
        };
        self.scrub = Pace::at(self.params.scrub_mb_s, self.clock, self.tick_cycles, now);
        self.block.put(at::TSC_START, now);
        self.block.put(at::TSC_LAST, now);
        self.ring = self.params.ring.map(Ring::open);
        if self.params.disk_mb_s != 0 && self.devices.has_pad() {
            let pace = Pace::at(self.params.disk_mb_s, self.clock, self.tick_cycles, now);
            self.disk = Disk::open(&self.params, self.clock, pace);
        }
        self.block.set_state(State::Running);
        let boot_us = self.clock.us(now.wrapping_sub(self.block.get(at::TSC_BOOT)));
        let _ = writeln!(self.devices, "ledger: running boot_us={boot_us} {}", self.params);
    }

    fn work(mut self) -> ! {
        let stop_after = self.params.stop_after;
        loop {
            let now = self.tick();
            let mut busy = false;
            if self.writes.take(now) {
                self.iterate();
                busy = true;
                if self.iterations == stop_after {
                    self.finish();
                }
            }
            busy |= self.ring.as_mut().is_some_and(Ring::turn);
            busy |= self.disk.as_mut().is_some_and(|disk| disk.turn(now));
            if self.scrub.take(now) {
                let number = self.scrub_next;
                self.check(number, Finder::Scrub);
                self.block.add(at::SCRUBBED, 1);
                self.scrub_next = (number + 1) % self.params.fill_pages();
                busy = true;
            }
            if self.params.report_ms != 0 && now.wrapping_sub(self.next_report) as i64 >= 0 {
                self.report(now);
            }
            let printing = self.devices.drain(SERIAL_BYTES_A_PASS);
            if !busy && !printing {
                self.park(now);
            }
        }
    }

    /// Accounts for the time since the last pass.
    fn tick(&mut self) -> u64 {
        let now = clock::now();
        if now < self.last {
            self.block.add(at::TSC_BACKWARDS, 1);
            self.block.forget_gaps(now);
            self.start = self.start.wrapping_sub(self.last - now);
            self.writes.restart(now);
            self.scrub.restart(now);
            if let Some(disk) = &mut self.disk {
                disk.restart(now);
            }
            self.next_report = now.wrapping_add(self.report_cycles);
        } else {
            let gap = now - self.last;
            if gap > 2 * self.tick_cycles {
                self.block.add(at::GAP_COUNT, 1);
            }
            if gap > self.tick_cycles / 2 {
                self.block.note_gap(now, gap);
            }
            if gap > self.block.get(at::LONGEST_GAP) {
                self.block.put(at::LONGEST_GAP_END, now);
                self.block.put(at::LONGEST_GAP, gap);
            }
        }
        self.last = now;
        self.block.put(at::TSC_LAST, now);
        self.block.add(at::TICKS, 1);
        now
    }

    /// One iteration: check what is there, then overwrite it. The order of stores is the block's promise.
    fn iterate(&mut self) {
        let k = self.iterations;
        if self.block.get(at::ITERATIONS) != k {
            // The low halves are enough to see which was older.
            let found = self.block.get(at::ITERATIONS) as u32;
            self.complain(STATS_PAGE, k as u32, found, Damage::Stale, Finder::Write);
        }
        let number = self.params.pattern.page_of(self.params.seed, self.params.ws_pages(), k);
        self.check(number, Finder::Write);
        let version = self.data.version(number).wrapping_add(1);
        let id = self.identity(number, version, k);

        self.block.put(at::CURRENT_PAGE, number);
        self.block.put(at::BEGUN, k + 1);
        compiler_fence(Ordering::SeqCst);
        page::write(self.data.page(number), &id);
        compiler_fence(Ordering::SeqCst);
        self.data.set_version(number, version);
        self.block.put(at::BYTES_WRITTEN, (k + 1) * PAGE_SIZE);
        self.block.put(at::ITERATIONS, k + 1);
        self.iterations = k + 1;
    }

    fn identity(&self, page: u64, version: u32, iteration: u64) -> Identity {
        Identity { seed: self.params.seed, page, version, iteration, content: self.params.content }
    }

    fn check(&mut self, number: u64, finder: Finder) {
        let expected = self.data.version(number);
        let (seed, content) = (self.params.seed, self.params.content);
        if let Err((damage, found)) = page::check(self.data.page(number), number, expected, seed, content) {
            self.complain(number, expected, found, damage, finder);
        }
    }

    #[cold]
    fn complain(&mut self, page: u64, expected: u32, found: u32, damage: Damage, finder: Finder) {
        if self.block.get(at::ERROR_COUNT) < PRINTED_ERRORS {
            let name = damage.name();
            let _ = writeln!(
                self.devices,
                "ledger: ERROR page={page} expected version={expected} found={found} kind={name}"
            );
        }
        let (kind, finder) = (damage as u32, finder as u32);
        self.block.note_error(&Error { page, expected, found, kind, finder });
    }

    fn report(&mut self, now: u64) {
        // From now on, not from when it was due: a long gap is followed by one report.
        self.next_report = now.wrapping_add(self.report_cycles);
        let tenths = self.clock.us(now.wrapping_sub(self.start)) / 100_000;
        let _ = writeln!(
            self.devices,
            "ledger: {}.{}s iterations={} written_mb={} longest_gap_us={} errors={}",
            tenths / 10,
            tenths % 10,
            self.iterations,
            self.iterations * PAGE_SIZE / 1_000_000,
            self.clock.us(self.block.get(at::LONGEST_GAP)),
            self.block.get(at::ERROR_COUNT),
        );
    }

    /// Parks until a write is due, but no longer than a tick; and not for less than a quarter of one, because a
    /// park costs an exit and a wake-up. What became due meanwhile is caught up with; the scrub is in no hurry.
    fn park(&mut self, now: u64) {
        let cycles = self.writes.wait(now).clamp(self.tick_cycles / 4, self.tick_cycles);
        self.block.add(at::PARKS, 1);
        self.devices.park_ns(self.clock.us(cycles).saturating_mul(1000));
    }

    /// The last check: every filled page, then the verdict.
    fn finish(&mut self) -> ! {
        for number in 0..self.params.fill_pages() {
            self.check(number, Finder::LastCheck);
        }
        let errors = self.block.get(at::ERROR_COUNT);
        let sound = errors == 0;
        if sound {
            let _ = writeln!(self.devices, "ledger: sound after {} iterations", self.iterations);
        } else {
            let _ = write!(self.block.message(), "{errors} errors");
            let _ = writeln!(
                self.devices,
                "ledger: BROKEN after {} iterations, errors={errors}",
                self.iterations
            );
        }
        self.block.set_state(if sound { State::Done } else { State::Failed });
        self.devices.flush();
        self.devices.power_off(if sound { EXIT_SOUND } else { EXIT_BROKEN })
    }
}
