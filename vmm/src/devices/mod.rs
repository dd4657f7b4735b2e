//! The devices of a VM, and which address reaches which.

mod console;
mod pad;
mod serial;
mod slot;
pub mod virtio;

use std::sync::{Mutex, MutexGuard};

pub use console::ConsoleSocket;
pub(crate) use console::{Input, InputThread};
pub use pad::{MAGIC as PAD_MAGIC, PARK_MAX, Pad, REG_MAGIC, REG_PARK_NS, REG_POWER_OFF};
pub use serial::{SerialPort, SerialSink};
pub use slot::Slot;

use crate::{
    addresses::{
        I8042_COMMAND_PORT, PAD_LEN, PAD_MMIO, POWER_OFF_PORT, SERIAL_LEN, SERIAL_MMIO, SERIAL_PORT,
        SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLOT_MMIO,
    },
    device::{Device, Effect, Interrupt},
};

/// The pulse-reset command of a PC's keyboard controller (8042 data sheet).
pub(crate) const I8042_RESET: u8 = 0xfe;
/// SLP_EN of the ACPI PM1 control register (ACPI 6.5, 4.8.3.2.1).
const ACPI_SLEEP_ENABLE: u16 = 0x2000;

/// SLP_EN of the ACPI sleep control register (ACPI 6.5, 4.8.3.7). The one sleep the guest is told of is S5.
const SLEEP_CONTROL_ENABLE: u8 = 0x20;

/// All devices of a VM. Shared by its vCPU threads: each device has its own lock.
pub struct Devices {
    serial: Mutex<SerialPort>,
    pad: Mutex<Pad>,
    /// By slot; empty slots read all ones, as unassigned addresses do.
    plugged: Vec<(Slot, Mutex<Box<dyn Device>>)>,
}

/// Takes a lock also after a panic in another thread: a device has no state that is broken in between.
fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Devices {
    /// Devices as after power-on.
    pub fn new(sink: SerialSink, serial_interrupt: Interrupt) -> Self {
        let serial = Mutex::new(SerialPort::new(sink, serial_interrupt));
        Self { serial, pad: Mutex::default(), plugged: Vec::new() }
    }

    /// Puts a device into a slot; one that was there before is dropped.
    pub fn plug(&mut self, slot: Slot, device: Box<dyn Device>) {
        self.plugged.retain(|(taken, _)| *taken != slot);
        let at = self.plugged.partition_point(|(other, _)| other.index() < slot.index());
        self.plugged.insert(at, (slot, Mutex::new(device)));
    }

    /// The slots that are taken, in their order: what the guest is told to look for.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        self.plugged.iter().map(|(slot, _)| *slot)
    }

    /// Lets input from outside reach the guest, or keeps it back: it must not change what is being saved.
    pub fn open(&self, open: bool) {
        lock(&self.serial).open(open);
    }

    /// Gives the guest's serial port as much input as it has room for; answers how many bytes that were.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).receive(bytes)
    }

    /// Calls `each` for every device, in the order of a saved state's sections.
    pub fn for_each<E>(&self, mut each: impl FnMut(&mut dyn Device) -> Result<(), E>) -> Result<(), E> {
        each(&mut *lock(&self.serial))?;
        each(&mut *lock(&self.pad))?;
        self.plugged.iter().try_for_each(|(_, device)| each(lock(device).as_mut()))
    }

    fn plugged(&self, address: u64, length: usize) -> Option<(&Mutex<Box<dyn Device>>, u64)> {
        // Most accesses are not for a slot, or a VM has none.
        address.checked_sub(SLOT_MMIO)?;
        self.plugged.iter().find_map(|(slot, device)| {
            within(slot.base(), Slot::BYTES, address, length).map(|offset| (device, offset))
        })
    }

    /// A guest's read from an address that no memory slot covers.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match find(address, data.len()) {
            Some((Register::Serial, offset)) => lock(&self.serial).read(offset, data),
            Some((Register::Pad, offset)) => lock(&self.pad).read(offset, data),
            None => match self.plugged(address, data.len()) {
                Some((device, offset)) => lock(device).read(offset, data),
                None => data.fill(0xff),
            },
        }
    }

    /// A guest's write to an address that no memory slot covers.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Effect {
        match find(address, data.len()) {
            Some((Register::Serial, offset)) => lock(&self.serial).write(offset, data),
            Some((Register::Pad, offset)) => lock(&self.pad).write(offset, data),
            None => match self.plugged(address, data.len()) {
                Some((device, offset)) => lock(device).write(offset, data),
                None => Effect::None,
            },
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
        } else if matches!(port, I8042_COMMAND_PORT | SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT) {
            // The controller's buffers are empty, always; and the machine did not just wake up.
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
            (SLEEP_CONTROL_PORT, [control]) if control & SLEEP_CONTROL_ENABLE != 0 => Effect::PowerOff(0),
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
    if let Some(offset) = within(SERIAL_MMIO, SERIAL_LEN, address, length) {
        return Some((Register::Serial, offset));
    }
    within(PAD_MMIO, PAD_LEN, address, length).map(|offset| (Register::Pad, offset))
}

/// The offset of an access that lies in a window with all of its bytes.
fn within(base: u64, size: u64, address: u64, length: usize) -> Option<u64> {
    let offset = address.checked_sub(base)?;
    let end = offset.checked_add(length as u64)?;
    (end <= size).then_some(offset)
}

fn serial_offset(port: u16) -> Option<u64> {
    let offset = u64::from(port.checked_sub(SERIAL_PORT)?);
    (offset < SERIAL_LEN).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(SerialSink::None, Interrupt::none())
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
        assert_eq!(devices.port_write(0x600, &[0x34]), Effect::PowerOff(0));
        assert_eq!(devices.port_write(0x600, &[0x14]), Effect::None);
        assert_eq!(devices.port_write(0x64, &[0xfe]), Effect::Reset);
        assert_eq!(devices.port_write(0x64, &[0xd1]), Effect::None);
    }

    #[test]
    fn a_plugged_device_answers_in_its_slot_alone_and_is_saved_behind_the_others() {
        let mut devices = devices();
        let (first, third) = (Slot::new(0).unwrap(), Slot::new(2).unwrap());
        devices.plug(third, Box::new(Pad::default()));
        devices.plug(first, Box::new(Pad::default()));
        assert_eq!(devices.slots().collect::<Vec<_>>(), [first, third]);
        for (address, answers) in [
            (first.base(), true),
            (third.base(), true),
            (first.base() + Slot::BYTES, false),
            (third.base() + Slot::BYTES - 2, false),
        ] {
            let mut data = [0; 4];
            devices.mmio_read(address, &mut data);
            assert_eq!(u32::from_le_bytes(data) == PAD_MAGIC, answers, "{address:#x}");
        }
        assert_eq!(
            devices.mmio_write(third.base() + REG_POWER_OFF, &7_u32.to_le_bytes()),
            Effect::PowerOff(7)
        );
        let mut names = Vec::new();
        let _ = devices.for_each(|device| {
            names.push(device.name().to_owned());
            Ok::<(), ()>(())
        });
        assert_eq!(names, ["serial", "pad", "pad", "pad"]);
    }
}
