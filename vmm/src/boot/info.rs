//! What a guest is told in memory: the command line, the memory map, PVH's start_info, Linux's boot_params.

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params, setup_header},
    loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
};
use vm_memory::ByteValued;

use super::initramfs::Initramfs;
use crate::{
    addresses::{
        CMDLINE, CMDLINE_MAX, EBDA_START, HIGH_MEMORY, PAGE_SIZE, PVH_MEMMAP, PVH_MODULES, PVH_START_INFO,
        ZERO_PAGE,
    },
    error::{ImageError, Result},
    memory::GuestMemory,
};

/// XEN_HVM_START_MAGIC_VALUE (Xen's start_info.h): "xEn3" with the high bit of the E set.
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// E820 type of usable RAM (asm/e820/types.h), and its PVH twin XEN_HVM_MEMMAP_TYPE_RAM.
const RAM: u32 = 1;
/// The boot sector's mark (Documentation/arch/x86/boot.rst, boot_flag).
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS" (same document, header).
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Loader id: undefined (same document, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;

/// Usable RAM as guests are told: without the extended BIOS area and the legacy hole below 1 MiB.
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64)> {
    let mut map = Vec::new();
    for space in memory.layout() {
        let end = space.base + space.pages * PAGE_SIZE;
        if space.base == 0 {
            map.push((0, EBDA_START.min(end)));
            if end > HIGH_MEMORY {
                map.push((HIGH_MEMORY, end - HIGH_MEMORY));
            }
        } else {
            map.push((space.base, end - space.base));
        }
    }
    map
}

/// What is told beside the memory map.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Info<'a> {
    /// What the guest gets, without a NUL at its end; see `check_cmdline`.
    pub(super) cmdline: &'a str,
    /// Where the initramfs lies.
    pub(super) initramfs: Option<Initramfs>,
    /// Where the root of the ACPI tables lies.
    pub(super) rsdp: Option<u64>,
    /// The header of a bzImage, which its kernel wants to have back.
    pub(super) setup: Option<setup_header>,
}

/// Checks a command line of a kernel that takes `most` bytes, beside what everybody is told.
///
/// # Errors
/// [`ImageError::CmdlineTooLong`] or [`ImageError::CmdlineNul`].
pub(super) fn check_cmdline(cmdline: &str, most: usize) -> Result<(), ImageError> {
    let most = most.min(CMDLINE_MAX - 1);
    if cmdline.len() > most {
        return Err(ImageError::CmdlineTooLong(cmdline.len(), most));
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(ImageError::CmdlineNul);
    }
    Ok(())
}

/// Writes all of it.
///
/// # Errors
/// As [`check_cmdline`].
pub(super) fn write(memory: &GuestMemory, info: &Info<'_>) -> Result<()> {
    check_cmdline(info.cmdline, CMDLINE_MAX)?;
    memory.write(CMDLINE, info.cmdline.as_bytes())?;
    memory.write(CMDLINE + info.cmdline.len() as u64, &[0])?;
    let map = memory_map(memory);
    write_start_info(memory, &map, info)?;
    write_zero_page(memory, &map, info)
}

fn write_start_info(memory: &GuestMemory, map: &[(u64, u64)], told: &Info<'_>) -> Result<()> {
    let mut bytes = Vec::new();
    for (address, size) in map {
        let entry = hvm_memmap_table_entry { addr: *address, size: *size, type_: RAM, ..Default::default() };
        bytes.extend_from_slice(entry.as_slice());
    }
    memory.write(PVH_MEMMAP, &bytes)?;
    let mut info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        rsdp_paddr: told.rsdp.unwrap_or(0),
        ..Default::default()
    };
    if let Some(Initramfs { address, bytes }) = told.initramfs {
        let module = hvm_modlist_entry { paddr: address, size: bytes, ..Default::default() };
        memory.write(PVH_MODULES, module.as_slice())?;
        info.modlist_paddr = PVH_MODULES;
        info.nr_modules = 1;
    }
    memory.write(PVH_START_INFO, info.as_slice())
}

