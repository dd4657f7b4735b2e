//! The processor a guest sees, and whether another host can show it too.
//!
//! ```text
//! what KVM supports ── model (a template takes features away) ── topology ──> description ──> each vCPU's leaves
//!                                                                                 │
//!                                                       check, at a destination <─┘
//! ```

mod features;
mod check;
mod model;
mod template;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

pub use check::{missing_features, vendor};
pub use features::Features;
pub use model::CpuModel;
pub use template::{Template, TemplateFile};

pub(crate) use check::check;

use crate::{
    error::{Error, Result},
    host::Host,
};

/// One CPUID leaf, in our own type: the format of a machine description is ours, not the kernel's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// `eax` that asks for it.
    pub function: u32,
    /// `ecx` that asks for it, where it matters.
    pub index: u32,
    /// KVM_CPUID_FLAG_* of linux/kvm.h.
    pub flags: u32,
    /// Answers.
    pub eax: u32,
    /// Answers.
    pub ebx: u32,
    /// Answers.
    pub ecx: u32,
    /// Answers.
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&Leaf> for kvm_cpuid_entry2 {
    fn from(leaf: &Leaf) -> Self {
        let Leaf { function, index, flags, eax, ebx, ecx, edx } = *leaf;
        Self { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// The most leaves a description may have: KVM_MAX_CPUID_ENTRIES of asm/kvm_host.h.
pub const MAX_LEAVES: usize = 256;

// Leaves and bits (AMD64 manual, volume 3, appendix E; Intel SDM, volume 2A, CPUID).
const LEAF_FEATURES: u32 = 0x1;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
/// A hypervisor is there: what guests go by before they look for KVM's own leaves (kvm api.rst leaves the bit to us).
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTITHREADING: u32 = 1 << 28;
const TOPOLOGY_THREAD: u32 = 1;
const TOPOLOGY_CORE: u32 = 2;

/// What a host's guests may be shown of its processor: all that KVM supports, and what KVM leaves to us.
fn supported(host: &Host) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = host.cpuid.as_slice().iter().map(Leaf::from).collect();
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF_FEATURES) {
        leaf.ecx |= ECX_HYPERVISOR;
        if host.tsc_deadline {
            leaf.ecx |= ECX_TSC_DEADLINE;
        }
    }
    if host.nested_bytes == 0 {
        hide_nesting(&mut leaves);
    }
    leaves
}

/// What the guests of a VM with so many vCPUs see: this model of the host's processor, with a topology of one thread a core and
/// all cores in one package. `nested`: they may run guests of their own.
///
/// # Errors
/// [`Error::MissingFeatures`] that names what the model has and this host has not.
pub(crate) fn describe(host: &Host, vcpus: u32, model: &CpuModel, nested: bool) -> Result<Vec<Leaf>> {
    let mut leaves = supported(host);
    if nested {
        if !has_nesting(&leaves) {
            return Err(Error::MissingFeatures(
                "nested virtualisation (load kvm-intel or kvm-amd with nested=1)".into(),
            ));
        }
    } else {
        hide_nesting(&mut leaves);
    }
    let mut leaves = model.apply(leaves)?;
    set_topology(&mut leaves, vcpus);
    Ok(leaves)
}

/// What a guest that arrives may have been started with: this model, and guests of its own if this host can have them.
///
/// # Errors
/// As [`describe`].
pub(crate) fn offered(host: &Host, vcpus: u32, model: &CpuModel) -> Result<Vec<Leaf>> {
    describe(host, vcpus, model, has_nesting(&supported(host)))
}

/// Features by which a guest can have guests of its own.
const NESTING: [&str; 2] = ["svm", "vmx"];

/// The leaf that says how its guests may run theirs with SVM.
const LEAF_SVM: u32 = 0x8000_000a;

/// Whether a guest may have guests of its own.
pub(crate) fn has_nesting(leaves: &[Leaf]) -> bool {
    !Features::of(leaves).and(features::set(&NESTING)).is_empty()
}

fn hide_nesting(leaves: &mut Vec<Leaf>) {
    leaves.retain(|leaf| leaf.function != LEAF_SVM);
    Features::of(leaves).without(features::set(&NESTING)).limit(leaves);
}

fn set_topology(leaves: &mut Vec<Leaf>, vcpus: u32) {
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF_FEATURES) {
        let logical = vcpus.min(255);
        leaf.ebx = (leaf.ebx & 0xff00_ffff) | logical << 16;
        if vcpus > 1 {
            leaf.edx |= EDX_MULTITHREADING;
        }
    }
    leaves.retain(|leaf| !matches!(leaf.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2));
    let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let shift = vcpus.next_power_of_two().trailing_zeros();
    for (index, (kind, eax, ebx)) in
        [(TOPOLOGY_THREAD, 0, 1), (TOPOLOGY_CORE, shift, vcpus), (0, 0, 0)].into_iter().enumerate()
    {
        let index = index as u32;
        let ecx = index | kind << 8;
        leaves.push(Leaf { function: LEAF_TOPOLOGY, index, flags, eax, ebx, ecx, edx: 0 });
    }
}

