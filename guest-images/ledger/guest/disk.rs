//! A driver for the first virtio disk, one request at a time, and what is written with it. Account and blocks: `model/disk.rs`.
//!
//! Registers and rings: Virtual I/O Device version 1.2, 4.2.2, 2.7 and 5.2. Nothing interrupts: the used ring is looked at.

use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence, fence};

use crate::clock::{self, Pace};
use crate::model::disk::{
    ACCOUNT_GPA, BLOCK_BYTES, BLOCK_WORDS, DATA_GPA, MAGIC, MAX_BLOCKS, RINGS_GPA, TABLE_GPA, at, block_of,
    clears, word,
};
use crate::model::layout::{SLOTS, SLOTS_GPA};
use crate::model::params::Params;

/// "virt", and the number of a block device.
const VIRTIO: u32 = 0x7472_6976;
const BLOCK_DEVICE: u32 = 2;

/// Feature bits: flush, write zeroes, and that of every modern device.
const FEATURES: u64 = 1 << 9 | 1 << 14 | 1 << 32;

/// Bits of the status: acknowledge, driver, driver ok, features ok.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    /// The length in sectors of 512 bytes.
    pub const CAPACITY: u64 = 0x100;
}

/// Entries of the queue.
const ENTRIES: u16 = 8;

/// Where the parts of the queue and of a request lie.
const DESCRIPTORS: u64 = RINGS_GPA;
const AVAILABLE: u64 = RINGS_GPA + 0x100;
const USED: u64 = RINGS_GPA + 0x200;
const HEADER: u64 = RINGS_GPA + 0x400;
const RANGE: u64 = RINGS_GPA + 0x500;
const ANSWER: u64 = RINGS_GPA + 0x600;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const WRITE_ZEROES: u32 = 13;

/// How many writes one flush makes safe.
const FLUSH_EVERY: u64 = 8;

/// How long an answer is waited for before something else is done.
const PATIENCE_US: u64 = 50;

fn put<T>(gpa: u64, value: T) {
    // SAFETY: aligned, and in a register, or in a page that is mapped and that no Rust object occupies.
    unsafe { ptr::with_exposed_provenance_mut::<T>(gpa as usize).write_volatile(value) };
}

fn get<T: Copy + From<u8>>(gpa: u64) -> T {
    // SAFETY: as in `put`; any bytes are a valid integer.
    unsafe { ptr::with_exposed_provenance::<T>(gpa as usize).read_volatile() }
}

fn account(offset: usize) -> u64 {
    ACCOUNT_GPA + offset as u64
}

/// What is under way.
#[derive(Clone, Copy)]
enum Step {
    Idle,
    Reading,
    Writing,
    Flushing,
}

/// A disk that is written.
pub struct Disk {
    base: u64,
    seed: u64,
    blocks: u64,
    stop: u64,
    written: u64,
    /// Requests made, and so the next index of both rings.
    requests: u16,
    step: Step,
    pace: Pace,
    patience_cycles: u64,
}

