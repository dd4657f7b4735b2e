//! The guest-physical map: every address this VMM gives a meaning to, in one place.
//!
//! ```text
//! 0x0000_0000_0000 .. RAM, space 0, up to 3 GiB
//!     0x1000 .. 0x8_0000   boot structures, see the constants below
//! 0x0000_c000_0000 .. the 32-bit hole: devices, local and I/O APICs, KVM's own pages
//!     0xd000_0000          serial port, MMIO twin
//!     0xd000_1000          pad
//!     0xd010_0000          slots of devices, a page each
//!     0xfec0_0000          I/O APIC, 0xfee0_0000 local APICs (in KVM)
//! 0x0001_0000_0000 .. RAM, space 1, whatever is more than 3 GiB
//! ```

/// Bytes in a page; x86-64's base page size.
pub const PAGE_SIZE: u64 = 4096;

/// First byte of the 32-bit hole: RAM of space 0 ends here at the latest. 3 GiB, as PCs have it.
pub const HOLE_START: u64 = 0xc000_0000;
/// First byte after the 32-bit hole, where space 1 starts: 4 GiB.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Global descriptor table of a 64-bit start, one page.
pub const BOOT_GDT: u64 = 0x1000;
/// Interrupt descriptor table of a 64-bit start: one page of zeros, every gate not present.
pub const BOOT_IDT: u64 = 0x2000;
/// Task state segment: one page of zeros. TR must point somewhere before a guest can be entered.
pub const BOOT_TSS: u64 = 0x3000;
/// PVH `hvm_start_info` (Xen's include/public/arch-x86/hvm/start_info.h).
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH `hvm_modlist_entry` of the initramfs, in the start_info's page behind it.
pub const PVH_MODULES: u64 = PVH_START_INFO + 0x100;
/// PVH memory map, one page: at most 170 entries, we write four.
pub const PVH_MEMMAP: u64 = 0x7000;
/// Linux `boot_params`, one page (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: u64 = 0x8000;
/// Page tables, level 4, one page.
pub const BOOT_PML4: u64 = 0x9000;
/// Page tables, level 3, one page.
pub const BOOT_PDPT: u64 = 0xa000;
/// Page tables, level 2, one page for each GiB of the identity map, 64 at most.
pub const BOOT_PD: u64 = 0x1_0000;
/// Most GiB the identity map covers; a guest that wants more maps it itself.
pub const BOOT_PD_MAX: u64 = 64;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x6_0000;
/// Most bytes of the command line, with its NUL: x86 Linux's COMMAND_LINE_SIZE (asm/setup.h).
pub const CMDLINE_MAX: usize = 2048;
/// First stack pointer of vCPU 0 in a 64-bit start; the stack grows down from here. Further vCPUs of a
/// flat image start 4 KiB lower each, and share what they must not use: a flat image sets its own.
pub const BOOT_STACK_TOP: u64 = 0x8_0000;
/// One past the boot structures; images start here at the earliest.
pub const BOOT_END: u64 = 0x8_0000;
/// Where conventional memory ends: the extended BIOS data area of a PC. RAM, but not told to guests.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables, first of all their root: guests without another hint look for it from 0xe0000 on (ACPI 6.5, 5.2.5.1). RAM, but
/// not told to guests as such.
pub const ACPI_START: u64 = 0xe_0000;
/// One past the ACPI tables.
pub const ACPI_END: u64 = 0xf_0000;
/// Where a PC's firmware begins in real mode, at f000:fff0: kernels jump there as their last way to reset a machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM goes on for guests after the legacy video and BIOS area.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// COM1, eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The interrupt line of COM1.
pub const SERIAL_IRQ: u32 = 4;
/// The serial port's MMIO twin, eight one-byte registers.
pub const SERIAL_MMIO: u64 = 0xd000_0000;
/// Registers of a 16550.
pub const SERIAL_LEN: u64 = 8;
/// The pad: parking and power-off for guests that cannot use HLT or ports.
pub const PAD_MMIO: u64 = 0xd000_1000;
/// Bytes of pad registers.
pub const PAD_LEN: u64 = 0x18;
/// Registers of the first slot; the others follow, a page each.
pub const SLOT_MMIO: u64 = 0xd010_0000;
/// Interrupt lines of the slots: those of the I/O APIC that no PC ever had, then those that PCs leave to add-in cards.
pub const SLOT_GSIS: [u32; 13] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11];
/// The I/O APIC's registers, and its number of lines (KVM's arch/x86/kvm/ioapic.h).
pub const IOAPIC_MMIO: u32 = 0xfec0_0000;
/// The local APICs' registers (Intel SDM, volume 3, 11.4.1).
pub const LAPIC_MMIO: u32 = 0xfee0_0000;
/// The keyboard controller's command port: the byte 0xfe there resets a PC.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The ACPI PM1a control port of QEMU's pc machine: 0x2000 | type there powers it off.
pub const POWER_OFF_PORT: u16 = 0x604;

/// The ACPI sleep control register of a hardware-reduced machine, one byte (ACPI 6.5, 4.8.3.7), beside the port above.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The sleep status register (4.8.3.8), one byte, always 0 here: this machine never wakes up.
pub const SLEEP_STATUS_PORT: u16 = 0x601;

/// KVM's three-page TSS for VMX hosts that emulate real mode (KVM_SET_TSS_ADDR, kvm api.rst): must
/// lie below 4 GiB in no slot.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// KVM's identity-map page, same reason (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
