//! One machine, one store, and checkpoints of the one in the other.

use crate::brittle::Brittle;
use crate::reader;
use migrate::cancel::CancelFlag;
use migrate::checkpoint::{self, CheckpointReport, Failed, Options};
use migrate::report::{Observer, Quiet};
use migrate::source::scripted::{Machine, Who, Witness};
use migrate::store::Store as _;
use migrate::vault::{Vault, new_id};
use protocol::checkpoint::name::CHECKPOINTS;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;
use std::sync::Arc;
use std::time::Duration;

/// Two spaces: one of several loads with an end inside one, and a small one.
pub(crate) fn layout() -> Layout {
    let space =
        |id, pages, guest_address| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address };
    Layout { spaces: vec![space(0, 900, 0), space(1, 70, 1 << 32)] }
}

pub(crate) struct World {
    pub(crate) witness: Witness,
    pub(crate) machine: Machine,
    pub(crate) store: Brittle,
    pub(crate) vault: Vault,
}

/// Options for a machine that writes at every call: the scripted one is slow, and nothing is gained in many rounds.
pub(crate) fn options() -> Options {
    let mut options = Options::new(new_id().unwrap());
    // A stage of few loads, so that the rounds wait for the store.
    options.stage_bytes = 1 << 20;
    options.max_pause = Duration::from_millis(3);
    options
}

impl World {
    pub(crate) fn new(seed: u64, pages_per_call: u64) -> Self {
        let (witness, store) = (Witness::default(), Brittle::new());
        let machine = Machine::new(layout(), seed, pages_per_call, witness.clone());
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        Self { witness, machine, store, vault }
    }

    pub(crate) fn take(&self, options: &Options) -> Result<CheckpointReport, Box<Failed>> {
        self.take_with(options, &CancelFlag::default(), &mut Quiet)
    }

    pub(crate) fn take_with(
        &self,
        options: &Options,
        cancel: &CancelFlag,
        observer: &mut dyn Observer,
    ) -> Result<CheckpointReport, Box<Failed>> {
        let lease = self.store.lock("a test").unwrap();
        checkpoint::take(self.machine.attach(), &self.vault, lease.as_ref(), options, cancel, observer)
    }

    /// Takes a checkpoint that must be right.
    pub(crate) fn take_soundly(&self, options: &Options) -> CheckpointReport {
        let report = self.take(options).unwrap_or_else(|failed| panic!("{failed}: {:#?}", failed.report));
        self.assert_sound(&report);
        report
    }

    /// That a checkpoint is what the machine was when it stood still, and that it runs and is tracked from it on.
    pub(crate) fn assert_sound(&self, report: &CheckpointReport) {
        assert!(report.committed, "{report:#?}");
        let read = reader::memory(&self.vault, report.id).unwrap();
        let frozen = self.witness.frozen_memory();
        for (space, (read, frozen)) in read.iter().zip(&frozen).enumerate() {
            let differs = |page: &usize| read[page * 4096..][..4096] != frozen[page * 4096..][..4096];
            let wrong: Vec<usize> = (0..read.len() / 4096).filter(differs).collect();
            assert!(wrong.is_empty(), "pages {wrong:?} of space {space} are wrong: {report:#?}");
        }
        assert!(self.witness.is_running(Who::Source), "it stands still");
        assert_eq!(self.machine.baseline(), Some(report.id));
        let manifest = self.vault.manifest(report.id).unwrap().manifest;
        assert_eq!(manifest.parent.as_ref().map(|parent| parent.id), report.parent);
        assert_eq!(manifest.pause_us, report.pause_us);
        let (machine, state) = self.vault.state(&manifest).unwrap();
        assert_eq!((machine.as_slice(), state.is_empty()), (&b"machine"[..], false));
    }

    /// How many checkpoints there are.
    pub(crate) fn committed(&self) -> usize {
        self.store.list(CHECKPOINTS).unwrap().len()
    }
}
