//! The system calls that no crate wraps safely for us. All of this crate's `unsafe` is here and in
//! [`crate::vcpu::kick`](crate::vcpu).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_bindings::{KVMIO, Xsave, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_bindings::{kvm_dirty_log, kvm_dirty_log__bindgen_ty_1};
use kvm_bindings::{kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::UserfaultfdFlags;
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress, bitmap::Bitmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::{devices::virtio::Slice, error::Error, memory::Region};

// KVM_CLEAR_DIRTY_LOG of include/uapi/linux/kvm.h; kvm-ioctls 0.25 does not have it.
ioctl_iowr_nr!(kvm_clear_dirty_log_nr, KVMIO, 0xc0, kvm_clear_dirty_log);
// KVM_GET_DIRTY_LOG of the same header.
ioctl_iow_nr!(kvm_get_dirty_log_nr, KVMIO, 0x42, kvm_dirty_log);

/// Makes a mapped region the guest's memory slot, or changes its flags (KVM_SET_USER_MEMORY_REGION).
///
/// The caller keeps `region` mapped for as long as a vCPU of `vm` may run; [`crate::vm::Vm`] does so by
/// owning the memory and joining its vCPU threads before it lets go of it.
pub(crate) fn set_memory_slot(vm: &VmFd, slot: u32, region: &Region, flags: u32) -> io::Result<()> {
    let userspace_addr =
        region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?.addr() as u64;
    let description = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr,
    };
    // SAFETY: address and length are those of one live mapping, which outlives the VM (see above) and
    // which Rust code touches through volatile accesses only.
    unsafe { vm.set_user_memory_region(description) }
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
}

