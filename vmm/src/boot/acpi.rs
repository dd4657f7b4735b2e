//! ACPI tables: how a guest finds its processors, interrupt controller, serial port and devices, and how it switches
//! itself off (ACPI 6.5; section numbers below are its).
//!
//! ```text
//! RSDP ─> XSDT ─┬─> FADT ─> DSDT
//!               └─> MADT
//! ```
//!
//! The machine is of the hardware-reduced kind (4.1): no power-management timer, no fixed events, no SMI. Power-off is one write
//! to the sleep control register, reset one to the keyboard controller's port.

use acpi_tables::{
    Aml,
    aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope},
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};

use crate::{
    addresses::{
        ACPI_END, ACPI_START, I8042_COMMAND_PORT, IOAPIC_MMIO, LAPIC_MMIO, SERIAL_IRQ, SERIAL_PORT,
        SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    },
    devices::{I8042_RESET, Slot},
    error::{Error, Result},
    memory::GuestMemory,
};

const OEM_ID: [u8; 6] = *b"MIGRAT";
const OEM_TABLE_ID: [u8; 8] = *b"MIGRATVM";
const OEM_REVISION: u32 = 1;

/// IA-PC boot architecture flags (table 5.11): neither VGA nor a clock in CMOS is there to be probed for, nor message-signalled
/// interrupts or PCIe power states to be set up. Bits 0 and 1, legacy devices and keyboard controller, stay off.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
/// SLP_TYP of S5, the only sleep there is; any number does, the guest writes what `_S5` says.
const SLEEP_TYPE_OFF: u8 = 5;
/// Bytes of a system description table's header (5.2.6).
const HEADER_BYTES: u32 = 36;
/// DSDT revision 2: integers in AML have 64 bits (5.2.11.1).
const DSDT_REVISION: u8 = 2;
/// Tables start at multiples of this.
const ALIGNMENT: u64 = 16;

/// Writes the tables for so many processors and these devices; answers where the root is.
///
/// # Errors
/// [`Error::Config`] when there is no room for so many.
pub(super) fn write(memory: &GuestMemory, vcpus: u32, slots: &[Slot]) -> Result<u64> {
    let bytes = tables(ACPI_START, vcpus, slots)?;
    let room = ACPI_END - ACPI_START;
    if bytes.len() as u64 > room {
        return Err(Error::Config(format!("ACPI tables of {} bytes, {room} fit", bytes.len())));
    }
    memory.write(ACPI_START, &bytes)?;
    Ok(ACPI_START)
}

/// The tables as they lie in memory from `base` on, the RSDP first.
fn tables(base: u64, vcpus: u32, slots: &[Slot]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; Rsdp::len()];
    let mut place = |table: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
        let address = base + bytes.len() as u64;
        bytes.extend_from_slice(table);
        address
    };
    let dsdt = place(dsdt(slots).as_slice());
    let fadt = place(&encoded(&fadt(dsdt)));
    let madt = place(&encoded(&madt(vcpus)?));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&encoded(&xsdt));
    let root = encoded(&Rsdp::new(OEM_ID, xsdt));
    bytes[..root.len()].copy_from_slice(&root);
    Ok(bytes)
}

fn encoded(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(I8042_COMMAND_PORT);
    fadt.reset_value = I8042_RESET;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u32) -> Result<impl Aml> {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LAPIC_MMIO));
    for vcpu in 0..vcpus {
        let id = u8::try_from(vcpu)
            .map_err(|_| Error::Config(format!("{vcpus} vCPUs: ACPI tables here count to 255")))?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_MMIO, 0));
    Ok(madt)
}

fn dsdt(slots: &[Slot]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let off = SLEEP_TYPE_OFF;
    // The second value is for machines with two control registers; the others are reserved (7.4.2).
    dsdt.append_slice(&encoded(&Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&off, &0_u8, &0_u8, &0_u8]),
    )));
    let serial = encoded(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8), &edge(SERIAL_IRQ)]),
            ),
        ],
    ));
    let devices: Vec<u8> = serial.into_iter().chain(slots.iter().flat_map(|slot| virtio(*slot))).collect();
    dsdt.append_slice(&Scope::raw(Path::new("_SB_"), devices));
    dsdt.update_checksum();
    dsdt
}

