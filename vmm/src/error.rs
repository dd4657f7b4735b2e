//! Everything that can go wrong in this crate, split by whose fault it is.

use std::{io, path::PathBuf};

/// What this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the VMM. The variant says whose fault it is, the text says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host has no KVM device node.
    #[error(
        "{0} does not exist: this host offers no KVM; load kvm-intel or kvm-amd, or switch virtualisation on in the firmware"
    )]
    NoKvm(PathBuf),
    /// The KVM device node is there, but not for us.
    #[error("no permission to open {0}: run as root, or join the group that owns it (usually `kvm`)")]
    KvmPermission(PathBuf),
    /// The host's kernel is too old, or built without something every VM needs.
    #[error("this host's KVM lacks {0}, which every VM here needs: use a newer kernel")]
    KvmLacks(&'static str),
    /// A system call of the host failed.
    #[error("the host refused to {action}: {source}")]
    Host {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The host does not let this process handle page faults of its guests.
    #[error(
        "this host lets nobody wait for missing memory, which post-copy needs: run the receiver as root, give its user \
         access to /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1 ({0})"
    )]
    NoPageFaults(io::Error),
    /// The VM was started and misses pages that are still at the host it came from.
    #[error(
        "cannot {asked}: {pages} pages of the VM are not here yet; wait until migrate vm status shows none (if its \
         migration was cut off, migrate recover at the host it came from takes it up again)"
    )]
    Incomplete {
        /// What was asked, as an infinitive.
        asked: &'static str,
        /// How many pages.
        pages: u64,
    },
    /// What the operator asked for cannot be.
    #[error("{0}")]
    Config(String),
    /// The kernel image cannot be booted.
    #[error("the kernel image cannot be booted: {0}")]
    Image(#[from] ImageError),
    /// The control socket cannot be created.
    #[error("cannot listen on {path}: {reason}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The VM is not in a state that allows what was asked.
    #[error("cannot {asked}: the VM is {state}")]
    WrongState {
        /// What was asked, as an infinitive.
        asked: &'static str,
        /// The state it is in.
        state: &'static str,
    },
    /// The saved state does not fit this VM or this host.
    #[error("the saved state cannot be loaded: {0}")]
    State(String),
    /// The destination's processor or kernel lacks features the guest was started with.
    #[error(
        "this host cannot run the guest: its CPU or kernel lacks {0}; choose a host that has them, or start the guest with fewer features"
    )]
    MissingFeatures(String),
    /// The guest ended while something was being done with it.
    #[error("the guest ended: {0}")]
    GuestEnded(String),
    /// The other end of the control socket broke the protocol.
    #[error("control protocol: {0}")]
    Protocol(String),
    /// Nothing answers at the control socket.
    #[error("no VM answers at {path}: {reason}")]
    Unreachable {
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Another session holds the VM, or the VMM speaks another version.
    #[error("the VMM refused the connection: {reason}")]
    Busy {
        /// The VMM's own words.
        reason: String,
        /// The process that holds the VM.
        holder_pid: Option<u32>,
    },
    /// The VMM answered a request with an error of its own.
    #[error("the VMM could not {asked}: {text}")]
    Refused {
        /// What was asked, as an infinitive.
        asked: &'static str,
        /// The class of the error.
        code: protocol::monitor::ErrorCode,
        /// The VMM's own words.
        text: String,
    },
    /// Something did not happen in time.
    #[error("waited {waited_ms} ms to {what}, in vain")]
    Timeout {
        /// What should have happened, as an infinitive.
        what: &'static str,
        /// How long.
        waited_ms: u64,
    },
}

impl Error {
    /// Wraps a failed system call; `action` is an infinitive.
    pub(crate) fn host(action: &'static str) -> impl Fn(io::Error) -> Error {
        move |source| Error::Host { action, source }
    }

    /// Wraps a failed KVM ioctl; `action` is an infinitive.
    pub(crate) fn kvm(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
        move |errno| Error::Host { action, source: io::Error::from_raw_os_error(errno.errno()) }
    }

    /// Wraps a failed rustix call; `action` is an infinitive.
    pub(crate) fn os(action: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
        move |errno| Error::Host { action, source: errno.into() }
    }
}

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// The first bytes are neither those of an ELF file nor of a bzImage.
    #[error("it is neither an ELF file nor a bzImage")]
    NotKernel,
    /// A kernel, but one that cannot run here.
    #[error("{0}")]
    Foreign(String),
    /// The file ends before what its headers promise.
    #[error("it is cut short: {0} lies beyond its end")]
    Truncated(&'static str),
    /// A 32-bit or big-endian file.
    #[error("it is not a 64-bit little-endian ELF file")]
    WrongClass,
    /// Made for another processor.
    #[error("it is made for {}, not for x86-64", machine(*.0))]
    WrongMachine(u16),
    /// An object file or a core dump.
    #[error("it is an ELF file of type {0}, not an executable (2 or 3)")]
    NotExecutable(u16),
    /// A header contradicts itself.
    #[error("its headers are inconsistent: {0}")]
    Inconsistent(&'static str),
    /// There is nothing in it to load.
    #[error("it has no loadable segment")]
    NothingToLoad,
    /// A segment does not lie inside guest memory.
    #[error("bytes {start:#x}..{end:#x} do not lie inside guest memory: give the VM more memory")]
    OutsideMemory {
        /// First guest-physical address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A segment would overwrite what the boot protocol puts into low memory.
    #[error("bytes {start:#x}..{end:#x} overlap the boot structures below {limit:#x}")]
    OverlapsBoot {
        /// First guest-physical address.
        start: u64,
        /// One past the last.
        end: u64,
        /// Where the boot structures end.
        limit: u64,
    },
    /// The kernel command line does not fit.
    #[error("the command line has {0} bytes, at most {1} fit")]
    CmdlineTooLong(usize, usize),
    /// The command line has a NUL byte inside.
    #[error("the command line contains a NUL byte")]
    CmdlineNul,
    /// The loader found something the checks above did not.
    #[error("{0}")]
    Loader(String),
    /// The initramfs and the kernel do not fit into memory together.
    #[error(
        "its initramfs has {bytes} bytes, and memory has room for {room} behind it: give the VM more memory"
    )]
    InitramfsTooLarge {
        /// The length of the initramfs.
        bytes: u64,
        /// What is left behind the kernel.
        room: u64,
    },
    /// The initramfs file has no bytes.
    #[error("its initramfs is empty")]
    InitramfsEmpty,
    /// A flat image starts with nothing but registers.
    #[error("a flat image takes no initramfs")]
    FlatWithInitramfs,
    /// The file could not be read.
    #[error("{0}")]
    Unreadable(String),
}

/// A processor by its number in ELF files (elf.h, EM_*).
fn machine(number: u16) -> String {
    let name = match number {
        3 => "32-bit x86",
        20 | 21 => "PowerPC",
        22 => "s390",
        40 => "32-bit ARM",
        183 => "AArch64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => return format!("machine {number}"),
    };
    name.to_owned()
}
