//! In which order a restored workload touched its pages first: the body of a touched object.
//!
//! ```text
//! u32 runs
//! run     u64 first page   u32 pages   u16 space   u16 zero
//! ```
//!
//! All numbers are little-endian. It is a hint and nothing else: whoever restores the checkpoint later brings these pages first. A record
//! that is damaged, or does not fit the layout, is passed over.

use crate::error::{ProtocolError, Result};
use crate::layout::Layout;
use crate::page::{PageRun, SpaceId};

/// The most runs in a record: 1 MiB of them.
pub const MAX_RUNS: usize = 1 << 16;

const RUN_BYTES: usize = 16;

/// The body of the object. Of runs behind [`MAX_RUNS`] nothing is written.
pub fn encode(runs: &[PageRun]) -> Vec<u8> {
    let runs = &runs[..runs.len().min(MAX_RUNS)];
    let mut bytes = Vec::with_capacity(4 + runs.len() * RUN_BYTES);
    bytes.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        bytes.extend_from_slice(&run.first.to_le_bytes());
        bytes.extend_from_slice(&run.count.to_le_bytes());
        bytes.extend_from_slice(&run.space.0.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
    }
    bytes
}

/// Reads a record for a layout that was validated.
///
/// # Errors
/// `Truncated`, `TooLarge`, `OutsideLayout`, or `Value`.
pub fn decode(layout: &Layout, bytes: &[u8]) -> Result<Vec<PageRun>> {
    const WHAT: &str = "a record of first touches";
    let found = bytes.len() as u64;
    let (count, rows) =
        bytes.split_first_chunk::<4>().ok_or(ProtocolError::Truncated { what: WHAT, found, needed: 4 })?;
    let count = u64::from(u32::from_le_bytes(*count));
    if count > MAX_RUNS as u64 {
        return Err(ProtocolError::TooLarge { what: WHAT, found: count, limit: MAX_RUNS as u64 });
    }
    let needed = 4 + count * RUN_BYTES as u64;
    if found < needed {
        return Err(ProtocolError::Truncated { what: WHAT, found, needed });
    }
    if found > needed {
        return Err(ProtocolError::TooLarge { what: WHAT, found, limit: needed });
    }
    let run = |row: &[u8; RUN_BYTES]| {
        let [f0, f1, f2, f3, f4, f5, f6, f7, c0, c1, c2, c3, s0, s1, z0, z1] = *row;
        let zero = u16::from_le_bytes([z0, z1]);
        if zero != 0 {
            return Err(ProtocolError::Value {
                what: "a reserved field of a record of first touches",
                found: zero.into(),
            });
        }
        let run = PageRun {
            space: SpaceId(u16::from_le_bytes([s0, s1])),
            first: u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]),
            count: u32::from_le_bytes([c0, c1, c2, c3]),
        };
        layout.check(&run)?;
        Ok(run)
    };
    rows.as_chunks::<RUN_BYTES>().0.iter().map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Space, SpaceKind};
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout {
            spaces: vec![Space { id: SpaceId(0), kind: SpaceKind::Memory, pages: 5000, guest_address: 0 }],
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(pages in proptest::collection::vec((0u64..4900, 1u32..100), 0..40)) {
            let runs: Vec<_> =
                pages.into_iter().map(|(first, count)| PageRun { space: SpaceId(0), first, count }).collect();
            prop_assert_eq!(decode(&layout(), &encode(&runs)).unwrap(), runs);
        }

        #[test]
        fn garbage_is_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&layout(), &bytes);
        }
    }

    #[test]
    fn a_record_that_does_not_fit_is_refused() {
        let good = encode(&[PageRun { space: SpaceId(0), first: 4999, count: 1 }]);
        decode(&layout(), &good).unwrap();
        let (mut longer, mut reserved, mut outside, mut many) =
            (good.clone(), good.clone(), good.clone(), good.clone());
        longer.push(0);
        reserved[18] = 1;
        outside[12] = 2;
        many[3] = 1;
        for bad in [&good[..3], &good[..19], &longer, &reserved, &outside, &many] {
            assert!(decode(&layout(), bad).is_err(), "{bad:?}");
        }
    }
}
