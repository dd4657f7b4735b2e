//! Which checkpoints stay.
//!
//! ```text
//! --keep-last 3 --keep-daily 2      time ─▶
//!
//! ──full──●─delta──●─delta──●─delta──│midnight, UTC│──●─delta──●─delta──●─delta──
//!         needed by the day's newest ─┘daily                    last     last     last, daily
//! ```
//!
//! A checkpoint stays because a rule wants it, because one that stays stands on it, or because its group stays. [`apply`] is a pure
//! function of what the manifests say; [`prune()`] does it.

mod prune;

pub use prune::{Plan, prune};

use protocol::checkpoint::manifest::Manifest;
use protocol::checkpoint::name::CheckpointId;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Milliseconds in an hour.
const HOUR_MS: u64 = 3_600_000;

/// Milliseconds in a day.
const DAY_MS: u64 = 24 * HOUR_MS;

/// 1 January 1970 was a Thursday: so long before it, weeks began, on a Monday as ISO 8601 has them.
const SINCE_MONDAY_MS: u64 = 3 * DAY_MS;

/// How many to keep, of each workload. Hours, days and weeks are those of UTC; the newest of each stays. One of which there is no
/// checkpoint counts for nothing: three days are the last three that have any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// The newest so many.
    pub last: u32,
    /// The newest of so many hours.
    pub hourly: u32,
    /// The newest of so many days.
    pub daily: u32,
    /// The newest of so many weeks.
    pub weekly: u32,
}

impl Keep {
    /// Whether it says anything.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What retention has to know of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub id: CheckpointId,
    /// Whose it is.
    pub workload: String,
    /// When it was taken, in milliseconds since 1970.
    pub taken_unix_ms: u64,
    /// What it stands on.
    pub parent: Option<CheckpointId>,
    /// The group it belongs to.
    pub group: Option<CheckpointId>,
}

impl From<&Manifest> for Member {
    fn from(manifest: &Manifest) -> Self {
        Self {
            id: manifest.id,
            workload: manifest.workload.clone(),
            taken_unix_ms: manifest.taken_unix_ms,
            parent: manifest.parent.as_ref().map(|parent| parent.id),
            group: manifest.group,
        }
    }
}

/// Why a checkpoint stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It is one of the newest of its workload.
    Last,
    /// It is the newest of its hour.
    Hourly,
    /// It is the newest of its day.
    Daily,
    /// It is the newest of its week.
    Weekly,
    /// This one stays, and is of the same group.
    Group(CheckpointId),
    /// This one stays, and stands on it.
    NeededBy(CheckpointId),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last => f.write_str("last"),
            Self::Hourly => f.write_str("hourly"),
            Self::Daily => f.write_str("daily"),
            Self::Weekly => f.write_str("weekly"),
            Self::Group(id) => write!(f, "in a group with {id}"),
            Self::NeededBy(id) => write!(f, "needed by {id}"),
        }
    }
}

/// What becomes of a set of checkpoints. Each is in one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Retention {
    /// Those that stay, and why, in the order of their names.
    pub kept: BTreeMap<CheckpointId, BTreeSet<Reason>>,
    /// Those that go, in an order in which none goes before one that stands on it.
    pub dropped: Vec<CheckpointId>,
}

/// Applies the rules to checkpoints of any number of workloads. The newest checkpoint of each workload always stays.
///
/// `bystanders` cannot be restored as they are, so they fulfil no rule and neither stay nor go; but what they stand on stays, because
/// what they lack may turn up.
pub fn apply(members: &[Member], bystanders: &[Member], keep: &Keep) -> Retention {
    let mut kept: BTreeMap<CheckpointId, BTreeSet<Reason>> = BTreeMap::new();
    let mut workloads: BTreeMap<&str, Vec<&Member>> = BTreeMap::new();
    for member in members {
        workloads.entry(&member.workload).or_default().push(member);
    }
    for of_one in workloads.values_mut() {
        of_one.sort_by_key(|member| std::cmp::Reverse((member.taken_unix_ms, member.id)));
        let mut want = |id: CheckpointId, reason| {
            kept.entry(id).or_default().insert(reason);
        };
        let last = usize::try_from(keep.last.max(1)).unwrap_or(usize::MAX);
        of_one.iter().take(last).for_each(|member| want(member.id, Reason::Last));
        for (reason, count, length_ms, shift_ms) in [
            (Reason::Hourly, keep.hourly, HOUR_MS, 0),
            (Reason::Daily, keep.daily, DAY_MS, 0),
            (Reason::Weekly, keep.weekly, 7 * DAY_MS, SINCE_MONDAY_MS),
        ] {
            let mut seen = BTreeSet::new();
            for member in &*of_one {
                let bucket = member.taken_unix_ms.saturating_add(shift_ms) / length_ms;
                if seen.len() as u64 == u64::from(count) && !seen.contains(&bucket) {
                    break;
                }
                if seen.insert(bucket) {
                    want(member.id, reason);
                }
            }
        }
    }
    keep_what_they_need(members, bystanders, &mut kept);
    let mut dropped: Vec<&Member> = members.iter().filter(|member| !kept.contains_key(&member.id)).collect();
    leaves_first(&mut dropped);
    Retention { dropped: dropped.iter().map(|member| member.id).collect(), kept }
}