/// The room that the vector registers of such a processor need, in 32-bit words, and what every processor has at least.
pub(crate) fn xsave_words(leaves: &[Leaf]) -> usize {
    let size = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (LEAF_XSAVE, 0));
    size.map_or(0, |leaf| leaf.ecx as usize).div_ceil(4).max(crate::sys::XSAVE_BASE_WORDS)
}

/// Bits of a physical address that the guest may use; 0 where that is not said.
pub(crate) fn physical_bits(leaves: &[Leaf]) -> u32 {
    check::address_bits(leaves).0
}

/// Whether a register is of the state of a guest that sees these features. One that is not has a value of the host's, which
/// another host may refuse.
pub(crate) fn shows_msr(features: &Features, msr: u32) -> bool {
    // Intel SDM, volume 4; asm/msr-index.h.
    let needed = match msr {
        0x10a => "arch-capabilities",
        0x345 => "pdcm",
        0x480..=0x491 => "vmx",
        0xe1 => "waitpkg",
        0x1c4 | 0x1c5 => "xfd",
        _ => return true,
    };
    !features.and(features::set(&[needed])).is_empty()
}

/// The leaves of one vCPU: the description, with its own APIC id in it.
///
/// # Errors
/// [`Error::Config`] when there are more leaves than KVM takes.
pub(crate) fn for_vcpu(leaves: &[Leaf], vcpu: u32) -> Result<CpuId> {
    let mut entries: Vec<kvm_cpuid_entry2> = leaves.iter().map(kvm_cpuid_entry2::from).collect();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => entry.ebx = (entry.ebx & 0x00ff_ffff) | vcpu << 24,
            LEAF_TOPOLOGY => entry.edx = vcpu,
            LEAF_AMD_TOPOLOGY => {
                entry.eax = vcpu;
                entry.ebx = (entry.ebx & !0xff) | (vcpu & 0xff);
            }
            _ => {}
        }
    }
    CpuId::from_entries(&entries).map_err(|error| Error::Config(format!("CPUID: {error:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32, edx: u32) -> Leaf {
        Leaf { function, ecx, edx, ..Leaf::default() }
    }

    #[test]
    fn every_vcpu_sees_its_own_apic_id() {
        let leaves = [leaf(1, 0, 0), leaf(LEAF_TOPOLOGY, 0, 0), leaf(LEAF_AMD_TOPOLOGY, 0, 0)];
        let cpuid = for_vcpu(&leaves, 3).unwrap();
        let entries = cpuid.as_slice();
        assert_eq!(entries[0].ebx >> 24, 3);
        assert_eq!(entries[1].edx, 3);
        assert_eq!(entries[2].eax, 3);
    }

    #[test]
    fn nesting_is_hidden_with_all_that_belongs_to_it() {
        let mut leaves = vec![leaf(1, 1 << 5 | 1, 0), leaf(0x8000_0001, 1 << 2 | 1, 0), leaf(LEAF_SVM, 0, 9)];
        assert!(has_nesting(&leaves));
        hide_nesting(&mut leaves);
        assert!(!has_nesting(&leaves));
        assert_eq!(leaves, [leaf(1, 1, 0), leaf(0x8000_0001, 1, 0)]);
    }

    #[test]
    fn registers_of_hidden_features_are_no_state() {
        let all = features::set(&["vmx", "arch-capabilities"]);
        assert!([0x10, 0x10a, 0x480, 0x491, 0x492].iter().all(|msr| shows_msr(&all, *msr)));
        let none = Features::default();
        assert!([0x10, 0x47f, 0x492].iter().all(|msr| shows_msr(&none, *msr)));
        assert!(![0x10a, 0x345, 0x480, 0x491].iter().any(|msr| shows_msr(&none, *msr)));
    }

    #[test]
    fn the_room_for_vector_registers_is_what_the_leaf_says() {
        assert_eq!(xsave_words(&[]), 1024);
        assert_eq!(xsave_words(&[leaf(LEAF_XSAVE, 11_008, 0)]), 2752);
    }
}
