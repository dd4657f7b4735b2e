//! All workloads of a group checkpoint: none of them starts before all of them could.

use super::report::{Event, Report};
use super::{Options, restore};
use crate::cancel::CancelFlag;
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};

use crate::vault::Vault;
use protocol::MigrationId;
use protocol::checkpoint::manifest::Group;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::{Offer, RefuseCode};
use protocol::page::PageSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How often somebody who waits looks whether it shall go on waiting.
const LOOK: Duration = Duration::from_millis(20);

/// Where a member goes, and who watches it. Called in the thread that restores it.
pub type Open<'a> = &'a (dyn Fn() -> (Box<dyn Destination>, Box<dyn FnMut(&Event)>) + Sync);

/// Restores all members of a group.
///
/// # Errors
/// As of one, naming the member. Nothing runs then, unless the text says so.
pub fn restore_group(
    vault: &Vault,
    group: &Group,
    open: Open<'_>,
    options: &Options,
    cancel: &CancelFlag,
) -> Result<Vec<Report>> {
    let mut names = Vec::new();
    let mut memory_bytes = 0_u64;
    for member in &group.members {
        let manifest = vault.manifest(member.id)?.manifest;
        memory_bytes = memory_bytes.saturating_add(manifest.layout.memory_bytes());
        names.push(manifest.workload);
    }
    if memory_bytes > options.max_memory_bytes {
        let reason = format!(
            "group {} ({}): its members have {memory_bytes} bytes of memory together, and {} are allowed here; free some memory, or \
             say --max-memory",
            group.id, group.name, options.max_memory_bytes
        );
        return Err(Error::Refused { code: RefuseCode::Memory, reason });
    }
    let gate = Gate {
        members: names.len(),
        flags: names.iter().map(|_| cancel.for_one()).collect(),
        state: Mutex::default(),
        changed: Condvar::new(),
    };
    let gate = Arc::new(gate);
    let outcomes: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&group.members)
            .map(|(number, member)| {
                let gate = Arc::clone(&gate);
                scope.spawn(move || {
                    let left = OnDrop(Arc::clone(&gate), number);
                    let (inner, mut observer) = open();
                    let destination = Gated { inner, gate: Arc::clone(&gate) };
                    let cancel = gate.flags.get(number).cloned().unwrap_or_default();
                    let outcome =
                        restore(vault, member.id, Box::new(destination), options, &cancel, &mut observer);
                    if outcome.is_ok() {
                        std::mem::forget(left);
                    }
                    outcome
                })
            })
            .collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let (started, culprit) = {
        let state = gate.state();
        (state.arrived == gate.members, state.failed)
    };
    let (mut reports, mut failure) = (Vec::new(), None);
    for (number, outcome) in outcomes.into_iter().enumerate() {
        let outcome = outcome
            .unwrap_or_else(|_| Err(Error::Host("the thread that restored it ended unexpectedly".into())));
        match outcome {
            Ok(report) => reports.push(report),
            Err(error) => {
                let error = error.of_member(names.get(number).map_or("", String::as_str));
                if failure.is_none() || culprit == Some(number) {
                    failure = Some(error);
                }
            }
        }
    }
    match failure {
        None => Ok(reports),
        Some(error) if started && !reports.is_empty() => {
            let running: Vec<_> = reports.iter().map(|report| report.name.as_str()).collect();
            Err(Error::Workload(format!(
                "{error}; the others of the group run already: {}; stop them with migrate vm stop, and restore the group again",
                running.join(", ")
            )))
        }
        Some(error) => Err(error),
    }
}

/// What all members pass at once, or none.
struct Gate {
    members: usize,
    flags: Vec<CancelFlag>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    arrived: usize,
    failed: Option<usize>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self) -> Result<()> {
        let mut state = self.state();
        state.arrived += 1;
        self.changed.notify_all();
        while state.arrived < self.members {
            if state.failed.is_some() || self.flags.iter().any(CancelFlag::is_set) {
                return Err(Error::Interrupted("another member of the group could not be restored".into()));
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn fail(&self, number: usize) {
        let mut state = self.state();
        state.failed.get_or_insert(number);
        if state.arrived < self.members {
            for flag in &self.flags {
                flag.set();
            }
        }
        self.changed.notify_all();
    }
}

/// Whoever leaves without having come to its end has failed.
struct OnDrop(Arc<Gate>, usize);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.fail(self.1);
    }
}

/// A destination that starts when all of them can.
struct Gated {
    inner: Box<dyn Destination>,
    gate: Arc<Gate>,
}

impl Gated {
    fn passed(self) -> Result<Box<dyn Destination>> {
        match self.gate.pass() {
            Ok(()) => Ok(self.inner),
            Err(error) => {
                self.inner.discard();
                Err(error)
            }
        }
    }
}

impl Destination for Gated {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        self.inner.prepare(offer, machine)
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        self.inner.memory()
    }

    fn begin_from(&mut self, checkpoint: CheckpointId) -> Result<()> {
        self.inner.begin_from(checkpoint)
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        self.inner.load(state)
    }

    fn start(self: Box<Self>, migration: MigrationId) -> Result<String> {
        self.passed()?.start(migration)
    }

    fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        self.inner.expect(missing)
    }

    fn start_incomplete(self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>> {
        self.passed()?.start_incomplete(migration)
    }

    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        self.inner.take_up(migration)
    }

    fn discard(self: Box<Self>) {
        self.inner.discard();
    }
}
