//! Memory of this process that it works in and that is written down, and which of its pages were written.
//!
//! The memory is a memfd(2), mapped once: the program works in the mapping, and the engine reads and fills the file, so neither needs
//! to know of the other's borrows. userfaultfd(2) write-protects the mapping's pages in its asynchronous mode, in which the
//! kernel lifts the protection at the first write by itself, and `PAGEMAP_SCAN` (Linux 6.7) tells for which pages it did, and protects
//! them again in the same step (Documentation/admin-guide/mm/pagemap.rst).

use super::Range;
use protocol::page::PAGE_SIZE;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

/// `UFFDIO_API`, `UFFDIO_REGISTER`, `UFFDIO_WRITEPROTECT` (include/uapi/linux/userfaultfd.h).
const API: Opcode = opcode::read_write::<Api>(super::GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(super::GROUP, 0x00);
const WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(super::GROUP, 0x06);

/// `PAGEMAP_SCAN` (include/uapi/linux/fs.h).
const SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);

/// `UFFD_API`.
const API_VERSION: u64 = 0xaa;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`, `UFFD_FEATURE_WP_UNPOPULATED` and `UFFD_FEATURE_WP_ASYNC`.
const FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;

/// `UFFD_USER_MODE_ONLY`: what an unprivileged process may have. In the asynchronous mode the kernel answers its own writes as well.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);

/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WP: u64 = 1 << 1;

/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const PROTECT: u64 = 1 << 0;

/// `PM_SCAN_WP_MATCHING` and `PM_SCAN_CHECK_WPASYNC`.
const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `PAGE_IS_WRITTEN`.
const IS_WRITTEN: u64 = 1 << 1;

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
struct Scan<'a>(&'a mut ScanArg);

// SAFETY: the opcode is PAGEMAP_SCAN, whose argument is a `struct pm_scan_arg`, which the kernel reads and writes.
unsafe impl Ioctl for Scan<'_> {
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

/// A type of which every pattern of bits is a value, and that has no padding.
///
/// # Safety
/// The implementor must be such a type, aligned to a page at most.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($type:ty),*) => {
        $(
            // SAFETY: every pattern of bits is a number.
            unsafe impl Plain for $type {}
        )*
    };
}

plain!(u8, u16, u32, u64, i8, i16, i32, i64, f32, f64);

/// Memory of this process: a memfd, mapped.
pub(crate) struct Mapped {
    address: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the mapping is memory like any other, and is reached through `&self` and `&mut self` alone.
unsafe impl Send for Mapped {}
// SAFETY: through `&self` it is only read.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// New memory, all zeros, and the file of it.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn new(bytes: usize) -> Result<(Self, OwnedFd), Errno> {
        let file = rustix::fs::memfd_create("migrate-program", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that exists.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) }?;
        let address = NonNull::new(address).ok_or(Errno::NOMEM)?;
        Ok((Self { address, bytes }, file))
    }

    /// What it holds.
    pub(crate) fn values<T: Plain>(&self) -> &[T] {
        // SAFETY: the mapping is so long, lives as long as `self`, is aligned to a page, and all of its bits are values; whoever else
        // knows the file writes to it only while the program gives its memory away mutably (see `crate::program`).
        unsafe { std::slice::from_raw_parts(self.address.cast().as_ptr(), self.bytes / size_of::<T>()) }
    }

    /// The same, to be changed.
    pub(crate) fn values_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `values`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast().as_ptr(), self.bytes / size_of::<T>()) }
    }

    fn start(&self) -> u64 {
        self.address.as_ptr().addr() as u64
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr(), self.bytes) };
        // Only a wrong address or length can fail, and these are those that it was made with.
        unmapped.ok();
    }
}

/// Knows which pages of some mappings were written since they were clean.
pub(crate) struct WriteTracker {
    /// While it is open the pages stay protected.
    _descriptor: OwnedFd,
    pagemap: File,
}

impl WriteTracker {
    /// Begins to track: all pages of these mappings are clean.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` or `ENOTTY` where it is too old, `EPERM` where it is forbidden.
    pub(crate) fn start(mappings: &[Mapped]) -> Result<Self, Errno> {
        let pagemap = File::open("/proc/self/pagemap")
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | USER_MODE_ONLY;
        // SAFETY: a descriptor alone changes no memory.
        let descriptor = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = Api { api: API_VERSION, features: FEATURES, ioctls: 0 };
        // SAFETY: the opcode is UFFDIO_API, whose argument is this struct.
        let call = unsafe { Updater::<API, Api>::new(&mut api) };
        // SAFETY: no memory but the struct is changed.
        unsafe { ioctl(&descriptor, call) }?;
        let tracker = Self { _descriptor: descriptor, pagemap };
        for mapping in mappings {
            let range = || Range { start: mapping.start(), len: mapping.bytes as u64 };
            let mut register = Register { range: range(), mode: MODE_WP, ioctls: 0 };
            // SAFETY: the opcode is UFFDIO_REGISTER, whose argument is this struct.
            let call = unsafe { Updater::<REGISTER, Register>::new(&mut register) };
            // SAFETY: the range is a mapping that is alive; its contents stay as they are.
            unsafe { ioctl(&tracker._descriptor, call) }?;
            let mut protect = WriteProtect { range: range(), mode: PROTECT };
            // SAFETY: the opcode is UFFDIO_WRITEPROTECT, whose argument is this struct.
            let call = unsafe { Updater::<WRITEPROTECT, WriteProtect>::new(&mut protect) };
            // SAFETY: as above; a write to the range is let through by the kernel, in the asynchronous mode.
            unsafe { ioctl(&tracker._descriptor, call) }?;
        }
        // Whether the kernel knows the other half is asked now and not at the first checkpoint.
        if let Some(mapping) = mappings.first() {
            tracker.written(mapping, 0, 1, false, &mut |_, _| {})?;
        }
        Ok(tracker)
    }

    /// Tells the written pages of a range as first page and number; with `clean` they are clean from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn written(
        &self,
        mapping: &Mapped,
        first: u64,
        count: u64,
        clean: bool,
        tell: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Errno> {
        let page_bytes = PAGE_SIZE as u64;
        let pages = mapping.bytes as u64 / page_bytes;
        let end_page = first.saturating_add(count).min(pages);
        let end = mapping.start() + end_page * page_bytes;
        let mut start = mapping.start() + first.min(end_page) * page_bytes;
        let mut regions = [PageRegion::default(); RANGES];
        while start < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: SCAN_CHECK_WPASYNC | if clean { SCAN_WP_MATCHING } else { 0 },
                start,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: RANGES as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: IS_WRITTEN,
                category_anyof_mask: 0,
                return_mask: IS_WRITTEN,
            };
            // SAFETY: the kernel writes to the struct and to `regions`, which is as long as it says; no contents of memory change.
            let found = unsafe { ioctl(&self.pagemap, Scan(&mut arg)) }?;
            for region in regions.iter().take(found) {
                let first = region.start.saturating_sub(mapping.start()) / page_bytes;
                tell(first, region.end.saturating_sub(region.start) / page_bytes);
            }
            if arg.walk_end <= start {
                return Err(Errno::IO);
            }
            start = arg.walk_end;
        }
        Ok(())
    }
}
