//! All virtio devices of a VM, together.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};

use super::{Description, Handle, Image, Part, Transport, transport::QUEUE_NOTIFY};
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
    /// The disks that the guest may write, by their places among the devices, in that order.
    writable: Vec<(usize, Arc<Image>)>,
    /// The places of those whose images come with the VM.
    arriving: Vec<usize>,
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
            let place = set.handles.len();
            set.writable.extend(part.image.map(|image| (place, image)));
            set.arriving.extend(part.is_arriving.then_some(place));
            set.handles.push(handle);
            set.descriptions.push(part.description);
        }
        Ok(set)
    }

    /// What a destination must have.
    pub(crate) fn descriptions(&self) -> &[Description] {
        &self.descriptions
    }

    /// The disks that the guest may write, by their places among the devices, in that order.
    pub(crate) fn writable(&self) -> &[(usize, Arc<Image>)] {
        &self.writable
    }

    /// The places of those whose images came, or come, with the VM.
    pub(crate) fn arriving(&self) -> &[usize] {
        &self.arriving
    }

    /// Makes what came with the VM a part of this host, because it starts.
    ///
    /// # Errors
    /// What names it, and why it cannot be; nothing was changed then.
    pub(crate) fn publish(&self) -> Result<()> {
        let mut published = Vec::new();
        for handle in &self.handles {
            match handle.publish() {
                Ok(false) => {}
                Ok(true) => published.push(handle),
                Err(error) => {
                    published.into_iter().for_each(Handle::retract);
                    return Err(error);
                }
            }
        }
        Ok(())
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
            && let Err(error) = self.release(&[])
        {
            tracing::warn!(%error, "letting go of devices");
        }
        outcome
    }

    /// Lets go of it, but of the devices at these places; the VM stands still.
    ///
    /// # Errors
    /// The first of those that could not be made safe; all are let go of all the same.
    pub(crate) fn release(&self, but: &[usize]) -> Result<()> {
        let others = self.handles.iter().enumerate().filter(|(place, _)| !but.contains(place));
        others.map(|(_, handle)| handle.release()).fold(Ok(()), Result::and)
    }
}
