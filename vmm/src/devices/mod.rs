//! The devices of a VM, and which address reaches which.

mod pad;
mod serial;

use std::sync::{Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

pub use pad::{MAGIC as PAD_MAGIC, PARK_MAX, Pad, REG_MAGIC, REG_PARK_NS, REG_POWER_OFF};
pub use serial::{SerialPort, SerialSink};

use crate::{
    addresses::{
        I8042_COMMAND_PORT, PAD_LEN, PAD_MMIO, POWER_OFF_PORT, SERIAL_LEN, SERIAL_MMIO, SERIAL_PORT,
    },
    device::{Device, Effect},
};

/// The pulse-reset command of a PC's keyboard controller (8042 data sheet).
const I8042_RESET: u8 = 0xfe;
/// SLP_EN of the ACPI PM1 control register (ACPI 6.5, 4.8.3.2.1).
const ACPI_SLEEP_ENABLE: u16 = 0x2000;

/// All devices of a VM. Shared by its vCPU threads: each device has its own lock.
pub struct Devices {
    serial: Mutex<SerialPort>,
    pad: Mutex<Pad>,
}

/// Takes a lock also after a panic in another thread: a device has no state that is broken in between.
fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Devices {
    /// Devices as after power-on.
    pub fn new(sink: SerialSink, serial_interrupt: EventFd) -> Self {
        Self { serial: Mutex::new(SerialPort::new(sink, serial_interrupt)), pad: Mutex::default() }
    }

    /// Calls `each` for every device, in the order of a saved state's sections.
    pub fn for_each<E>(&self, mut each: impl FnMut(&mut dyn Device) -> Result<(), E>) -> Result<(), E> {
        each(&mut *lock(&self.serial))?;
        each(&mut *lock(&self.pad))
    }

    /// A guest's read from an address that no memory slot covers.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match find(address, data.len()) {
            Some((Register::Serial, offset)) => lock(&self.serial).read(offset, data),
            Some((Register::Pad, offset)) => lock(&self.pad).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A guest's write to an address that no memory slot covers.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Effect {
        match find(address, data.len()) {
            Some((Register::Serial, offset)) => lock(&self.serial).write(offset, data),
            Some((Register::Pad, offset)) => lock(&self.pad).write(offset, data),
            None => Effect::None,
        }
    }

    /// A guest's read from a port. A string instruction gives several bytes: each is one access.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = serial_offset(port) {
            let mut serial = lock(&self.serial);
            for byte in data.chunks_mut(1) {
                serial.read(offset, byte);
            }
        } else if port == I8042_COMMAND_PORT {
            // The controller's buffers are empty, always.
            data.fill(0);
        }
    }

    /// A guest's write to a port. A string instruction gives several bytes: each is one access.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        if let Some(offset) = serial_offset(port) {
            let mut serial = lock(&self.serial);
            for byte in data.chunks(1) {
                serial.write(offset, byte);
            }
            return Effect::None;
        }
        match (port, data) {
            (I8042_COMMAND_PORT, [I8042_RESET]) => Effect::Reset,
            (POWER_OFF_PORT, [low, high]) if u16::from_le_bytes([*low, *high]) & ACPI_SLEEP_ENABLE != 0 => {
                Effect::PowerOff(0)
            }
            _ => Effect::None,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Register {
    Serial,
    Pad,
}

fn find(address: u64, length: usize) -> Option<(Register, u64)> {
    let within = |base: u64, size: u64| {
        let offset = address.checked_sub(base)?;
        let end = offset.checked_add(length as u64)?;
        (end <= size).then_some(offset)
    };
    if let Some(offset) = within(SERIAL_MMIO, SERIAL_LEN) {
        return Some((Register::Serial, offset));
    }
    within(PAD_MMIO, PAD_LEN).map(|offset| (Register::Pad, offset))
}

fn serial_offset(port: u16) -> Option<u64> {
    let offset = u64::from(port.checked_sub(SERIAL_PORT)?);
    (offset < SERIAL_LEN).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(SerialSink::None, EventFd::new(0).unwrap())
    }

    #[test]
    fn the_serial_port_and_its_twin_are_one() {
        let devices = devices();
        devices.port_write(SERIAL_PORT + 7, &[0x42]);
        let mut data = [0];
        devices.mmio_read(SERIAL_MMIO + 7, &mut data);
        assert_eq!(data, [0x42]);
    }

    #[test]
    fn unassigned_addresses_read_all_ones_and_ignore_writes() {
        let devices = devices();
        for address in [0xc000_0000, SERIAL_MMIO + 8, PAD_MMIO + PAD_LEN, PAD_MMIO + PAD_LEN - 1, u64::MAX] {
            let mut data = [0; 8];
            devices.mmio_read(address, &mut data);
            assert_eq!(data, [0xff; 8], "{address:#x}");
            assert_eq!(devices.mmio_write(address, &[0; 8]), Effect::None);
        }
        let mut data = [0; 2];
        devices.port_read(0x80, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn a_guest_can_power_off_and_reset_by_ports() {
        let devices = devices();
        assert_eq!(devices.port_write(0x604, &0x2000_u16.to_le_bytes()), Effect::PowerOff(0));
        assert_eq!(devices.port_write(0x604, &[0]), Effect::None);
        assert_eq!(devices.port_write(0x64, &[0xfe]), Effect::Reset);
        assert_eq!(devices.port_write(0x64, &[0xd1]), Effect::None);
    }
}
