//! A VM that arrives: described, loaded, started, and perhaps without all of its memory for a while.

use std::time::Instant;

use protocol::{
    MigrationId,
    layout::{Layout, SpaceKind},
    monitor::{Phase, Reply},
    page::PageSet,
};

use super::{Answer, Expectation, Instance, ending};
use crate::{
    config::{ExitReason, check_name},
    devices::virtio::{self, Description},
    error::{Error, Result},
    faults::Awaited,
    memory::spaces_for,
    state::Machine,
    vm::{Vm, layout_of},
};

impl Instance {
    pub(super) fn prepare(&mut self, name: String, layout: &Layout, blob: &[u8]) -> Result<Answer> {
        let Some(expectation) = self.expectation.as_ref().filter(|_| self.phase == Phase::Incoming) else {
            return Err(self.wrong("prepare"));
        };
        check_name(&name)?;
        layout
            .validate(expectation.max_memory_bytes)
            .map_err(|error| Error::Config(format!("the memory that is to come: {error}")))?;
        let memory_bytes = layout.memory_bytes();
        let (machine, devices) = Machine::decode(blob)?;
        let disks = devices.iter().filter_map(|device| match device {
            Description::Copied { sectors, .. } => Some(virtio::pages_of(*sectors)),
            _ => None,
        });
        if *layout != layout_of(&spaces_for(memory_bytes)?, &disks.collect::<Vec<_>>()) {
            return Err(Error::Config(
                "this VMM lays out memory and disks in another way than the source".into(),
            ));
        }
        machine.check(&expectation.host, &expectation.cpu)?;
        let devices = virtio::rebuild_all(&devices, &expectation.allowed)?;
        // From here on only the host can refuse; the expectation is used up.
        let Some(expectation) = self.expectation.take() else { return Err(self.wrong("prepare")) };
        let Expectation { host, serial, .. } = expectation;
        let vm = Vm::prepare(&host, memory_bytes, machine, serial, devices, &self.events)?;
        self.name = name;
        self.vm = Some(vm);
        self.phase = Phase::Prepared;
        self.describe()
    }

    pub(super) fn load(&mut self, blob: &[u8]) -> Result<Answer> {
        let started = Instant::now();
        self.read_memory = self.in_phase(Phase::Prepared, "load")?.load(blob)?;
        tracing::debug!(took = ?started.elapsed(), "loaded");
        self.phase = Phase::Loaded;
        Ok(Reply::Done.into())
    }

    pub(super) fn start(&mut self, migration: MigrationId) -> Result<Answer> {
        let vm = self.in_phase(Phase::Loaded, "start")?;
        vm.acquire()?;
        vm.publish()?;
        vm.resume();
        self.phase = Phase::Running;
        self.arrived_by = Some(migration);
        Ok(Reply::Done.into())
    }

    /// Reads the page sets of all spaces.
    pub(super) fn sets_of(&self, blob: &[u8]) -> Result<Vec<PageSet>> {
        let Some(vm) = &self.vm else { return Err(self.wrong("read page sets")) };
        let mut rest = blob;
        let wrong = |error: protocol::ProtocolError| Error::Protocol(error.to_string());
        let mut sets = Vec::new();
        for space in vm.layout().spaces {
            let length = usize::try_from(PageSet::byte_len(space.pages)).unwrap_or(usize::MAX);
            let (bytes, behind) = rest.split_at_checked(length).ok_or_else(|| {
                Error::Protocol(format!("the page sets have {} bytes, which is too few", blob.len()))
            })?;
            sets.push(PageSet::from_bytes(space.pages, bytes).map_err(wrong)?);
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(Error::Protocol(format!("{} bytes follow the page sets", rest.len())));
        }
        Ok(sets)
    }

    pub(super) fn expect(&mut self, blob: &[u8]) -> Result<Answer> {
        if self.awaited.is_some() {
            return Err(self.wrong("expect pages twice"));
        }
        self.in_phase(Phase::Loaded, "expect pages")?;
        if self.read_memory {
            return Err(Error::Config(
                "a guest in 32-bit PAE mode cannot be started without all of its memory: move it without post-copy".into(),
            ));
        }
        let mut missing = self.sets_of(blob)?;
        let started = Instant::now();
        let vm = self.in_phase(Phase::Loaded, "expect pages")?;
        let disks = missing.split_off(vm.memory().layout().len());
        if disks.iter().any(|set| !set.is_empty()) {
            return Err(Error::Protocol("a disk cannot miss pages: only memory can wait for them".into()));
        }
        let awaited = Awaited::begin(vm.memory(), missing)?;
        tracing::debug!(took = ?started.elapsed(), "pages are expected");
        self.awaited = Some(awaited);
        Ok(Reply::Done.into())
    }

    pub(super) fn page_faults(&mut self) -> Result<Answer> {
        let pages = self.awaiting_pages();
        let (Some(vm), Some(awaited), Some(pages)) = (&self.vm, &self.awaited, pages) else {
            return Err(self.wrong("hand out its page faults: it misses no pages, and"));
        };
        let mut addresses = Vec::new();
        for region in vm.memory().regions() {
            addresses.push(crate::sys::address_of(region).map_err(Error::host("find guest memory"))?);
        }
        let mut blob = Vec::new();
        awaited.missing().iter().for_each(|set| set.write_to(&mut blob));
        for space in vm.layout().of_kind(SpaceKind::Disk) {
            addresses.push(0);
            PageSet::empty(space.pages).write_to(&mut blob);
        }
        let fds = vec![awaited.share(vm.memory())?];
        Ok(Answer { reply: Reply::PageFaults { pages, addresses }, blob, fds, end: None })
    }

    pub(super) fn complete(&mut self) -> Result<Answer> {
        self.in_phase(Phase::Running, "be complete")?;
        self.check_complete("be complete")?;
        if let (Some(vm), Some(awaited)) = (&self.vm, &self.awaited) {
            awaited.end(vm.memory())?;
        }
        self.awaited = None;
        Ok(Reply::Done.into())
    }

    /// Nothing that needs all of the memory may begin while pages are missing.
    pub(super) fn check_complete(&mut self, asked: &'static str) -> Result<()> {
        match self.awaiting_pages() {
            Some(pages) if pages > 0 || asked != "be complete" => Err(Error::Incomplete { asked, pages }),
            _ => Ok(()),
        }
    }

    pub(super) fn discard(&self) -> Result<Answer> {
        match self.phase {
            Phase::Incoming | Phase::Prepared | Phase::Loaded => Ok(ending(ExitReason::Discarded)),
            _ => Err(self.wrong("discard")),
        }
    }
}
