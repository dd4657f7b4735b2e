//! A VM under the `vmm` crate as a source.

use crate::destination::vm::disks_of;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PageReader};
use crate::source::{Committed, Completed, Copied, Dirty, Donor, Durable, Source, Workload};
use crate::speed::Gauge;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::WorkloadKind;
use protocol::layout::Layout;
use protocol::monitor::{Phase, Role};
use protocol::page::{PageRun, PageSet, SpaceId};
use std::path::Path;
use std::time::Duration;
use vmm::Client;

/// How long the VMM may take for one answer. Stopping its vCPUs takes well under a millisecond; a host that swaps may
/// take seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A running VM, held by a session on its control socket. Dropping it closes the session, and the VMM does what is
/// right then: it resumes, unless it was pledged.
pub struct VmSource {
    client: Client,
    workload: Workload,
    memory: GuestMemory,
    destination: String,
    tracked: bool,
    baseline: Option<CheckpointId>,
    /// Its VMM knows what a baseline is.
    can_keep: bool,
    frozen: bool,
    pledged_to: Option<MigrationId>,
}

impl VmSource {
    /// Takes hold of the VM behind a control socket. `destination` is the address it will go to, as an operator writes
    /// it: the VMM remembers it with the pledge, so that `migrate recover` knows whom to ask. `copied` are the disks that go with it.
    ///
    /// # Errors
    /// `Workload` when there is no such VM or somebody else holds it, `Usage` for disks that cannot go with it.
    pub fn connect(name: &str, socket: &Path, destination: &str, copied: &Copied) -> Result<Self> {
        Self::hold(name, socket, destination, "migrate send", copied)
    }

    /// Takes hold of the VM to watch it, not to move it; `copied` are the disks that would go with it.
    ///
    /// # Errors
    /// As [`VmSource::connect`].
    pub fn watch(name: &str, socket: &Path, copied: &Copied) -> Result<Self> {
        Self::hold(name, socket, "", "migrate estimate", copied)
    }

    /// Takes hold of the VM to write it down, not to move it: with every disk that it writes, which would be newer than the memory
    /// when that is restored.
    ///
    /// # Errors
    /// As [`VmSource::connect`].
    pub fn checkpoint(name: &str, socket: &Path) -> Result<Self> {
        Self::hold(name, socket, "", "migrate checkpoint", &Copied::All)
    }

    /// A look at how fast the guest is, if it says so itself.
    pub fn gauge(&self) -> Option<Gauge> {
        Gauge::on(&self.workload.layout, self.memory.duplicate().ok()?)
    }

    fn hold(name: &str, socket: &Path, destination: &str, who: &str, copied: &Copied) -> Result<Self> {
        let mut client = Client::connect(socket, Role::Session, who, ANSWER_LIMIT)
            .map_err(|error| Error::Workload(format!("the VM {name} cannot be taken: {error}")))?;
        let mut description = client.describe()?;
        let disks = copied.of(name, &description.machine)?;
        if !disks.is_empty() {
            if !description.can_copy_disks {
                return Err(Error::Workload(format!(
                    "{name}: its disk {} cannot be copied with its memory, because its VMM is too old for that",
                    disks[0]
                )));
            }
            description = client.copy_disks(disks)?;
        }
        description.layout.validate(u64::MAX)?;
        let memory =
            GuestMemory::open(&description.layout, description.memory, &disks_of(&description.machine))?;
        let workload = Workload {
            kind: WorkloadKind::Vm,
            name: description.name,
            layout: description.layout,
            machine: description.machine,
        };
        Ok(Self {
            client,
            workload,
            memory,
            destination: destination.into(),
            tracked: false,
            baseline: None,
            can_keep: false,
            frozen: false,
            pledged_to: None,
        })
    }
}

impl Source for VmSource {
    fn workload(&self) -> &Workload {
        &self.workload
    }

    fn track(&mut self, dirty: Dirty) -> Result<String> {
        let tracking = self.client.track_start(dirty == Dirty::SinceBaseline)?;
        self.tracked = true;
        self.can_keep = tracking.can_keep;
        self.baseline = tracking.baseline;
        let name =
            serde_json::to_value(tracking.mode).ok().and_then(|value| value.as_str().map(str::to_owned));
        Ok(format!("kvm-{}", name.unwrap_or_default()))
    }

    fn baseline(&self) -> Option<CheckpointId> {
        self.baseline
    }

