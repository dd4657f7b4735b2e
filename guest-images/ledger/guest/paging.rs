//! Page tables for RAM above 4 GiB; boot.s has those below.
//!
//! They are written at CPL 3. That is sound without a TLB flush, because entries only go from not present
//! to present, and the processor does not keep entries that are not present.

use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering, compiler_fence};

use crate::model::layout::{MAX_RAM_GPA, Range};

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;

/// Present, writable, user, accessed, dirty.
const TABLE: u64 = 0x67;
/// The same and a large page.
const PAGE: u64 = 0xE7;

/// One directory for each GiB from the fifth on.
const DIRECTORIES: usize = (MAX_RAM_GPA / GIB) as usize - 4;

#[repr(C, align(4096))]
struct Table([UnsafeCell<u64>; 512]);

// SAFETY: there is one vCPU and no interrupt: nothing runs at the same time.
unsafe impl Sync for Table {}

impl Table {
    const fn empty() -> Table {
        Table([const { UnsafeCell::new(0) }; 512])
    }

    fn set(&self, index: usize, entry: u64) {
        // SAFETY: in this table; only the processor's page walk reads it, which takes 8 bytes at once.
        unsafe { self.0[index].get().write_volatile(entry) };
    }
}

static HIGH: [Table; DIRECTORIES] = [const { Table::empty() }; DIRECTORIES];

unsafe extern "C" {
    /// The table that boot.s made: entry n is the n-th GiB.
    safe static pdpt: Table;
}

/// Identity-maps every GiB above the fourth that holds some of `ranges`.
pub fn map_high(ranges: &[Range]) {
    for (i, directory) in HIGH.iter().enumerate() {
        let from = (i as u64 + 4) * GIB;
        let holds_ram = |range: &Range| range.start < from + GIB && range.start + range.len > from;
        if !ranges.iter().any(holds_ram) {
            continue;
        }
        for entry in 0..512 {
            directory.set(entry, (from + entry as u64 * LARGE_PAGE) | PAGE);
        }
        pdpt.set(i + 4, (core::ptr::from_ref(directory).expose_provenance() as u64) | TABLE);
    }
    // The first access through the new entries comes after they are written.
    compiler_fence(Ordering::SeqCst);
}
