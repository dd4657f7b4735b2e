//! Whether to try to pack: a pure rule, so that memory which cannot be packed does not pay for being tried.

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

    /// Some pages were tried: whether they were worth packing.
    pub(super) fn tried(&mut self, worth: bool) {
        self.skipped = if worth { 0 } else { (self.skipped * 2 + 1).min(MOST_SKIPPED) };
        self.skipping = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of some loads are tried.
    fn tries(packing: &mut Packing, loads: u32, worth: bool) -> usize {
        let tried = |_: &u32| {
            let now = packing.try_next();
            if now {
                packing.tried(worth);
            }
            now
        };
        (0..loads).filter(tried).count()
    }

    #[test]
    fn what_cannot_be_packed_is_seldom_tried_and_what_can_always_is() {
        let mut packing = Packing::default();
        assert_eq!(tries(&mut packing, 1000, true), 1000);
        // 1, 3, 7, 15, and then 31 are skipped between two.
        assert_eq!(tries(&mut packing, 1024, false), 5 + 31);
        // Once it can be packed again, that is noticed within 32 loads.
        assert!(tries(&mut packing, 64, true) >= 32);
        assert_eq!(tries(&mut packing, 10, true), 10);
    }
}