impl Disk {
    /// Finds the first disk and makes it ready, if there is one.
    pub fn open(params: &Params, rate: clock::Rate, pace: Pace) -> Option<Disk> {
        let base = (0..SLOTS).map(|slot| SLOTS_GPA + slot * 0x1000).find(|base| {
            get::<u32>(base + reg::MAGIC) == VIRTIO && get::<u32>(base + reg::DEVICE_ID) == BLOCK_DEVICE
        })?;
        put(base + reg::STATUS, 0_u32);
        put(base + reg::STATUS, ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            put(base + reg::DEVICE_FEATURES_SEL, half);
            let offered = get::<u32>(base + reg::DEVICE_FEATURES);
            put(base + reg::DRIVER_FEATURES_SEL, half);
            put(base + reg::DRIVER_FEATURES, offered & (FEATURES >> (32 * half)) as u32);
        }
        put(base + reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        put(base + reg::QUEUE_SEL, 0_u32);
        put(base + reg::QUEUE_NUM, u32::from(ENTRIES));
        for (register, gpa) in
            [(reg::QUEUE_DESC, DESCRIPTORS), (reg::QUEUE_DRIVER, AVAILABLE), (reg::QUEUE_DEVICE, USED)]
        {
            put(base + register, gpa as u32);
            put(base + register + 4, (gpa >> 32) as u32);
        }
        // Flag of the available ring: no interrupts.
        put(AVAILABLE, 1_u16);
        put(base + reg::QUEUE_READY, 1_u32);
        put(base + reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let sectors = u64::from(get::<u32>(base + reg::CAPACITY))
            | u64::from(get::<u32>(base + reg::CAPACITY + 4)) << 32;
        let blocks = (sectors * 512 / BLOCK_BYTES as u64).min(MAX_BLOCKS);
        if blocks == 0 {
            return None;
        }
        put(account(at::SEED), params.seed);
        put(account(at::BLOCKS), blocks);
        compiler_fence(Ordering::SeqCst);
        put(account(at::MAGIC), MAGIC);
        Some(Disk {
            base,
            seed: params.seed,
            blocks,
            stop: params.disk_stop,
            written: 0,
            requests: 0,
            step: Step::Idle,
            pace,
            patience_cycles: rate.cycles(PATIENCE_US),
        })
    }

    /// The clock was set back.
    pub fn restart(&mut self, now: u64) {
        self.pace.restart(now);
    }

    /// Does what can be done now; says whether something was.
    pub fn turn(&mut self, now: u64) -> bool {
        let n = self.written + 1;
        let block = block_of(self.seed, self.blocks, n);
        let sector = block * (BLOCK_BYTES as u64 / 512);
        if !matches!(self.step, Step::Idle) && !self.is_answered() {
            return false;
        }
        self.step = match self.step {
            Step::Idle => {
                if (self.stop != 0 && self.written >= self.stop) || !self.pace.take(now) {
                    return false;
                }
                self.ask(IN, sector, Some((DATA_GPA, BLOCK_BYTES as u32, WRITE)));
                Step::Reading
            }
            Step::Reading => {
                self.check(block);
                put(account(at::BEGUN), n);
                compiler_fence(Ordering::SeqCst);
                if clears(n) {
                    put(RANGE, sector);
                    put(RANGE + 8, (BLOCK_BYTES / 512) as u32);
                    // Flag: its room may be given back.
                    put(RANGE + 12, 1_u32);
                    self.ask(WRITE_ZEROES, 0, Some((RANGE, 16, 0)));
                } else {
                    for i in 0..BLOCK_WORDS {
                        put(DATA_GPA + i as u64 * 8, word(self.seed, block, n, i));
                    }
                    self.ask(OUT, sector, Some((DATA_GPA, BLOCK_BYTES as u32, 0)));
                }
                Step::Writing
            }
            Step::Writing => {
                put(TABLE_GPA + block * 4, n as u32);
                compiler_fence(Ordering::SeqCst);
                put(account(at::WRITTEN), n);
                self.written = n;
                if n.is_multiple_of(FLUSH_EVERY) || n == self.stop {
                    self.ask(FLUSH, 0, None);
                    Step::Flushing
                } else {
                    Step::Idle
                }
            }
            Step::Flushing => {
                put(account(at::FLUSHED), self.written);
                Step::Idle
            }
        };
        true
    }

    /// Compares the block that was read with what was written last.
    fn check(&self, block: u64) {
        let last = u64::from(get::<u32>(TABLE_GPA + block * 4));
        let is_right = |i: usize| get::<u64>(DATA_GPA + i as u64 * 8) == word(self.seed, block, last, i);
        if last != 0 && !(0..BLOCK_WORDS).all(is_right) {
            complain();
        }
    }

    /// Makes a request; data has an address, a length and a flag.
    fn ask(&mut self, kind: u32, sector: u64, data: Option<(u64, u32, u16)>) {
        put(HEADER, kind);
        put(HEADER + 4, 0_u32);
        put(HEADER + 8, sector);
        put(ANSWER, 0xff_u8);
        describe(0, HEADER, 16, NEXT, 1);
        match data {
            Some((gpa, bytes, flag)) => {
                describe(1, gpa, bytes, NEXT | flag, 2);
                describe(2, ANSWER, 1, WRITE, 0);
            }
            None => describe(1, ANSWER, 1, WRITE, 0),
        }
        put(AVAILABLE + 4 + u64::from(self.requests % ENTRIES) * 2, 0_u16);
        self.requests = self.requests.wrapping_add(1);
        fence(Ordering::SeqCst);
        put(AVAILABLE + 2, self.requests);
        fence(Ordering::SeqCst);
        put(self.base + reg::QUEUE_NOTIFY, 0_u32);
    }

    /// Whether the last request was answered; waits a moment for it.
    fn is_answered(&self) -> bool {
        let from = clock::now();
        while get::<u16>(USED + 2) != self.requests {
            if clock::now().wrapping_sub(from) > self.patience_cycles {
                return false;
            }
            core::hint::spin_loop();
        }
        fence(Ordering::SeqCst);
        if get::<u8>(ANSWER) != 0 {
            complain();
        }
        true
    }
}

fn complain() {
    put(account(at::ERRORS), get::<u64>(account(at::ERRORS)) + 1);
}

fn describe(index: u64, gpa: u64, bytes: u32, flags: u16, next: u16) {
    let entry = DESCRIPTORS + index * 16;
    put(entry, gpa);
    put(entry + 8, bytes);
    put(entry + 12, flags);
    put(entry + 14, next);
}
