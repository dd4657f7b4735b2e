//! What this host's KVM offers, asked once.

use std::{ffi::CString, os::unix::ffi::OsStrExt, path::Path};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NESTED_STATE, KVM_CAP_XSAVE2,
    KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};

use crate::{
    cpuid::{self, Leaf},
    dirty::LogMode,
    error::{Error, Result},
    faults,
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

/// What this host's KVM offers to VMs, beyond what all of them need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offers {
    /// The version of KVM's interface.
    pub api_version: u32,
    /// The most vCPUs of one VM.
    pub max_vcpus: u32,
    /// How the log of dirty pages is kept.
    pub dirty_log: LogMode,
    /// Whether a guest's TSC can run at another rate than the host's.
    pub tsc_scaling: bool,
    /// Whether the in-kernel APIC has the TSC deadline timer.
    pub tsc_deadline: bool,
    /// Whether KVM says of which moment a guest's clock is.
    pub clock_realtime: bool,
    /// Whether guests can have guests of their own.
    pub nesting: bool,
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

    /// What it offers. A VM is made to ask, and goes at once: where something else holds the processor's virtualisation,
    /// KVM answers questions and makes no VM.
    ///
    /// # Errors
    /// [`Error::Host`] when it makes none.
    pub fn offers(&self) -> Result<Offers> {
        let vm = self.kvm.create_vm().map_err(Error::kvm("make a VM"))?;
        let log = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        Ok(Offers {
            api_version: u32::try_from(self.kvm.get_api_version()).unwrap_or(0),
            max_vcpus: self.max_vcpus,
            dirty_log: LogMode::best_of(u32::try_from(log).unwrap_or(0)),
            tsc_scaling: self.tsc_scaling,
            tsc_deadline: self.tsc_deadline,
            clock_realtime: self.clock_realtime,
            nesting: self.offers_nesting(),
        })
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

/// Tries what a post-copy needs, on a few MiB of memory as guests have it: that whoever touches a missing page can be made to
/// wait, and that single pages can be taken away, also of huge ones.
///
/// # Errors
/// [`Error::NoPageFaults`] that says what to do, or [`Error::Host`].
pub fn try_page_faults() -> Result<()> {
    faults::try_out()
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

    #[test]
    fn what_kvm_offers_is_told_where_there_is_kvm() {
        let Some(host) = crate::vm_tests::host() else { return };
        let offers = host.offers().unwrap();
        assert_eq!(offers.api_version, KVM_API_VERSION);
        assert!(offers.max_vcpus > 0, "{offers:?}");
    }
}