fn write_zero_page(memory: &GuestMemory, map: &[(u64, u64)], told: &Info<'_>) -> Result<()> {
    let mut params = boot_params::default();
    match told.setup {
        Some(setup) => params.hdr = setup,
        None => {
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.header = HEADER_MAGIC;
            params.hdr.cmdline_size = u32::try_from(told.cmdline.len()).unwrap_or(0);
        }
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE).unwrap_or(0);
    if let Some(Initramfs { address, bytes }) = told.initramfs {
        // Both are below 4 GiB: it lies in the first space.
        params.hdr.ramdisk_image = u32::try_from(address).unwrap_or(0);
        params.hdr.ramdisk_size = u32::try_from(bytes).unwrap_or(0);
    }
    params.acpi_rsdp_addr = told.rsdp.unwrap_or(0);
    for (slot, (address, size)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: *address, size: *size, r#type: RAM };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    memory.write(ZERO_PAGE, params.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn the_map_leaves_out_the_legacy_hole() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        assert_eq!(memory_map(&memory), [(0, EBDA_START), (HIGH_MEMORY, 3 << 20)]);
        let memory = GuestMemory::create(5 << 30).unwrap();
        assert_eq!(memory_map(&memory)[2], (4 << 30, 2 << 30));
    }

    #[test]
    fn start_info_points_to_the_command_line() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        write(&memory, &Info { cmdline: "console=ttyS0", ..Info::default() }).unwrap();
        let mut info = [0; 56];
        memory.read(PVH_START_INFO, &mut info).unwrap();
        assert_eq!(info[..4], START_INFO_MAGIC.to_le_bytes());
        assert_eq!(info[24..32], CMDLINE.to_le_bytes());
        let mut text = [0xff; 14];
        memory.read(CMDLINE, &mut text).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        let with = |cmdline: &str| write(&memory, &Info { cmdline, ..Info::default() });
        with(&"x".repeat(CMDLINE_MAX - 1)).unwrap();
        let long = with(&"x".repeat(CMDLINE_MAX)).unwrap_err();
        assert!(matches!(long, Error::Image(ImageError::CmdlineTooLong(..))));
        assert!(with("a\0b").is_err());
        assert_eq!(check_cmdline("abc", 2), Err(ImageError::CmdlineTooLong(3, 2)));
    }

    #[test]
    fn both_protocols_tell_of_the_initramfs_and_of_acpi() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        let initramfs = Some(Initramfs { address: 0x30_0000, bytes: 77 });
        let setup = Some(setup_header { kernel_alignment: 0x20_0000, ..Default::default() });
        write(&memory, &Info { cmdline: "", initramfs, rsdp: Some(0xe_0000), setup }).unwrap();
        let word = |address| {
            let mut bytes = [0; 8];
            memory.read(address, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        // hvm_start_info: nr_modules, modlist_paddr, rsdp_paddr; hvm_modlist_entry: paddr, size.
        assert_eq!(word(PVH_START_INFO + 12) & 0xffff_ffff, 1);
        assert_eq!((word(PVH_START_INFO + 16), word(PVH_START_INFO + 32)), (PVH_MODULES, 0xe_0000));
        assert_eq!((word(PVH_MODULES), word(PVH_MODULES + 8)), (0x30_0000, 77));
        // boot_params: acpi_rsdp_addr, ramdisk_image and _size, kernel_alignment (zero-page.rst, boot.rst).
        assert_eq!(word(ZERO_PAGE + 0x70), 0xe_0000);
        assert_eq!(word(ZERO_PAGE + 0x218), 77 << 32 | 0x30_0000);
        assert_eq!(word(ZERO_PAGE + 0x230) & 0xffff_ffff, 0x20_0000);
        assert_eq!(word(ZERO_PAGE + 0x1e8) & 0xff, 2);
    }
}
