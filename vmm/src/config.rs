//! What a VM is made of, and how it can end.

use std::path::PathBuf;

use crate::{
    boot::{Bytes, KernelSource},
    cpuid::CpuModel,
    devices::{
        SerialSink,
        virtio::{Allowed, DeviceConfig},
    },
    error::{Error, Result},
};

/// A VM that boots here.
#[derive(Debug)]
pub struct VmConfig {
    /// Its name, see [`check_name`].
    pub name: String,
    /// Memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Which processor its guest is shown.
    pub cpu: CpuModel,
    /// Its guest may run guests of its own.
    pub nested: bool,
    /// What to boot.
    pub kernel: KernelSource,
    /// The kernel's initramfs.
    pub initramfs: Option<Bytes>,
    /// The kernel's command line; ` tsc_khz=N` is added to it for guests other than Linux.
    pub cmdline: String,
    /// Where the serial port's output goes.
    pub serial: SerialSink,
    /// Its disks and other virtio devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceConfig>,
    /// Where to serve the control protocol; nowhere if `None`.
    pub socket_path: Option<PathBuf>,
}

/// A VM that comes from elsewhere: everything else is said over the control socket.
#[derive(Debug)]
pub struct IncomingConfig {
    /// What to call it until it says its name.
    pub name: String,
    /// The most memory it may have, in bytes.
    pub max_memory_bytes: u64,
    /// Where the serial port's output goes.
    pub serial: SerialSink,
    /// What it may have of this host.
    pub allowed: Allowed,
    /// The most that its guest may have been shown of a processor.
    pub cpu: CpuModel,
    /// Where to serve the control protocol.
    pub socket_path: PathBuf,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched off, with this code.
    PoweredOff {
        /// What it wrote to the pad; 0 for an ACPI power-off.
        code: u32,
    },
    /// The guest asked for a reset.
    Reset,
    /// The guest or the host's KVM could not go on.
    Crashed {
        /// On which vCPU.
        vcpu: u32,
        /// Why, in one line.
        reason: String,
    },
    /// Another host has it.
    HandedOver,
    /// A client of the control socket ended it.
    Terminated,
    /// It was to arrive here, and did not.
    Discarded,
}

impl ExitReason {
    /// The largest code of a guest that a process's exit status carries.
    pub const MAX_GUEST_CODE: u8 = 99;
    /// Exit status of [`ExitReason::Reset`].
    pub const RESET: u8 = 120;
    /// Exit status of [`ExitReason::Crashed`].
    pub const CRASHED: u8 = 121;
    /// Exit status of [`ExitReason::Discarded`].
    pub const DISCARDED: u8 = 122;
    /// Exit status when the VM could not be built or run: not an `ExitReason`, but of the same list.
    pub const FAILED: u8 = 123;

    /// The process's exit status: the guest's own code up to 99 (larger ones become 99), 0 when it was
    /// handed over or terminated as asked, else one of the constants.
    pub fn exit_code(&self) -> u8 {
        match self {
            ExitReason::PoweredOff { code } => {
                u8::try_from(*code).unwrap_or(Self::MAX_GUEST_CODE).min(Self::MAX_GUEST_CODE)
            }
            ExitReason::HandedOver | ExitReason::Terminated => 0,
            ExitReason::Reset => Self::RESET,
            ExitReason::Crashed { .. } => Self::CRASHED,
            ExitReason::Discarded => Self::DISCARDED,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::PoweredOff { code } => write!(f, "the guest powered off with code {code}"),
            ExitReason::Reset => f.write_str("the guest asked for a reset"),
            ExitReason::Crashed { vcpu, reason } => write!(f, "the guest crashed on vCPU {vcpu}: {reason}"),
            ExitReason::HandedOver => f.write_str("another host has it"),
            ExitReason::Terminated => f.write_str("it was terminated"),
            ExitReason::Discarded => f.write_str("it did not arrive"),
        }
    }
}

/// Checks a VM's name by the protocol's rule: it is a safe file name, command-line argument and terminal
/// output.
///
/// # Errors
/// [`Error::Config`] that says the rule.
pub fn check_name(name: &str) -> Result<()> {
    protocol::control::check_name(name).map_err(|error| Error::Config(format!("{name:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_file_names() {
        for good in ["a", "web-1", "A_b.c", &"x".repeat(64)] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "-v", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn exit_codes_do_not_collide() {
        assert_eq!(ExitReason::PoweredOff { code: 7 }.exit_code(), 7);
        assert_eq!(ExitReason::PoweredOff { code: 0x1_0000 }.exit_code(), 99);
        assert_eq!(ExitReason::PoweredOff { code: 121 }.exit_code(), 99);
        assert_eq!(ExitReason::HandedOver.exit_code(), 0);
        assert_eq!(ExitReason::Crashed { vcpu: 0, reason: String::new() }.exit_code(), 121);
    }
}
