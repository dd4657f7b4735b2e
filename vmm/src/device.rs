//! What a device is, and what touching one can cause.

use std::{io, sync::Arc, time::Duration};

use kvm_ioctls::VmFd;

use crate::error::Result;

/// One of the VM's interrupt lines, edge-triggered.
///
/// It goes up and down by KVM_IRQ_LINE and not through an irqfd: an irqfd's interrupt may wait in a queue of the host's
/// kernel, and one that leaves it only after a freeze has read the interrupt controllers is lost in a move. When
/// [`Interrupt::raise`] has returned, the interrupt stands in the controllers' state.
#[derive(Clone)]
pub struct Interrupt(Arc<dyn Fn() -> io::Result<()> + Send + Sync>);

impl Interrupt {
    /// The line with this number (KVM's GSI) of a VM that has its interrupt controllers.
    pub fn line(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self::to(move || {
            for active in [true, false] {
                vm.set_irq_line(gsi, active).map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
            }
            Ok(())
        })
    }

    /// A line that leads to a function.
    pub fn to(raise: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(raise))
    }

    /// A line that leads nowhere.
    pub fn none() -> Self {
        Self::to(|| Ok(()))
    }

    /// Interrupts the guest once.
    ///
    /// # Errors
    /// What the host's kernel answers; a line of a living VM does not fail.
    pub fn raise(&self) -> io::Result<()> {
        (self.0)()
    }
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupt")
    }
}

/// What a guest's access makes the vCPU or the VM do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: run on.
    None,
    /// The vCPU sleeps at most this long; a pause or a stop ends it early.
    Park(Duration),
    /// The guest switched itself off, with this code.
    PowerOff(u32),
    /// The guest asked for a reset, which here ends the VM.
    Reset,
}

/// A device behind registers.
///
/// Offsets are relative to the device and come from the guest, as do the lengths: an implementation
/// ignores what makes no sense, and never fails. Reads of registers that do not exist give all ones.
pub trait Device: Send {
    /// Its name, unique in a VM: also the name of its section in a saved state.
    fn name(&self) -> &str;
    /// Fills `data` from the register at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data` into the register at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
    /// The version of the state that [`Device::save`] writes.
    fn state_version(&self) -> u16;
    /// Its whole state, encoded with postcard.
    ///
    /// # Errors
    /// [`crate::Error::State`] when it cannot be encoded.
    fn save(&self) -> Result<Vec<u8>>;
    /// Replaces its state by a saved one, of a peer that is not trusted.
    ///
    /// # Errors
    /// [`crate::Error::State`] when the bytes are not a state of that version; nothing changed then.
    fn restore(&mut self, version: u16, bytes: &[u8]) -> Result<()>;
}
