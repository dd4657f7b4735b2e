//! The stats block, as the host reads it. The bytes come from a guest: nothing in them is believed unseen.

use std::fmt;

use crate::model::layout::{MAX_RANGES, PAGE_SIZE, Range, Ranges, STATS_GPA, VERSION_TABLE_GPA, data_start};
use crate::model::page::{Content, Damage};
use crate::model::params::Rate;
use crate::model::pattern::Pattern;
use crate::model::stats::{ERRORS, FLAG_PAD, GAPS, MAGIC, State, VERSION, at};

/// Why bytes are not a stats block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadStats {
    /// Fewer than a page of bytes.
    Short(usize),
    /// No magic number: the guest has not come to its first instruction at CPL 3, or is another guest.
    Magic(u64),
    /// A layout version this library does not know.
    Version(u32),
    /// A field holds what no guest writes; the text names it.
    Field(&'static str),
}

impl fmt::Display for BadStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadStats::Short(bytes) => write!(f, "{bytes} bytes are too few for a stats block"),
            BadStats::Magic(found) => {
                write!(
                    f,
                    "no ledger stats block at {STATS_GPA:#x} (found {found:#x}): has the guest started?"
                )
            }
            BadStats::Version(found) => {
                write!(f, "stats block version {found}, this library reads {VERSION}: rebuild the guest")
            }
            BadStats::Field(field) => write!(f, "the stats block is damaged: {field}"),
        }
    }
}

impl std::error::Error for BadStats {}

/// Why a stats block could not be read.
#[derive(Debug)]
pub enum ReadError<E> {
    /// The reader failed.
    Reader(E),
    /// What it read is not a stats block.
    Bad(BadStats),
}

impl<E: fmt::Display> fmt::Display for ReadError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Reader(error) => write!(f, "reading guest memory at {STATS_GPA:#x}: {error}"),
            ReadError::Bad(bad) => bad.fmt(f),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> std::error::Error for ReadError<E> {}

/// A time without a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// TSC of the tick that ended it.
    pub tsc_end: u64,
    /// Its length in TSC cycles.
    pub cycles: u64,
}

/// What the guest was doing when it found an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finder {
    /// It was about to overwrite the page.
    Write,
    /// It read all pages in turn.
    Scrub,
    /// It did the check before its verdict.
    LastCheck,
}

/// An error the guest found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRecord {
    /// The page; [`STATS_PAGE`](crate::model::stats::STATS_PAGE) is the stats block itself.
    pub page: u64,
    /// The version its table has for the page.
    pub expected_version: u32,
    /// The version the page claims, 0 if it has no header.
    pub found_version: u32,
    /// What was wrong.
    pub damage: Damage,
    /// When it was seen.
    pub finder: Finder,
    /// How many iterations were done then.
    pub iterations: u64,
}

/// What the guest does, as far as its memory depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// `seed=`
    pub seed: u64,
    /// Pages filled at boot.
    pub fill_pages: u64,
    /// Pages overwritten, the first of those filled.
    pub ws_pages: u64,
    /// In which order.
    pub pattern: Pattern,
    /// With what.
    pub content: Content,
    /// Where data pages lie.
    pub ranges: Ranges,
}

/// A stats block. Read it while the vCPU is frozen; read from a running guest each field is whole, but
/// they may be of different moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// What the guest is doing.
    pub state: State,
    /// What it was asked to do. `None` while booting, and if it could not start.
    pub setup: Option<Setup>,
    /// How fast it overwrites.
    pub rate: Rate,
    /// The longest it parks at once, in microseconds.
    pub tick_us: u64,
    /// Its TSC frequency in kHz, if it was told.
    pub tsc_khz: Option<u64>,
    /// Whether it found the pad, so whether it parks and prints.
    pub has_pad: bool,
    /// Iterations begun: one more than done while a page is being written.
    pub begun: u64,
    /// The page of the iteration begun last.
    pub current_page: u64,
    /// Iterations done.
    pub iterations: u64,
    /// Pages filled so far.
    pub filled: u64,
    /// Bytes written by iterations.
    pub bytes_written: u64,
    /// Passes of the main loop.
    pub ticks: u64,
    /// How often it parked, or spun because there is no pad.
    pub parks: u64,
    /// Pages checked by the scrub.
    pub scrubbed: u64,
    /// Errors the guest found: lost, stale, torn, foreign.
    pub errors: [u64; 4],
    /// The first of them.
    pub first_errors: Vec<ErrorRecord>,
    /// TSC at its first instruction at CPL 3.
    pub tsc_boot: u64,
    /// TSC when all was filled and the main loop began; 0 before.
    pub tsc_start: u64,
    /// TSC of the newest tick.
    pub tsc_last: u64,
    /// The longest gap between ticks since the start.
    pub longest_gap: Gap,
    /// Gaps longer than half a tick, oldest first, without those that a later one was as long as.
    pub gaps: Vec<Gap>,
    /// `gaps` is complete for what ended after this TSC; commonly 0.
    pub gaps_since: u64,
    /// How many gaps were longer than two ticks.
    pub gap_count: u64,
    /// How often the TSC was found to have gone back.
    pub tsc_backwards: u64,
    /// Why it failed, if it did.
    pub message: String,
    /// The command line it was given, the first 1024 bytes of it.
    pub command_line: String,
}

