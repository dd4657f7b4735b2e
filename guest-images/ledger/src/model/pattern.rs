//! Which page iteration `k` writes: a pure function of the seed, the working set and `k`.

/// In which order the working set is overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One page after the other, then from the start again.
    Seq,
    /// Each page with the same probability.
    Uniform,
    /// The first `pages_percent` of the working set take `writes_percent` of the writes.
    Hot {
        /// The share of pages that are hot, 1 to 100; at least one page is.
        pages_percent: u8,
        /// The share of writes that go to them, 0 to 100.
        writes_percent: u8,
    },
}

/// The high and the low half of a 128-bit product, folded: one multiplication that depends on all bits.
pub(super) fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

// Odd, with bits set and clear in no order: digits of sqrt(2), sqrt(3) and sqrt(5) after the point.
pub(super) const ROOT_2: u64 = 0x6A09_E667_F3BC_C909;
pub(super) const ROOT_3: u64 = 0xBB67_AE85_84CA_A73B;
pub(super) const ROOT_5: u64 = 0x3C6E_F372_FE94_F82B;

/// A number that looks independent for each pair of arguments.
pub(super) fn mix(a: u64, b: u64) -> u64 {
    fold(fold(a ^ ROOT_2, ROOT_3) ^ b.wrapping_mul(ROOT_5), ROOT_2) ^ b
}

/// Scales 64 uniform bits to `0..bound`.
fn below(bits: u64, bound: u64) -> u64 {
    ((u128::from(bits) * u128::from(bound)) >> 64) as u64
}

impl Pattern {
    /// The page that iteration `k` (counted from 0) writes, less than `ws_pages` unless that is 0.
    pub fn page_of(self, seed: u64, ws_pages: u64, k: u64) -> u64 {
        let draw = || mix(mix(seed, ROOT_3), k);
        match self {
            Pattern::Seq => k.checked_rem(ws_pages).unwrap_or(0),
            Pattern::Uniform => below(draw(), ws_pages),
            Pattern::Hot { pages_percent, writes_percent } => {
                let hot = (ws_pages * u64::from(pages_percent) / 100).max(1);
                let draw = draw();
                let is_hot = below(mix(draw, ROOT_5), 100) < u64::from(writes_percent);
                if is_hot || hot >= ws_pages {
                    below(draw, hot.min(ws_pages))
                } else {
                    hot + below(draw, ws_pages - hot)
                }
            }
        }
    }
}
