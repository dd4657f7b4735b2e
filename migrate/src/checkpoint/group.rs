//! One checkpoint of several workloads: of one instant, and either of all of them or of none.
//!
//! Every member is written down as ever, by a thread of its own, and waits for the others at three places: see
//! [`Meeting`]. Its manifest names the group, and so it does not exist before the group's object does, which is written
//! last.

use super::meeting::{Meeting, Spread};
use super::{CheckpointReport, Failed, Options, take};
use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::report::{Observer, micros};
use crate::source::Source;
use crate::store::Lease;
use crate::vault::Vault;
use protocol::checkpoint::manifest::MAX_MEMBERS;
use protocol::checkpoint::name::CheckpointId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What a group is called, and how it is taken.
#[derive(Debug, Clone)]
pub struct GroupOptions {
    /// The group checkpoint's name in the store.
    pub id: CheckpointId,
    /// What the operator calls the group.
    pub name: String,
    /// Whether its members stand still at one instant. Without it they belong to no instant: for tests of what it is good for.
    pub barrier: bool,
}

/// A workload that is held, and who watches it.
pub(super) type Held = (Box<dyn Source>, Box<dyn Observer>);

/// One that is to be written down.
pub struct Joining<'a> {
    /// The workload's name.
    pub name: String,
    /// Takes hold of it, and says who watches. Called in the thread that writes it down.
    pub open: Box<dyn FnOnce() -> Result<Held> + Send + 'a>,
    /// How it is taken; `group` is set here.
    pub options: Options,
}

/// What a group checkpoint did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupReport {
    /// Its name in the store.
    pub id: CheckpointId,
    /// What the operator calls the group.
    pub name: String,
    /// Where it lies.
    pub store: String,
    /// Whether it exists: all of every member is durable.
    pub committed: bool,
    /// From the first member that stood still to the last one, in microseconds.
    pub freeze_spread_us: u64,
    /// How long all members stood still at once.
    pub together_us: u64,
    /// The longest pause of a member.
    pub longest_pause_us: u64,
    /// From the first call to the end.
    pub total_us: u64,
    /// Its members, those that came to be written down at all.
    pub members: Vec<CheckpointReport>,
}

/// A group checkpoint that does not exist.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct GroupFailed {
    /// Why.
    pub error: Error,
    /// Its numbers.
    pub report: GroupReport,
}

/// A right to write that several threads ask about.
struct Shared<'a>(Mutex<&'a mut dyn Lease>);

impl Lease for Shared<'_> {
    fn check(&self) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).check()
    }

    fn held_for(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).held_for()
    }
}

/// Takes one checkpoint of all of these.
///
/// # Errors
/// As of one, naming the member that failed. No member's checkpoint exists then, each of them runs, and its next checkpoint misses
/// nothing.
pub fn take_group(
    members: Vec<Joining<'_>>,
    vault: &Vault,
    lease: &mut dyn Lease,
    options: &GroupOptions,
    cancel: &CancelFlag,
) -> std::result::Result<GroupReport, Box<GroupFailed>> {
    let begun = Instant::now();
    let mut report = GroupReport {
        id: options.id,
        name: options.name.clone(),
        store: vault.place(),
        committed: false,
        freeze_spread_us: 0,
        together_us: 0,
        longest_pause_us: 0,
        total_us: 0,
        members: Vec::new(),
    };
    let names: Vec<String> = members.iter().map(|member| member.name.clone()).collect();
    if let Err(error) = check(&names) {
        return Err(Box::new(GroupFailed { error, report }));
    }
    let meeting = Meeting::new(options.id, names.clone(), options.barrier, cancel);
    let lease = Shared(Mutex::new(lease));
    let outcomes: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(members)
            .map(|(number, joining)| {
                let (place, lease) = (meeting.member(number), &lease);
                let name = &options.name;
                scope.spawn(move || {
                    let left = OnDrop(place.clone());
                    let outcome = join(joining, place.clone(), name, vault, lease);
                    if let Err(Failing { error, .. }) = &outcome {
                        place.fail(&error.to_string());
                    }
                    std::mem::forget(left);
                    outcome
                })
            })
            .collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let culprit = meeting.culprit();
    let mut failure: Option<(bool, Error)> = None;
    for (number, outcome) in outcomes.into_iter().enumerate() {
        let failing = match outcome {
            Ok(Ok(done)) => {
                report.members.push(done);
                continue;
            }
            Ok(Err(failing)) => failing,
            Err(_) => Failing {
                error: Error::Host("the thread that wrote it down ended unexpectedly".into()),
                report: None,
            },
        };
        report.members.extend(failing.report.map(|report| *report));
        // A workload that stands still is worse news than why; and of the others, the first that failed knows more than those that
        // were told.
        let first = culprit == Some(number) || matches!(failing.error, Error::NotResumed { .. });
        if failure.as_ref().is_none_or(|(by_first, _)| first && !by_first) {
            let name = names.get(number).map_or("", String::as_str);
            failure = Some((first, failing.error.of_member(name)));
        }
    }
    let Spread { freezes, together } = meeting.spread();
    report.committed = failure.is_none();
    report.freeze_spread_us = micros(freezes);
    report.together_us = micros(together);
    report.longest_pause_us = report.members.iter().map(|member| member.pause_us).max().unwrap_or(0);
    report.total_us = micros(begun.elapsed());
    match failure {
        None => Ok(report),
        Some((_, error)) => Err(Box::new(GroupFailed { error, report })),
    }
}

fn check(names: &[String]) -> Result<()> {
    if names.is_empty() || names.len() > MAX_MEMBERS {
        return Err(Error::Usage(format!(
            "a group has 1 to {MAX_MEMBERS} members, this one has {}",
            names.len()
        )));
    }
    let distinct: BTreeSet<_> = names.iter().collect();
    if distinct.len() < names.len() {
        return Err(Error::Usage("a group has every workload once".into()));
    }
    Ok(())
}

/// Whoever leaves without a word has failed: the others must not wait.
struct OnDrop(super::Member);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.fail("the thread that wrote it down ended unexpectedly");
    }
}

struct Failing {
    error: Error,
    report: Option<Box<CheckpointReport>>,
}

fn join(
    joining: Joining<'_>,
    place: super::Member,
    name: &str,
    vault: &Vault,
    lease: &Shared<'_>,
) -> std::result::Result<CheckpointReport, Failing> {
    let Joining { open, mut options, .. } = joining;
    let cancel = place.cancel();
    options.group = Some((place, name.into()));
    let (source, mut observer) = open().map_err(|error| Failing { error, report: None })?;
    take(source, vault, lease, &options, &cancel, observer.as_mut()).map_err(|failed| {
        let Failed { error, report } = *failed;
        Failing { error, report: Some(Box::new(report)) }
    })
}
