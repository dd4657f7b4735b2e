//! Templates: processors that are less than the host's, so that many hosts can be them.
//!
//! A template is a list of features. Its guests see these and no others, on every host alike, and a host that lacks one cannot
//! start them. The levels of the x86-64 psABI are templates, and a file is one.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{
    Features, LEAF_XSAVE, Leaf,
    check::{LEAF_ADDRESSES, address_bits, maker, vendor},
    features::{VECTOR_STATE, set},
};
use crate::error::{Error, Result};

/// The format of a file.
const FORMAT: u32 = 1;
/// The longest name, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// Widths of addresses that there are: 32-bit processors with PAE have 36, and 5-level paging ends at 57 (linear) and 52 (physical).
const PHYSICAL_BITS: std::ops::RangeInclusive<u32> = 36..=52;
const LINEAR_BITS: std::ops::RangeInclusive<u32> = 48..=57;
/// The width of physical addresses at a level: what the least of servers have, and so does QEMU's default model.
const LEVEL_PHYSICAL_BITS: u32 = 40;
const LEVEL_LINEAR_BITS: u32 = 48;

/// The baseline of x86-64 and level 2 (x86-64 psABI, 3.1.1, table 3.1), with what every 64-bit kernel expects besides.
const LEVEL_2: &[&str] = &[
    "fpu",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "cx8",
    "apic",
    "sep",
    "pge",
    "cmov",
    "pat",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "syscall",
    "nx",
    "long-mode",
    "lahf",
    "sse3",
    "ssse3",
    "cx16",
    "sse4.1",
    "sse4.2",
    "popcnt",
];
/// What level 3 has more.
const LEVEL_3: &[&str] = &["xsave", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe"];
/// What a guest of a level gets where the host has it: what old kernels expect, what guards it, and what KVM does for it, which is
/// the same on all hosts but very old ones.
const CARRIED: &[&str] = &[
    "topoext",
    "vme",
    "mce",
    "mtrr",
    "mca",
    "pse36",
    "ss",
    "x2apic",
    "tsc-deadline",
    "rdtscp",
    "arat",
    "tsc-adjust",
    "invariant-tsc",
    "cr8-legacy",
    "smep",
    "smap",
    "umip",
    "md-clear",
    "spec-ctrl",
    "stibp",
    "ssbd",
    "flush-l1d",
    "ibpb",
    "ibrs",
    "amd-stibp",
    "amd-ssbd",
    "virt-ssbd",
    "amd-ssb-no",
    "kvm-clocksource",
    "kvm-nop-io-delay",
    "kvm-clocksource2",
    "kvm-steal-time",
    "kvm-pv-eoi",
    "kvm-pv-unhalt",
    "kvm-clocksource-stable",
];

/// What no template has, and why not.
const NEVER: &[(&str, &str)] = &[
    ("svm", "guests get it with --nested alone"),
    ("vmx", "guests get it with --nested alone"),
    (
        "arch-capabilities",
        "it says which protections a guest may leave out, and that differs from host to host",
    ),
    ("pdcm", "no template has performance counters"),
    ("perfctr-core", "no template has performance counters"),
];

/// Feature, and what it cannot be used without.
const NEEDS: &[(&str, &str)] = &[
    ("avx", "xsave"),
    ("pku", "xsave"),
    ("amx-tile", "xsave"),
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsavec"),
    ("xfd", "xsave"),
    ("avx2", "avx"),
    ("fma", "avx"),
    ("f16c", "avx"),
    ("vaes", "avx"),
    ("vpclmulqdq", "avx"),
    ("avx-vnni", "avx2"),
    ("avx-ifma", "avx2"),
    ("avx512f", "avx2"),
    ("avx512dq", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512vbmi", "avx512f"),
    ("avx512vbmi2", "avx512f"),
    ("avx512vnni", "avx512f"),
    ("avx512bitalg", "avx512f"),
    ("avx512vpopcntdq", "avx512f"),
    ("avx512-bf16", "avx512f"),
    ("avx512-fp16", "avx512bw"),
    ("amx-bf16", "amx-tile"),
    ("amx-int8", "amx-tile"),
    ("amx-fp16", "amx-tile"),
];

/// Which registers are saved and restored for a feature.
const SAVED_FOR: &[(&str, &[&str])] = &[
    ("xsave", &["xcr0.x87", "xcr0.sse"]),
    ("avx", &["xcr0.avx"]),
    ("avx512f", &["xcr0.opmask", "xcr0.zmm", "xcr0.hi-zmm"]),
    ("pku", &["xcr0.pkru"]),
    ("amx-tile", &["xcr0.tilecfg", "xcr0.tiledata"]),
    ("shstk", &["xss.cet-user", "xss.cet-kernel"]),
    ("ibt", &["xss.cet-user"]),
];

/// Leaves with nothing in them but features, sizes, names and what this VMM makes itself. All others are of one processor: counters,
/// tracing, power, memory encryption.
const KEPT: &[u32] = &[
    0,
    1,
    2,
    4,
    6,
    7,
    0xb,
    LEAF_XSAVE,
    0x4000_0000,
    0x4000_0001,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    LEAF_ADDRESSES,
    super::LEAF_SVM,
    0x8000_001d,
    0x8000_001e,
    0x8000_0021,
];
/// Those of matrices, which mean nothing without them.
const MATRIX_LEAVES: &[u32] = &[0x1d, 0x1e];

/// A processor that many hosts can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    name: String,
    /// Whose processors; any maker's if `None`.
    vendor: Option<String>,
    required: Features,
    /// Comes along where the host has it.
    carried: Features,
    physical_bits: Option<u32>,
    linear_bits: Option<u32>,
    /// Hosts with narrower addresses are no obstacle.
    narrower: bool,
}

/// A level of the psABI, by its name.
pub(super) fn level(name: &str) -> Option<Template> {
    let required = match name {
        "x86-64-v2" => set(LEVEL_2),
        "x86-64-v3" => set(LEVEL_2).or(set(LEVEL_3)),
        _ => return None,
    };
    Some(Template {
        name: name.into(),
        vendor: None,
        required,
        carried: set(CARRIED),
        physical_bits: Some(LEVEL_PHYSICAL_BITS),
        linear_bits: Some(LEVEL_LINEAR_BITS),
        narrower: true,
    })
}

impl Template {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The leaves of its guests on a host that has these. What a guest gets for guests of its own stays, if it is there.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] that names what the host lacks.
    pub(super) fn apply(&self, mut leaves: Vec<Leaf>) -> Result<Vec<Leaf>> {
        let here = vendor(&leaves);
        if let Some(vendor) = self.vendor.as_ref().filter(|vendor| **vendor != here) {
            return Err(Error::MissingFeatures(format!(
                "a processor made by {}, which CPU {} is (it has one made by {})",
                maker(vendor),
                self.name,
                maker(&here)
            )));
        }
        let host = Features::of(&leaves);
        let mut shown = self.required.or(self.carried.and(host));
        for (feature, registers) in SAVED_FOR {
            if !shown.and(set(&[feature])).is_empty() {
                shown = shown.or(set(registers));
            }
        }
        let mut missing = shown.without(host).names();
        let (physical, linear) = address_bits(&leaves);
        for (what, wanted, has) in
            [("physical", self.physical_bits, physical), ("linear", self.linear_bits, linear)]
        {
            if let Some(wanted) = wanted.filter(|wanted| !self.narrower && *wanted > has) {
                missing.push(format!("{wanted} bits of {what} addresses (it has {has})"));
            }
        }
        if !missing.is_empty() {
            return Err(Error::MissingFeatures(format!(
                "{}, which CPU {} has",
                missing.join(", "),
                self.name
            )));
        }
        self.cut(&mut leaves, shown);
        Ok(leaves)
    }

    fn cut(&self, leaves: &mut Vec<Leaf>, shown: Features) {
        let matrices = !shown.and(set(&["amx-tile"])).is_empty();
        let saved = Features::of(leaves).and(shown);
        leaves.retain(|leaf| {
            KEPT.contains(&leaf.function) && (leaf.function, leaf.index) <= (7, 2)
                || leaf.function > 7 && KEPT.contains(&leaf.function)
                || matrices && MATRIX_LEAVES.contains(&leaf.function)
        });
        shown.or(set(&super::NESTING)).limit(leaves);
        cut_vector_state(leaves, saved);
        let narrow = |bits: u32, most: Option<u32>| most.map_or(bits, |most| bits.min(most));
        let highest = |leaves: &[Leaf], range: std::ops::Range<u32>| {
            leaves.iter().map(|leaf| leaf.function).filter(|function| range.contains(function)).max()
        };
        let (basic, extended) = (highest(leaves, 0..0x4000_0000), highest(leaves, 0x8000_0000..0xc000_0000));
        for leaf in leaves {
            match leaf.function {
                0 => leaf.eax = basic.unwrap_or(0).max(super::LEAF_TOPOLOGY),
                7 if leaf.index == 0 => leaf.eax = leaf.eax.min(2),
                0x8000_0000 => leaf.eax = extended.unwrap_or(0x8000_0000),
                LEAF_ADDRESSES => {
                    let (physical, linear) = (leaf.eax & 0xff, leaf.eax >> 8 & 0xff);
                    leaf.eax = narrow(physical, self.physical_bits) | narrow(linear, self.linear_bits) << 8;
                }
                _ => {}
            }
        }
    }
}

