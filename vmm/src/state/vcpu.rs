//! One vCPU's state. See the ordering requirements of [`super`].

use std::{sync::Arc, time::Duration};

use kvm_bindings::{
    KVM_MAX_XCRS, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, nested::KvmNestedStateBuffer,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::msrs;
use crate::{
    error::{Error, Result},
    sys,
};

/// The most MSRs a state may carry; KVM lists a few hundred at most.
const MAX_MSRS: usize = 4096;

/// Everything KVM knows of a vCPU that its guest can notice.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// Whether it runs, halts, or waits to be started.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// FPU and vector registers, in the standard XSAVE format.
    pub xsave: Vec<u32>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// The local APIC's registers.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers, index and value, in the order in which they are written back.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions and interrupts on their way.
    pub events: kvm_vcpu_events,
    /// State of a guest hypervisor, where the host has it.
    pub nested: Option<Box<KvmNestedStateBuffer>>,
}

/// What saving and loading must know of the host.
#[derive(Debug, Clone)]
pub(crate) struct VcpuContext {
    /// Registers to save, in the order of [`msrs::write_order`].
    pub(crate) msrs: Arc<[u32]>,
    /// Size of the XSAVE area here.
    pub(crate) xsave_words: usize,
    /// Whether vCPUs have nested state.
    pub(crate) nested: bool,
}

/// How much real time passed between save and load, and how fast the guest's TSC runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Catchup {
    pub(crate) elapsed: Duration,
    pub(crate) tsc_khz: u32,
}

impl Catchup {
    /// How far the TSC went meanwhile.
    pub(crate) fn tsc_ticks(&self) -> u64 {
        let ticks = self.elapsed.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        u64::try_from(ticks).unwrap_or(0)
    }
}

/// Paging is on (CR0), with the wider entries (CR4), and a 64-bit kernel (EFER). Intel SDM volume 3, 2.5 and 2.2.1.
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;

fn is_pae(&kvm_sregs { cr0, cr4, efer, .. }: &kvm_sregs) -> bool {
    cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0
}

impl VcpuState {
    /// Whether loading it reads guest memory: in 32-bit PAE mode KVM takes the four page-directory pointers from there.
    pub(crate) fn reads_memory(&self) -> bool {
        is_pae(&self.sregs)
    }

