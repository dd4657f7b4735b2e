//! Where the members of a group wait for each other: a barrier with a word of its own for each step.
//!
//! ```text
//! rounds ─▶ ready ══▶ freeze, last pages, state ─▶ copied ══▶ goes on, writes ─▶ manifest ══▶ group object ─▶ settle
//!             ║ all are ready                        ║ all have been copied        ║ all are durable
//! ```
//!
//! Nobody freezes before everybody could, and nobody goes on before everybody was copied. So there is an instant at which all of them
//! stood still, and every member's memory and state are those of that instant.
//!
//! Whoever fails says so, and everybody else learns it where they wait or, by their own flag, where they work. Only the last step has no
//! way back: one member writes the group object for all.

use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use protocol::checkpoint::manifest::Parent;
use protocol::checkpoint::name::CheckpointId;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest that members stand still for another one to be copied. It takes milliseconds, and as many seconds where a member writes
/// its memory faster than it can be copied; behind that, no checkpoint is better than such a pause.
const COPY_LIMIT: Duration = Duration::from_secs(5);

/// How often somebody who waits looks whether it shall go on waiting.
const LOOK: Duration = Duration::from_millis(20);

/// The members of a group, and how far each of them is.
#[derive(Debug)]
pub struct Meeting {
    group: CheckpointId,
    names: Vec<String>,
    barrier: bool,
    flags: Vec<CancelFlag>,
    steps: Mutex<Steps>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Steps {
    ready: Vec<bool>,
    freezing: bool,
    /// Since when each stood still, and until when it could not have gone on.
    frozen: Vec<Option<Instant>>,
    copied: Vec<Option<Instant>>,
    manifests: Vec<Option<Parent>>,
    taken_unix_ms: u64,
    end: Option<End>,
}

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// Somebody is writing the group object.
    Committing,
    Exists,
    Failed {
        who: usize,
        why: String,
    },
    /// The group object may have been written.
    InDoubt(String),
}

/// How a group ends for one member.
#[derive(Debug)]
pub(super) enum Ended {
    /// It exists.
    Exists,
    /// It does not, and nothing of it will.
    Failed(Error),
    /// It may exist.
    InDoubt(Error),
}

/// What the instants of a group were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spread {
    /// From the first member that stood still to the last one.
    pub freezes: Duration,
    /// How long all of them stood still at once.
    pub together: Duration,
}

impl Meeting {
    /// A meeting of these workloads. Without `barrier` each of them is frozen on its own: of no use but to see what it is good for.
    pub fn new(group: CheckpointId, names: Vec<String>, barrier: bool, cancel: &CancelFlag) -> Arc<Self> {
        let members = names.len();
        let steps = Steps {
            ready: vec![false; members],
            frozen: vec![None; members],
            copied: vec![None; members],
            manifests: vec![None; members],
            ..Steps::default()
        };
        let flags = names.iter().map(|_| cancel.for_one()).collect();
        Arc::new(Self { group, names, barrier, flags, steps: Mutex::new(steps), changed: Condvar::new() })
    }

    /// One member's place at it.
    pub fn member(self: &Arc<Self>, number: usize) -> Member {
        Member { meeting: Arc::clone(self), number }
    }

    /// Who failed first, if anybody did.
    pub fn culprit(&self) -> Option<usize> {
        match &self.steps().end {
            Some(End::Failed { who, .. }) => Some(*who),
            _ => None,
        }
    }

