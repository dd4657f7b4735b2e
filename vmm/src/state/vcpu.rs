//! One vCPU's state. See the ordering requirements of [`super`].

use std::sync::Arc;

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

/// What stands in front of any nested state (`struct kvm_nested_state` of asm/kvm.h).
const NESTED_HEADER_BYTES: usize = 128;

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
    /// State of a guest hypervisor, where the host has it and the guest may have guests.
    pub nested: Option<Box<KvmNestedStateBuffer>>,
    /// How far its TSC is ahead of this host's, where KVM says so: of no use elsewhere, so not of the format.
    #[serde(skip)]
    pub tsc_offset: Option<u64>,
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

/// One moment by two clocks of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// Nanoseconds since 1970.
    pub(crate) unix_ns: u64,
    pub(crate) host_tsc: u64,
}

/// Since when real time passed that the guest was not there for, and how fast its TSC runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Catchup {
    pub(crate) saved_at_unix_ns: u64,
    pub(crate) tsc_khz: u32,
    /// A moment of this host behind the save, if KVM knows one and the guest's TSC runs at the host's rate.
    pub(crate) moment: Option<Moment>,
}

impl Catchup {
    /// How far the TSC went from the save until then; nothing if this host's clock is behind the source's, so that it never runs back.
    fn tsc_ticks(&self, until_unix_ns: u64) -> u64 {
        let elapsed_ns = until_unix_ns.saturating_sub(self.saved_at_unix_ns);
        let ticks = u128::from(elapsed_ns) * u128::from(self.tsc_khz) / 1_000_000;
        u64::try_from(ticks).unwrap_or(0)
    }

    /// How far ahead of this host's TSC that of a vCPU must be that had this value at the save.
    fn tsc_offset(&self, saved: u64) -> Option<u64> {
        let moment = self.moment?;
        Some(saved.wrapping_add(self.tsc_ticks(moment.unix_ns)).wrapping_sub(moment.host_tsc))
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
            tsc_offset: sys::tsc_offset(vcpu).ok(),
        })
    }

    /// Gives the TSC the value it had when the host's had this one. Each vCPU reads its own a little later than the last, and all are
    /// to be those of the moment that the state is of.
    pub(crate) fn set_tsc_of(&mut self, host_tsc: u64) {
        if let Some(offset) = self.tsc_offset {
            let tscs = self.msrs.iter_mut().filter(|(index, _)| *index == msrs::TSC);
            tscs.for_each(|(_, value)| *value = host_tsc.wrapping_add(offset));
        }
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
        let lengths = NESTED_HEADER_BYTES..=size_of::<KvmNestedStateBuffer>();
        if let Some(nested) = self.nested.as_ref().filter(|nested| !lengths.contains(&(nested.size as usize)))
        {
            return Err(Error::State(format!(
                "a vCPU's nested state has {} bytes, and not {NESTED_HEADER_BYTES} to {}",
                nested.size,
                lengths.end()
            )));
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
        msrs::write(vcpu, &self.advanced_msrs(vcpu, catchup))?;
        if let Some(nested) = &self.nested {
            vcpu.set_nested_state(nested).map_err(Error::kvm("take a vCPU's nested state"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(Error::kvm("take a vCPU's run state"))?;
        vcpu.set_vcpu_events(&self.events).map_err(Error::kvm("take a vCPU's pending events"))
    }
}

impl VcpuState {
    /// The registers to write. By its offset the TSC is exact, whatever time the writing takes; without one KVM takes values that are
    /// written within a second of each other for those of one clock.
    fn advanced_msrs(&self, vcpu: &VcpuFd, catchup: Catchup) -> Vec<(u32, u64)> {
        let mut values = self.msrs.clone();
        values.retain_mut(|(index, value)| {
            if *index != msrs::TSC {
                return true;
            }
            let set = catchup.tsc_offset(*value).map(|offset| sys::set_tsc_offset(vcpu, offset));
            *value = value.wrapping_add(catchup.tsc_ticks(super::vm::unix_ns()));
            !matches!(set, Some(Ok(())))
        });
        values
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
        let moment = Some(Moment { unix_ns: 8_000_000, host_tsc: 1_000 });
        let catchup = Catchup { saved_at_unix_ns: 5_000_000, tsc_khz: 2_000_000, moment };
        assert_eq!(catchup.tsc_ticks(8_000_000), 6_000_000);
        // The source's clock is ahead: it stands still, and does not run back.
        assert_eq!(catchup.tsc_ticks(4_999_999), 0);
        assert_eq!(catchup.tsc_offset(700), Some(5_999_700));
        assert_eq!(catchup.tsc_offset(0), Some(5_999_000));
        let behind = Catchup { saved_at_unix_ns: 9_000_000, ..catchup };
        assert_eq!(behind.tsc_offset(700).map(|offset| offset.wrapping_add(1_000)), Some(700));
        assert_eq!(Catchup { moment: None, ..catchup }.tsc_offset(700), None);
        let endless = Catchup { saved_at_unix_ns: 0, tsc_khz: u32::MAX, moment: None };
        assert_eq!(endless.tsc_ticks(u64::MAX), 0);
    }

    #[test]
    fn all_tscs_are_those_of_one_moment() {
        let mut saved = VcpuState { tsc_offset: Some(5_u64.wrapping_neg()), ..state(1024) };
        saved.set_tsc_of(100);
        assert_eq!(saved.msrs[0], (msrs::TSC, 95));
        let mut unknown = state(1024);
        unknown.set_tsc_of(100);
        assert_eq!(unknown.msrs[0], (msrs::TSC, 1));
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
            tsc_offset: None,
        }
    }

    /// The bytes of version 1: the kernel's structure as it is, behind its length.
    #[test]
    fn nested_state_has_its_bytes_and_its_bounds() {
        // As kvm-amd says it of a guest that runs one of its own: flags, KVM_STATE_NESTED_FORMAT_SVM, size, and where its VMCB is.
        let mut nested = Box::<KvmNestedStateBuffer>::default();
        (nested.flags, nested.format, nested.size) = (1, 1, 4224);
        nested.hdr.svm.vmcb_pa = 0x1234_5000;
        let bytes = crate::state::encode(&nested).unwrap();
        let prefix = bytes.len() - size_of::<KvmNestedStateBuffer>();
        assert_eq!(bytes[prefix..][..16], [1, 0, 1, 0, 0x80, 0x10, 0, 0, 0, 0x50, 0x34, 0x12, 0, 0, 0, 0]);
        let saved = VcpuState { nested: Some(nested), ..state(1024) };
        let again: VcpuState = postcard::from_bytes(&crate::state::encode(&saved).unwrap()).unwrap();
        assert_eq!(
            crate::state::encode(&again.nested).unwrap(),
            crate::state::encode(&saved.nested).unwrap()
        );
        let context = VcpuContext { msrs: Arc::from([]), xsave_words: 1024, nested: true };
        again.check(&context).unwrap();
        let refused = again.check(&VcpuContext { nested: false, ..context.clone() }).unwrap_err();
        assert!(matches!(refused, Error::MissingFeatures(_)), "{refused}");
        for size in [0, 127, size_of::<KvmNestedStateBuffer>() as u32 + 1, u32::MAX] {
            let mut bad = again.clone();
            bad.nested.as_mut().unwrap().size = size;
            assert!(bad.check(&context).unwrap_err().to_string().contains("nested state has"));
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