/// Reads a slot's dirty log into `bits`, one bit a page (KVM_GET_DIRTY_LOG). As kvm-ioctls does it, but into memory that the
/// caller has already.
///
/// `region` is what was made this slot with [`set_memory_slot`].
pub(crate) fn get_dirty_log(vm: &VmFd, slot: u32, region: &Region, bits: &mut [u64]) -> io::Result<()> {
    let words = region.len().div_ceil(crate::addresses::PAGE_SIZE).div_ceil(64);
    if (bits.len() as u64) < words {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let request = kvm_dirty_log {
        slot,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
        ..Default::default()
    };
    // SAFETY: the kernel writes whole words, one bit for each page of the slot (kvm api.rst); the slot is as long as its
    // region, `bits` was checked to have that many, and is borrowed for the call.
    let answer = unsafe { ioctl_with_ref(vm, kvm_get_dirty_log_nr(), &request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Clears bits of a slot's dirty log and write-protects these pages again (KVM_CLEAR_DIRTY_LOG).
///
/// `first_page` is a multiple of 64; `pages` is one too, except at the slot's end. Bit n of `bits`
/// stands for page `first_page + n`.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bits: &[u64],
) -> io::Result<()> {
    if bits.len() < (pages as usize).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr().cast_mut().cast() },
    };
    // SAFETY: the kernel reads the request and one bit a page of `bits`, whose length was checked; it
    // writes to neither.
    let answer = unsafe { ioctl_with_ref(vm, kvm_clear_dirty_log_nr(), &request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks for transparent huge pages under a region (madvise(2), MADV_HUGEPAGE). A wish: hosts may refuse.
pub(crate) fn ask_huge_pages(region: &Region) -> io::Result<()> {
    let start = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
    let length = usize::try_from(region.len()).map_err(io::Error::other)?;
    // SAFETY: the range is exactly one live mapping, and this advice changes no contents.
    unsafe { rustix::mm::madvise(start.cast(), length, rustix::mm::Advice::LinuxHugepage) }?;
    Ok(())
}

/// Reads the FPU and vector state. `words` is the size of the area in 32-bit words, from
/// KVM_CAP_XSAVE2; without that capability it is 1024.
pub(crate) fn get_xsave(vcpu: &VcpuFd, words: usize) -> io::Result<Vec<u32>> {
    let mut area = Xsave::new(words.saturating_sub(XSAVE_BASE_WORDS)).map_err(io::Error::other)?;
    // SAFETY: the area is as large as KVM_CAP_XSAVE2 says, and the guest cannot enlarge it: we never
    // ask arch_prctl for permissions beyond what the capability already counts.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    Ok(words)
}

/// Writes the FPU and vector state; `state` must have exactly the size this host uses.
pub(crate) fn set_xsave(vcpu: &VcpuFd, state: &[u32], words: usize) -> io::Result<()> {
    if state.len() != words || words < XSAVE_BASE_WORDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (base, extra) = state.split_at(XSAVE_BASE_WORDS);
    let mut area = Xsave::from_entries(extra).map_err(io::Error::other)?;
    let mut xsave = kvm_xsave::default();
    xsave.region.copy_from_slice(base);
    // SAFETY: only the fixed part in front of the flexible array is replaced, not its length.
    let header = unsafe { area.as_mut_fam_struct() };
    header.xsave.region = xsave.region;
    // SAFETY: the area is as large as KVM_CAP_XSAVE2 says, so the kernel reads inside it.
    unsafe { vcpu.set_xsave2(&area) }.map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
}

// KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR of include/uapi/linux/kvm.h; kvm-ioctls has them for a vCPU on Arm alone.
ioctl_iow_nr!(kvm_set_device_attr_nr, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(kvm_get_device_attr_nr, KVMIO, 0xe2, kvm_device_attr);

/// `place` is the exposed address of the eight bytes: the kernel reads or writes them, and the compiler must not think that nobody does.
fn tsc_offset_at(place: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: place,
        ..Default::default()
    }
}

/// How far a vCPU's TSC is ahead of the host's (KVM_VCPU_TSC_OFFSET, Linux 5.16).
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let request = tsc_offset_at((&raw mut offset).expose_provenance() as u64);
    // SAFETY: the kernel reads the request and writes the eight bytes of `offset`, which is alive.
    let answer = unsafe { ioctl_with_ref(vcpu, kvm_get_device_attr_nr(), &request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(offset) }
}

/// Sets what [`tsc_offset`] reads.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let request = tsc_offset_at((&raw const offset).expose_provenance() as u64);
    // SAFETY: the kernel reads the request and the eight bytes of `offset`, which is alive.
    let answer = unsafe { ioctl_with_ref(vcpu, kvm_set_device_attr_nr(), &request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// 32-bit words in the fixed part of `kvm_xsave` (asm/kvm.h).
pub(crate) const XSAVE_BASE_WORDS: usize = 1024;

/// `struct uffdio_api` of include/uapi/linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

ioctl_iowr_nr!(uffdio_api_nr, UFFDIO, 0x3f, UffdioApi);
ioctl_iowr_nr!(uffdio_register_nr, UFFDIO, 0x00, UffdioRegister);
ioctl_ior_nr!(uffdio_unregister_nr, UFFDIO, 0x01, UffdioRange);
ioctl_ior_nr!(uffdio_wake_nr, UFFDIO, 0x02, UffdioRange);
// USERFAULTFD_IOC_NEW of the same header, for /dev/userfaultfd.
ioctl_io_nr!(userfaultfd_ioc_new_nr, UFFDIO, 0x00);

/// A userfaultfd(2) that may handle faults of the kernel too: KVM's, on a guest's behalf, are such. It is not blocking.
///
/// # Errors
/// [`Error::NoPageFaults`] that says which permission is missing.
pub(crate) fn userfaultfd() -> Result<OwnedFd, Error> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: what the descriptor can do to memory it does only to ranges that are registered with it, and those are
    // guest memory alone (below), which Rust code touches through volatile accesses only.
    let made = unsafe { rustix::mm::userfaultfd(flags) };
    let descriptor = match made {
        Ok(descriptor) => descriptor,
        // Without privileges the device may still be allowed, by its mode (userfaultfd(2)).
        Err(errno) => from_device(flags).map_err(|_| Error::NoPageFaults(errno.into()))?,
    };
    let mut api = UffdioApi { api: UFFD_API, features: UFFD_FEATURE_MISSING_SHMEM, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_api`, which is alive.
    let answer = unsafe { ioctl_with_mut_ref(&descriptor, uffdio_api_nr(), &mut api) };
    if answer < 0 { Err(Error::NoPageFaults(io::Error::last_os_error())) } else { Ok(descriptor) }
}

fn from_device(flags: UserfaultfdFlags) -> io::Result<OwnedFd> {
    let device = std::fs::File::open("/dev/userfaultfd")?;
    // SAFETY: the argument is a number, and the kernel touches no memory of ours.
    let answer = unsafe { ioctl_with_val(&device, userfaultfd_ioc_new_nr(), flags.bits().into()) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// Where a region is mapped in this process.
pub(crate) fn address_of(region: &Region) -> io::Result<u64> {
    Ok(region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?.addr() as u64)
}

fn range_of(region: &Region) -> io::Result<UffdioRange> {
    Ok(UffdioRange { start: address_of(region)?, len: region.len() })
}

/// Lets whoever touches a hole of a mapped region wait (UFFDIO_REGISTER, for missing pages).
pub(crate) fn register_missing(descriptor: &OwnedFd, region: &Region) -> io::Result<()> {
    let range = range_of(region)?;
    let mut request = UffdioRegister { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_register`, which is alive; the range is exactly one live mapping
    // of guest memory, whose accesses may take as long as they like.
    let answer = unsafe { ioctl_with_mut_ref(descriptor, uffdio_register_nr(), &mut request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Undoes [`register_missing`]; whoever waits goes on (UFFDIO_UNREGISTER).
pub(crate) fn unregister(descriptor: &OwnedFd, region: &Region) -> io::Result<()> {
    let range = range_of(region)?;
    // SAFETY: the kernel reads one `uffdio_range`, which is alive, and changes no contents of memory.
    let answer = unsafe { ioctl_with_ref(descriptor, uffdio_unregister_nr(), &range) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets whoever waits in a region try again (UFFDIO_WAKE).
pub(crate) fn wake(descriptor: &OwnedFd, region: &Region) -> io::Result<()> {
    let range = range_of(region)?;
    // SAFETY: the kernel reads one `uffdio_range`, which is alive, and changes no contents of memory.
    let answer = unsafe { ioctl_with_ref(descriptor, uffdio_wake_nr(), &range) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An event's descriptor.
pub(crate) fn descriptor_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor, and lives as long as what is returned.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// What a whole file is locked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileLock {
    /// Nothing: the lock goes.
    None,
    /// Against those who want it exclusively.
    Shared,
    /// Against everybody.
    Exclusive,
}

impl FileLock {
    fn request(self) -> io::Result<libc::flock> {
        let kind = match self {
            FileLock::None => libc::F_UNLCK,
            FileLock::Shared => libc::F_RDLCK,
            FileLock::Exclusive => libc::F_WRLCK,
        };
        let no_lock = |_| io::Error::from(io::ErrorKind::InvalidInput);
        Ok(libc::flock {
            l_type: kind.try_into().map_err(no_lock)?,
            l_whence: libc::SEEK_SET.try_into().map_err(no_lock)?,
            // From the beginning to the end, wherever that will be.
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        })
    }
}

/// Whether somebody else has locked an open file exclusively (fcntl(2), F_OFD_GETLK).
pub(crate) fn is_locked(file: &std::fs::File) -> io::Result<bool> {
    // A shared lock is in the way of an exclusive one alone.
    let mut request = FileLock::Shared.request()?;
    // SAFETY: the kernel reads and writes one `flock`, which is alive, and touches no other memory of ours.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    if answer == 0 { Ok(i32::from(request.l_type) != libc::F_UNLCK) } else { Err(io::Error::last_os_error()) }
}

/// Changes the lock of an open file (fcntl(2), F_OFD_SETLK). `false`: somebody else holds one that is in the way.
pub(crate) fn lock_file(file: &std::fs::File, kind: FileLock) -> io::Result<bool> {
    let request = kind.request()?;
    // SAFETY: the kernel reads one `flock`, which is alive, and touches no other memory of ours.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if answer == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// The most pieces of one call (IOV_MAX of limits.h).
const MAX_PIECES: usize = 1024;

/// Fills guest memory from a file, from byte `at` on, and marks it dirty.
pub(crate) fn read_exactly(file: &std::fs::File, at: u64, slices: &[Slice<'_>]) -> io::Result<()> {
    transfer(
        at,
        slices,
        |pieces, offset| {
            // SAFETY: each piece is a live mapping of guest memory of its length, which Rust code touches through volatile
            // accesses only.
            unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), pieces_of(pieces), offset) }
        },
        |slice, bytes| slice.bitmap().mark_dirty(0, bytes),
    )
}

/// Writes guest memory to a file, from byte `at` on.
pub(crate) fn write_exactly(file: &std::fs::File, at: u64, slices: &[Slice<'_>]) -> io::Result<()> {
    transfer(
        at,
        slices,
        |pieces, offset| {
            // SAFETY: as above; the kernel only reads the pieces.
            unsafe { libc::pwritev(file.as_raw_fd(), pieces.as_ptr(), pieces_of(pieces), offset) }
        },
        |_, _| {},
    )
}

fn pieces_of(pieces: &[libc::iovec]) -> libc::c_int {
    pieces.len().try_into().unwrap_or(0)
}

/// Moves all bytes of the slices, however many calls that takes; `moved` is told what was of each slice.
fn transfer(
    mut at: u64,
    slices: &[Slice<'_>],
    call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
    moved: impl Fn(&Slice<'_>, usize),
) -> io::Result<()> {
    let mut waiting: VecDeque<Slice<'_>> = slices.iter().filter(|slice| !slice.is_empty()).cloned().collect();
    while !waiting.is_empty() {
        let pieces: Vec<libc::iovec> = waiting
            .iter()
            .take(MAX_PIECES)
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let offset = at.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut bytes = match usize::try_from(call(&pieces, offset)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => bytes,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        at += bytes as u64;
        while bytes > 0
            && let Some(slice) = waiting.pop_front()
        {
            let done = bytes.min(slice.len());
            moved(&slice, done);
            bytes -= done;
            if done < slice.len() {
                waiting.push_front(slice.offset(done).map_err(io::Error::other)?);
            }
        }
    }
    Ok(())
}

/// `struct ifreq` of linux/if.h, as TUNSETIFF reads it: a name and flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    _rest: [u8; 22],
}

// linux/if_tun.h.
const TUN: u32 = b'T' as u32;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
ioctl_iow_nr!(tunsetiff_nr, TUN, 202, libc::c_int);
ioctl_iow_nr!(tunsetoffload_nr, TUN, 208, libc::c_uint);
ioctl_iow_nr!(tunsetvnethdrsz_nr, TUN, 216, libc::c_int);

/// Attaches an open /dev/net/tun to a tap (TUNSETIFF), whose frames have a virtio header of that many bytes.
pub(crate) fn attach_tap(file: &std::fs::File, name: &str, header_bytes: usize) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut request =
        InterfaceRequest { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, _rest: [0; 22] };
    // The last byte stays a NUL.
    if name.len() >= request.name.len() {
        return Err(invalid());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads and writes one `ifreq`, which is alive and of its size.
    let answer = unsafe { ioctl_with_mut_ref(file, tunsetiff_nr(), &mut request) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let header = libc::c_int::try_from(header_bytes).map_err(|_| invalid())?;
    // SAFETY: the kernel reads one int, which is alive.
    let answer = unsafe { ioctl_with_ref(file, tunsetvnethdrsz_nr(), &header) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a tap may leave to its reader (TUNSETOFFLOAD).
pub(crate) fn set_tap_offloads(file: &std::fs::File, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is a number, and the kernel touches no memory of ours.
    let answer = unsafe { ioctl_with_val(file, tunsetoffload_nr(), offloads.into()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