    /// How far apart its members stood still. Zero while not all have.
    pub fn spread(&self) -> Spread {
        let steps = self.steps();
        let all = |instants: &[Option<Instant>]| instants.iter().copied().collect::<Option<Vec<_>>>();
        let (Some(frozen), Some(copied)) = (all(&steps.frozen), all(&steps.copied)) else {
            return Spread::default();
        };
        let (Some(first), Some(last), Some(gone_on)) =
            (frozen.iter().min(), frozen.iter().max(), copied.iter().min())
        else {
            return Spread::default();
        };
        Spread {
            freezes: last.saturating_duration_since(*first),
            together: gone_on.saturating_duration_since(*last),
        }
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, steps: MutexGuard<'a, Steps>, time: Duration) -> MutexGuard<'a, Steps> {
        self.changed.wait_timeout(steps, time).unwrap_or_else(PoisonError::into_inner).0
    }

    fn given_up(&self, who: usize, why: &str) -> Error {
        let name = self.names.get(who).map_or("", String::as_str);
        Error::Workload(format!("the checkpoint of the group was given up because of {name}: {why}"))
    }

    fn check(&self, steps: &Steps) -> Result<()> {
        match &steps.end {
            Some(End::Failed { who, why }) => Err(self.given_up(*who, why)),
            _ => Ok(()),
        }
    }

    fn fail(&self, steps: &mut Steps, who: usize, why: &str) {
        if steps.end.is_none() {
            steps.end = Some(End::Failed { who, why: why.into() });
            // Wherever they are: a flag that is behind its last look is not heard, and nobody is there yet.
            for flag in &self.flags {
                flag.set();
            }
            self.changed.notify_all();
        }
    }

    /// Those of whom this is not so.
    fn missing(&self, done: impl Fn(usize) -> bool) -> String {
        let names = self.names.iter().enumerate().filter(|(number, _)| !done(*number));
        names.map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// A member's place at a [`Meeting`].
#[derive(Debug, Clone)]
pub struct Member {
    meeting: Arc<Meeting>,
    number: usize,
}

impl Member {
    /// The group.
    pub fn group(&self) -> CheckpointId {
        self.meeting.group
    }

    /// What makes this member stop when another one fails.
    pub fn cancel(&self) -> CancelFlag {
        self.meeting.flags.get(self.number).cloned().unwrap_or_default()
    }

    /// This member failed: nobody's checkpoint will exist.
    pub fn fail(&self, why: &str) {
        self.meeting.fail(&mut self.meeting.steps(), self.number, why);
    }

    /// This member could freeze now. Whether everybody shall; `false` when not all were ready within this time: then this one is not
    /// any more either, until it asks again.
    pub(super) fn ready(&self, patience: Duration) -> Result<bool> {
        let meeting = &*self.meeting;
        let until = Instant::now() + patience;
        let mut steps = meeting.steps();
        set(&mut steps.ready, self.number, true);
        loop {
            meeting.check(&steps)?;
            if !meeting.barrier || steps.freezing || steps.ready.iter().all(|ready| *ready) {
                steps.freezing = true;
                meeting.changed.notify_all();
                return Ok(true);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                set(&mut steps.ready, self.number, false);
                return Ok(false);
            }
            steps = meeting.wait(steps, left);
        }
    }

    /// This member stands still.
    pub(super) fn stands_still(&self, taken_unix_ms: u64) {
        let mut steps = self.meeting.steps();
        set(&mut steps.frozen, self.number, Some(Instant::now()));
        steps.taken_unix_ms = steps.taken_unix_ms.max(taken_unix_ms);
    }

    /// This member's last pages and state are copied. Comes back when everybody's are.
    pub(super) fn copied(&self) -> Result<()> {
        let meeting = &*self.meeting;
        let begun = Instant::now();
        let mut steps = meeting.steps();
        set(&mut steps.copied, self.number, Some(Instant::now()));
        meeting.changed.notify_all();
        loop {
            meeting.check(&steps)?;
            if !meeting.barrier || steps.copied.iter().all(Option::is_some) {
                if meeting.barrier {
                    // Only from here on it can go on.
                    set(&mut steps.copied, self.number, Some(Instant::now()));
                }
                return Ok(());
            }
            if begun.elapsed() > COPY_LIMIT {
                let missing = meeting.missing(|number| steps.copied.get(number).is_some_and(Option::is_some));
                let why = format!(
                    "{missing} did not stand still and was not copied within {} s",
                    COPY_LIMIT.as_secs()
                );
                meeting.fail(&mut steps, self.number, &why);
            } else {
                steps = meeting.wait(steps, LOOK);
            }
        }
    }

    /// This member's manifest is durable. The last one writes the group object by `put`, with when they stood still and all
    /// members; everybody learns how that ended.
    pub(super) fn commit(&self, manifest: Parent, put: impl FnOnce(u64, Vec<Parent>) -> Result<()>) -> Ended {
        let meeting = &*self.meeting;
        let mut steps = meeting.steps();
        set(&mut steps.manifests, self.number, Some(manifest));
        let all = steps.manifests.iter().cloned().collect::<Option<Vec<_>>>();
        if let Some(members) = all.filter(|_| steps.end.is_none()) {
            if let Err(error) = self.cancel().pass() {
                meeting.fail(&mut steps, self.number, &error.to_string());
            } else {
                let taken_unix_ms = steps.taken_unix_ms;
                steps.end = Some(End::Committing);
                drop(steps);
                let committing = Committing(meeting);
                let put = put(taken_unix_ms, members);
                committing.ends(put);
                steps = meeting.steps();
            }
        }
        loop {
            match &steps.end {
                Some(End::Exists) => return Ended::Exists,
                Some(End::Failed { who, why }) => return Ended::Failed(meeting.given_up(*who, why)),
                Some(End::InDoubt(why)) => return Ended::InDoubt(Error::Store(why.clone())),
                // Somebody is at it, and nobody can change it any more.
                Some(End::Committing) => {}
                None => {
                    if let Err(error) = self.cancel().check() {
                        meeting.fail(&mut steps, self.number, &error.to_string());
                        continue;
                    }
                }
            }
            steps = meeting.wait(steps, LOOK);
        }
    }
}

/// The group object is being written. Whoever leaves without saying how that ended did not come to its end, and nobody else can know
/// how far it came: the others must not wait for it.
struct Committing<'a>(&'a Meeting);

impl Committing<'_> {
    fn ends(self, put: Result<()>) {
        let end = put.map_or_else(|error| in_doubt(&error.to_string()), |()| End::Exists);
        self.0.steps().end = Some(end);
        // Dropping it tells the others.
    }
}

impl Drop for Committing<'_> {
    fn drop(&mut self) {
        let mut steps = self.0.steps();
        if steps.end == Some(End::Committing) {
            steps.end = Some(in_doubt("the thread that wrote the group object ended unexpectedly"));
        }
        self.0.changed.notify_all();
    }
}