/// Little-endian fields of a block that is surely long enough.
struct Fields<'a>(&'a [u8; PAGE_SIZE as usize]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    fn text(&self, from: usize, to: usize) -> String {
        let bytes = self.0[from..to].split(|byte| *byte == 0).next().unwrap_or(&[]);
        String::from_utf8_lossy(bytes).into_owned()
    }

    fn setup(&self) -> Result<Option<Setup>, BadStats> {
        let count = self.u32(at::RANGE_COUNT) as usize;
        if count == 0 {
            return Ok(None);
        }
        if count > MAX_RANGES {
            return Err(BadStats::Field("more data ranges than there is room for"));
        }
        let (fill_pages, ws_pages) = (self.u64(at::FILL_PAGES), self.u64(at::WS_PAGES));
        let mut ranges = Ranges::default();
        for i in 0..count {
            let start = self.u64(at::RANGES + i * 16);
            let range = Range { start, len: self.u64(at::RANGES + i * 16 + 8) };
            ranges.push(range).map_err(|_| BadStats::Field("a data range is out of place"))?;
        }
        if fill_pages > ranges.pages() || self.u64(at::VERSION_TABLE) != VERSION_TABLE_GPA {
            return Err(BadStats::Field("more pages filled than there is room for"));
        }
        if ranges.gpa_of(0).is_none_or(|first| first < data_start(fill_pages)) {
            return Err(BadStats::Field("data lies over the version table"));
        }
        if ws_pages == 0 || ws_pages > fill_pages {
            return Err(BadStats::Field("the working set is empty or larger than what is filled"));
        }
        let percent = |at| u8::try_from(self.u32(at)).ok().filter(|percent| *percent <= 100);
        let pattern = match self.u32(at::PATTERN) {
            0 => Pattern::Seq,
            1 => Pattern::Uniform,
            2 => Pattern::Hot {
                pages_percent: percent(at::HOT_PAGES).ok_or(BadStats::Field("hot_pages"))?,
                writes_percent: percent(at::HOT_WRITES).ok_or(BadStats::Field("hot_writes"))?,
            },
            _ => return Err(BadStats::Field("pattern")),
        };
        let content = match self.u32(at::CONTENT) {
            0 => Content::Random,
            1 => Content::Text,
            2 => Content::Zero,
            _ => return Err(BadStats::Field("content")),
        };
        let seed = self.u64(at::SEED);
        Ok(Some(Setup { seed, fill_pages, ws_pages, pattern, content, ranges }))
    }

    fn gaps(&self) -> Vec<Gap> {
        let listed = self.u64(at::GAPS_LISTED).min(GAPS as u64) as usize;
        (0..listed)
            .map(|n| at::GAP_LIST + n * 16)
            .map(|slot| Gap { tsc_end: self.u64(slot), cycles: self.u64(slot + 8) })
            .collect()
    }

    fn first_errors(&self) -> Result<Vec<ErrorRecord>, BadStats> {
        let kept = self.u64(at::ERROR_COUNT).min(ERRORS as u64) as usize;
        (0..kept)
            .map(|i| {
                let slot = at::ERROR_LIST + i * 32;
                let damage = match self.u32(slot + 16) {
                    0 => Damage::Lost,
                    1 => Damage::Stale,
                    2 => Damage::Torn,
                    3 => Damage::Foreign,
                    _ => return Err(BadStats::Field("an error's kind")),
                };
                let finder = match self.u32(slot + 20) {
                    0 => Finder::Write,
                    1 => Finder::Scrub,
                    2 => Finder::LastCheck,
                    _ => return Err(BadStats::Field("an error's finder")),
                };
                Ok(ErrorRecord {
                    page: self.u64(slot),
                    expected_version: self.u32(slot + 8),
                    found_version: self.u32(slot + 12),
                    damage,
                    finder,
                    iterations: self.u64(slot + 24),
                })
            })
            .collect()
    }
}

