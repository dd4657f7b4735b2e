//! From an image to a VM that can be entered: what lies where, and with which registers it starts.
//!
//! | image | entry | `rdi` | `rsi` | `rbx` |
//! |---|---|---|---|---|
//! | ELF with a PVH note | 32-bit, paging off | – | – | start_info |
//! | other ELF | 64-bit, identity map | start_info | boot_params | start_info |
//! | flat | 64-bit, identity map, CPL 0 or 3 | vCPU number | start_info | – |
//!
//! Every image also finds a PVH start_info, a memory map, boot_params and the command line in low memory
//! (see [`crate::addresses`]). With an ELF only vCPU 0 starts, the others wait for INIT and SIPI as on a
//! PC; with a flat image all of them start at the entry.

mod elf;
mod info;
mod long_mode;
mod pvh;

use std::path::PathBuf;

pub use elf::{ElfEntry, check as check_elf};
pub use long_mode::Ring;

use crate::{
    addresses::BOOT_END,
    error::{ImageError, Result},
    memory::GuestMemory,
};

/// What to boot.
#[derive(Debug, Clone)]
pub enum KernelSource {
    /// An ELF file: by its PVH note if it has one, else at its 64-bit entry.
    Elf(Bytes),
    /// Bytes that go to one address as they are.
    Flat {
        /// The image.
        image: Bytes,
        /// Guest-physical address of its first byte, at or above 512 KiB.
        load_address: u64,
        /// Where vCPUs start.
        entry: u64,
        /// At which privilege level.
        ring: Ring,
    },
}

/// An image, in memory or in a file.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// In memory.
    Inline(std::sync::Arc<[u8]>),
    /// In a file, read when the VM is built.
    File(PathBuf),
}

/// The largest image that is read: 1 GiB, well beyond any kernel with debugging information.
const MAX_IMAGE_BYTES: u64 = 1 << 30;

impl Bytes {
    fn load(&self) -> Result<std::borrow::Cow<'_, [u8]>> {
        let path = match self {
            Bytes::Inline(bytes) => return Ok(bytes.as_ref().into()),
            Bytes::File(path) => path,
        };
        let unreadable = |why: String| ImageError::Unreadable(format!("{}: {why}", path.display()));
        let length = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
        if length > MAX_IMAGE_BYTES {
            return Err(unreadable(format!("{length} bytes are too many for a kernel")).into());
        }
        Ok(std::fs::read(path).map_err(|error| unreadable(error.to_string()))?.into())
    }
}

/// How vCPUs start, after [`load`] filled the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// vCPU 0 in 32-bit protected mode without paging; the others wait for SIPI.
    Pvh {
        /// The entry of the PVH note.
        entry: u32,
    },
    /// vCPU 0 in 64-bit mode at CPL 0, as Linux's 64-bit boot protocol; the others wait for SIPI.
    Elf64 {
        /// The ELF header's entry.
        entry: u64,
    },
    /// All vCPUs in 64-bit mode.
    Flat {
        /// Where.
        entry: u64,
        /// At which privilege level.
        ring: Ring,
    },
}

impl Start {
    /// Whether a vCPU runs from the beginning, or waits for another to start it.
    pub fn runs_at_once(&self, vcpu: u32) -> bool {
        vcpu == 0 || matches!(self, Start::Flat { .. })
    }

    /// The registers a vCPU starts with, made from what KVM gave it at its creation.
    pub(crate) fn registers(&self, vcpu: u32, sregs: &mut kvm_bindings::kvm_sregs) -> kvm_bindings::kvm_regs {
        match *self {
            Start::Pvh { entry } => pvh::registers(entry, sregs),
            Start::Elf64 { entry } => long_mode::elf_registers(entry, sregs),
            Start::Flat { entry, ring } => long_mode::flat_registers(entry, ring, vcpu, sregs),
        }
    }
}

/// Puts an image, its command line and everything the boot protocols want into guest memory.
///
/// # Errors
/// [`crate::Error::Image`] that says what is wrong with it.
pub fn load(memory: &GuestMemory, source: &KernelSource, cmdline: &str) -> Result<Start> {
    let start = match source {
        KernelSource::Elf(bytes) => {
            let image = bytes.load()?;
            match elf::load(memory, &image)? {
                ElfEntry::Pvh(entry) => Start::Pvh { entry },
                ElfEntry::Long(entry) => Start::Elf64 { entry },
            }
        }
        KernelSource::Flat { image, load_address, entry, ring } => {
            let image = image.load()?;
            check_place(memory, *load_address, image.len() as u64)?;
            memory.write(*load_address, &image)?;
            Start::Flat { entry: *entry, ring: *ring }
        }
    };
    info::write(memory, cmdline)?;
    if !matches!(start, Start::Pvh { .. }) {
        long_mode::write_tables(memory)?;
    }
    Ok(start)
}

/// Checks that an image's bytes lie in RAM and above the boot structures.
fn check_place(memory: &GuestMemory, start: u64, length: u64) -> Result<(), ImageError> {
    let end = start.saturating_add(length);
    if !memory.contains(start, length) {
        return Err(ImageError::OutsideMemory { start, end });
    }
    if start < BOOT_END {
        return Err(ImageError::OverlapsBoot { start, end, limit: BOOT_END });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn flat(load_address: u64, length: usize) -> KernelSource {
        KernelSource::Flat {
            image: Bytes::Inline(vec![0x90; length].into()),
            load_address,
            entry: load_address,
            ring: Ring::User,
        }
    }

    #[test]
    fn a_flat_image_must_lie_in_ram_above_the_boot_structures() {
        let memory = GuestMemory::create(2 << 20).unwrap();
        load(&memory, &flat(0x10_0000, 4096), "a").unwrap();
        for (address, length) in [(0x1000, 16), (0x1f_ffff, 2), (u64::MAX, 1), (0x4000_0000, 1)] {
            let error = load(&memory, &flat(address, length), "a").unwrap_err();
            assert!(matches!(error, Error::Image(_)), "{address:#x}: {error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let source = KernelSource::Elf(Bytes::File("/nowhere/kernel".into()));
        let memory = GuestMemory::create(2 << 20).unwrap();
        let error = load(&memory, &source, "").unwrap_err().to_string();
        assert!(error.contains("/nowhere/kernel"), "{error}");
    }
}
