//! The processor a guest sees, and whether another host can show it too.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    host::Host,
};

/// One CPUID leaf, in our own type: the format of a machine description is ours, not the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
/// A hypervisor is there: what guests go by before they look for KVM's own leaves (kvm api.rst leaves the bit to us).
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTITHREADING: u32 = 1 << 28;
const TOPOLOGY_THREAD: u32 = 1;
const TOPOLOGY_CORE: u32 = 2;

/// What this host shows to the guests of a VM with so many vCPUs: all it supports, with a topology of
/// one thread a core and all cores in one package.
pub(crate) fn describe(host: &Host, vcpus: u32) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = host.cpuid.as_slice().iter().map(Leaf::from).collect();
    for leaf in &mut leaves {
        if leaf.function == LEAF_FEATURES {
            leaf.ecx |= ECX_HYPERVISOR;
            if host.tsc_deadline {
                leaf.ecx |= ECX_TSC_DEADLINE;
            }
            let logical = vcpus.min(255);
            leaf.ebx = (leaf.ebx & 0xff00_ffff) | logical << 16;
            if vcpus > 1 {
                leaf.edx |= EDX_MULTITHREADING;
            }
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
    leaves
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

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register that is a set of features, and the names of those that people know by name.
struct FeatureWord {
    function: u32,
    index: u32,
    register: Register,
    name: &'static str,
    /// Bits that tell a state, not a feature: OSXSAVE, OSPKE, multithreading, and that there is a hypervisor.
    ignored: u32,
    known: &'static [(u32, &'static str)],
}

