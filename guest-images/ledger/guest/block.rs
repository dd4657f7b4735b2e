//! The stats block, as the guest writes it. Layout and order of stores: `model/stats.rs`.

use core::fmt;
use core::ptr;

use crate::model::layout::{PAGE_SIZE, Ranges, STATS_GPA, VERSION_TABLE_GPA};
use crate::model::page::Content;
use crate::model::params::{Params, Rate, Serial};
use crate::model::pattern::Pattern;
use crate::model::stats::{self, State, at};

/// The stats block. All stores are volatile: each is one instruction, in program order.
pub struct Block(());

impl Block {
    /// The panic handler takes it a second time: it never returns, so the two do not alternate.
    pub fn take() -> Block {
        Block(())
    }

    fn pointer<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset < PAGE_SIZE as usize);
        ptr::with_exposed_provenance_mut(STATS_GPA as usize + offset)
    }

    pub fn put(&mut self, offset: usize, value: u64) {
        // SAFETY: aligned, in the block's page, which is mapped and which no Rust object occupies.
        unsafe { self.pointer::<u64>(offset).write_volatile(value) };
    }

    pub fn get(&self, offset: usize) -> u64 {
        // SAFETY: as in `put`; any bytes are a valid integer.
        unsafe { self.pointer::<u64>(offset).read_volatile() }
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        // SAFETY: as in `put`.
        unsafe { self.pointer::<u32>(offset).write_volatile(value) };
    }

    fn put_bytes(&mut self, offset: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `put`.
            unsafe { self.pointer::<u8>(offset + i).write_volatile(*byte) };
        }
    }

    pub fn add(&mut self, offset: usize, more: u64) {
        self.put(offset, self.get(offset).wrapping_add(more));
    }

    pub fn set_state(&mut self, state: State) {
        self.put_u32(at::STATE, state.code());
    }

    /// Empties the block; the magic number comes last.
    pub fn reset(&mut self, tsc_boot: u64) {
        for offset in (0..PAGE_SIZE as usize).step_by(8) {
            self.put(offset, 0);
        }
        self.put_u32(at::VERSION, stats::VERSION);
        self.set_state(State::Booting);
        self.put(at::TSC_BOOT, tsc_boot);
        self.put(at::MAGIC, stats::MAGIC);
    }

    pub fn put_command_line(&mut self, line: &str) {
        let bytes = line.len().min(stats::COMMAND_LINE_BYTES);
        self.put_bytes(at::COMMAND_LINE, &line.as_bytes()[..bytes]);
    }

    pub fn put_setup(&mut self, params: &Params, ranges: &Ranges, has_pad: bool) {
        self.put(at::FLAGS, if has_pad { stats::FLAG_PAD } else { 0 });
        self.put(at::SEED, params.seed);
        self.put(at::FILL_PAGES, params.fill_pages());
        self.put(at::WS_PAGES, params.ws_pages());
        let rate = match params.rate {
            Rate::Idle => 0,
            Rate::Paced(mb_s) => u64::from(mb_s),
            Rate::Max => u64::MAX,
        };
        self.put(at::RATE, rate);
        let (pattern, hot_pages, hot_writes) = match params.pattern {
            Pattern::Seq => (0, 0, 0),
            Pattern::Uniform => (1, 0, 0),
            Pattern::Hot { pages_percent, writes_percent } => (2, pages_percent, writes_percent),
        };
        self.put_u32(at::PATTERN, pattern);
        self.put_u32(at::HOT_PAGES, u32::from(hot_pages));
        self.put_u32(at::HOT_WRITES, u32::from(hot_writes));
        let content = match params.content {
            Content::Random => 0,
            Content::Text => 1,
            Content::Zero => 2,
        };
        self.put_u32(at::CONTENT, content);
        self.put(at::TICK_US, params.tick_us);
        self.put(at::REPORT_MS, params.report_ms);
        self.put(at::SCRUB, params.scrub_mb_s);
        self.put(at::TSC_KHZ, params.tsc_khz);
        self.put(at::STOP_AFTER, params.stop_after);
        let serial = match params.serial {
            Serial::Mmio => 0,
            Serial::Port => 1,
            Serial::None => 2,
        };
        self.put_u32(at::SERIAL, serial);
        self.put(at::VERSION_TABLE, VERSION_TABLE_GPA);
        for (i, range) in ranges.as_slice().iter().enumerate() {
            self.put(at::RANGES + i * 16, range.start);
            self.put(at::RANGES + i * 16 + 8, range.len);
        }
        self.put_u32(at::RANGE_COUNT, ranges.as_slice().len() as u32);
    }

    /// Adds a gap to the list, in place of the earlier ones it outdoes.
    pub fn note_gap(&mut self, tsc_end: u64, gap: u64) {
        let mut listed = (self.get(at::GAPS_LISTED) as usize).min(stats::GAPS);
        while listed > 0 && self.get(at::GAP_LIST + (listed - 1) * 16 + 8) <= gap {
            listed -= 1;
        }
        if listed == stats::GAPS {
            self.put(at::GAPS_SINCE, self.get(at::GAP_LIST));
            for offset in (at::GAP_LIST..at::GAP_LIST + (stats::GAPS - 1) * 16).step_by(8) {
                self.put(offset, self.get(offset + 16));
            }
            listed -= 1;
        }
        // In this order a block frozen in between has the new gap in the place of one it outdoes, and what
        // follows it in the list is never the first after any moment.
        let slot = at::GAP_LIST + listed * 16;
        self.put(slot + 8, gap);
        self.put(slot, tsc_end);
        self.put(at::GAPS_LISTED, listed as u64 + 1);
    }

    /// The TSC went back: moments before now cannot be told from those to come.
    pub fn forget_gaps(&mut self, now: u64) {
        self.put(at::GAPS_SINCE, now);
        self.put(at::GAPS_LISTED, 0);
    }

    /// Counts an error and keeps it, if it is among the first.
    pub fn note_error(&mut self, error: &Error) {
        let count = self.get(at::ERROR_COUNT);
        if count < stats::ERRORS as u64 {
            let slot = at::ERROR_LIST + count as usize * 32;
            self.put(slot, error.page);
            self.put_u32(slot + 8, error.expected);
            self.put_u32(slot + 12, error.found);
            self.put_u32(slot + 16, error.kind);
            self.put_u32(slot + 20, error.finder);
            self.put(slot + 24, self.get(at::ITERATIONS));
        }
        self.add(at::ERRORS + error.kind as usize % 4 * 8, 1);
        self.put(at::ERROR_COUNT, count.wrapping_add(1));
    }

    /// Writes text into the message field.
    pub fn message(&self) -> Message {
        Message { used: 0 }
    }
}

/// An error, in the numbers the block uses.
pub struct Error {
    pub page: u64,
    pub expected: u32,
    pub found: u32,
    pub kind: u32,
    pub finder: u32,
}

/// Text for the message field; what does not fit is cut off.
pub struct Message {
    used: usize,
}

impl fmt::Write for Message {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = stats::MESSAGE_BYTES - self.used;
        let bytes = &text.as_bytes()[..text.len().min(room)];
        Block::take().put_bytes(at::MESSAGE + self.used, bytes);
        self.used += bytes.len();
        Ok(())
    }
}
