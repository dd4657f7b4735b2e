//! Several machines in one checkpoint: all of them or none, and all of one instant.

use crate::brittle::Brittle;
use crate::harness::{layout, options};
use crate::reader;
use migrate::cancel::CancelFlag;
use migrate::checkpoint::{GroupFailed, GroupOptions, GroupReport, Joining, take_group};
use migrate::error::Error;
use migrate::report::Quiet;
use migrate::source::scripted::{Call, Machine, Who, Witness};
use migrate::store::Store as _;
use migrate::vault::{Vault, new_id};
use protocol::checkpoint::name::{CHECKPOINTS, CheckpointId, DATA, GROUPS};
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Shop {
    members: Vec<(Witness, Machine)>,
    store: Brittle,
    vault: Vault,
}

const NAMES: [&str; 3] = ["a", "b", "c"];

impl Shop {
    fn new(seed: u64) -> Self {
        let store = Brittle::new();
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        let machine = |(name, seed): (&&str, u64)| {
            let witness = Witness::default();
            (witness.clone(), Machine::new(layout(), seed, seed % 4, witness).named(name))
        };
        Self { members: NAMES.iter().zip(seed..).map(machine).collect(), store, vault }
    }

    fn take(&self) -> Result<GroupReport, Box<GroupFailed>> {
        let joining = self.members.iter().zip(NAMES).map(|((_, machine), name)| Joining {
            name: name.into(),
            open: Box::new(move || Ok((machine.attach(), Box::new(Quiet)))),
            options: options(),
        });
        let wanted = GroupOptions { id: new_id().unwrap(), name: "shop".into(), barrier: true };
        let mut lease = self.store.lock("a test").unwrap();
        take_group(joining.collect(), &self.vault, &mut *lease, &wanted, &CancelFlag::default())
    }

    /// Takes a group checkpoint that must be right.
    fn take_soundly(&self) -> GroupReport {
        let report = self.take().unwrap_or_else(|failed| panic!("{failed}: {:#?}", failed.report));
        let group = self.vault.resolve_group("shop").unwrap();
        assert!(report.committed && group.id == report.id && group.members.len() == 3, "{report:#?}");
        // Nobody went on before everybody was copied, so there was an instant at which all of them stood still.
        assert!(report.together_us > 0, "{report:#?}");
        for ((witness, machine), member) in self.members.iter().zip(&report.members) {
            assert!(reader::memory(&self.vault, member.id).unwrap() == witness.frozen_memory());
            assert!(witness.is_running(Who::Source));
            assert_eq!(machine.baseline(), Some(member.id));
            let manifest = self.vault.manifest(member.id).unwrap().manifest;
            assert_eq!((manifest.group, manifest.workload), (Some(report.id), member.workload.clone()));
        }
        report
    }

    fn committed(&self) -> Vec<CheckpointId> {
        self.vault.manifests().unwrap().committed.iter().map(|found| found.manifest.id).collect()
    }

    fn baselines(&self) -> Vec<Option<CheckpointId>> {
        self.members.iter().map(|(_, machine)| machine.baseline()).collect()
    }

    /// Behind an attempt that failed: nobody's checkpoint exists, everybody runs, and nothing else has changed.
    fn assert_harmless(&self, committed: &[CheckpointId], baselines: &[Option<CheckpointId>], what: &str) {
        assert_eq!(self.committed(), committed, "{what}");
        assert_eq!(self.baselines(), baselines, "{what}");
        for (witness, machine) in &self.members {
            assert!(witness.is_running(Who::Source), "{what}: one stands still");
            machine.heal();
        }
        let next = self.take_soundly();
        let parents: Vec<_> = next.members.iter().map(|member| member.parent).collect();
        assert_eq!(parents, baselines, "{what}");
    }
}

#[test]
fn a_group_is_one_checkpoint_again_and_again() {
    let shop = Shop::new(1);
    let first = shop.take_soundly();
    let second = shop.take_soundly();
    for (first, second) in first.members.iter().zip(&second.members) {
        assert_eq!(second.parent, Some(first.id));
    }
    assert_eq!(shop.committed().len(), 6);
}

