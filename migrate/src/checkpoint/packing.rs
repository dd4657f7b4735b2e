//! Whether to try to pack: a pure rule, so that memory which cannot be packed does not pay for being tried.

/// Packed pages that do not become shorter than this part of their length are not worth unpacking.
const WORTH_EIGHTHS: u64 = 7;

/// Of memory that cannot be packed, one load in so many is tried: with 16 of its 64 pages, so that is less than 1 % of the bytes.
const MOST_SKIPPED: u32 = 31;

/// What the latest loads of a writer taught.
#[derive(Debug, Default)]
pub(super) struct Packing {
    /// Loads that are not tried any more before the next one is.
    skipping: u32,
    /// How many were skipped before the latest try, if that failed.
    skipped: u32,
}

impl Packing {
    /// Whether to try the next load.
    pub(super) fn try_next(&mut self) -> bool {
        let now = self.skipping == 0;
        self.skipping = self.skipping.saturating_sub(1);
        now
    }

    /// So many bytes became so many. Answers whether that is worth it.
    pub(super) fn tried(&mut self, bytes: u64, stored_bytes: u64) -> bool {
        let worth = stored_bytes * 8 <= bytes * WORTH_EIGHTHS;
        self.skipped = if worth { 0 } else { (self.skipped * 2 + 1).min(MOST_SKIPPED) };
        self.skipping = self.skipped;
        worth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loads that are tried when packing makes them so long, of 100.
    fn tries(packing: &mut Packing, loads: u32, stored_bytes: u64) -> u32 {
        (0..loads).map(|_| u32::from(packing.try_next() && { packing.tried(100, stored_bytes); true })).sum()
    }

    #[test]
    fn what_cannot_be_packed_is_seldom_tried_and_what_can_always_is() {
        let mut packing = Packing::default();
        assert_eq!(tries(&mut packing, 1000, 87), 1000);
        // 1, 3, 7, 15, and then 31 are skipped between two.
        assert_eq!(tries(&mut packing, 1024, 100), 5 + 31);
        // Once it can be packed again, that is noticed within 32 loads.
        assert!(tries(&mut packing, 64, 50) >= 32);
        assert_eq!(tries(&mut packing, 10, 50), 10);
    }
}
