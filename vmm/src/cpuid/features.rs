//! The features of a processor: which register has them, and what people call them.

use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

use super::{ECX_HYPERVISOR, EDX_MULTITHREADING, Leaf};

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// A register that is a set of features.
#[derive(Clone, Copy)]
struct Word {
    name: &'static str,
    function: u32,
    index: u32,
    register: Register,
    /// Bits that tell a state, not a feature: OSXSAVE, OSPKE, multithreading, and that there is a hypervisor.
    ignored: u32,
    /// The names of those that people know by name.
    known: &'static [(u32, &'static str)],
}

const fn word(
    name: &'static str,
    function: u32,
    index: u32,
    register: Register,
    known: &'static [(u32, &'static str)],
) -> Word {
    Word { name, function, index, register, ignored: 0, known }
}

const fn ignoring(ignored: u32, word: Word) -> Word {
    Word { ignored, ..word }
}

/// All that are compared, with the names of Linux (asm/cpufeatures.h) where it has some. AMD64 manual, volume 3, appendix E; Intel
/// SDM, volume 2A, CPUID; kvm cpuid.rst for the leaf of KVM.
const WORDS: &[Word] = &[
    ignoring(
        1 << 27 | ECX_HYPERVISOR,
        word(
            "CPUID 1 ecx",
            1,
            0,
            Ecx,
            &[
                (0, "sse3"),
                (1, "pclmulqdq"),
                (3, "monitor"),
                (5, "vmx"),
                (9, "ssse3"),
                (12, "fma"),
                (13, "cx16"),
                (15, "pdcm"),
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
        ),
    ),
    ignoring(
        EDX_MULTITHREADING,
        word(
            "CPUID 1 edx",
            1,
            0,
            Edx,
            &[
                (0, "fpu"),
                (1, "vme"),
                (2, "de"),
                (3, "pse"),
                (4, "tsc"),
                (5, "msr"),
                (6, "pae"),
                (7, "mce"),
                (8, "cx8"),
                (9, "apic"),
                (11, "sep"),
                (12, "mtrr"),
                (13, "pge"),
                (14, "mca"),
                (15, "cmov"),
                (16, "pat"),
                (17, "pse36"),
                (19, "clflush"),
                (23, "mmx"),
                (24, "fxsr"),
                (25, "sse"),
                (26, "sse2"),
                (27, "ss"),
            ],
        ),
    ),
    word("CPUID 6 eax", 6, 0, Eax, &[(2, "arat")]),
    word(
        "CPUID 7 ebx",
        7,
        0,
        Ebx,
        &[
            (0, "fsgsbase"),
            (1, "tsc-adjust"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
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
    ),
    ignoring(
        1 << 4,
        word(
            "CPUID 7 ecx",
            7,
            0,
            Ecx,
            &[
                (1, "avx512vbmi"),
                (2, "umip"),
                (3, "pku"),
                (5, "waitpkg"),
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
                (25, "cldemote"),
                (27, "movdiri"),
                (28, "movdir64b"),
            ],
        ),
    ),
    word(
        "CPUID 7 edx",
        7,
        0,
        Edx,
        &[
            (4, "fsrm"),
            (10, "md-clear"),
            (14, "serialize"),
            (16, "tsxldtrk"),
            (20, "ibt"),
            (22, "amx-bf16"),
            (23, "avx512-fp16"),
            (24, "amx-tile"),
            (25, "amx-int8"),
            (26, "spec-ctrl"),
            (27, "stibp"),
            (28, "flush-l1d"),
            (29, "arch-capabilities"),
            (31, "ssbd"),
        ],
    ),
    word(
        "CPUID 7.1 eax",
        7,
        1,
        Eax,
        &[(4, "avx-vnni"), (5, "avx512-bf16"), (21, "amx-fp16"), (23, "avx-ifma")],
    ),
    word("CPUID 7.1 ebx", 7, 1, Ebx, &[]),
    word("CPUID 7.1 ecx", 7, 1, Ecx, &[]),
    word("CPUID 7.1 edx", 7, 1, Edx, &[]),
    word("CPUID 7.2 edx", 7, 2, Edx, &[]),
    word(
        "XCR0 low",
        0xd,
        0,
        Eax,
        &[
            (0, "xcr0.x87"),
            (1, "xcr0.sse"),
            (2, "xcr0.avx"),
            (5, "xcr0.opmask"),
            (6, "xcr0.zmm"),
            (7, "xcr0.hi-zmm"),
            (9, "xcr0.pkru"),
            (17, "xcr0.tilecfg"),
            (18, "xcr0.tiledata"),
        ],
    ),
    word("XCR0 high", 0xd, 0, Edx, &[]),
    word(
        "CPUID 0xd.1 eax",
        0xd,
        1,
        Eax,
        &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")],
    ),
    word("XSS low", 0xd, 1, Ecx, &[(11, "xss.cet-user"), (12, "xss.cet-kernel")]),
    word("XSS high", 0xd, 1, Edx, &[]),
    word(
        "CPUID 0x80000001 ecx",
        0x8000_0001,
        0,
        Ecx,
        &[
            (0, "lahf"),
            (2, "svm"),
            (4, "cr8-legacy"),
            (5, "lzcnt"),
            (6, "sse4a"),
            (8, "prefetchw"),
            (22, "topoext"),
            (23, "perfctr-core"),
        ],
    ),
    word(
        "CPUID 0x80000001 edx",
        0x8000_0001,
        0,
        Edx,
        &[(11, "syscall"), (20, "nx"), (26, "1-gib-pages"), (27, "rdtscp"), (29, "long-mode")],
    ),
    word("CPUID 0x80000007 edx", 0x8000_0007, 0, Edx, &[(8, "invariant-tsc")]),
    word(
        "CPUID 0x80000008 ebx",
        0x8000_0008,
        0,
        Ebx,
        &[
            (0, "clzero"),
            (2, "xsaveerptr"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "amd-stibp"),
            (24, "amd-ssbd"),
            (25, "virt-ssbd"),
            (26, "amd-ssb-no"),
        ],
    ),
    word("CPUID 0x80000021 eax", 0x8000_0021, 0, Eax, &[]),
    word(
        "KVM features",
        0x4000_0001,
        0,
        Eax,
        &[
            (0, "kvm-clocksource"),
            (1, "kvm-nop-io-delay"),
            (3, "kvm-clocksource2"),
            (5, "kvm-steal-time"),
            (6, "kvm-pv-eoi"),
            (7, "kvm-pv-unhalt"),
            (24, "kvm-clocksource-stable"),
        ],
    ),
];

impl Word {
    fn is_in(&self, leaf: &Leaf) -> bool {
        leaf.function == self.function
            && (leaf.index == self.index || leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0)
    }

    fn of<'a>(&self, leaf: &'a mut Leaf) -> &'a mut u32 {
        match self.register {
            Eax => &mut leaf.eax,
            Ebx => &mut leaf.ebx,
            Ecx => &mut leaf.ecx,
            Edx => &mut leaf.edx,
        }
    }
}

/// A set of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features([u32; WORDS.len()]);

impl Features {
    /// Those that a processor with these leaves has.
    pub(crate) fn of(leaves: &[Leaf]) -> Self {
        let mut features = Self::default();
        for (bits, word) in features.0.iter_mut().zip(WORDS) {
            let found = leaves.iter().find(|leaf| word.is_in(leaf));
            *bits = found.map_or(0, |leaf| *word.of(&mut leaf.clone())) & !word.ignored;
        }
        features
    }

    /// Those with these names. `WORD bit N` names what has no other name.
    ///
    /// # Errors
    /// The name that is none.
    pub(super) fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, &'a str> {
        let mut features = Self::default();
        for name in names {
            let (word, bit) = find(name).ok_or(name)?;
            features.0[word] |= 1 << bit;
        }
        Ok(features)
    }

    /// The name of each.
    pub fn names(&self) -> Vec<String> {
        let named = |(bits, word): (&u32, &Word)| {
            let bits = *bits;
            (0..32).filter(move |bit| bits & 1 << bit != 0).map(|bit| bit_name(word, bit)).collect::<Vec<_>>()
        };
        self.0.iter().zip(WORDS).flat_map(named).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn and(self, other: Self) -> Self {
        self.with(other, |bits, others| bits & others)
    }

    pub(super) fn or(self, other: Self) -> Self {
        self.with(other, |bits, others| bits | others)
    }

    pub(super) fn without(self, other: Self) -> Self {
        self.with(other, |bits, others| bits & !others)
    }

    fn with(mut self, other: Self, op: impl Fn(u32, u32) -> u32) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(bits, others)| *bits = op(*bits, others));
        self
    }

    /// The parts of the vector registers' state that the guest's programs have, and those that its kernel has: a bit each.
    pub(super) fn vector_parts(&self) -> (u64, u64) {
        let part = |name: &str| {
            let bits = |half: &str| {
                let place = WORDS.iter().position(|word| word.name == format!("{name} {half}"));
                place.map_or(0, |place| u64::from(self.0[place]))
            };
            bits("low") | bits("high") << 32
        };
        (part("XCR0"), part("XSS"))
    }

    /// Takes all others out of a processor's leaves; what is no feature stays.
    pub(super) fn limit(&self, leaves: &mut [Leaf]) {
        for (bits, word) in self.0.iter().zip(WORDS) {
            for leaf in leaves.iter_mut().filter(|leaf| word.is_in(leaf)) {
                *word.of(leaf) &= bits | word.ignored;
            }
        }
    }
}