    /// Saves a paused vCPU.
    ///
    /// # Errors
    /// [`Error::Host`] when KVM refuses.
    pub(crate) fn save(vcpu: &VcpuFd, context: &VcpuContext) -> Result<Self> {
        let mp_state = vcpu.get_mp_state().map_err(Error::kvm("read a vCPU's run state"))?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(Error::kvm("read a vCPU's registers"))?,
            sregs: vcpu.get_sregs().map_err(Error::kvm("read a vCPU's segment registers"))?,
            xsave: sys::get_xsave(vcpu, context.xsave_words)
                .map_err(Error::host("read a vCPU's vector registers"))?,
            xcrs: vcpu.get_xcrs().map_err(Error::kvm("read a vCPU's XCRs"))?,
            debug_regs: vcpu.get_debug_regs().map_err(Error::kvm("read a vCPU's debug registers"))?,
            lapic: vcpu.get_lapic().map_err(Error::kvm("read a vCPU's APIC"))?,
            msrs: msrs::read(vcpu, &context.msrs)?,
            nested: save_nested(vcpu, context)?,
            events: vcpu.get_vcpu_events().map_err(Error::kvm("read a vCPU's pending events"))?,
        })
    }

    /// Checks what can be checked without a vCPU. KVM checks the rest itself, field by field.
    ///
    /// # Errors
    /// [`Error::State`].
    pub(crate) fn check(&self, context: &VcpuContext) -> Result<()> {
        if self.msrs.len() > MAX_MSRS {
            return Err(Error::State(format!("a vCPU has {} MSRs", self.msrs.len())));
        }
        if !self.msrs.is_sorted_by_key(|(index, _)| msrs::write_order(*index)) {
            return Err(Error::State("a vCPU's MSRs are not in order".into()));
        }
        // A larger area is fine if its end is unused: the source's host may know more components.
        let (here, beyond) = self.xsave.split_at_checked(context.xsave_words).unwrap_or((&self.xsave, &[]));
        if here.len() < sys::XSAVE_BASE_WORDS || beyond.iter().any(|word| *word != 0) {
            return Err(Error::State(format!(
                "a vCPU has {} bytes of vector registers, this host takes {}",
                self.xsave.len() * 4,
                context.xsave_words * 4
            )));
        }
        if self.xcrs.nr_xcrs > KVM_MAX_XCRS {
            return Err(Error::State(format!("a vCPU has {} XCRs", self.xcrs.nr_xcrs)));
        }
        // KVM goes by the length inside the buffer, so it must be the buffer's own at most.
        if self.nested.as_ref().is_some_and(|nested| nested.size as usize > size_of::<KvmNestedStateBuffer>())
        {
            return Err(Error::State("a vCPU's nested state is longer than any can be".into()));
        }
        if self.nested.is_some() && !context.nested {
            return Err(Error::MissingFeatures("nested virtualisation, which the guest uses".into()));
        }
        Ok(())
    }

    /// Loads this state into a vCPU that never ran, or is paused.
    ///
    /// # Errors
    /// [`Error::State`] when the state makes no sense here, [`Error::Host`] when KVM refuses a part.
    pub(crate) fn load(&self, vcpu: &VcpuFd, context: &VcpuContext, catchup: Catchup) -> Result<()> {
        self.check(context)?;
        vcpu.set_sregs(&self.sregs).map_err(Error::kvm("take a vCPU's segment registers"))?;
        vcpu.set_regs(&self.regs).map_err(Error::kvm("take a vCPU's registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(Error::kvm("take a vCPU's XCRs"))?;
        let mut xsave = self.xsave.clone();
        xsave.resize(context.xsave_words, 0);
        sys::set_xsave(vcpu, &xsave, context.xsave_words)
            .map_err(Error::host("take a vCPU's vector registers"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(Error::kvm("take a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(Error::kvm("take a vCPU's APIC"))?;
        let advanced: Vec<(u32, u64)> = self
            .msrs
            .iter()
            .map(|(index, value)| match *index {
                msrs::TSC => (*index, value.wrapping_add(catchup.tsc_ticks())),
                _ => (*index, *value),
            })
            .collect();
        msrs::write(vcpu, &advanced)?;
        if let Some(nested) = &self.nested {
            vcpu.set_nested_state(nested).map_err(Error::kvm("take a vCPU's nested state"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(Error::kvm("take a vCPU's run state"))?;
        vcpu.set_vcpu_events(&self.events).map_err(Error::kvm("take a vCPU's pending events"))
    }
}

fn save_nested(vcpu: &VcpuFd, context: &VcpuContext) -> Result<Option<Box<KvmNestedStateBuffer>>> {
    if !context.nested {
        return Ok(None);
    }
    let mut buffer = Box::<KvmNestedStateBuffer>::default();
    let size = vcpu.nested_state(&mut buffer).map_err(Error::kvm("read a vCPU's nested state"))?;
    Ok(size.map(|_| buffer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_32_bit_pae_paging_is_read_from_memory() {
        let sregs = |cr0, cr4, efer| kvm_sregs { cr0, cr4, efer, ..kvm_sregs::default() };
        assert!(is_pae(&sregs(CR0_PG | 1, CR4_PAE, 0)));
        for other in [sregs(1, CR4_PAE, 0), sregs(CR0_PG, 0, 0), sregs(CR0_PG, CR4_PAE, EFER_LMA | 0x100)] {
            assert!(!is_pae(&other));
        }
    }

    #[test]
    fn the_tsc_advances_with_real_time() {
        let catchup = Catchup { elapsed: Duration::from_millis(3), tsc_khz: 2_000_000 };
        assert_eq!(catchup.tsc_ticks(), 6_000_000);
        let none = Catchup { elapsed: Duration::ZERO, tsc_khz: u32::MAX };
        assert_eq!(none.tsc_ticks(), 0);
    }

    fn state(xsave_words: usize) -> VcpuState {
        VcpuState {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: vec![0; xsave_words],
            xcrs: kvm_xcrs::default(),
            debug_regs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: vec![(msrs::TSC, 1), (0xc000_0080, 2), (msrs::TSC_DEADLINE, 3)],
            events: kvm_vcpu_events::default(),
            nested: None,
        }
    }

    #[test]
    fn a_state_that_does_not_fit_is_refused_before_kvm_sees_it() {
        let context = VcpuContext { msrs: Arc::from([]), xsave_words: 1024, nested: false };
        state(1024).check(&context).unwrap();
        state(1026).check(&context).unwrap();
        assert!(state(1023).check(&context).is_err());
        let mut used = state(1026);
        used.xsave[1025] = 1;
        assert!(used.check(&context).is_err());
        let mut unordered = state(1024);
        unordered.msrs.reverse();
        assert!(unordered.check(&context).is_err());
        let mut xcrs = state(1024);
        xcrs.xcrs.nr_xcrs = 17;
        assert!(xcrs.check(&context).is_err());
    }
}
