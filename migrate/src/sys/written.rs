//! Which pages of a process were written: userfaultfd(2) write-protects them in its asynchronous mode, in which the kernel lifts the
//! protection at the first write by itself, and `PAGEMAP_SCAN` (Linux 6.7) tells for which pages it did, and protects them again in the
//! same step (Documentation/admin-guide/mm/pagemap.rst).

use super::{GROUP, Range};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;

/// `UFFDIO_API`, `UFFDIO_REGISTER`, `UFFDIO_WRITEPROTECT` (include/uapi/linux/userfaultfd.h).
const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
const WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(GROUP, 0x06);

/// `PAGEMAP_SCAN` (include/uapi/linux/fs.h).
const SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);

/// `UFFD_API`.
const API_VERSION: u64 = 0xaa;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`, `UFFD_FEATURE_WP_UNPOPULATED` and `UFFD_FEATURE_WP_ASYNC`.
const FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;

/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WP: u64 = 1 << 1;

/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const PROTECT: u64 = 1 << 0;

/// `PM_SCAN_WP_MATCHING` and `PM_SCAN_CHECK_WPASYNC`.
const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// What a page can be (`PAGE_IS_…`).
pub(crate) const WP_ALLOWED: u64 = 1 << 0;
pub(crate) const WRITTEN: u64 = 1 << 1;
pub(crate) const PRESENT: u64 = 1 << 3;
pub(crate) const SWAPPED: u64 = 1 << 4;
/// The page of zeros that everybody shares who has only read.
pub(crate) const ZERO_PAGE: u64 = 1 << 5;

/// Ranges that one scan answers.
const RANGES: usize = 512;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// The call itself: its answer is how many ranges were written to `vec`.
struct Call<'a>(&'a mut ScanArg);

// SAFETY: the opcode is PAGEMAP_SCAN, whose argument is a `struct pm_scan_arg`, which the kernel reads and writes.
unsafe impl Ioctl for Call<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<usize, Errno> {
        usize::try_from(output).map_err(|_| Errno::IO)
    }
}

/// Makes a new userfaultfd one that protects in the asynchronous mode.
///
/// # Errors
/// The kernel's: `EINVAL` where it is too old.
pub(crate) fn begin(descriptor: &OwnedFd) -> Result<(), Errno> {
    let mut api = Api { api: API_VERSION, features: FEATURES, ioctls: 0 };
    // SAFETY: the opcode is UFFDIO_API, whose argument is this struct.
    let call = unsafe { Updater::<API, Api>::new(&mut api) };
    // SAFETY: no memory but the struct is changed.
    unsafe { ioctl(descriptor, call) }
}

/// Lets pages of these addresses be protected, those of mappings that were not yet as those that were. None of the former counts as clean.
///
/// # Errors
/// The kernel's: `EINVAL` for mappings that cannot be, such as those of files.
pub(crate) fn register(descriptor: &OwnedFd, start: u64, len: u64) -> Result<(), Errno> {
    let mut register = Register { range: Range { start, len }, mode: MODE_WP, ioctls: 0 };
    // SAFETY: the opcode is UFFDIO_REGISTER, whose argument is this struct.
    let call = unsafe { Updater::<REGISTER, Register>::new(&mut register) };
    // SAFETY: the contents of memory stay as they are.
    unsafe { ioctl(descriptor, call) }
}

/// Protects pages of registered addresses, so that they count as clean, or takes that away, so that they count as written.
///
/// # Errors
/// The kernel's.
pub(crate) fn protect(descriptor: &OwnedFd, start: u64, len: u64, clean: bool) -> Result<(), Errno> {
    let mut protect = WriteProtect { range: Range { start, len }, mode: if clean { PROTECT } else { 0 } };
    // SAFETY: the opcode is UFFDIO_WRITEPROTECT, whose argument is this struct.
    let call = unsafe { Updater::<WRITEPROTECT, WriteProtect>::new(&mut protect) };
    // SAFETY: the contents of memory stay as they are; a write to it is let through by the kernel, in the asynchronous mode.
    unsafe { ioctl(descriptor, call) }
}

/// What to look for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scan {
    /// A page must be all of this,
    pub(crate) all: u64,
    /// some of this, if it is not 0,
    pub(crate) any: u64,
    /// and none of this.
    pub(crate) none: u64,
    /// What to tell of it.
    pub(crate) tell: u64,
    /// What is found is clean from now on.
    pub(crate) clean: bool,
    /// It is an error if a page could not be protected.
    pub(crate) protectable: bool,
}

/// Tells the ranges of addresses that were looked for, as start, end and what they are. `pagemap` is that of the process.
///
/// # Errors
/// The kernel's: `ENOTTY` where it is too old, `EPERM` where a page could not be protected.
pub(crate) fn scan(
    pagemap: &File,
    mut start: u64,
    end: u64,
    scan: Scan,
    tell: &mut dyn FnMut(u64, u64, u64),
) -> Result<(), Errno> {
    let mut flags = if scan.clean { SCAN_WP_MATCHING } else { 0 };
    if scan.protectable {
        flags |= SCAN_CHECK_WPASYNC;
    }
    let mut regions = [PageRegion::default(); RANGES];
    while start < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: RANGES as u64,
            max_pages: 0,
            category_inverted: scan.none,
            category_mask: scan.all | scan.none,
            category_anyof_mask: scan.any,
            return_mask: scan.tell,
        };
        // SAFETY: the kernel writes to the struct and to `regions`, which is as long as it says; no contents of memory change.
        let found = unsafe { ioctl(pagemap, Call(&mut arg)) }?;
        regions.iter().take(found).for_each(|region| tell(region.start, region.end, region.categories));
        if arg.walk_end <= start {
            return Err(Errno::IO);
        }
        start = arg.walk_end;
    }
    Ok(())
}