/// Where vector registers are listed that are saved and restored: XCR0 and XSS.
pub(super) const VECTOR_STATE: Features = {
    let mut bits = [0; WORDS.len()];
    let mut place = 0;
    while place < WORDS.len() {
        let word = &WORDS[place];
        if word.function == 0xd && (word.index == 0 || matches!(word.register, Ecx | Edx)) {
            bits[place] = u32::MAX;
        }
        place += 1;
    }
    Features(bits)
};

/// Those with these names, which are of this crate's own lists; a test looks that all of them are names.
pub(super) fn set(names: &[&str]) -> Features {
    Features::named(names.iter().copied()).unwrap_or_default()
}

fn bit_name(word: &Word, bit: u32) -> String {
    match word.known.iter().find(|(known, _)| *known == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("{} bit {bit}", word.name),
    }
}

fn find(name: &str) -> Option<(usize, u32)> {
    WORDS.iter().enumerate().find_map(|(place, word)| {
        let known = word.known.iter().find(|(_, known)| *known == name).map(|(bit, _)| *bit);
        let bit = known.or_else(|| {
            let number = name.strip_prefix(word.name)?.strip_prefix(" bit ")?;
            number.parse().ok().filter(|bit| *bit < 32 && !number.starts_with(['+', '0']) || number == "0")
        })?;
        (word.ignored & 1 << bit == 0).then_some((place, bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_one_name_and_the_name_leads_back() {
        let all = Features(std::array::from_fn(|place| !WORDS[place].ignored));
        let names = all.names();
        assert_eq!(Features::named(names.iter().map(String::as_str)), Ok(all));
        let distinct: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        for wrong in
            ["", "sse5", "CPUID 1 ecx bit 32", "CPUID 1 ecx bit 31", "XCR0 low bit +3", "CPUID 9 eax bit 1"]
        {
            assert_eq!(Features::named([wrong]), Err(wrong));
        }
    }

    #[test]
    fn what_is_not_wanted_goes_and_what_is_no_feature_stays() {
        let mut leaves = [Leaf { function: 1, eax: 7, ecx: u32::MAX, edx: 1 << 28 | 1, ..Leaf::default() }];
        Features::named(["sse3", "avx"]).unwrap().limit(&mut leaves);
        assert_eq!(
            (leaves[0].eax, leaves[0].ecx, leaves[0].edx),
            (7, 1 << 31 | 1 << 28 | 1 << 27 | 1, 1 << 28)
        );
    }
}