impl Stats {
    /// Decodes the page at [`STATS_GPA`].
    pub fn decode(bytes: &[u8]) -> Result<Stats, BadStats> {
        let page = bytes.first_chunk().ok_or(BadStats::Short(bytes.len()))?;
        let fields = Fields(page);
        if fields.u64(at::MAGIC) != MAGIC {
            return Err(BadStats::Magic(fields.u64(at::MAGIC)));
        }
        if fields.u32(at::VERSION) != VERSION {
            return Err(BadStats::Version(fields.u32(at::VERSION)));
        }
        let state = State::from_code(fields.u32(at::STATE)).ok_or(BadStats::Field("state"))?;
        let setup = fields.setup()?;
        let rate = match fields.u64(at::RATE) {
            0 => Rate::Idle,
            u64::MAX => Rate::Max,
            mb_s => Rate::Paced(u32::try_from(mb_s).map_err(|_| BadStats::Field("rate"))?),
        };
        let (begun, iterations) = (fields.u64(at::BEGUN), fields.u64(at::ITERATIONS));
        if begun.checked_sub(iterations).is_none_or(|in_flight| in_flight > 1) {
            return Err(BadStats::Field("iterations begun are neither those done nor one more"));
        }
        let filled = fields.u64(at::FILLED);
        if filled > setup.map_or(0, |setup| setup.fill_pages) {
            return Err(BadStats::Field("more pages filled than were asked for"));
        }
        let error = |i: usize| fields.u64(at::ERRORS + i * 8);
        Ok(Stats {
            state,
            setup,
            rate,
            tick_us: fields.u64(at::TICK_US),
            tsc_khz: Some(fields.u64(at::TSC_KHZ)).filter(|khz| *khz != 0),
            has_pad: fields.u64(at::FLAGS) & FLAG_PAD != 0,
            begun,
            current_page: fields.u64(at::CURRENT_PAGE),
            iterations,
            filled,
            bytes_written: fields.u64(at::BYTES_WRITTEN),
            ticks: fields.u64(at::TICKS),
            parks: fields.u64(at::PARKS),
            scrubbed: fields.u64(at::SCRUBBED),
            errors: [error(0), error(1), error(2), error(3)],
            first_errors: fields.first_errors()?,
            tsc_boot: fields.u64(at::TSC_BOOT),
            tsc_start: fields.u64(at::TSC_START),
            tsc_last: fields.u64(at::TSC_LAST),
            longest_gap: Gap {
                tsc_end: fields.u64(at::LONGEST_GAP_END),
                cycles: fields.u64(at::LONGEST_GAP),
            },
            gaps: fields.gaps(),
            gaps_since: fields.u64(at::GAPS_SINCE),
            gap_count: fields.u64(at::GAP_COUNT),
            tsc_backwards: fields.u64(at::TSC_BACKWARDS),
            message: fields.text(at::MESSAGE, at::COMMAND_LINE),
            command_line: fields.text(at::COMMAND_LINE, at::END),
        })
    }

    /// Reads and decodes the block with a reader of guest-physical memory.
    pub fn read<E>(mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Stats, ReadError<E>> {
        let mut page = [0; PAGE_SIZE as usize];
        read(STATS_GPA, &mut page).map_err(ReadError::Reader)?;
        Stats::decode(&page).map_err(ReadError::Bad)
    }

    /// How many errors the guest itself found.
    pub fn error_count(&self) -> u64 {
        self.errors.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The longest gap that ended at or after `tsc`: after a migration, with a TSC from before it, the
    /// downtime as the guest saw it (and up to one park, a tick at most).
    ///
    /// `None` if none since then was longer than half a tick, or if the list no longer goes back so far
    /// (then `tsc` is not later than `gaps_since`).
    pub fn longest_gap_since(&self, tsc: u64) -> Option<Gap> {
        if tsc <= self.gaps_since && self.gaps_since != 0 {
            // Still known if the longest of all came later.
            return Some(self.longest_gap).filter(|gap| gap.tsc_end >= tsc && self.tsc_backwards == 0);
        }
        self.gaps.iter().copied().find(|gap| gap.tsc_end >= tsc)
    }

    /// TSC cycles as microseconds, if the guest knew its frequency.
    pub fn us(&self, cycles: u64) -> Option<u64> {
        let us = u128::from(cycles) * 1000 / u128::from(self.tsc_khz?);
        u64::try_from(us).ok()
    }
}
