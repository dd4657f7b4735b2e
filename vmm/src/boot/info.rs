//! What a guest is told in memory: the command line, the memory map, PVH's start_info, Linux's boot_params.

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params},
    loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info},
};
use vm_memory::ByteValued;

use crate::{
    addresses::{
        CMDLINE, CMDLINE_MAX, EBDA_START, HIGH_MEMORY, PAGE_SIZE, PVH_MEMMAP, PVH_START_INFO, ZERO_PAGE,
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

/// Writes all of it. `cmdline` is what the guest gets, without a NUL at its end.
///
/// # Errors
/// [`ImageError::CmdlineTooLong`] or [`ImageError::CmdlineNul`].
pub(super) fn write(memory: &GuestMemory, cmdline: &str) -> Result<()> {
    let length = cmdline.len();
    if length >= CMDLINE_MAX {
        return Err(ImageError::CmdlineTooLong(length, CMDLINE_MAX - 1).into());
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(ImageError::CmdlineNul.into());
    }
    memory.write(CMDLINE, cmdline.as_bytes())?;
    memory.write(CMDLINE + length as u64, &[0])?;
    let map = memory_map(memory);
    write_start_info(memory, &map)?;
    write_zero_page(memory, &map, length)
}

fn write_start_info(memory: &GuestMemory, map: &[(u64, u64)]) -> Result<()> {
    let mut bytes = Vec::new();
    for (address, size) in map {
        let entry = hvm_memmap_table_entry { addr: *address, size: *size, type_: RAM, ..Default::default() };
        bytes.extend_from_slice(entry.as_slice());
    }
    memory.write(PVH_MEMMAP, &bytes)?;
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    memory.write(PVH_START_INFO, info.as_slice())
}

fn write_zero_page(memory: &GuestMemory, map: &[(u64, u64)], cmdline_bytes: usize) -> Result<()> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(cmdline_bytes).unwrap_or(0);
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
        write(&memory, "console=ttyS0").unwrap();
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
        write(&memory, &"x".repeat(CMDLINE_MAX - 1)).unwrap();
        let long = write(&memory, &"x".repeat(CMDLINE_MAX)).unwrap_err();
        assert!(matches!(long, Error::Image(ImageError::CmdlineTooLong(..))));
        assert!(write(&memory, "a\0b").is_err());
    }
}