fn in_doubt(why: &str) -> End {
    End::InDoubt(format!("{why}; `migrate store list` says whether the group exists"))
}

fn set<T>(all: &mut [T], number: usize, value: T) {
    if let Some(place) = all.get_mut(number) {
        *place = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::checkpoint::manifest::HexDigest;
    use std::thread;

    /// Two members whose manifests are durable; how writing the group object ended for both, and whether its thread lived.
    fn commit(put: impl FnOnce() -> Result<()> + Clone + Send) -> Vec<thread::Result<Ended>> {
        let group = CheckpointId::new(1_795_463_311, 1);
        let names = vec!["a".into(), "b".into()];
        let meeting = Meeting::new(group, names, true, &CancelFlag::default());
        thread::scope(|scope| {
            let members = [0, 1].map(|number| {
                let (member, put) = (meeting.member(number), put.clone());
                scope.spawn(move || {
                    member.commit(Parent { id: group, digest: HexDigest([0; 32]) }, |_, _| put())
                })
            });
            members.map(thread::ScopedJoinHandle::join).into_iter().collect()
        })
    }

    #[test]
    fn everybody_learns_how_the_group_object_ended() {
        assert!(commit(|| Ok(())).iter().all(|ended| matches!(ended, Ok(Ended::Exists))));
        let ended = commit(|| Err(Error::Store("no room".into())));
        for ended in ended {
            let Ok(Ended::InDoubt(error)) = ended else { panic!("{ended:?}") };
            assert!(error.to_string().contains("no room"), "{error}");
        }
    }

    #[test]
    fn nobody_waits_for_a_thread_that_ended_while_it_wrote_the_group_object() {
        let ended = commit(|| panic!("a defect"));
        assert_eq!(ended.iter().filter(|ended| ended.is_err()).count(), 1, "{ended:?}");
        let told = ended.into_iter().flatten().next();
        let Some(Ended::InDoubt(error)) = told else { panic!("{told:?}") };
        assert!(error.to_string().contains("ended unexpectedly; `migrate store list` says"), "{error}");
    }
}