const FEATURE_WORDS: &[FeatureWord] = &[
    FeatureWord {
        function: 1,
        index: 0,
        register: Register::Ecx,
        name: "CPUID 1 ecx",
        ignored: 1 << 27 | ECX_HYPERVISOR,
        known: &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (3, "monitor"),
            (5, "vmx"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4.1"),
            (20, "sse4.2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc-deadline"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    },
    FeatureWord {
        function: 1,
        index: 0,
        register: Register::Edx,
        name: "CPUID 1 edx",
        ignored: EDX_MULTITHREADING,
        known: &[(0, "fpu"), (4, "tsc"), (9, "apic"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2")],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: Register::Ebx,
        name: "CPUID 7 ebx",
        ignored: 0,
        known: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: Register::Ecx,
        name: "CPUID 7 ecx",
        ignored: 1 << 4,
        known: &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (6, "avx512vbmi2"),
            (7, "shstk"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512vnni"),
            (12, "avx512bitalg"),
            (14, "avx512vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: Register::Edx,
        name: "CPUID 7 edx",
        ignored: 0,
        known: &[
            (4, "fsrm"),
            (20, "ibt"),
            (22, "amx-bf16"),
            (24, "amx-tile"),
            (25, "amx-int8"),
            (26, "spec-ctrl"),
            (27, "stibp"),
            (29, "arch-capabilities"),
            (31, "ssbd"),
        ],
    },
    FeatureWord {
        function: 7,
        index: 1,
        register: Register::Eax,
        name: "CPUID 7.1 eax",
        ignored: 0,
        known: &[(4, "avx-vnni"), (5, "avx512-bf16"), (21, "amx-fp16"), (23, "avx-ifma")],
    },
    FeatureWord {
        function: 7,
        index: 1,
        register: Register::Edx,
        name: "CPUID 7.1 edx",
        ignored: 0,
        known: &[],
    },
    FeatureWord {
        function: 0xd,
        index: 0,
        register: Register::Eax,
        name: "XCR0 low",
        ignored: 0,
        known: &[(1, "xcr0.sse"), (2, "xcr0.avx"), (5, "xcr0.opmask"), (9, "xcr0.pkru")],
    },
    FeatureWord {
        function: 0xd,
        index: 0,
        register: Register::Edx,
        name: "XCR0 high",
        ignored: 0,
        known: &[],
    },
    FeatureWord {
        function: 0xd,
        index: 1,
        register: Register::Eax,
        name: "CPUID 0xd.1 eax",
        ignored: 0,
        known: &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")],
    },
    FeatureWord {
        function: 0x8000_0001,
        index: 0,
        register: Register::Ecx,
        name: "CPUID 0x80000001 ecx",
        ignored: 0,
        known: &[(0, "lahf"), (2, "svm"), (5, "lzcnt"), (6, "sse4a"), (8, "prefetchw"), (22, "topoext")],
    },
    FeatureWord {
        function: 0x8000_0001,
        index: 0,
        register: Register::Edx,
        name: "CPUID 0x80000001 edx",
        ignored: 0,
        known: &[(11, "syscall"), (20, "nx"), (26, "1-gib-pages"), (27, "rdtscp"), (29, "long-mode")],
    },
    FeatureWord {
        function: 0x8000_0007,
        index: 0,
        register: Register::Edx,
        name: "CPUID 0x80000007 edx",
        ignored: 0,
        known: &[(8, "invariant-tsc")],
    },
    FeatureWord {
        function: 0x8000_0008,
        index: 0,
        register: Register::Ebx,
        name: "CPUID 0x80000008 ebx",
        ignored: 0,
        known: &[(0, "clzero"), (9, "wbnoinvd"), (12, "ibpb")],
    },
    FeatureWord {
        function: 0x8000_0021,
        index: 0,
        register: Register::Eax,
        name: "CPUID 0x80000021 eax",
        ignored: 0,
        known: &[],
    },
    FeatureWord {
        function: 0x4000_0001,
        index: 0,
        register: Register::Eax,
        name: "KVM features",
        ignored: 0,
        known: &[(0, "kvm-clocksource"), (3, "kvm-clocksource2"), (5, "kvm-steal-time"), (6, "kvm-pv-eoi")],
    },
];

impl FeatureWord {
    fn value(&self, leaves: &[Leaf]) -> u32 {
        let found = leaves.iter().find(|leaf| {
            leaf.function == self.function
                && (leaf.index == self.index || leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0)
        });
        found.map_or(0, |leaf| match self.register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        })
    }

    fn bit_name(&self, bit: u32) -> String {
        match self.known.iter().find(|(known, _)| *known == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("{} bit {bit}", self.name),
        }
    }
}

/// The features that `guest` was started with and `host` cannot show, by name.
pub fn missing_features(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
    let mut missing = Vec::new();
    for word in FEATURE_WORDS {
        let lacking = word.value(guest) & !word.value(host) & !word.ignored;
        missing.extend((0..32).filter(|bit| lacking & (1 << bit) != 0).map(|bit| word.bit_name(bit)));
    }
    missing
}

/// Who made the processor, from leaf 0: for instance `AuthenticAMD`.
pub fn vendor(leaves: &[Leaf]) -> String {
    let Some(leaf) = leaves.iter().find(|leaf| leaf.function == 0) else { return String::new() };
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Checks that this host can show a guest the processor it was started with.
///
/// # Errors
/// [`Error::MissingFeatures`] with the names of all that is missing.
pub(crate) fn check(guest: &[Leaf], host: &[Leaf]) -> Result<()> {
    if guest.len() > MAX_LEAVES {
        return Err(Error::State(format!("the machine has {} CPUID leaves", guest.len())));
    }
    let (theirs, ours) = (vendor(guest), vendor(host));
    if theirs != ours {
        // {:?}: the name comes from a peer, and must not reach a terminal unescaped.
        return Err(Error::MissingFeatures(format!("a processor of {theirs:?} (it has one of {ours:?})")));
    }
    let missing = missing_features(guest, host);
    if missing.is_empty() { Ok(()) } else { Err(Error::MissingFeatures(missing.join(", "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32, edx: u32) -> Leaf {
        Leaf { function, index: 0, flags: 0, eax: 0, ebx: 0, ecx, edx }
    }

    #[test]
    fn missing_features_are_named() {
        let guest = [leaf(1, 1 << 28 | 1 << 25, 0), leaf(0x8000_0001, 0, 1 << 26 | 1 << 30)];
        let host = [leaf(1, 1 << 25, 0)];
        assert_eq!(missing_features(&guest, &host), ["avx", "1-gib-pages", "CPUID 0x80000001 edx bit 30"]);
        assert!(missing_features(&host, &guest).is_empty());
        let error = check(&guest, &host).unwrap_err().to_string();
        assert!(error.contains("lacks avx, 1-gib-pages"), "{error}");
    }

    #[test]
    fn bits_that_tell_a_state_do_not_count() {
        assert!(missing_features(&[leaf(1, 1 << 27 | 1 << 31, 1 << 28)], &[]).is_empty());
    }

    #[test]
    fn another_vendor_is_refused() {
        let name = |text: &[u8; 4]| Leaf { ebx: u32::from_le_bytes(*text), ..leaf(0, 0, 0) };
        assert!(check(&[name(b"Genu")], &[name(b"Auth")]).is_err());
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
}
