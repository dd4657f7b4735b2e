//! Compares frozen guest memory with what it must hold, page by page and byte by byte.
//!
//! Nothing the guest says of its pages is believed: the pattern is replayed up to the iterations the stats
//! block says were done, and every page is generated anew. A guest may be frozen between any two of its
//! instructions, so one page may be in the middle of a write; the stats block says which, and there each
//! word must be the old one or the new one. Everything else must be equal.

use std::fmt;

use crate::model::layout::{PAGE_SIZE, VERSION_TABLE_GPA};
use crate::model::page::{self, Damage, FILLED, FIRST_VERSION, Identity, Page, WORDS};
use crate::model::stats::State;
use crate::replay::Replay;
use crate::stats::{Setup, Stats};

/// How many faults a verdict lists; all are counted.
pub const MAX_FAULTS: usize = 64;

/// More iterations are not replayed: at a page each half microsecond that is a run of nine hours, and a
/// larger number most likely comes from a damaged stats block.
const MAX_ITERATIONS: u64 = 1 << 36;

/// Bytes of the version table read at once.
const TABLE_CHUNK: usize = 64 << 10;

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A data page.
    Page,
    /// The page's entry in the guest's version table.
    TableEntry,
}

/// One thing that is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub subject: Subject,
    /// The data page it belongs to.
    pub page: u64,
    /// Where it lies in guest-physical memory.
    pub gpa: u64,
    /// How it is wrong.
    pub damage: Damage,
    /// The version it must have.
    pub expected_version: u32,
    /// The version it claims to have, 0 for none.
    pub found_version: u32,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = match self.subject {
            Subject::Page => "page",
            Subject::TableEntry => "version table entry",
        };
        let Fault { page, gpa, expected_version, found_version, .. } = self;
        let damage = self.damage.name();
        write!(f, "{subject} {page} at {gpa:#x} is {damage}: ")?;
        write!(f, "expected version {expected_version}, found {found_version}")
    }
}

/// What came of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Data pages compared.
    pub pages_checked: u64,
    /// The iterations they were compared after.
    pub iterations: u64,
    /// The page that was being written, if one was.
    pub in_flight: Option<u64>,
    /// Data pages that are lost.
    pub lost: u64,
    /// Data pages that are whole, but of another version.
    pub stale: u64,
    /// Data pages that are a mixture, or have a flipped bit.
    pub torn: u64,
    /// Data pages that are another page.
    pub foreign: u64,
    /// Entries of the version table that are wrong.
    pub table_entries: u64,
    /// Errors the guest found by itself before it was frozen.
    pub guest_errors: u64,
    /// Why the guest stopped, if it panicked or its own last check found damage.
    pub guest_failure: Option<String>,
    /// The stats block names another page in flight than the pattern does.
    pub wrong_page_in_flight: bool,
    /// The first [`MAX_FAULTS`] faults.
    pub faults: Vec<Fault>,
}

impl Verdict {
    /// Whether nothing at all was wrong.
    pub fn is_sound(&self) -> bool {
        self.damaged() == 0
            && self.guest_errors == 0
            && self.guest_failure.is_none()
            && !self.wrong_page_in_flight
    }

    /// How many pages and table entries are wrong.
    pub fn damaged(&self) -> u64 {
        self.lost + self.stale + self.torn + self.foreign + self.table_entries
    }

    fn note(&mut self, fault: Fault) {
        let count = match (fault.subject, fault.damage) {
            (Subject::TableEntry, _) => &mut self.table_entries,
            (Subject::Page, Damage::Lost) => &mut self.lost,
            (Subject::Page, Damage::Stale) => &mut self.stale,
            (Subject::Page, Damage::Torn) => &mut self.torn,
            (Subject::Page, Damage::Foreign) => &mut self.foreign,
        };
        *count += 1;
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }
}

impl fmt::Display for Verdict {
    /// One line, then one for each fault listed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { pages_checked, iterations, .. } = self;
        if self.is_sound() {
            return write!(f, "sound: {pages_checked} pages after {iterations} iterations");
        }
        let Verdict { lost, stale, torn, foreign, table_entries, guest_errors, .. } = self;
        write!(
            f,
            "BROKEN: {pages_checked} pages after {iterations} iterations: lost={lost} stale={stale} \
             torn={torn} foreign={foreign} table_entries={table_entries} guest_errors={guest_errors}"
        )?;
        if self.wrong_page_in_flight {
            f.write_str("\n  the stats block names another page in flight than the pattern does")?;
        }
        if let Some(failure) = &self.guest_failure {
            write!(f, "\n  the guest stopped: {failure}")?;
        }
        for fault in &self.faults {
            write!(f, "\n  {fault}")?;
        }
        let more = self.damaged().saturating_sub(self.faults.len() as u64);
        if more > 0 { write!(f, "\n  and {more} more") } else { Ok(()) }
    }
}

/// Why memory could not be checked.
#[derive(Debug)]
pub enum VerifyError<E> {
    /// The reader failed at this address.
    Reader(u64, E),
    /// The guest has not read its command line yet, or could not start; the text is its own reason.
    NotStarted(String),
    /// More iterations than any run has: the stats block must be damaged.
    TooManyIterations(u64),
}

impl<E: fmt::Display> fmt::Display for VerifyError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerifyError::Reader(gpa, error) => write!(f, "reading guest memory at {gpa:#x}: {error}"),
            VerifyError::NotStarted(message) if message.is_empty() => {
                f.write_str("the guest has not begun to fill its memory: wait for it")
            }
            VerifyError::NotStarted(message) => write!(f, "the guest could not start: {message}"),
            VerifyError::TooManyIterations(iterations) => {
                write!(f, "{iterations} iterations cannot be: the stats block is damaged")
            }
        }
    }
}

