//! The system calls that no crate wraps: those of a userfaultfd(2) that another process made for its own memory, and in [`mapped`] those
//! for memory of this process.
//!
//! What the former change is memory of that process and never this one's, so nothing here can break a rule of the language;
//! the blocks are unsafe because the kernel reads the arguments through pointers.

pub(crate) mod writeback;

mod mapped;
pub(crate) mod inject;
pub(crate) mod written;

pub use mapped::Plain;
pub(crate) use mapped::{Mapped, View, WriteTracker};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// `UFFDIO`: the group of these calls (include/uapi/linux/userfaultfd.h).
const GROUP: u8 = 0xaa;
const WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<Zeropage>(GROUP, 0x04);

/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;

/// Bytes of `struct uffd_msg`.
const EVENT_BYTES: usize = 32;

/// Events that are read at once: more than a VM has vCPUs, mostly.
const EVENTS: usize = 64;

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct Zeropage {
    range: Range,
    mode: u64,
    zeropage: i64,
}

/// How far a call got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    /// So many bytes from the front were filled, at least one page.
    Bytes(u64),
    /// The first page is there already; nobody was woken.
    Present,
    /// Nothing was done: the memory is being changed in another way. It must be tried again.
    Again,
}

/// Waits for page faults, for at most `limit`, and answers the addresses that were touched.
///
/// # Errors
/// The kernel's.
pub(crate) fn page_faults(descriptor: &OwnedFd, limit: Duration) -> Result<Vec<u64>, Errno> {
    let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
    let mut ready = [PollFd::new(descriptor, PollFlags::IN)];
    match poll(&mut ready, Some(&limit)) {
        Ok(0) | Err(Errno::INTR) => return Ok(Vec::new()),
        Ok(_) => {}
        Err(error) => return Err(error),
    }
    let mut buffer = [0; EVENT_BYTES * EVENTS];
    let read = match rustix::io::read(descriptor, &mut buffer) {
        Ok(read) => read,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let events = buffer.get(..read).unwrap_or(&[]).as_chunks::<EVENT_BYTES>().0;
    let faults = events.iter().filter(|event| event[0] == EVENT_PAGEFAULT);
    // u8 event, 7 reserved bytes, u64 flags, u64 address.
    Ok(faults.map(|event| u64::from_ne_bytes(std::array::from_fn(|at| event[16 + at]))).collect())
}

/// Puts `bytes` at an address, page by page, where there is nothing yet, and wakes who waits there.
///
/// # Errors
/// The kernel's.
pub(crate) fn copy(descriptor: &OwnedFd, address: u64, bytes: &[u8]) -> Result<Filled, Errno> {
    copy_from(descriptor, address, bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64)
}

/// The same with bytes that are mapped: `bytes` of them from an offset on.
///
/// # Errors
/// The kernel's; `EINVAL` for bytes behind the end of the mapping.
pub(crate) fn copy_mapped(
    descriptor: &OwnedFd,
    address: u64,
    view: &View,
    offset: u64,
    bytes: u64,
) -> Result<Filled, Errno> {
    copy_from(descriptor, address, view.address(offset, bytes).ok_or(Errno::INVAL)?, bytes)
}

/// Fills with `len` bytes from an address of this process; the kernel answers `EFAULT` where nothing is mapped.
fn copy_from(descriptor: &OwnedFd, dst: u64, src: u64, len: u64) -> Result<Filled, Errno> {
    let mut request = Copy { dst, src, len, mode: 0, copy: 0 };
    // SAFETY: the opcode is UFFDIO_COPY, whose argument is this struct.
    let call = unsafe { Updater::<COPY, Copy>::new(&mut request) };
    // SAFETY: the kernel reads from this process's memory, and writes to memory of the process that made the descriptor.
    let result = unsafe { ioctl(descriptor, call) };
    filled(result, request.copy)
}

/// A descriptor that this process was started with, by its number; it is closed when the value is dropped. `None` if there is none of that number.
///
/// To be called before anything else has opened or taken one: a number that was given to somebody since would get a second owner.
pub(crate) fn inherited(number: i32) -> Option<OwnedFd> {
    // Standard input, output and error have an owner.
    let is_open = number > 2 && std::path::Path::new(&format!("/proc/self/fd/{number}")).exists();
    // SAFETY: it is open, and the caller has opened nothing yet, so it came with the program, and nobody owns it.
    is_open.then(|| unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) })
}

/// Makes pages zero where there is nothing yet, and wakes who waits there.
///
/// # Errors
/// The kernel's.
pub(crate) fn zero(descriptor: &OwnedFd, start: u64, len: u64) -> Result<Filled, Errno> {
    let mut request = Zeropage { range: Range { start, len }, mode: 0, zeropage: 0 };
    // SAFETY: the opcode is UFFDIO_ZEROPAGE, whose argument is this struct.
    let call = unsafe { Updater::<ZEROPAGE, Zeropage>::new(&mut request) };
    // SAFETY: the kernel writes to memory of the process that made the descriptor.
    let result = unsafe { ioctl(descriptor, call) };
    filled(result, request.zeropage)
}

/// Wakes who waits in a range, to look again.
///
/// # Errors
/// The kernel's.
pub(crate) fn wake(descriptor: &OwnedFd, start: u64, len: u64) -> Result<(), Errno> {
    let mut request = Range { start, len };
    // SAFETY: the opcode is UFFDIO_WAKE, whose argument is this struct; the kernel only reads it.
    let call = unsafe { Updater::<WAKE, Range>::new(&mut request) };
    // SAFETY: no memory is changed.
    unsafe { ioctl(descriptor, call) }
}

/// ioctl_userfaultfd(2): the last field says how many bytes were filled, or why none was.
fn filled(result: Result<(), Errno>, count: i64) -> Result<Filled, Errno> {
    match (result, u64::try_from(count)) {
        (_, Ok(bytes)) if bytes > 0 => Ok(Filled::Bytes(bytes)),
        (Ok(()), _) => Err(Errno::IO),
        (Err(Errno::EXIST), _) => Ok(Filled::Present),
        (Err(Errno::AGAIN), _) => Ok(Filled::Again),
        (Err(error), _) => Err(error),
    }
}
