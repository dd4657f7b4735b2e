//! What a device is, and what touching one can cause.

use std::time::Duration;

use crate::error::Result;

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
    fn name(&self) -> &'static str;
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
