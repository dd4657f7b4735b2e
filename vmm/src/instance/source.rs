//! A VM that leaves, or of which a copy is taken: frozen, saved, pledged, settled.

use std::time::Instant;

use protocol::{
    MigrationId,
    monitor::{Phase, Pledge, Reply},
};

use super::{Answer, Instance, ending, plain};
use crate::{
    config::ExitReason,
    error::{Error, Result},
};

impl Instance {
    pub(super) fn describe(&self) -> Result<Answer> {
        let wrong = || self.wrong("describe the VM");
        let vm = self.vm.as_ref().filter(|_| self.phase != Phase::Stopped).ok_or_else(wrong)?;
        let fds = vm.share(matches!(self.phase, Phase::Prepared | Phase::Loaded))?;
        let blob = vm.describe()?;
        let (name, layout) = (self.name.clone(), vm.layout());
        Ok(Answer { reply: Reply::Description { name, layout, can_copy_disks: true }, blob, fds, end: None })
    }

    pub(super) fn copy_disks(&mut self, disks: &[String]) -> Result<Answer> {
        let vm = self.live("choose the disks that go along")?;
        if vm.tracker().is_tracking() {
            return Err(Error::WrongState {
                asked: "choose the disks that go along",
                state: "being tracked",
            });
        }
        vm.copy_disks(disks)?;
        self.describe()
    }

    /// The disks that a session chose are no spaces for the next one.
    pub(super) fn forget_disks(&mut self) {
        if let Some(vm) = &mut self.vm
            && let Err(error) = vm.copy_disks(&[])
        {
            tracing::warn!(%error, "disks are still spaces");
        }
    }

    pub(super) fn freeze(&mut self) -> Result<Answer> {
        self.check_complete("freeze")?;
        self.in_phase(Phase::Running, "freeze")?;
        self.unthrottle();
        let vm = self.in_phase(Phase::Running, "freeze")?;
        match vm.pause() {
            Ok(took) => {
                tracing::debug!(?took, "frozen");
                self.phase = Phase::Frozen;
                Ok(Reply::Done.into())
            }
            Err(error @ Error::GuestEnded(_)) => {
                self.phase = Phase::Stopped;
                Err(error)
            }
            Err(error) => {
                vm.resume();
                Err(error)
            }
        }
    }

    pub(super) fn save(&mut self) -> Result<Answer> {
        let started = Instant::now();
        let blob = self.in_phase(Phase::Frozen, "save")?.save()?;
        tracing::debug!(took = ?started.elapsed(), bytes = blob.len(), "saved");
        Ok(Answer { blob, ..Reply::Saved.into() })
    }

    pub(super) fn pledge(&mut self, migration: MigrationId, peer: &str) -> Result<Answer> {
        // The destination takes the disks when it starts, which it may from now on.
        self.in_phase(Phase::Frozen, "pledge")?.release()?;
        self.phase = Phase::Pledged;
        self.pledge = Some(Pledge { migration, peer: plain(peer) });
        Ok(Reply::Done.into())
    }

    pub(super) fn resume(&mut self, migration: Option<MigrationId>) -> Result<Answer> {
        match self.phase {
            Phase::Frozen => self.go_on(),
            Phase::Pledged => {
                let Some(migration) = migration else {
                    return Err(Error::Protocol(
                        "a pledged VM resumes only for the migration of the pledge".into(),
                    ));
                };
                self.check_pledge(migration)?;
                // If somebody else has a disk by now, the VM stays as it is, and this can be tried again.
                self.in_phase(Phase::Pledged, "resume")?.acquire()?;
                self.go_on();
                self.stop_tracking();
            }
            _ => return Err(self.wrong("resume")),
        }
        Ok(Reply::Done.into())
    }

    pub(super) fn hand_over(&mut self, migration: MigrationId) -> Result<Answer> {
        self.in_phase(Phase::Pledged, "hand over")?;
        self.check_pledge(migration)?;
        Ok(ending(ExitReason::HandedOver))
    }

    pub(super) fn check_pledge(&self, migration: MigrationId) -> Result<()> {
        match &self.pledge {
            Some(pledge) if pledge.migration == migration => Ok(()),
            Some(pledge) => Err(Error::Protocol(format!(
                "the VM is pledged to migration {}, not {migration}",
                pledge.migration
            ))),
            None => Err(self.wrong("settle a pledge")),
        }
    }

    pub(super) fn go_on(&mut self) {
        self.pledge = None;
        self.phase = Phase::Running;
        self.run();
    }
}
