//! Several ranges of an object as few reads.

use crate::error::{Error, Result};
use std::ops::Range;

/// Checks that ranges begin before they end, and that the buffer is as long as all of them.
pub(super) fn check(name: &str, ranges: &[Range<u64>], buffer: &[u8]) -> Result<()> {
    let mut bytes = ranges.iter().map(|range| range.end.checked_sub(range.start));
    let sum = bytes.try_fold(0_u64, |sum, bytes| sum.checked_add(bytes?));
    if sum == Some(buffer.len() as u64) {
        return Ok(());
    }
    Err(Error::Store(format!("the ranges to read of the object {name} do not fit the room for them")))
}

/// Reads ranges, one behind the other: those that touch as one.
pub(super) fn each(
    name: &str,
    ranges: &[Range<u64>],
    buffer: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    check(name, ranges, buffer)?;
    let mut rest = buffer;
    for run in ranges.chunk_by(|one, next| one.end == next.start) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let Some((part, behind)) = usize::try_from(last.end - first.start)
            .ok()
            .and_then(|bytes| std::mem::take(&mut rest).split_at_mut_checked(bytes))
        else {
            break;
        };
        read(first.start, part)?;
        rest = behind;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_that_touch_are_one_read() {
        let mut reads = Vec::new();
        let read = |offset, part: &mut [u8]| {
            reads.push((offset, part.len()));
            Ok(())
        };
        each("x", &[0..4, 4..8, 9..10, 10..10, 2..3], &mut [0; 10], read).unwrap();
        assert_eq!(reads, [(0, 8), (9, 1), (2, 1)]);
        for (wrong, room) in [(0..4, 3), (Range { start: 4, end: 0 }, 0), (0..u64::MAX, 1)] {
            each("x", &[wrong], &mut vec![0; room], |_, _| Ok(())).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_the_ranges_one_behind_the_other(pairs in prop::collection::vec((0_u64..60, 0_u64..20), 0..8)) {
            let bytes: Vec<u8> = (0..80).collect();
            let ranges: Vec<_> = pairs.iter().map(|(from, length)| *from..from + length).collect();
            let expected: Vec<u8> = ranges.iter().flat_map(|range| range.clone().map(|at| at as u8)).collect();
            let mut found = vec![0; expected.len()];
            each("x", &ranges, &mut found, |offset, part| {
                part.copy_from_slice(&bytes[offset as usize..][..part.len()]);
                Ok(())
            }).unwrap();
            prop_assert_eq!(found, expected);
        }
    }
}