    fn set_baseline(&mut self, checkpoint: CheckpointId) -> Result<()> {
        if !self.can_keep {
            tracing::warn!(
                vm = self.workload.name,
                "its VMM is too old to keep track between checkpoints: each will be a whole one"
            );
            return Ok(());
        }
        self.client.set_baseline(Some(checkpoint))?;
        self.baseline = Some(checkpoint);
        Ok(())
    }

    fn harvest(&mut self) -> Result<Vec<PageSet>> {
        Ok(self.client.harvest(&self.workload.layout)?)
    }

    fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()> {
        let count = u32::try_from(count)
            .map_err(|_| Error::Workload(format!("{count} pages are more than can be taken at once")))?;
        Ok(self.client.take(PageRun { space, first, count })?)
    }

    fn present(&mut self, space: SpaceId, first: u64, count: u64, pages: &mut PageSet) -> Result<()> {
        self.memory.remove_holes(space, first, count, pages)
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        self.memory.read(run.space, run.offset(), buffer)
    }

    fn reader(&self) -> Result<Box<dyn PageReader>> {
        Ok(Box::new(self.memory.duplicate()?))
    }

    fn redirty(&mut self, pages: &[PageSet]) -> Result<()> {
        Ok(self.client.redirty(pages)?)
    }

    fn can_throttle(&self) -> bool {
        self.client.welcome().throttle_percent.is_some()
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        Ok(self.client.throttle(percent)?)
    }

    fn freeze(&mut self) -> Result<()> {
        self.client.freeze()?;
        self.frozen = true;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        Ok(self.client.save()?)
    }

    fn pledge(&mut self, migration: MigrationId, _peer: &str) -> Result<()> {
        self.client.pledge(migration, &self.destination)?;
        self.pledged_to = Some(migration);
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        if self.frozen {
            // Without a pledge this leaves the tracking on.
            self.client.resume(None)?;
            self.frozen = false;
        }
        Ok(())
    }

    fn resume(mut self: Box<Self>) -> Result<()> {
        if self.frozen {
            self.client.resume(self.pledged_to)?;
        }
        // Resuming from a pledge ends the tracking by itself.
        if self.tracked && self.pledged_to.is_none() {
            self.client.track_stop()?;
        }
        Ok(())
    }

    fn end(self: Box<Self>, _: Durable) -> Result<()> {
        // As in `hand_over`: freeing the memory is for the VMM.
        let Self { mut client, memory, .. } = *self;
        drop(memory);
        Ok(client.terminate()?)
    }

    fn hand_over(self: Box<Self>, committed: Committed) -> Result<()> {
        // Whoever lets go of the memory last has to free it, which takes 0.1 s a GiB: that is for the VMM, which nobody
        // waits for any more.
        let Self { mut client, memory, .. } = *self;
        drop(memory);
        Ok(client.hand_over(committed.migration())?)
    }

    fn donate(self: Box<Self>, _: Committed) -> Box<dyn Donor> {
        let Self { client, workload, memory, .. } = *self;
        Box::new(VmDonor { client, name: workload.name, layout: workload.layout, memory })
    }

    fn leave_frozen(self: Box<Self>) {
        // The VMM keeps a pledged VM frozen when its session ends: dropping the client is all there is to do.
        tracing::warn!(vm = self.workload.name, "left frozen");
    }
}

/// A frozen VM whose guest runs elsewhere and misses pages of it. Dropping it closes the session: a pledged VM stays as
/// it is then.
pub struct VmDonor {
    client: Client,
    name: String,
    layout: Layout,
    memory: GuestMemory,
}

impl VmDonor {
    /// Takes hold of a VM that was pledged to a migration, whose engine is gone.
    ///
    /// # Errors
    /// `Workload` when there is none, or it is not pledged to this migration.
    pub fn of(mut client: Client, migration: MigrationId) -> Result<Self> {
        let status = client.status()?;
        if status.phase != Phase::Pledged || status.pledged_to.is_none_or(|to| to.migration != migration) {
            return Err(Error::Workload(format!("{} is not pledged to migration {migration}", status.name)));
        }
        let description = client.describe()?;
        description.layout.validate(u64::MAX)?;
        let memory = GuestMemory::open(&description.layout, description.memory, &[])?;
        Ok(Self { client, name: description.name, layout: description.layout, memory })
    }
}

impl Donor for VmDonor {
    fn name(&self) -> &str {
        &self.name
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        self.memory.read(run.space, run.offset(), buffer)
    }

    fn finish(self: Box<Self>, completed: Completed) -> Result<()> {
        let Self { mut client, memory, .. } = *self;
        // As in `hand_over`: freeing it is for the VMM.
        drop(memory);
        Ok(client.hand_over(completed.migration())?)
    }
}