/// Makes the leaf of vector registers fit what is left of them: where each part lies, and how much room all need.
fn cut_vector_state(leaves: &mut Vec<Leaf>, shown: Features) {
    // Legacy area and header (Intel SDM, volume 1, 13.4).
    const LEAST_BYTES: u32 = 512 + 64;
    let parts = shown.vector_parts();
    if parts == (0, 0) {
        return leaves.retain(|leaf| leaf.function != LEAF_XSAVE);
    }
    let (user, kernel) = parts;
    leaves.retain(|leaf| {
        leaf.function != LEAF_XSAVE
            || leaf.index < 2
            || leaf.index < 64 && (user | kernel) >> leaf.index & 1 == 1
    });
    // Size and place of a part, in bytes, are in eax and ebx.
    let ends = leaves
        .iter()
        .filter(|leaf| {
            leaf.function == LEAF_XSAVE && (2..64).contains(&leaf.index) && user >> leaf.index & 1 == 1
        })
        .map(|leaf| leaf.eax.saturating_add(leaf.ebx));
    let bytes = ends.max().unwrap_or(0).max(LEAST_BYTES);
    for leaf in leaves.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (LEAF_XSAVE, 0)) {
        // ebx is what is switched on needs, and KVM keeps it up to date.
        (leaf.ebx, leaf.ecx) = (LEAST_BYTES, bytes);
    }
}