impl<E: fmt::Debug + fmt::Display> std::error::Error for VerifyError<E> {}

/// A page that may be either of two, word by word.
struct InFlight {
    page: u64,
    /// What it was before; `None` while filling: anything at all.
    before: Option<Identity>,
    after: Identity,
}

/// Checks all of a frozen guest's data pages and their version-table entries.
///
/// `read` fills a buffer from guest-physical memory. `stats` must be of the same moment, so the guest must
/// have been frozen before they were read. Takes about 2 s for 4 GiB of pages (release build) and a few
/// nanoseconds for each iteration done so far.
pub fn verify<E>(
    stats: &Stats,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Verdict, VerifyError<E>> {
    let setup = stats.setup.ok_or_else(|| VerifyError::NotStarted(stats.message.clone()))?;
    if stats.iterations > MAX_ITERATIONS {
        return Err(VerifyError::TooManyIterations(stats.iterations));
    }
    let mut replay = Replay::new(setup);
    replay.advance_to(stats.iterations);

    let mut verdict = Verdict {
        iterations: stats.iterations,
        guest_errors: stats.error_count(),
        guest_failure: (stats.state == State::Failed).then(|| stats.message.clone()),
        ..Verdict::default()
    };
    let in_flight = in_flight(stats, &setup, &replay);
    verdict.in_flight = in_flight.as_ref().map(|in_flight| in_flight.page);
    if stats.begun > stats.iterations && verdict.in_flight != Some(stats.current_page) {
        verdict.wrong_page_in_flight = true;
    }

    let mut table = Vec::new();
    let mut bytes = [0; PAGE_SIZE as usize];
    for number in 0..stats.filled.min(setup.fill_pages) {
        let entry_gpa = VERSION_TABLE_GPA + number * 4;
        let slot = (number * 4) as usize % TABLE_CHUNK;
        if slot == 0 {
            let left = (stats.filled - number) * 4;
            table.resize(TABLE_CHUNK.min(usize::try_from(left).unwrap_or(TABLE_CHUNK)), 0);
            read(entry_gpa, &mut table).map_err(|error| VerifyError::Reader(entry_gpa, error))?;
        }
        let entry = table.get(slot..slot + 4).and_then(|bytes| bytes.first_chunk());
        let entry = entry.map_or(0, |bytes| u32::from_le_bytes(*bytes));

        let (Some(id), Some(gpa)) = (replay.identity(number), setup.ranges.gpa_of(number)) else { continue };
        let moving = in_flight.as_ref().filter(|in_flight| in_flight.page == number);
        read(gpa, &mut bytes).map_err(|error| VerifyError::Reader(gpa, error))?;
        let found = words(&bytes);
        let fault = match moving {
            Some(moving) => compare_moving(&found, moving),
            None => compare(&found, &id),
        };
        verdict.pages_checked += 1;
        let base = Fault {
            subject: Subject::Page,
            page: number,
            gpa,
            damage: Damage::Stale,
            expected_version: id.version,
            found_version: 0,
        };
        if let Some((damage, found_version)) = fault {
            verdict.note(Fault { damage, found_version, ..base });
        }
        let entry_ok = entry == id.version || moving.is_some_and(|moving| entry == moving.after.version);
        if !entry_ok {
            let damage = if entry == 0 { Damage::Lost } else { Damage::Stale };
            let subject = Subject::TableEntry;
            verdict.note(Fault { subject, gpa: entry_gpa, damage, found_version: entry, ..base });
        }
    }
    Ok(verdict)
}

fn in_flight(stats: &Stats, setup: &Setup, replay: &Replay) -> Option<InFlight> {
    let &Setup { seed, content, .. } = setup;
    if stats.filled < setup.fill_pages {
        let (version, iteration) = (FIRST_VERSION, FILLED);
        let after = Identity { seed, page: stats.filled, version, iteration, content };
        return Some(InFlight { page: stats.filled, before: None, after });
    }
    if stats.begun == stats.iterations {
        return None;
    }
    let page = setup.pattern.page_of(seed, setup.ws_pages, stats.iterations);
    let before = replay.identity(page)?;
    let (version, iteration) = (before.version.wrapping_add(1), stats.iterations);
    Some(InFlight { page, before: Some(before), after: Identity { version, iteration, ..before } })
}

fn words(bytes: &[u8; PAGE_SIZE as usize]) -> Page {
    let mut page = [0; WORDS];
    for (word, bytes) in page.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    page
}

fn generate(id: &Identity) -> Page {
    let mut page = [0; WORDS];
    page::write(&mut page, id);
    page
}

fn compare(found: &Page, id: &Identity) -> Option<(Damage, u32)> {
    if *found == generate(id) {
        return None;
    }
    match page::check(found, id.page, id.version, id.seed, id.content) {
        Err(damage) => Some(damage),
        // A header and checksum that fit, over what this iteration never wrote.
        Ok(()) => Some((Damage::Foreign, id.version)),
    }
}

fn compare_moving(found: &Page, moving: &InFlight) -> Option<(Damage, u32)> {
    let before = generate(moving.before.as_ref()?);
    let after = generate(&moving.after);
    let either = found.iter().zip(&before).zip(&after).all(|((f, b), a)| f == b || f == a);
    if either { None } else { Some((Damage::Torn, 0)) }
}