/// A virtio-mmio device, as Linux looks for it by the id LNRO0005 (drivers/virtio/virtio_mmio.c).
fn virtio(slot: Slot) -> Vec<u8> {
    let base = u32::try_from(slot.base()).unwrap_or(0);
    let bytes = u32::try_from(Slot::BYTES).unwrap_or(0);
    let index = slot.index();
    encoded(&Device::new(
        Path::new(&format!("V{index:03}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &index),
            // Writes of the device to memory are seen by caches, as all of them are here (6.2.17).
            &Name::new(Path::new("_CCA"), &1_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, base, bytes), &edge(slot.gsi())]),
            ),
        ],
    ))
}

/// An edge-triggered line, active high, not shared.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    /// A table by its address, cut to its length.
    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let start = &bytes[usize::try_from(address - ACPI_START).unwrap()..];
        let length = u32::from_le_bytes(*start[4..].first_chunk().unwrap()) as usize;
        &start[..length]
    }

    /// Follows the pointers as a guest does: FADT, DSDT, MADT.
    fn walk(bytes: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(bytes, u64_at(bytes, 24));
        assert_eq!((&xsdt[..4], xsdt.len(), sum(xsdt)), (&b"XSDT"[..], 36 + 2 * 8, 0));
        let fadt = table(bytes, u64_at(xsdt, 36));
        let madt = table(bytes, u64_at(xsdt, 44));
        // X_DSDT, table 5.9.
        let dsdt = table(bytes, u64_at(fadt, 140));
        [fadt, dsdt, madt]
    }

    #[test]
    fn a_guest_finds_every_table_and_their_sums_are_right() {
        for (vcpus, taken) in [(1, 0), (4, 3), (254, Slot::COUNT)] {
            let slots: Vec<Slot> = (0..taken).filter_map(Slot::new).collect();
            let bytes = tables(ACPI_START, vcpus, &slots).unwrap();
            assert!(bytes.len() as u64 <= ACPI_END - ACPI_START);
            let found = walk(&bytes);
            for (name, table) in [b"FACP", b"DSDT", b"APIC"].into_iter().zip(found) {
                assert_eq!((&table[..4], sum(table)), (&name[..], 0));
            }
            let [_, dsdt, madt] = found;
            assert_eq!(madt.len(), 44 + 8 * vcpus as usize + 12);
            assert_eq!(dsdt.windows(8).filter(|text| text == b"LNRO0005").count(), taken);
        }
    }

    #[test]
    fn power_off_and_reset_are_where_the_devices_take_them() {
        let bytes = tables(ACPI_START, 1, &[]).unwrap();
        let [fadt, dsdt, _] = walk(&bytes);
        // Offsets of table 5.9: flags, RESET_REG's address and value, SLEEP_CONTROL_REG, SLEEP_STATUS_REG.
        let flags = u32::from_le_bytes(*fadt[112..].first_chunk().unwrap());
        assert_ne!(flags & (1 << 10), 0, "a reset register");
        assert_ne!(flags & (1 << 20), 0, "hardware-reduced");
        assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0x64, 0xfe));
        assert_eq!((fadt[244], u64_at(fadt, 248)), (1, SLEEP_CONTROL_PORT.into()));
        assert_eq!((fadt[256], u64_at(fadt, 260)), (1, SLEEP_STATUS_PORT.into()));
        assert!(dsdt.windows(4).any(|name| name == b"_S5_"));
        assert!(dsdt.windows(4).any(|name| name == b"COM1"));
    }

    #[test]
    fn more_processors_than_apic_ids_are_refused() {
        assert!(tables(ACPI_START, 257, &[]).is_err());
    }
}
