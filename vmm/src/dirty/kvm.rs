//! KVM's dirty log.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::{DirtyLog, LogMode};
use crate::{
    error::{Error, Result},
    memory::GuestMemory,
    sys,
};

/// The log of one KVM VM. Slots are spaces; logging is on only between start and stop, because a logged
/// slot costs the guest a fault for each first write and KVM its huge pages.
pub struct KvmLog {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    mode: LogMode,
}

impl KvmLog {
    /// Asks the host for the best mode it has. `best` caps it, so that tests can drive the others.
    pub(crate) fn new(vm: Arc<VmFd>, memory: Arc<GuestMemory>, best: LogMode) -> Self {
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let offered = u32::try_from(offered).unwrap_or(0);
        let mode = choose(offered, best);
        let mut log = Self { vm, memory, mode };
        // Also when none is wanted: the VM remembers what was enabled before.
        if offered != 0
            && let Err(error) = log.enable(mode)
        {
            tracing::warn!(%error, "the host offers manual dirty-log protection but refuses it");
            log.mode = LogMode::Plain;
        }
        log
    }

    /// Chooses how logs behave that are switched on from now on (KVM_ENABLE_CAP).
    fn enable(&self, mode: LogMode) -> std::result::Result<(), kvm_ioctls::Error> {
        let flags = match mode {
            LogMode::ManualInitiallySet => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
            LogMode::Manual => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            LogMode::Plain => 0,
        };
        let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        self.vm.enable_cap(&kvm_enable_cap { cap, args: [flags.into(), 0, 0, 0], ..Default::default() })
    }

    fn set_flags(&self, flags: u32) -> std::io::Result<()> {
        for (slot, region) in (0_u32..).zip(self.memory.regions()) {
            sys::set_memory_slot(&self.vm, slot, region, flags)?;
        }
        Ok(())
    }
}

impl LogMode {
    /// The best mode with what KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 answers.
    pub(crate) fn best_of(offered: u32) -> Self {
        choose(offered, Self::ManualInitiallySet)
    }
}

fn choose(offered: u32, best: LogMode) -> LogMode {
    let initially_set = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    match best {
        LogMode::ManualInitiallySet if offered & initially_set == initially_set => {
            LogMode::ManualInitiallySet
        }
        LogMode::ManualInitiallySet | LogMode::Manual
            if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 =>
        {
            LogMode::Manual
        }
        _ => LogMode::Plain,
    }
}

impl DirtyLog for KvmLog {
    fn mode(&self) -> LogMode {
        self.mode
    }

    fn start(&mut self) -> Result<()> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES).map_err(|source| {
            if let Err(error) = self.set_flags(0) {
                tracing::warn!(%error, "dirty logging could not be switched off again");
            }
            Error::Host { action: "start dirty logging", source }
        })
    }

    fn start_clean(&mut self) -> Result<()> {
        if self.mode != LogMode::ManualInitiallySet {
            return self.start();
        }
        // What "initially set" asks for is looked at only when a slot's log is switched on (kvm api.rst): the log goes on without
        // it, and later ones have it again. Clearing the bits instead would take a call for all of memory.
        self.enable(LogMode::Manual).map_err(Error::kvm("begin with an empty dirty log"))?;
        let started = self.start();
        let restored = self.enable(self.mode).map_err(Error::kvm("restore the mode of the dirty log"));
        match (started, restored) {
            (Ok(()), Err(error)) => {
                self.stop()?;
                Err(error)
            }
            (started, _) => started,
        }
    }

    fn stop(&mut self) -> Result<()> {
        self.set_flags(0).map_err(Error::host("stop dirty logging"))
    }

    fn get(&mut self, slot: usize, bits: &mut [u64]) -> Result<()> {
        let Some(region) = self.memory.regions().nth(slot) else { return Ok(()) };
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        sys::get_dirty_log(&self.vm, slot, region, bits).map_err(Error::host("read the dirty log"))
    }

    fn clear(&mut self, slot: usize, first: u64, pages: u64, bits: &[u64]) -> Result<()> {
        let pages = u32::try_from(pages)
            .map_err(|_| Error::Protocol(format!("{pages} pages are too many for one range")))?;
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        sys::clear_dirty_log(&self.vm, slot, first, pages, bits).map_err(Error::host("clear the dirty log"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_mode_the_host_offers_is_chosen() {
        use LogMode::{Manual, ManualInitiallySet, Plain};
        for (offered, best, chosen) in [
            (3, ManualInitiallySet, ManualInitiallySet),
            (1, ManualInitiallySet, Manual),
            (0, ManualInitiallySet, Plain),
            (2, ManualInitiallySet, Plain),
            (3, Manual, Manual),
            (3, Plain, Plain),
        ] {
            assert_eq!(choose(offered, best), chosen, "{offered} {best:?}");
        }
    }
}
