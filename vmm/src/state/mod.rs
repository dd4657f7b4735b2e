//! Everything of a VM that is not memory: what is saved, in which order, and how it is checked.
//!
//! # Ordering requirements
//!
//! A state is saved with every vCPU paused (each thread has answered the pause, and re-entered KVM once
//! with `immediate_exit` where a port or MMIO access was pending: KVM keeps half of such an access to
//! itself until then, and the registers are not the truth before).
//!
//! Saving a vCPU:
//! 1. *mp_state* first: KVM_GET_MP_STATE lets pending INIT and SIPI take effect, which changes registers.
//! 2. registers, segment and control registers, XSAVE, XCRs, debug registers, MSRs, LAPIC: any order.
//! 3. *events* after all of these: KVM may turn what it holds back into an injected event.
//!
//! Loading a vCPU:
//! 1. CPUID was set when the vCPU was created: KVM checks CR4, EFER and MSRs against it, sizes XSAVE by it.
//! 2. The *TSC rate* before the TSC, which KVM scales by it.
//! 3. *sregs* before registers and MSRs: they carry EFER, and the APIC base that says whether the LAPIC is on.
//! 4. *XCRs* before XSAVE, which refuses components that XCR0 does not have.
//! 5. *LAPIC* after sregs (the base enables it), before the MSRs: TSC_DEADLINE needs the LAPIC's timer mode.
//! 6. *MSRs*: TSC first, TSC_DEADLINE last, because a deadline is compared with the TSC.
//! 7. *mp_state* after sregs and LAPIC; *events* last of all, because setting registers clears them.
//!
//! *Nested state* lies between: behind sregs, whose EFER and CR4 it needs, registers and MSRs, which KVM moves into the guest's guest where one runs
//! (svm_set_nested_state of arch/x86/kvm/svm/nested.c, vmx_set_nested_state of vmx/nested.c); before mp_state and events, which are then those of that guest.
//!
//! # One moment
//!
//! A state is of the moment of its clock (KVM_GET_CLOCK), where KVM tells the real time and the host's TSC of it: each vCPU's TSC is saved as it was then, by
//! its offset (KVM_VCPU_TSC_OFFSET). A destination adds the real time that passed since to the clock and to the TSC alike, and nothing if its own clock is
//! behind. Where KVM tells neither, the moment is that of the save by this process's clock, some 100 us away.
//!
//! The VM's own parts (PICs, IOAPIC, PIT, clock) are loaded before the vCPUs: an interrupt line that is
//! up reaches a LAPIC only once it is restored, so none is delivered twice.
//!
//! # Sections
//!
//! | name | version | body (postcard) |
//! |---|---|---|
//! | `machine` | 1 | [`Machine`]; also the whole of a machine description |
//! | `vm` | 1 | [`VmState`] |
//! | `vcpu/N` | 1 | [`VcpuState`] |
//! | `device/NAME` | per device | per device |
//!
//! A machine description has the section `machine` alone, or, for a VM with virtio devices, `machine` as version 2 (the same
//! body) and `devices`, the list of [`crate::devices::virtio::Description`]: a VMM that does not know of devices refuses the version.
//!
//! Structures of the kernel's ABI are carried as their bytes (asm/kvm.h, little-endian).

mod machine;
mod msrs;
mod vcpu;
mod vm;

pub use machine::Machine;
pub use vcpu::VcpuState;
pub use vm::VmState;

pub(crate) use machine::check_vcpus;
pub(crate) use msrs::readable as readable_msrs;
pub(crate) use vcpu::{Catchup, VcpuContext};
pub(crate) use vm::moment;

use serde::{Serialize, de::DeserializeOwned};

use crate::error::{Error, Result};

pub(crate) const MACHINE_SECTION: &str = "machine";
pub(crate) const VM_SECTION: &str = "vm";
pub(crate) const VERSION: u16 = 1;

/// The name of a vCPU's section.
pub(crate) fn vcpu_section(index: u32) -> String {
    format!("vcpu/{index}")
}

/// The vCPUs of a VM's state, in their order: for whoever looks at it without running it.
///
/// # Errors
/// `State` when there are none, or a section of one is not what it should be.
pub fn vcpus(state: &protocol::state::State) -> Result<Vec<VcpuState>> {
    let names = (0..).map(vcpu_section).take_while(|name| state.section(name).is_some());
    let vcpus: Vec<VcpuState> = names.map(|name| decode(state, &name)).collect::<Result<_>>()?;
    if vcpus.is_empty() {
        return Err(Error::State("there is no section of a vCPU".into()));
    }
    Ok(vcpus)
}

/// The name of a device's section.
pub(crate) fn device_section(name: &str) -> String {
    format!("device/{name}")
}

pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(|error| Error::State(error.to_string()))
}

/// Reads the body of a section of ours, all of it.
pub(crate) fn decode<T: DeserializeOwned>(state: &protocol::state::State, name: &str) -> Result<T> {
    let section = state.section(name).ok_or_else(|| Error::State(format!("there is no section {name:?}")))?;
    if section.version != VERSION {
        return Err(Error::State(format!(
            "section {name:?} has version {}, this VMM knows {VERSION}: use a VMM as new as the source's",
            section.version
        )));
    }
    match postcard::take_from_bytes(&section.body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(Error::State(format!("section {name:?} has {} bytes too many", rest.len()))),
        Err(error) => Err(Error::State(format!("section {name:?}: {error}"))),
    }
}
