//! What this host's KVM offers, asked once.

use std::{ffi::CString, os::unix::ffi::OsStrExt, path::Path};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_NESTED_STATE, KVM_CAP_XSAVE2, KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};

use crate::{
    cpuid::{self, Leaf},
    error::{Error, Result},
    sys::XSAVE_BASE_WORDS,
};

/// The device node of KVM.
pub const KVM_PATH: &str = "/dev/kvm";

/// KVM of this host.
pub struct Host {
    pub(crate) kvm: Kvm,
    /// What KVM can offer to guests.
    pub(crate) cpuid: CpuId,
    /// Every MSR that KVM says belongs to a guest's state.
    pub(crate) msrs: Vec<u32>,
    /// The most vCPUs of one VM.
    pub(crate) max_vcpus: u32,
    /// Size of the XSAVE area in 32-bit words.
    pub(crate) xsave_words: usize,
    /// Whether a guest's TSC can run at another rate than the host's.
    pub(crate) tsc_scaling: bool,
    /// Whether the in-kernel APIC has the TSC deadline timer.
    pub(crate) tsc_deadline: bool,
    /// Whether KVM_SET_CLOCK catches up with the real-time clock itself.
    pub(crate) clock_realtime: bool,
    /// Whether vCPUs have nested state, and how many bytes of it at most.
    pub(crate) nested_bytes: usize,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("max_vcpus", &self.max_vcpus).finish_non_exhaustive()
    }
}

impl Host {
    /// Opens KVM and asks it.
    ///
    /// # Errors
    /// [`Error::NoKvm`], [`Error::KvmPermission`], [`Error::KvmLacks`] or [`Error::Host`].
    pub fn open() -> Result<Self> {
        Self::open_at(Path::new(KVM_PATH))
    }

    /// Whether guests can have guests of their own here.
    pub fn offers_nesting(&self) -> bool {
        let leaves: Vec<Leaf> = self.cpuid.as_slice().iter().map(Leaf::from).collect();
        self.nested_bytes > 0 && cpuid::has_nesting(&leaves)
    }

    /// The same for a device node elsewhere.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub fn open_at(path: &Path) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::NoKvm(path.to_owned()))?;
        let kvm = Kvm::new_with_path(name).map_err(|errno| {
            let error = std::io::Error::from_raw_os_error(errno.errno());
            match error.kind() {
                std::io::ErrorKind::NotFound => Error::NoKvm(path.to_owned()),
                std::io::ErrorKind::PermissionDenied => Error::KvmPermission(path.to_owned()),
                _ => Error::Host { action: "open KVM", source: error },
            }
        })?;
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(Error::KvmLacks("API version 12"));
        }
        for (capability, name) in [
            (Cap::UserMemory, "user memory slots"),
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Pit2, "an in-kernel PIT"),
            (Cap::ExtCpuid, "KVM_SET_CPUID2"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::MpState, "KVM_GET_MP_STATE"),
            (Cap::VcpuEvents, "KVM_GET_VCPU_EVENTS"),
            (Cap::Debugregs, "KVM_GET_DEBUGREGS"),
            (Cap::Xsave, "KVM_GET_XSAVE"),
            (Cap::Xcrs, "KVM_GET_XCRS"),
            (Cap::AdjustClock, "KVM_GET_CLOCK"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(Error::KvmLacks(name));
            }
        }
        let raw = |capability: u32| usize::try_from(kvm.check_extension_raw(capability.into())).unwrap_or(0);
        let clock_flags = u32::try_from(kvm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        Ok(Self {
            cpuid: kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(Error::kvm("say which CPU features it supports"))?,
            msrs: kvm
                .get_msr_index_list()
                .map_err(Error::kvm("list its model-specific registers"))?
                .as_slice()
                .to_vec(),
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            xsave_words: raw(KVM_CAP_XSAVE2).div_ceil(4).max(XSAVE_BASE_WORDS),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            clock_realtime: clock_flags & KVM_CLOCK_REALTIME != 0,
            nested_bytes: raw(KVM_CAP_NESTED_STATE),
            kvm,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kvm_the_error_says_what_to_do() {
        let error = Host::open_at(Path::new("/nowhere/kvm")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/kvm does not exist"), "{error}");
        assert!(error.contains("load kvm-intel or kvm-amd"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }

    #[test]
    fn a_file_that_is_not_kvm_is_refused() {
        let error = Host::open_at(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, Error::KvmLacks(_) | Error::Host { .. }), "{error}");
    }
}
