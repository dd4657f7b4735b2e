//! What checkpoints and objects are called.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The name of one checkpoint, `20261123T194831Z-3f9a1c07`: when it was begun, in UTC, and 32 random bits. Names sort by time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckpointId {
    /// Seconds since 1970, at most [`MAX_UNIX_S`].
    unix_s: u64,
    random: u32,
}

/// The last second of the year 9999: four digits have to do.
pub const MAX_UNIX_S: u64 = 253_402_300_799;

const SECONDS_PER_DAY: u64 = 86_400;

impl CheckpointId {
    /// The name of a checkpoint that begins now; a time behind the year 9999 is taken for its last second.
    pub fn new(unix_s: u64, random: u32) -> Self {
        Self { unix_s: unix_s.min(MAX_UNIX_S), random }
    }

    /// When it was begun, in seconds since 1970.
    pub fn unix_s(&self) -> u64 {
        self.unix_s
    }

    /// What tells it from others of that second.
    pub fn random(&self) -> u32 {
        self.random
    }
}

/// Year, month and day of a day counted from 1970-01-01 on, in the Gregorian calendar: years are counted from March on, so that
/// the leap day is a year's last.
fn civil(day: u64) -> (u64, u64, u64) {
    // Day 0 of era 0 is the first of March of the year 0; an era has 400 years.
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, of_year - (153 * from_march + 2) / 5 + 1)
}

/// The day counted from 1970-01-01 on; `None` for a date that no calendar has, or before 1970.
fn day_of(year: u64, month: u64, day: u64) -> Option<u64> {
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let year_from_march = year.checked_sub(u64::from(month <= 2))?;
    let (era, year_of_era) = (year_from_march / 400, year_from_march % 400);
    let of_year = (153 * from_march + 2) / 5 + day.checked_sub(1)?;
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    let found = (era * 146_097 + of_era).checked_sub(719_468)?;
    (civil(found) == (year, month, day)).then_some(found)
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil(self.unix_s / SECONDS_PER_DAY);
        let second = self.unix_s % SECONDS_PER_DAY;
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z-{:08x}", self.random)
    }
}

impl fmt::Debug for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for CheckpointId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "a checkpoint is named like 20261123T194831Z-3f9a1c07";
        let number = |from: usize, to: usize| {
            let digits = text.get(from..to).filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
            digits.and_then(|part| part.parse::<u64>().ok()).ok_or(WRONG)
        };
        let random = text.get(17..).filter(|part| {
            part.len() == 8 && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        });
        let random = random.and_then(|part| u32::from_str_radix(part, 16).ok()).ok_or(WRONG)?;
        if text.get(8..9) != Some("T") || text.get(15..17) != Some("Z-") {
            return Err(WRONG);
        }
        let day = day_of(number(0, 4)?, number(4, 6)?, number(6, 8)?).ok_or(WRONG)?;
        let (hour, minute, second) = (number(9, 11)?, number(11, 13)?, number(13, 15)?);
        if hour > 23 || minute > 59 || second > 59 {
            return Err(WRONG);
        }
        Ok(Self { unix_s: day * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second, random })
    }
}

impl Serialize for CheckpointId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CheckpointId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The object that says what a store is.
pub const STORE: &str = "store.json";

/// Where manifests lie.
pub const CHECKPOINTS: &str = "checkpoints/";

/// Where the data of all checkpoints lies.
pub const DATA: &str = "data/";

/// Where group checkpoints lie.
pub const GROUPS: &str = "groups/";

/// Where it is noted what was given up.
pub const PRUNED: &str = "pruned/";

/// Where orders of first touches lie.
pub const TOUCHED: &str = "touched/";

/// Where merged indexes lie.
pub const MERGED: &str = "merged/";

/// The manifest of a checkpoint.
pub fn manifest(id: CheckpointId) -> String {
    format!("{CHECKPOINTS}{id}")
}

/// The index of a checkpoint.
pub fn index(id: CheckpointId) -> String {
    format!("{DATA}{id}/index")
}

/// The state of a checkpoint.
pub fn state(id: CheckpointId) -> String {
    format!("{DATA}{id}/state")
}

/// One segment of a checkpoint.
pub fn segment(id: CheckpointId, number: u32) -> String {
    format!("{DATA}{id}/segment-{number:05}")
}

/// A group checkpoint.
pub fn group(id: CheckpointId) -> String {
    format!("{GROUPS}{id}")
}

/// The note that a checkpoint was given up.
pub fn pruned(id: CheckpointId) -> String {
    format!("{PRUNED}{id}")
}

/// One order of first touches of a checkpoint.
pub fn touched(id: CheckpointId, random: u64) -> String {
    format!("{TOUCHED}{id}/{random:016x}")
}

/// Where all of a checkpoint's pages lie, its chain merged.
pub fn merged_index(id: CheckpointId) -> String {
    format!("{MERGED}{id}/index")
}

/// The sums of these pages.
pub fn merged_sums(id: CheckpointId) -> String {
    format!("{MERGED}{id}/sums")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_is_a_time_that_people_know() {
        for (unix_s, text) in [
            (0, "19700101T000000Z-00000000"),
            (951_827_696, "20000229T123456Z-00000000"),
            (1_795_463_311, "20261123T194831Z-00000000"),
            (MAX_UNIX_S, "99991231T235959Z-00000000"),
        ] {
            assert_eq!(CheckpointId::new(unix_s, 0).to_string(), text);
            assert_eq!(text.parse(), Ok(CheckpointId::new(unix_s, 0)));
        }
        for wrong in [
            "",
            "x",
            "20261123T194831Z",
            "20261123T194831Z-3f9a1c0",
            "20261123T194831Z-3F9A1C07",
            "20260230T000000Z-00000000",
            "20261123T240000Z-00000000",
            "20261123 194831Z-3f9a1c07",
            "19691231T235959Z-00000000",
            "2026112äT194831Z-3f9a1c07",
        ] {
            wrong.parse::<CheckpointId>().unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn a_name_reads_back_and_sorts_by_time(a in 0..=MAX_UNIX_S, b in 0..=MAX_UNIX_S, random: u32) {
            let (a, b) = (CheckpointId::new(a, random), CheckpointId::new(b, random));
            prop_assert_eq!(a.to_string().parse(), Ok(a));
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            if let Ok(id) = text.parse::<CheckpointId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
