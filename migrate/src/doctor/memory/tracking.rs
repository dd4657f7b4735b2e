//! Whether the kernel tells what a process writes: tried on a few pages of this one.

use crate::sys::{Mapped, WriteTracker};
use protocol::page::PAGE_SIZE;
use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;

/// Pages that are tried, and the one that is written.
const PAGES: usize = 16;
const WRITTEN: usize = 5;

/// A page that was written since it was made clean (Documentation/admin-guide/mm/soft-dirty.rst).
const SOFT_DIRTY: u64 = 1 << 55;

/// Write-protection that the kernel lifts by itself, and the call that tells for which pages it did.
pub(in super::super) fn try_writes() -> Result<(), String> {
    let (mapped, _file) = Mapped::new(PAGES * PAGE_SIZE).map_err(|error| error.to_string())?;
    let mut mappings = [mapped];
    let tracker = WriteTracker::start(&mappings).map_err(|error| error.to_string())?;
    mappings[0].values_mut::<u8>()[WRITTEN * PAGE_SIZE] = 1;
    let mut found = Vec::new();
    tracker
        .written(&mappings[0], 0, PAGES as u64, false, &mut |first, count| found.push((first, count)))
        .map_err(|error| error.to_string())?;
    match found[..] {
        [(first, 1)] if first == WRITTEN as u64 => Ok(()),
        _ => Err("it told other pages than the one that was written".into()),
    }
}

/// The same by the older way, which CRIU uses. It forgets what this process has written so far, which nobody else asks for.
pub(crate) fn try_soft_dirty() -> Result<(), String> {
    let mut pages = vec![1_u8; PAGES * PAGE_SIZE];
    // Inside of the vector, so that nothing else lies on the page.
    let start = pages.as_ptr().addr();
    let address = start.next_multiple_of(PAGE_SIZE) + WRITTEN * PAGE_SIZE;
    let failed = |error: io::Error| error.to_string();
    let pagemap = File::open("/proc/self/pagemap").map_err(failed)?;
    let is_dirty = || {
        let mut entry = [0; 8];
        let at = address / PAGE_SIZE * entry.len();
        pagemap.read_exact_at(&mut entry, at as u64).map_err(failed)?;
        Ok::<_, String>(u64::from_ne_bytes(entry) & SOFT_DIRTY != 0)
    };
    let mut clear = OpenOptions::new().write(true).open("/proc/self/clear_refs").map_err(failed)?;
    clear.write_all(b"4").map_err(failed)?;
    let before = is_dirty()?;
    if let Some(byte) = black_box(&mut pages).get_mut(address - start) {
        *byte = 2;
    }
    black_box(&mut pages);
    match (before, is_dirty()?) {
        (false, true) => Ok(()),
        (_, false) => Err("a page that was written is not marked (CONFIG_MEM_SOFT_DIRTY is not set)".into()),
        (true, true) => Err("a page stays marked when the marks are removed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_ends_with_a_word_either_way() {
        for (name, tried) in [("writes", try_writes()), ("soft-dirty", try_soft_dirty())] {
            println!("{name}: {tried:?}");
            assert!(tried.err().is_none_or(|why| !why.is_empty()), "{name}");
        }
    }
}
