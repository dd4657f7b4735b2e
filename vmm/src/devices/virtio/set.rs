//! All virtio devices of a VM, together.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};

use super::{Description, Handle, Part, Transport, transport::QUEUE_NOTIFY};
use crate::{
    device::Interrupt,
    devices::{Devices, Slot},
    error::Result,
    memory::GuestMemory,
};

/// The devices, as whoever owns the VM holds them.
#[derive(Default)]
pub(crate) struct Set {
    handles: Vec<Handle>,
    descriptions: Vec<Description>,
}

impl Set {
    /// Puts devices into the slots of a machine, from the first on.
    ///
    /// # Errors
    /// [`crate::Error::Host`] when the host has no threads or events for them.
    pub(crate) fn plug(
        parts: Vec<Part>,
        vm: &Arc<VmFd>,
        memory: &Arc<GuestMemory>,
        devices: &mut Devices,
    ) -> Result<Self> {
        let mut set = Self::default();
        // There are no more devices than slots: that was checked when they were made.
        for (slot, part) in (0..).map_while(Slot::new).zip(parts) {
            let line = Interrupt::line(Arc::clone(vm), slot.gsi());
            let (transport, handle) = Transport::new(part.name, Arc::clone(memory), line, part.backend)?;
            for queue in (0_u32..).take(transport.queues()) {
                let place = IoEventAddress::Mmio(slot.base() + QUEUE_NOTIFY);
                // Only quicker: what KVM does not answer itself comes through the registers.
                if let Err(error) = vm.register_ioevent(handle.kick(), &place, queue) {
                    tracing::debug!(%error, queue, "the guest's notifications come through the vCPU");
                }
            }
            devices.plug(slot, Box::new(transport));
            set.handles.push(handle);
            set.descriptions.push(part.description);
        }
        Ok(set)
    }

    /// What a destination must have.
    pub(crate) fn descriptions(&self) -> &[Description] {
        &self.descriptions
    }

    /// When this returns, no device touches guest memory, a disk or a tap, and no request is in flight. The vCPUs stand
    /// still already.
    pub(crate) fn pause(&self) {
        self.handles.iter().for_each(Handle::ask_pause);
        self.handles.iter().for_each(Handle::wait_paused);
    }

    /// Lets all go on.
    pub(crate) fn resume(&self) {
        self.handles.iter().for_each(Handle::resume);
    }

    /// Takes what only one VM may have.
    ///
    /// # Errors
    /// What names it, and why it is not to be had; the others are let go of again.
    pub(crate) fn acquire(&self) -> Result<()> {
        let outcome = self.handles.iter().try_for_each(Handle::acquire);
        if outcome.is_err()
            && let Err(error) = self.release()
        {
            tracing::warn!(%error, "letting go of devices");
        }
        outcome
    }

    /// Lets go of it; the VM stands still.
    ///
    /// # Errors
    /// The first of those that could not be made safe; all are let go of all the same.
    pub(crate) fn release(&self) -> Result<()> {
        self.handles.iter().map(Handle::release).fold(Ok(()), Result::and)
    }
}
