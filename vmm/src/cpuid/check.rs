//! Whether a host can show a guest the processor it was started with.

use super::{Features, Leaf, MAX_LEAVES};
use crate::error::{Error, Result};

/// How wide addresses are, in bits: physical and linear (leaf 0x80000008, eax).
pub(super) const LEAF_ADDRESSES: u32 = 0x8000_0008;

/// The features that `guest` was started with and `host` cannot show, by name.
pub fn missing_features(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
    let mut missing = Features::of(guest).without(Features::of(host)).names();
    let ((physical, linear), (most_physical, most_linear)) = (address_bits(guest), address_bits(host));
    // A description without the leaf says nothing of it.
    if physical > most_physical && most_physical > 0 {
        missing.push(format!("{physical} bits of physical addresses (it has {most_physical})"));
    }
    if linear > most_linear && most_linear > 0 {
        missing.push(format!("{linear} bits of linear addresses (it has {most_linear})"));
    }
    missing
}

/// Bits of a physical and of a linear address, 0 where that is not said.
pub(super) fn address_bits(leaves: &[Leaf]) -> (u32, u32) {
    let found = leaves.iter().find(|leaf| leaf.function == LEAF_ADDRESSES);
    found.map_or((0, 0), |leaf| (leaf.eax & 0xff, leaf.eax >> 8 & 0xff))
}

/// Who made the processor, from leaf 0: for instance `AuthenticAMD`.
pub fn vendor(leaves: &[Leaf]) -> String {
    let Some(leaf) = leaves.iter().find(|leaf| leaf.function == 0) else { return String::new() };
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A maker's name as people know it. What comes from a peer must not reach a terminal unescaped.
pub(super) fn maker(vendor: &str) -> String {
    match vendor {
        "GenuineIntel" => "Intel".into(),
        "AuthenticAMD" => "AMD".into(),
        "HygonGenuine" => "Hygon".into(),
        other => format!("{other:?}"),
    }
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
        return Err(Error::MissingFeatures(format!(
            "a processor made by {} (it has one made by {}, and no guest moves between the two)",
            maker(&theirs),
            maker(&ours)
        )));
    }
    let missing = missing_features(guest, host);
    if missing.is_empty() { Ok(()) } else { Err(Error::MissingFeatures(missing.join(", "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32, edx: u32) -> Leaf {
        Leaf { function, ecx, edx, ..Leaf::default() }
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
    fn wider_addresses_are_a_feature() {
        let width = |eax| Leaf { function: LEAF_ADDRESSES, eax, ..Leaf::default() };
        assert!(check(&[width(0x3028)], &[width(0x392e)]).is_ok());
        let error = check(&[width(0x392e)], &[width(0x3028)]).unwrap_err().to_string();
        assert!(error.contains("46 bits of physical addresses (it has 40), 57 bits of linear"), "{error}");
    }

    #[test]
    fn another_maker_is_refused_plainly() {
        let made_by = |name: &[u8; 12]| {
            let part = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
            [Leaf { ebx: part(0), edx: part(4), ecx: part(8), ..Leaf::default() }]
        };
        let error = check(&made_by(b"GenuineIntel"), &made_by(b"AuthenticAMD")).unwrap_err().to_string();
        assert!(error.contains("a processor made by Intel (it has one made by AMD, and no guest"), "{error}");
        let error =
            check(&made_by(b"\x1b[2JIntel\0\0\0"), &made_by(b"AuthenticAMD")).unwrap_err().to_string();
        assert!(!error.contains('\x1b'), "{error}");
    }
}