/// Adds groups and ancestors, until nothing is missing.
fn keep_what_they_need(
    members: &[Member],
    bystanders: &[Member],
    kept: &mut BTreeMap<CheckpointId, BTreeSet<Reason>>,
) {
    let all = || members.iter().chain(bystanders);
    let by_id: BTreeMap<CheckpointId, &Member> = all().map(|member| (member.id, member)).collect();
    let droppable: BTreeSet<CheckpointId> = members.iter().map(|member| member.id).collect();
    let mut groups: BTreeMap<CheckpointId, Vec<CheckpointId>> = BTreeMap::new();
    for member in all() {
        if let Some(group) = member.group {
            groups.entry(group).or_default().push(member.id);
        }
    }
    let mut open: Vec<CheckpointId> =
        kept.keys().copied().chain(bystanders.iter().map(|one| one.id)).collect();
    let mut seen: BTreeSet<CheckpointId> = open.iter().copied().collect();
    while let Some(id) = open.pop() {
        let Some(member) = by_id.get(&id) else { continue };
        let of_group = member.group.and_then(|group| groups.get(&group)).into_iter().flatten();
        let of_group = of_group.filter(|other| **other != id).map(|other| (*other, Reason::Group(id)));
        let parent = member.parent.map(|parent| (parent, Reason::NeededBy(id)));
        for (other, reason) in of_group.chain(parent) {
            if seen.insert(other) {
                open.push(other);
                if droppable.contains(&other) {
                    kept.entry(other).or_default().insert(reason);
                }
            }
        }
    }
}

