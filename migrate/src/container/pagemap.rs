//! What `/proc/PID/pagemap` says of a process's pages, for kernels that cannot be asked for ranges (Documentation/admin-guide/mm/pagemap.rst and
//! soft-dirty.rst).

use protocol::page::PAGE_SIZE;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Bits of an entry.
pub(super) const SOFT_DIRTY: u64 = 1 << 55;
pub(super) const SWAPPED: u64 = 1 << 62;
pub(super) const PRESENT: u64 = 1 << 63;

/// Bytes of an entry.
const ENTRY_BYTES: usize = 8;

/// Entries that are read at once.
const ENTRIES: usize = 4096;

/// What `/proc/PID/clear_refs` is told to let all pages count as clean.
const CLEAR_SOFT_DIRTY: &str = "4";

/// Tells the pages between two addresses whose entries are so, by first page and number, ascending.
///
/// # Errors
/// The kernel's; `ESRCH` for memory that is gone.
pub(super) fn runs(
    pagemap: &File,
    start: u64,
    end: u64,
    is_so: impl Fn(u64) -> bool,
    tell: &mut dyn FnMut(u64, u64),
) -> io::Result<()> {
    let (mut page, end) = (start / PAGE_SIZE as u64, end / PAGE_SIZE as u64);
    let mut buffer = vec![0; ENTRIES * ENTRY_BYTES];
    let mut run: Option<(u64, u64)> = None;
    while page < end {
        let wanted = usize::try_from(end - page).unwrap_or(ENTRIES).min(ENTRIES) * ENTRY_BYTES;
        let read = pagemap.read_at(&mut buffer[..wanted], page * ENTRY_BYTES as u64)?;
        let entries = buffer[..read].as_chunks::<ENTRY_BYTES>().0;
        if entries.is_empty() {
            // The process has ended, or runs another program: this memory is nobody's any more.
            return Err(Errno::SRCH.into());
        }
        for entry in entries {
            match &mut run {
                Some((_, count)) if is_so(u64::from_ne_bytes(*entry)) => *count += 1,
                None if is_so(u64::from_ne_bytes(*entry)) => run = Some((page, 1)),
                Some((first, count)) => {
                    tell(*first, *count);
                    run = None;
                }
                None => {}
            }
            page += 1;
        }
    }
    if let Some((first, count)) = run {
        tell(first, count);
    }
    Ok(())
}

/// All pages of a process count as clean from now on.
///
/// # Errors
/// The kernel's.
pub(super) fn clear_soft_dirty(pid: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), CLEAR_SOFT_DIRTY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_pages_are_found() {
        // Six pages, of which the third and fourth are there.
        let memory = crate::sys::Mapped::new(6 * PAGE_SIZE);
        let (mut memory, _file) = memory.unwrap();
        let address = memory.values::<u8>().as_ptr().addr() as u64;
        memory.values_mut::<u8>()[2 * PAGE_SIZE] = 1;
        memory.values_mut::<u8>()[3 * PAGE_SIZE] = 1;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut found = Vec::new();
        let end = address + 6 * PAGE_SIZE as u64;
        let mut tell = |first, count| found.push((first * PAGE_SIZE as u64 - address, count));
        runs(&pagemap, address, end, |entry| entry & PRESENT != 0, &mut tell).unwrap();
        assert_eq!(found, [(2 * PAGE_SIZE as u64, 2)]);
        assert_eq!(memory.values::<u8>()[0], 0);
    }
}
