//! Whatever comes: what an offer is of decides where it goes.

use super::container::{self, ContainerDestination};
use super::vm::{self, VmDestination};
use super::{Destination, Incomplete, PageMemory, Refusal};
use crate::container::Runtime;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::paths::RuntimeDir;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::{Offer, RefuseCode, WorkloadKind};
use protocol::page::PageSet;
use std::path::PathBuf;
use std::sync::Arc;

/// Where both kinds go.
#[derive(Debug, Clone)]
pub struct Places {
    /// VMs.
    pub vm: vm::Place,
    /// Containers.
    pub container: ContainerPlace,
}

/// As [`container::Place`], with programs that are looked for when a container comes: a host need not have them for VMs.
#[derive(Debug, Clone)]
pub struct ContainerPlace {
    /// runc, if it is not the one in `PATH`.
    pub runc: Option<PathBuf>,
    /// The directory of its state, if it is not its own.
    pub runc_root: Option<PathBuf>,
    /// CRIU, if it is not the one in `PATH`.
    pub criu: Option<PathBuf>,
    /// Where images are, if that is in memory.
    pub runtime_dir: RuntimeDir,
    /// Where the bundles of containers that arrive are made; without it none is taken.
    pub bundles: Option<PathBuf>,
    /// The container's name here, if not the one it had.
    pub name: Option<String>,
    /// Its root file system here, if that is not at the same path as there.
    pub root: Option<PathBuf>,
    /// The layers below its upper layer here, if that arrives and they are not at the same paths as there.
    pub lower: Vec<PathBuf>,
    /// Its network namespace here, if that is not at the same path as there.
    pub netns: Option<PathBuf>,
}

impl ContainerPlace {
    fn open(&self) -> Result<container::Place> {
        let Self { runtime_dir, bundles, name, root, lower, netns, .. } = self.clone();
        let bundles = bundles.ok_or_else(|| {
            Error::Host("containers are not taken here, because whoever sends one says what it may do: allow them with --containers FOLDER".into())
        })?;
        let runtime = Runtime::find(self.runc.as_deref(), self.runc_root.as_deref(), self.criu.as_deref())?;
        Ok(container::Place { runtime, runtime_dir, bundles, name, root, lower, netns })
    }
}

/// A destination for both kinds.
pub struct AnyDestination {
    places: Places,
    chosen: Option<Box<dyn Destination>>,
}

impl AnyDestination {
    /// A destination that becomes one or the other when an offer comes.
    pub fn new(places: Places) -> Self {
        Self { places, chosen: None }
    }

    fn chosen(&mut self) -> Result<&mut dyn Destination> {
        match &mut self.chosen {
            Some(chosen) => Ok(chosen.as_mut()),
            None => Err(nothing()),
        }
    }
}

fn nothing() -> Error {
    Error::Workload("nothing was prepared here".into())
}

impl Destination for AnyDestination {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        // What was there goes first: it may hold the name.
        self.chosen = None;
        let mut chosen: Box<dyn Destination> = match offer.kind {
            WorkloadKind::Container => {
                let refused = |error: Error| Refusal { code: RefuseCode::Host, reason: error.to_string() };
                Box::new(ContainerDestination::new(self.places.container.open().map_err(refused)?))
            }
            WorkloadKind::Vm | WorkloadKind::Program => Box::new(VmDestination::new(self.places.vm.clone())),
        };
        chosen.prepare(offer, machine)?;
        self.chosen = Some(chosen);
        Ok(())
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        match &self.chosen {
            Some(chosen) => chosen.memory(),
            None => Arc::new(GuestMemory::none()),
        }
    }

    fn begin_from(&mut self, checkpoint: CheckpointId) -> Result<()> {
        self.chosen()?.begin_from(checkpoint)
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        self.chosen()?.load(state)
    }

    fn start(self: Box<Self>, migration: MigrationId) -> Result<String> {
        self.chosen.ok_or_else(nothing)?.start(migration)
    }

    fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        self.chosen()?.expect(missing)
    }

    fn start_incomplete(self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>> {
        self.chosen.ok_or_else(nothing)?.start_incomplete(migration)
    }

    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        // Only a VM runs before all of its memory is there.
        VmDestination::new(self.places.vm.clone()).take_up(migration)
    }

    fn discard(self: Box<Self>) {
        if let Some(chosen) = self.chosen {
            chosen.discard();
        }
    }
}