/// Orders checkpoints so that none stands in front of one that stands on it. A ring, which no chain has, is broken somewhere.
fn leaves_first(members: &mut [&Member]) {
    let parents: BTreeMap<CheckpointId, Option<CheckpointId>> =
        members.iter().map(|member| (member.id, member.parent)).collect();
    let depth = |id: CheckpointId| {
        let above = std::iter::successors(Some(id), |id| parents.get(id).copied().flatten());
        above.take(parents.len() + 1).count()
    };
    members.sort_by_cached_key(|member| std::cmp::Reverse((depth(member.id), member.id)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(minute: u64, parent: Option<CheckpointId>) -> Member {
        let id = CheckpointId::new(minute * 60, 1);
        Member { id, workload: "web".into(), taken_unix_ms: minute * 60_000, parent, group: None }
    }

    fn minutes(retention: &Retention) -> Vec<u64> {
        retention.kept.keys().map(|id| id.unix_s() / 60).collect()
    }

    #[test]
    fn the_newest_of_each_hour_day_and_week_stays() {
        // Every 20 minutes for 30 days, from Thursday, 1 January 1970 on; all of them full.
        let members: Vec<Member> = (0..30 * 72).map(|number| member(number * 20, None)).collect();
        let kept = |keep| minutes(&apply(&members, &[], &keep));
        let end = 30 * 1440;
        assert_eq!(kept(Keep { last: 3, ..Keep::default() }), [end - 60, end - 40, end - 20]);
        assert_eq!(kept(Keep { hourly: 3, ..Keep::default() }), [end - 140, end - 80, end - 20]);
        assert_eq!(kept(Keep { daily: 2, ..Keep::default() }), [end - 1460, end - 20]);
        // Friday, 30 January is the last day; the Sundays before it are the 25th and the 18th.
        assert_eq!(kept(Keep { weekly: 3, ..Keep::default() }), [18 * 1440 - 20, 25 * 1440 - 20, end - 20]);
        assert_eq!(kept(Keep::default()), [end - 20], "the newest stays whatever is asked for");
    }

    #[test]
    fn what_a_kept_one_stands_on_is_kept_with_the_reason() {
        let full = member(0, None);
        let first = member(1, Some(full.id));
        let second = member(2, Some(first.id));
        let aside = member(1440 * 3, None);
        let found = apply(
            &[aside.clone(), second.clone(), full.clone(), first.clone()],
            &[],
            &Keep { daily: 2, ..Keep::default() },
        );
        let reason = |member: &Member| found.kept[&member.id].iter().copied().collect::<Vec<_>>();
        assert_eq!(reason(&second), [Reason::Daily]);
        assert_eq!(reason(&first), [Reason::NeededBy(second.id)]);
        assert_eq!(reason(&full), [Reason::NeededBy(first.id)]);
        assert_eq!(reason(&aside), [Reason::Last, Reason::Daily]);
        let found = apply(
            &[full.clone(), first.clone(), second.clone(), aside],
            &[],
            &Keep { last: 1, ..Keep::default() },
        );
        assert_eq!(found.dropped, [second.id, first.id, full.id]);
    }

    #[test]
    fn each_workload_has_its_own_newest() {
        let mut other = member(0, None);
        other.workload = "db".into();
        other.id = CheckpointId::new(0, 2);
        let members = [member(0, None), member(5, None), other];
        assert_eq!(apply(&members, &[], &Keep::default()).dropped, [members[0].id]);
    }

    /// Checkpoints of two workloads, some of them in groups, each a delta on an earlier one of its workload or full.
    fn stores() -> impl Strategy<Value = Vec<Member>> {
        let one =
            (0_u64..20_000, any::<bool>(), proptest::option::of(0_usize..8), proptest::option::of(0_u32..6));
        proptest::collection::vec(one, 0..40).prop_map(|rows| {
            let mut members: Vec<Member> = Vec::new();
            for (number, (minute, second_vm, parent, group)) in rows.into_iter().enumerate() {
                let workload = if second_vm { "db" } else { "web" };
                let before: Vec<_> = members.iter().filter(|one| one.workload == workload).collect();
                let parent = parent.and_then(|back| before.iter().rev().nth(back)).map(|one| one.id);
                members.push(Member {
                    id: CheckpointId::new(minute * 60, number as u32),
                    workload: workload.into(),
                    taken_unix_ms: minute * 60_000,
                    parent,
                    group: group.map(|group| CheckpointId::new(0, 1000 + group)),
                });
            }
            members
        })
    }

    fn keeps() -> impl Strategy<Value = Keep> {
        (0_u32..5, 0_u32..5, 0_u32..5, 0_u32..3).prop_map(|(last, hourly, daily, weekly)| Keep {
            last,
            hourly,
            daily,
            weekly,
        })
    }

    proptest! {
        #[test]
        fn nothing_that_is_needed_goes(members in stores(), keep in keeps()) {
            let found = apply(&members, &[], &keep);
            prop_assert_eq!(found.kept.len() + found.dropped.len(), members.len());
            let kept = |id: &CheckpointId| found.kept.contains_key(id);
            for workload in ["web", "db"] {
                let newest = members.iter().filter(|one| one.workload == workload).max_by_key(|one| (one.taken_unix_ms, one.id));
                prop_assert!(newest.is_none_or(|newest| kept(&newest.id)), "the newest of {} goes", workload);
            }
            for member in &members {
                if kept(&member.id) {
                    prop_assert!(member.parent.is_none_or(|parent| kept(&parent)), "{} lost its parent", member.id);
                }
                for other in members.iter().filter(|other| other.group.is_some() && other.group == member.group) {
                    prop_assert_eq!(kept(&member.id), kept(&other.id), "a group is torn");
                }
            }
            for (at, id) in found.dropped.iter().enumerate() {
                let later = &found.dropped[at + 1..];
                let stands_on_it = |one: &&Member| one.parent == Some(*id) && later.contains(&one.id);
                prop_assert!(members.iter().find(stands_on_it).is_none(), "{} goes too early", id);
            }
            prop_assert!(found.kept.values().all(|reasons| !reasons.is_empty()));
        }

        #[test]
        fn twice_is_once(members in stores(), keep in keeps()) {
            let found = apply(&members, &[], &keep);
            let rest: Vec<Member> = members.into_iter().filter(|one| found.kept.contains_key(&one.id)).collect();
            prop_assert!(apply(&rest, &[], &keep).dropped.is_empty());
        }

        #[test]
        fn who_keeps_more_keeps_all_of_it(members in stores(), keep in keeps(), more in keeps()) {
            let both = Keep {
                last: keep.last + more.last,
                hourly: keep.hourly + more.hourly,
                daily: keep.daily + more.daily,
                weekly: keep.weekly + more.weekly,
            };
            let (less, more) = (apply(&members, &[], &keep), apply(&members, &[], &both));
            prop_assert!(less.kept.keys().all(|id| more.kept.contains_key(id)));
        }
    }
}
