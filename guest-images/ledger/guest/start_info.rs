//! The PVH start info: where the command line and the memory map are.
//!
//! Offsets and the magic number: `struct hvm_start_info` and `struct hvm_memmap_table_entry`,
//! xen/include/public/arch-x86/hvm/start_info.h.

use core::ptr;

use crate::model::layout::{Range, STATS_GPA};

/// The longest command line that is read, in bytes.
pub const COMMAND_LINE_BYTES: usize = 2048;

/// The most entries of the memory map that are read.
pub const MAX_MAP: usize = 64;

const MAGIC: u32 = 0x336e_c578;

/// `XEN_HVM_MEMMAP_TYPE_RAM`
const RAM: u32 = 1;

/// The boot page tables map this much.
const MAPPED: u64 = 4 << 30;

/// A start info with a valid magic number.
pub struct StartInfo(u64);

/// Reads a `T` that the VMM put at `gpa`, if it can be read at all.
fn read<T: Copy + From<u8>>(gpa: u64) -> Option<T> {
    // What lies over the stats block or the image would be our own data, but is readable all the same.
    if gpa == 0 || gpa > MAPPED - 8 || gpa.abs_diff(STATS_GPA) < 8 {
        return None;
    }
    let pointer = ptr::with_exposed_provenance::<T>(gpa as usize);
    // SAFETY: the address is identity-mapped by the boot tables, and any bytes are a valid integer.
    Some(unsafe { pointer.read_unaligned() })
}

impl StartInfo {
    pub fn at(gpa: u64) -> Option<StartInfo> {
        let magic: u32 = read(gpa)?;
        (magic == MAGIC).then_some(StartInfo(gpa))
    }

    /// The command line; what is not UTF-8 is left out from there on.
    pub fn command_line<'a>(&self, buffer: &'a mut [u8]) -> &'a str {
        let mut bytes = 0;
        if let Some(from) = read::<u64>(self.0 + 24).filter(|from| *from != 0) {
            for (i, slot) in buffer.iter_mut().enumerate() {
                match read::<u8>(from + i as u64) {
                    None | Some(0) => break,
                    Some(byte) => *slot = byte,
                }
                bytes = i + 1;
            }
        }
        let line = buffer.get(..bytes).unwrap_or(&[]);
        match core::str::from_utf8(line) {
            Ok(line) => line,
            Err(error) => core::str::from_utf8(&line[..error.valid_up_to()]).unwrap_or(""),
        }
    }

    /// The RAM of the memory map.
    pub fn ram<'a>(&self, buffer: &'a mut [Range; MAX_MAP]) -> Option<&'a [Range]> {
        let version: u32 = read(self.0 + 4)?;
        let map: u64 = read(self.0 + 40)?;
        let entries: u32 = read(self.0 + 48)?;
        if version == 0 || map == 0 {
            return None;
        }
        let mut count = 0;
        for i in 0..u64::from(entries).min(MAX_MAP as u64) {
            let entry = map.checked_add(i * 24)?;
            let kind: u32 = read(entry.checked_add(16)?)?;
            if kind == RAM {
                buffer[count] = Range { start: read(entry)?, len: read(entry + 8)? };
                count += 1;
            }
        }
        (count > 0).then_some(&buffer[..count])
    }
}
