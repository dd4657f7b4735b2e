//! The data pages and the version table, as the guest reaches them.

use core::ptr;

use crate::model::layout::{Ranges, VERSION_TABLE_GPA};
use crate::model::page::Page;

/// All filled pages and their versions.
pub struct Data {
    ranges: Ranges,
    pages: u64,
}

impl Data {
    /// `ranges` must have room for `pages`, as `Ranges::for_data` makes sure.
    pub fn new(ranges: Ranges, pages: u64) -> Data {
        Data { ranges, pages }
    }

    /// Data page `page`; one at a time, as it borrows all.
    pub fn page(&mut self, page: u64) -> &mut Page {
        assert!(page < self.pages);
        let gpa = self.ranges.gpa_of(page).unwrap_or_else(|| panic!("page {page} lies nowhere"));
        let pointer = ptr::with_exposed_provenance_mut::<Page>(gpa as usize);
        // SAFETY: in a range of RAM that is mapped and that nothing but data pages occupies, and the
        // exclusive borrow of `self` lasts as long as this one.
        unsafe { &mut *pointer }
    }

    fn entry(&self, page: u64) -> *mut u32 {
        assert!(page < self.pages);
        ptr::with_exposed_provenance_mut(VERSION_TABLE_GPA as usize + page as usize * 4)
    }

    /// The version the table has for this page.
    pub fn version(&self, page: u64) -> u32 {
        // SAFETY: in the table, which is mapped (it ends before the first data page).
        unsafe { self.entry(page).read_volatile() }
    }

    pub fn set_version(&mut self, page: u64, version: u32) {
        // SAFETY: as in `version`.
        unsafe { self.entry(page).write_volatile(version) };
    }
}
