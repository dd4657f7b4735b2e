//! The stats block: one page at [`STATS_GPA`](super::layout::STATS_GPA) in which the guest keeps what it was
//! asked to do and how far it is.
//!
//! All fields are little-endian and naturally aligned, and the guest stores each with one instruction.
//! The order of its stores makes a block frozen at any moment meaningful:
//!
//! 1. [`at::CURRENT_PAGE`], then [`at::BEGUN`] = k + 1: iteration k is about to write that page;
//! 2. the page, its header last;
//! 3. its entry in the version table;
//! 4. [`at::ITERATIONS`] = k + 1.
//!
//! So where `BEGUN` equals `ITERATIONS` nothing is in flight, and otherwise exactly that page is. While the
//! state is [`State::Filling`] page number [`at::FILLED`] is in flight and no later one is defined.

/// "LDGRSTAT" in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LDGRSTAT");

/// The version of this layout.
pub const VERSION: u32 = 1;

/// How many gaps the list has room for. Its expected length is the logarithm of the gaps there were.
pub const GAPS: usize = 32;

/// How many errors are kept in full.
pub const ERRORS: usize = 16;

/// An error's page number when it was the stats block itself that went back in time.
pub const STATS_PAGE: u64 = u64::MAX;

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Reading its command line, mapping memory.
    Booting,
    /// Filling pages for the first time.
    Filling,
    /// Writing, scrubbing, reporting.
    Running,
    /// It did what `stop_after=` asked for, checked everything and found it sound.
    Done,
    /// It could not start or panicked (the message says why), or its last check found damage.
    Failed,
}

impl State {
    /// The number that stands for it in the block.
    pub fn code(self) -> u32 {
        self as u32 + 1
    }

    /// The state a number stands for.
    pub fn from_code(code: u32) -> Option<State> {
        [State::Booting, State::Filling, State::Running, State::Done, State::Failed]
            .into_iter()
            .find(|state| state.code() == code)
    }
}

/// Offsets of the fields in bytes; `u64` unless it says otherwise.
pub mod at {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0x000;
    /// `u32`: [`VERSION`](super::VERSION).
    pub const VERSION: usize = 0x008;
    /// `u32`: [`State`](super::State) as a number from 1.
    pub const STATE: usize = 0x00C;
    /// Bit 0: the guest found the pad.
    pub const FLAGS: usize = 0x010;
    /// `seed=`
    pub const SEED: usize = 0x018;
    /// `fill=` in pages.
    pub const FILL_PAGES: usize = 0x020;
    /// `ws=` in pages.
    pub const WS_PAGES: usize = 0x028;
    /// `rate=` in MB/s; all ones for `max`.
    pub const RATE: usize = 0x030;
    /// `u32`: 0 seq, 1 uniform, 2 hot.
    pub const PATTERN: usize = 0x038;
    /// `u32`: 0 random, 1 text, 2 zero.
    pub const CONTENT: usize = 0x03C;
    /// `u32`: `hot_pages=`
    pub const HOT_PAGES: usize = 0x040;
    /// `u32`: `hot_writes=`
    pub const HOT_WRITES: usize = 0x044;
    /// `tick_us=`
    pub const TICK_US: usize = 0x048;
    /// `report_ms=`
    pub const REPORT_MS: usize = 0x050;
    /// `scrub=` in MB/s.
    pub const SCRUB: usize = 0x058;
    /// `tsc_khz=`; 0 is unknown.
    pub const TSC_KHZ: usize = 0x060;
    /// `stop_after=`
    pub const STOP_AFTER: usize = 0x068;
    /// `u32`: `serial=`, 0 mmio, 1 port, 2 none.
    pub const SERIAL: usize = 0x070;
    /// `u32`: how many data ranges there are.
    pub const RANGE_COUNT: usize = 0x074;
    /// Where the version table begins.
    pub const VERSION_TABLE: usize = 0x078;
    /// Eight data ranges: start, length in bytes.
    pub const RANGES: usize = 0x080;

    /// Iterations begun.
    pub const BEGUN: usize = 0x200;
    /// The page of the iteration begun last.
    pub const CURRENT_PAGE: usize = 0x208;
    /// Iterations done.
    pub const ITERATIONS: usize = 0x210;
    /// Pages filled.
    pub const FILLED: usize = 0x218;
    /// Bytes written by iterations.
    pub const BYTES_WRITTEN: usize = 0x220;
    /// Passes of the main loop.
    pub const TICKS: usize = 0x228;
    /// How often it parked, or spun in place of parking.
    pub const PARKS: usize = 0x230;
    /// Pages checked by the scrub.
    pub const SCRUBBED: usize = 0x238;
    /// Errors: four counts in the order lost, stale, torn, foreign.
    pub const ERRORS: usize = 0x240;
    /// How many errors there were in all; the first 16 are kept at [`ERROR_LIST`].
    pub const ERROR_COUNT: usize = 0x260;
    /// TSC at the first instruction at CPL 3.
    pub const TSC_BOOT: usize = 0x268;
    /// TSC when filling ended and the main loop began.
    pub const TSC_START: usize = 0x270;
    /// TSC of the newest tick.
    pub const TSC_LAST: usize = 0x278;
    /// The longest gap between two ticks since the start, in TSC cycles.
    pub const LONGEST_GAP: usize = 0x280;
    /// TSC at its end.
    pub const LONGEST_GAP_END: usize = 0x288;
    /// How many gaps were longer than two ticks.
    pub const GAP_COUNT: usize = 0x290;
    /// How often the TSC was found to have gone back.
    pub const TSC_BACKWARDS: usize = 0x298;
    /// How many entries [`GAP_LIST`] has.
    pub const GAPS_LISTED: usize = 0x2A0;
    /// The list is complete for all that ended after this TSC; 0 unless it ever overflowed or the TSC went
    /// back.
    pub const GAPS_SINCE: usize = 0x2A8;

    /// Up to 32 times: TSC at the gap's end, gap in TSC cycles. Gaps longer than half a tick, oldest first,
    /// without those that a later one was at least as long as: so each is the longest since the one
    /// before it ended, and the first that ended at or after a moment is the longest since that moment.
    pub const GAP_LIST: usize = 0x300;
    /// 16 errors of 32 bytes: page, `u32` expected version, `u32` found version, `u32` kind (0 lost,
    /// 1 stale, 2 torn, 3 foreign), `u32` found by (0 write, 1 scrub, 2 last check), iterations done.
    pub const ERROR_LIST: usize = 0x500;
    /// 256 bytes of text, zero-padded: why it failed.
    pub const MESSAGE: usize = 0x700;
    /// 1024 bytes of text, zero-padded: the command line, cut off if longer.
    pub const COMMAND_LINE: usize = 0x800;
    /// The end of all that.
    pub const END: usize = 0xC00;
}

/// Bytes of [`at::MESSAGE`].
pub const MESSAGE_BYTES: usize = at::COMMAND_LINE - at::MESSAGE;

/// Bytes of [`at::COMMAND_LINE`].
pub const COMMAND_LINE_BYTES: usize = at::END - at::COMMAND_LINE;

/// Bit 0 of [`at::FLAGS`].
pub const FLAG_PAD: u64 = 1;
