//! ELF images: checked here in full, then loaded by linux-loader.

use std::io::Cursor;

use linux_loader::loader::{KernelLoader, elf::PvhBootCapability};

use super::check_place;
use crate::{
    addresses::HIGH_MEMORY,
    error::{ImageError, Result},
    memory::GuestMemory,
};

/// Where an ELF image starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElfEntry {
    /// At the 32-bit entry of its PVH note.
    Pvh(u32),
    /// At the 64-bit entry of its header.
    Long(u64),
}

/// A loadable piece of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in memory, in bytes; what the file does not fill is zero.
    pub length: u64,
}

// Offsets and values of the ELF-64 object file format, version 1.5, and the System V ABI for AMD64.
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const LINUX_OWNER: &[u8] = b"Linux\0";

/// The longest note segment that is looked through, in bytes: vmlinux has a few hundred.
const MAX_NOTES_BYTES: u64 = 64 << 10;

/// Checks every header of an image against the file's own length, and lists what will be loaded.
///
/// # Errors
/// An [`ImageError`] that names what is wrong.
pub fn check(image: &[u8]) -> Result<Vec<Segment>, ImageError> {
    if !image.starts_with(MAGIC) {
        return Err(ImageError::NotKernel);
    }
    let header = image.get(..HEADER_BYTES).ok_or(ImageError::Truncated("the file header"))?;
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN {
        return Err(ImageError::WrongClass);
    }
    let machine = u16_at(header, 18);
    if machine != MACHINE_X86_64 {
        return Err(ImageError::WrongMachine(machine));
    }
    let kind = u16_at(header, 16);
    if kind != TYPE_EXECUTABLE && kind != TYPE_SHARED {
        return Err(ImageError::NotExecutable(kind));
    }
    if usize::from(u16_at(header, 54)) != PROGRAM_HEADER_BYTES {
        return Err(ImageError::Inconsistent("program headers of an unknown size"));
    }
    let table = usize::try_from(u64_at(header, 32))
        .ok()
        .filter(|start| *start >= HEADER_BYTES)
        .ok_or(ImageError::Inconsistent("the program headers lie inside the file header"))?;
    let bytes = usize::from(u16_at(header, 56)) * PROGRAM_HEADER_BYTES;
    let table = table
        .checked_add(bytes)
        .and_then(|end| image.get(table..end))
        .ok_or(ImageError::Truncated("the table of program headers"))?;
    let mut segments = Vec::new();
    for entry in table.chunks_exact(PROGRAM_HEADER_BYTES) {
        segments.extend(check_segment(entry, image.len() as u64)?);
    }
    if segments.is_empty() {
        return Err(ImageError::NothingToLoad);
    }
    Ok(segments)
}

fn check_segment(entry: &[u8], file_bytes: u64) -> Result<Option<Segment>, ImageError> {
    let kind = u32_at(entry, 0);
    if kind != PT_LOAD && kind != PT_NOTE {
        return Ok(None);
    }
    let (offset, address) = (u64_at(entry, 8), u64_at(entry, 24));
    let (in_file, in_memory) = (u64_at(entry, 32), u64_at(entry, 40));
    if offset.checked_add(in_file).is_none_or(|end| end > file_bytes) {
        return Err(ImageError::Truncated("a segment"));
    }
    if kind == PT_NOTE {
        if in_file > MAX_NOTES_BYTES {
            return Err(ImageError::Inconsistent("its notes are too long"));
        }
        return Ok(None);
    }
    if in_file > in_memory {
        return Err(ImageError::Inconsistent("a segment is longer in the file than in memory"));
    }
    Ok((in_memory > 0).then_some(Segment { address, length: in_memory }))
}

/// Whether a checked image is a Linux kernel: each has a note of this owner (include/linux/elfnote.h and build-salt.h).
pub(super) fn is_linux(image: &[u8]) -> bool {
    notes(image).is_some_and(|notes| notes.windows(LINUX_OWNER.len()).any(|owner| owner == LINUX_OWNER))
}

fn notes(image: &[u8]) -> Option<&[u8]> {
    let table = usize::try_from(u64_at(image, 32)).ok()?;
    let entries = image.get(table..)?.chunks_exact(PROGRAM_HEADER_BYTES).take(usize::from(u16_at(image, 56)));
    let entry = entries.into_iter().find(|entry| u32_at(entry, 0) == PT_NOTE)?;
    let start = usize::try_from(u64_at(entry, 8)).ok()?;
    let length = usize::try_from(u64_at(entry, 32).min(MAX_NOTES_BYTES)).ok()?;
    image.get(start..start.checked_add(length)?)
}

/// An image in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loaded {
    pub(super) entry: ElfEntry,
    /// One past its last segment.
    pub(super) end: u64,
}

/// Loads a checked image into fresh memory, whose zeros are the image's too.
///
/// # Errors
/// [`crate::Error::Image`] that names what is wrong.
pub(super) fn load(memory: &GuestMemory, image: &[u8]) -> Result<Loaded> {
    let mut end = 0;
    for segment in check(image)? {
        check_place(memory, segment.address, segment.length)?;
        check_above_tables(segment)?;
        end = end.max(segment.address + segment.length);
    }
    let loaded = linux_loader::loader::Elf::load(memory.map(), None, &mut Cursor::new(image), None)
        .map_err(|error| ImageError::Loader(error.to_string()))?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            ElfEntry::Pvh(u32::try_from(entry.0).map_err(|_| ImageError::Inconsistent("its PVH entry"))?)
        }
        _ => ElfEntry::Long(loaded.kernel_load.0),
    };
    let address = match entry {
        ElfEntry::Pvh(entry) => u64::from(entry),
        ElfEntry::Long(entry) => entry,
    };
    if !memory.contains(address, 1) {
        return Err(ImageError::OutsideMemory { start: address, end: address.saturating_add(1) }.into());
    }
    Ok(Loaded { entry, end })
}