#[test]
fn one_member_that_fails_is_nobodys_checkpoint() {
    for (round, call) in [Call::Track, Call::Harvest, Call::Read, Call::Freeze, Call::State, Call::Thaw]
        .into_iter()
        .enumerate()
    {
        let shop = Shop::new(round as u64);
        // A delta of a machine that wrote nothing reads nothing.
        if round % 2 == 0 && call != Call::Read {
            shop.take_soundly();
        }
        let (committed, baselines) = (shop.committed(), shop.baselines());
        shop.members[round % 3].1.on_call(move |made, number| {
            if made == call && number == 0 { Err(Error::Workload("it says no".into())) } else { Ok(()) }
        });
        let begun = Instant::now();
        let failed = shop.take().unwrap_err();
        let text = failed.to_string();
        assert!(text.starts_with(NAMES[round % 3]) && text.contains("it says no"), "{call:?}: {text}");
        assert!(!failed.report.committed);
        // The others were told, and did not stand still until they had waited long enough.
        assert!(begun.elapsed() < Duration::from_secs(4), "{call:?}: {:?}", begun.elapsed());
        shop.assert_harmless(&committed, &baselines, &text);
    }
}

#[test]
fn a_member_that_cannot_be_had_is_nobodys_checkpoint() {
    let shop = Shop::new(7);
    let mut joining: Vec<Joining<'_>> = Vec::new();
    for (number, (_, machine)) in shop.members.iter().enumerate() {
        joining.push(Joining {
            name: NAMES[number].into(),
            open: Box::new(move || match number {
                1 => Err(Error::Workload("somebody else holds it".into())),
                _ => Ok((machine.attach(), Box::new(Quiet))),
            }),
            options: options(),
        });
    }
    let wanted = GroupOptions { id: new_id().unwrap(), name: "shop".into(), barrier: true };
    let mut lease = shop.store.lock("a test").unwrap();
    let failed = take_group(joining, &shop.vault, &mut *lease, &wanted, &CancelFlag::default()).unwrap_err();
    drop(lease);
    assert_eq!(failed.to_string(), "b: somebody else holds it");
    shop.assert_harmless(&[], &[None; 3], "one cannot be had");
}

#[test]
fn a_store_that_fails_at_any_change_has_no_group_and_the_next_one_is_right() {
    let mut failures = 0;
    for changes in 0.. {
        let shop = Shop::new(changes);
        let before = changes.is_multiple_of(2).then(|| shop.take_soundly());
        let (committed, baselines) = (shop.committed(), shop.baselines());
        shop.store.fail_behind(changes);
        let taken = shop.take();
        shop.store.mend();
        match taken {
            Err(failed) => {
                failures += 1;
                let groups = shop.store.list(GROUPS).unwrap().len();
                assert_eq!(groups, usize::from(before.is_some()), "{failed}");
                shop.assert_harmless(&committed, &baselines, &format!("change {changes}: {failed}"));
            }
            Ok(_) => break,
        }
    }
    // Of each member a segment, the index, the state and the manifest, and then the group.
    assert!(failures >= 13, "{failures}");
}

#[test]
fn a_thread_that_ends_unexpectedly_leaves_nobody_waiting() {
    for (seed, prefix) in (1..).zip([DATA, CHECKPOINTS, GROUPS]) {
        let shop = Shop::new(seed);
        shop.take_soundly();
        let (committed, baselines) = (shop.committed(), shop.baselines());
        shop.store.panic_at(Some(prefix));
        let begun = Instant::now();
        let failed = shop.take().unwrap_err();
        assert!(failed.to_string().contains("ended unexpectedly"), "{prefix}: {failed}");
        assert!(begun.elapsed() < Duration::from_secs(4), "{prefix}: {:?}", begun.elapsed());
        shop.store.panic_at(None);
        shop.assert_harmless(&committed, &baselines, &format!("{prefix}: {failed}"));
    }
}