/// A template as a file has it, in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateFile {
    /// 1.
    pub format: u32,
    /// What messages call it.
    pub name: String,
    /// Whose processors, as leaf 0 says it; any maker's if it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// Bits of a physical address; the host's own if it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_bits: Option<u32>,
    /// Bits of a linear address; the host's own if it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linear_bits: Option<u32>,
    /// The names of all features that a guest sees.
    pub features: Vec<String>,
}

impl TemplateFile {
    /// Reads one, and checks it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> Result<Features, String> {
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if self.format != FORMAT {
            return Err(format!("it has format {}, this version knows {FORMAT}", self.format));
        }
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES || !plain(&self.name) {
            return Err(format!("its name must be 1 to {MAX_NAME_BYTES} letters, digits and signs"));
        }
        if self.vendor.as_ref().is_some_and(|vendor| vendor.len() != 12 || !plain(vendor)) {
            return Err("its vendor must be 12 letters, as GenuineIntel or AuthenticAMD is".into());
        }
        for (what, bits, range) in [
            ("physical_bits", self.physical_bits, PHYSICAL_BITS),
            ("linear_bits", self.linear_bits, LINEAR_BITS),
        ] {
            if let Some(bits) = bits.filter(|bits| !range.contains(bits)) {
                return Err(format!("{what} is {bits}, and not {} to {}", range.start(), range.end()));
            }
        }
        let names: BTreeSet<&str> = self.features.iter().map(String::as_str).collect();
        if let Some((name, why)) = NEVER.iter().find(|(name, _)| names.contains(name)) {
            return Err(format!("{name} cannot be in a template: {why}"));
        }
        let features = Features::named(names.iter().copied())
            .map_err(|name| format!("{name:?} is no feature: migrate cpu show lists this host's"))?;
        if let Some(name) = features.and(VECTOR_STATE).names().first() {
            return Err(format!("{name} is not listed: it follows from the others"));
        }
        match NEEDS.iter().find(|(name, needed)| names.contains(name) && !names.contains(needed)) {
            Some((name, needed)) => Err(format!("{name} needs {needed}, which is not in the list")),
            None => Ok(features),
        }
    }

    /// The template.
    ///
    /// # Errors
    /// [`Error::Config`] that says what is wrong with it.
    pub fn template(self) -> Result<Template> {
        let required =
            self.check().map_err(|why| Error::Config(format!("CPU template {:?}: {why}", self.name)))?;
        Ok(Template {
            name: self.name,
            vendor: self.vendor,
            required,
            carried: Features::default(),
            physical_bits: self.physical_bits,
            linear_bits: self.linear_bits,
            narrower: false,
        })
    }

    /// What a template must be for a guest to see as much of these leaves as any template has.
    pub(super) fn of(name: &str, leaves: &[Leaf]) -> Self {
        let never = NEVER.iter().fold(Features::default(), |never, (name, _)| never.or(set(&[name])));
        let mut shown = Features::of(leaves).without(never).without(VECTOR_STATE);
        // Again and again: what a feature needs may need something itself that is missing.
        for _ in NEEDS {
            let lost = NEEDS.iter().filter(|(_, needed)| shown.and(set(&[needed])).is_empty());
            shown = lost.fold(shown, |shown, (name, _)| shown.without(set(&[name])));
        }
        let (physical, linear) = address_bits(leaves);
        Self {
            format: FORMAT,
            name: name.into(),
            vendor: Some(vendor(leaves)),
            physical_bits: Some(physical).filter(|bits| PHYSICAL_BITS.contains(bits)),
            linear_bits: Some(linear).filter(|bits| LINEAR_BITS.contains(bits)),
            features: shown.names(),
        }
    }

    /// What all of these have, so that every host that can be one of them can be it.
    ///
    /// # Errors
    /// [`Error::Config`] when they are of different makers, or there are none.
    pub fn common(name: &str, files: &[Self]) -> Result<Self> {
        let Some((first, others)) = files.split_first() else {
            return Err(Error::Config("the common part of no templates is none".into()));
        };
        let mut common = Self { name: name.into(), ..first.clone() };
        for other in others {
            common.vendor = match (common.vendor.take(), &other.vendor) {
                (Some(one), Some(two)) if one != *two => {
                    return Err(Error::Config(format!(
                        "{} is of a processor made by {}, {} of one made by {}: no guest moves between the two",
                        first.name,
                        maker(&one),
                        other.name,
                        maker(two)
                    )));
                }
                (one, two) => one.or_else(|| two.clone()),
            };
            let least = |one: Option<u32>, two: Option<u32>| {
                one.zip(two).map(|(one, two)| one.min(two)).or(one).or(two)
            };
            common.physical_bits = least(common.physical_bits, other.physical_bits);
            common.linear_bits = least(common.linear_bits, other.linear_bits);
            common.features.retain(|feature| other.features.contains(feature));
        }
        common.check().map_err(Error::Config)?;
        Ok(common)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has everything, as the leaves of an Intel server with AVX-512 have their sizes.
    fn all() -> Vec<Leaf> {
        let leaf = |function, index| Leaf { function, index, flags: 1, ..Leaf::default() };
        let full = |function, index| {
            let all = u32::MAX;
            Leaf { eax: all, ebx: all, ecx: all, edx: all, ..leaf(function, index) }
        };
        let name = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let vendor =
            Leaf { eax: 0x1c, ebx: name(b"Genu"), edx: name(b"ineI"), ecx: name(b"ntel"), ..leaf(0, 0) };
        let mut leaves = vec![
            vendor,
            full(1, 0),
            full(6, 0),
            full(7, 0),
            full(7, 1),
            full(7, 2),
            full(7, 3),
            full(0xa, 0),
        ];
        leaves.push(Leaf { eax: 0x602e7, ebx: 2696, ecx: 11_008, ..leaf(LEAF_XSAVE, 0) });
        leaves.push(Leaf { eax: 0x1f, ebx: 2696, ecx: 0x1800, ..leaf(LEAF_XSAVE, 1) });
        for (index, bytes, place) in [
            (2, 256, 576),
            (5, 64, 1088),
            (6, 512, 1152),
            (7, 1024, 1664),
            (9, 8, 2688),
            (17, 64, 2752),
            (18, 8192, 2816),
        ] {
            leaves.push(Leaf { eax: bytes, ebx: place, ..leaf(LEAF_XSAVE, index) });
        }
        leaves.extend([
            full(0x14, 0),
            full(0x1d, 1),
            full(0x4000_0001, 0),
            full(0x8000_0001, 0),
            full(0x8000_0007, 0),
        ]);
        leaves.push(Leaf { eax: 0x392e, ebx: u32::MAX, ..leaf(LEAF_ADDRESSES, 0) });
        leaves.extend([full(0x8000_0021, 0), full(0x8000_0022, 0)]);
        leaves
    }

    fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<&Leaf> {
        leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index))
    }

    #[test]
    fn all_names_of_the_lists_are_names() {
        let never = NEVER.iter().map(|(name, _)| *name);
        let needs = NEEDS.iter().flat_map(|(name, needed)| [*name, *needed]);
        let saved = SAVED_FOR.iter().flat_map(|(name, registers)| registers.iter().copied().chain([*name]));
        for list in [LEVEL_2.to_vec(), LEVEL_3.to_vec(), CARRIED.to_vec(), super::super::NESTING.to_vec()] {
            Features::named(list).unwrap();
        }
        Features::named(never.chain(needs).chain(saved)).unwrap();
    }

    #[test]
    fn a_level_shows_what_it_has_and_nothing_else() {
        let [two, three] = ["x86-64-v2", "x86-64-v3"].map(|name| level(name).unwrap().apply(all()).unwrap());
        let names = Features::of(&three).names();
        for shown in ["avx2", "sse4.2", "xcr0.avx", "spec-ctrl", "kvm-clocksource", "nx"] {
            assert!(names.iter().any(|name| name == shown), "{shown}");
        }
        // KVM's guests may be asked to have guests; `hide_nesting` is what decides that.
        let hidden =
            ["avx512f", "aes", "xcr0.opmask", "xcr0.pkru", "arch-capabilities", "xsaves", "xss.cet-user"];
        assert!(!names.iter().any(|name| hidden.contains(&name.as_str())), "{names:?}");
        // Where the parts lie is as before, the room is what they need, and what means nothing is gone.
        let room = find(&three, LEAF_XSAVE, 0).unwrap();
        assert_eq!((room.eax, room.ebx, room.ecx, room.edx), (7, 576, 832, 0));
        assert_eq!(find(&three, LEAF_XSAVE, 2).unwrap().ebx, 576);
        assert!(find(&three, LEAF_XSAVE, 5).is_none() && find(&two, LEAF_XSAVE, 0).is_none());
        for gone in [(0xa, 0), (7, 3), (0x14, 0), (0x1d, 1), (0x8000_0022, 0)] {
            assert!(find(&three, gone.0, gone.1).is_none(), "{gone:x?}");
        }
        assert_eq!(find(&three, 0, 0).unwrap().eax, LEAF_XSAVE);
        assert_eq!(address_bits(&three), (40, 48));
        assert_eq!(super::super::xsave_words(&three), 1024);
        // A guest of the lower level moves to a host that shows the higher one at most, and not the other way round.
        super::super::check(&two, &three).unwrap();
        let error = super::super::check(&three, &two).unwrap_err().to_string();
        assert!(error.contains("avx2") && error.contains("xcr0.avx"), "{error}");
    }

    #[test]
    fn a_host_that_lacks_a_level_is_refused_with_all_that_it_lacks() {
        let mut host = all();
        Features::of(&host).without(set(&["avx2", "xcr0.avx", "aes"])).limit(&mut host);
        level("x86-64-v2").unwrap().apply(host.clone()).unwrap();
        let error = level("x86-64-v3").unwrap().apply(host).unwrap_err().to_string();
        assert!(error.contains("lacks avx2, xcr0.avx, which CPU x86-64-v3 has"), "{error}");
    }

    #[test]
    fn the_common_part_is_what_all_can_be() {
        let mut lesser = all();
        Features::of(&lesser).without(set(&["avx512f", "aes"])).limit(&mut lesser);
        for leaf in lesser.iter_mut().filter(|leaf| leaf.function == LEAF_ADDRESSES) {
            leaf.eax = 0x3028;
        }
        let files = [TemplateFile::of("a", &all()), TemplateFile::of("b", &lesser)];
        let common = TemplateFile::common("fleet", &files).unwrap();
        let text = serde_json::to_string(&common).unwrap();
        let template = TemplateFile::parse(&text).unwrap().template().unwrap();
        let [one, two] = [all(), lesser.clone()].map(|host| template.apply(host).unwrap());
        assert_eq!(Features::of(&one), Features::of(&two));
        assert_eq!((address_bits(&one), address_bits(&two)), ((40, 48), (40, 48)));
        // What needs what one of them lacks is gone with it, or the list would be none.
        assert!(!common.features.iter().any(|name| name.starts_with("avx512") || name == "aes"));
        assert!(common.features.iter().any(|name| name == "avx2"));
        // The larger one alone is more than the lesser can be.
        let error = files[0].clone().template().unwrap().apply(lesser).unwrap_err().to_string();
        for word in ["avx512f", "aes", "46 bits of physical addresses (it has 40)"] {
            assert!(error.contains(word), "{word}: {error}");
        }
        let amd = TemplateFile { vendor: Some("AuthenticAMD".into()), ..files[0].clone() };
        let error = TemplateFile::common("x", &[files[1].clone(), amd.clone()]).unwrap_err().to_string();
        assert!(error.contains("by Intel") && error.contains("by AMD"), "{error}");
        let error = amd.template().unwrap().apply(all()).unwrap_err().to_string();
        assert!(error.contains("made by AMD, which CPU a is (it has one made by Intel)"), "{error}");
        assert!(TemplateFile::common("x", &[]).is_err());
    }
}