/// Below 1 MiB lie what the boot protocols put there and ACPI tables; see [`crate::addresses`].
fn check_above_tables(Segment { address, length }: Segment) -> Result<(), ImageError> {
    if address < HIGH_MEMORY {
        return Err(ImageError::OverlapsBoot {
            start: address,
            end: address.saturating_add(length),
            limit: HIGH_MEMORY,
        });
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    array_at(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    array_at(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    array_at(bytes, at).map_or(0, u64::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An ELF file with one segment of `body` at `address`, and a PVH note when `pvh` says where.
    fn elf(address: u64, body: &[u8], pvh: Option<u32>) -> Vec<u8> {
        let headers = 1 + u16::from(pvh.is_some());
        let mut file = MAGIC.to_vec();
        file.extend([CLASS_64, LITTLE_ENDIAN, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        file.extend(TYPE_EXECUTABLE.to_le_bytes());
        file.extend(MACHINE_X86_64.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        file.extend(address.to_le_bytes());
        file.extend(64_u64.to_le_bytes());
        file.extend([0; 12]);
        file.extend(64_u16.to_le_bytes());
        file.extend(56_u16.to_le_bytes());
        file.extend(headers.to_le_bytes());
        file.extend([0; 6]);
        let mut offset = 64 + 56 * u64::from(headers);
        let mut segment = |kind: u32, address: u64, length: u64| {
            file.extend(kind.to_le_bytes());
            file.extend(7_u32.to_le_bytes());
            for value in [offset, address, address, length, length, 4096] {
                file.extend(value.to_le_bytes());
            }
            offset += length;
        };
        segment(PT_LOAD, address, body.len() as u64);
        if pvh.is_some() {
            segment(PT_NOTE, 0, 20);
        }
        file.extend(body);
        if let Some(entry) = pvh {
            for value in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
                file.extend(value.to_le_bytes());
            }
        }
        file
    }

    #[test]
    fn a_pvh_note_wins_over_the_header() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        let entry = load(&memory, &elf(0x10_0000, &[0x90; 100], Some(0x10_0010))).unwrap();
        assert_eq!(entry, Loaded { entry: ElfEntry::Pvh(0x10_0010), end: 0x10_0064 });
        let entry = load(&memory, &elf(0x10_0000, &[0x90; 100], None)).unwrap();
        assert_eq!(entry.entry, ElfEntry::Long(0x10_0000));
        let mut byte = [0];
        memory.read(0x10_0063, &mut byte).unwrap();
        assert_eq!(byte, [0x90]);
    }

    #[test]
    fn each_wrong_file_ends_in_its_own_error() {
        let good = elf(0x10_0000, &[0x90; 100], None);
        let with = |at: usize, byte: u8| {
            let mut file = good.clone();
            file[at] = byte;
            check(&file).unwrap_err()
        };
        assert_eq!(check(b"#!/bin/sh").unwrap_err(), ImageError::NotKernel);
        assert_eq!(check(&[]).unwrap_err(), ImageError::NotKernel);
        assert_eq!(check(&good[..63]).unwrap_err(), ImageError::Truncated("the file header"));
        assert_eq!(check(&good[..good.len() - 1]).unwrap_err(), ImageError::Truncated("a segment"));
        assert_eq!(with(4, 1), ImageError::WrongClass);
        assert_eq!(with(5, 2), ImageError::WrongClass);
        assert_eq!(with(18, 183), ImageError::WrongMachine(183));
        assert_eq!(with(16, 1), ImageError::NotExecutable(1));
        assert_eq!(with(56, 0), ImageError::NothingToLoad);
        assert!(matches!(with(32, 0), ImageError::Inconsistent(_)));
        assert!(matches!(with(54, 1), ImageError::Inconsistent(_)));
        assert_eq!(with(57, 0xff), ImageError::Truncated("the table of program headers"));
        assert!(matches!(with(64 + 40, 1), ImageError::Inconsistent(_)));
    }

    #[test]
    fn a_linux_kernel_is_known_by_its_notes() {
        let mut file = elf(0x10_0000, &[0x90; 100], Some(0x10_0000));
        assert!(!is_linux(&file));
        let end = file.len();
        file[end - 8..end - 2].copy_from_slice(b"Linux\0");
        assert!(is_linux(&file));
        assert!(!is_linux(&elf(0x10_0000, b"Linux\0", None)));
        for cut in 0..file.len() {
            is_linux(&file[..cut]);
        }
    }

    #[test]
    fn segments_must_lie_in_memory() {
        let memory = GuestMemory::create(2 << 20).unwrap();
        for (address, fits) in
            [(0x10_0000, true), (0x1f_ffff, false), (u64::MAX - 8, false), (0x1000, false), (0xe_0000, false)]
        {
            assert_eq!(load(&memory, &elf(address, &[0x90; 16], None)).is_ok(), fits, "{address:#x}");
        }
        let outside = load(&memory, &elf(0x10_0000, &[0x90; 16], Some(0xffff_fff0)));
        assert!(outside.is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut file in prop::collection::vec(any::<u8>(), 0..400), good in any::<bool>()) {
            let memory = GuestMemory::create(2 << 20).unwrap();
            if good {
                let start = elf(0x10_0000, &[0x90; 16], Some(0x10_0000));
                for (byte, other) in file.iter_mut().zip(&start) {
                    if *byte < 240 { *byte = *other; }
                }
            }
            let _ = load(&memory, &file);
        }
    }
}
