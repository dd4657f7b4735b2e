//! Memory of this process that it works in and that is written down, and which of its pages were written.
//!
//! The memory is a memfd(2), mapped once: the program works in the mapping, and the engine reads and fills the file, so neither needs
//! to know of the other's borrows.

use super::written::{self, Scan, WRITTEN};
use protocol::page::PAGE_SIZE;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

/// `UFFD_USER_MODE_ONLY`: what an unprivileged process may have. In the asynchronous mode the kernel answers its own writes as well.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);

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

/// A file of memory, mapped to be read by the kernel alone: others may change it meanwhile, so nothing borrows from it.
pub(crate) struct View {
    address: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the mapping is not read here at all; its address is given to the kernel.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Maps the first `bytes` of a file.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn new(file: &OwnedFd, bytes: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice changes no memory that exists.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, file, 0)
        }?;
        Ok(Self { address: NonNull::new(address).ok_or(Errno::NOMEM)?, bytes })
    }

    /// Where these bytes are, if it has so many.
    pub(super) fn address(&self, offset: u64, bytes: u64) -> Option<u64> {
        let end = offset.checked_add(bytes)?;
        (end <= self.bytes as u64).then(|| self.address.as_ptr().expose_provenance() as u64 + offset)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr(), self.bytes) };
        // As above.
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
        written::begin(&descriptor)?;
        let tracker = Self { _descriptor: descriptor, pagemap };
        for mapping in mappings {
            let (start, len) = (mapping.start(), mapping.bytes as u64);
            written::register(&tracker._descriptor, start, len)?;
            written::protect(&tracker._descriptor, start, len, true)?;
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
        let start = mapping.start() + first.min(end_page) * page_bytes;
        let what = Scan { all: WRITTEN, tell: WRITTEN, clean, protectable: true, ..Scan::default() };
        written::scan(&self.pagemap, start, end, what, &mut |start, end, _| {
            tell(start.saturating_sub(mapping.start()) / page_bytes, end.saturating_sub(start) / page_bytes);
        })
    }
}
