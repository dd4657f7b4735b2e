//! From an image to a VM that can be entered: what lies where, and with which registers it starts.
//!
//! | image | entry | `rdi` | `rsi` | `rbx` |
//! |---|---|---|---|---|
//! | ELF with a PVH note | 32-bit, paging off | – | – | start_info |
//! | other ELF | 64-bit, identity map | start_info | boot_params | start_info |
//! | bzImage | 64-bit, identity map | start_info | boot_params | start_info |
//! | flat | 64-bit, identity map, CPL 0 or 3 | vCPU number | start_info | – |
//!
//! Every image also finds a PVH start_info, a memory map, boot_params and the command line in low memory
//! (see [`crate::addresses`]); a kernel finds ACPI tables and its initramfs through them. With a kernel only vCPU 0 starts, the
//! others wait for INIT and SIPI as on a PC; with a flat image all of them start at the entry.

mod acpi;
mod bzimage;
mod elf;
mod info;
mod initramfs;
mod long_mode;
mod pvh;

use std::{borrow::Cow, path::PathBuf};

pub use elf::{ElfEntry, check as check_elf};
pub use long_mode::Ring;

use crate::{
    addresses::{BOOT_END, CMDLINE_MAX, RESET_VECTOR},
    devices::{I8042_RESET, Slot},
    error::{ImageError, Result},
    memory::GuestMemory,
};

/// What to boot.
#[derive(Debug, Clone)]
pub enum KernelSource {
    /// A kernel: a bzImage, or an ELF file, by its PVH note if it has one, else at its 64-bit entry.
    Kernel(Bytes),
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
    /// `what` it is, for people.
    fn load(&self, what: &str) -> Result<Cow<'_, [u8]>> {
        let path = match self {
            Bytes::Inline(bytes) => return Ok(bytes.as_ref().into()),
            Bytes::File(path) => path,
        };
        let unreadable = |why: String| ImageError::Unreadable(format!("{what} {}: {why}", path.display()));
        let length = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
        if length > MAX_IMAGE_BYTES {
            return Err(unreadable(format!(
                "{length} bytes are more than the {MAX_IMAGE_BYTES} that are read"
            ))
            .into());
        }
        Ok(std::fs::read(path).map_err(|error| unreadable(error.to_string()))?.into())
    }
}

/// How vCPUs start, after its images are in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// vCPU 0 in 32-bit protected mode without paging; the others wait for SIPI.
    Pvh {
        /// The entry of the PVH note.
        entry: u32,
    },
    /// vCPU 0 in 64-bit mode at CPL 0, as Linux's 64-bit boot protocol; the others wait for SIPI.
    Elf64 {
        /// The entry of the ELF header or of the bzImage.
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

/// What stands at [`RESET_VECTOR`] instead of firmware: `mov al, 0xfe; out 0x64, al`, the reset of the keyboard controller, then
/// `hlt` for ever. On a hardware-reduced ACPI machine Linux asks EFI for a reset, and comes here where there is none
/// (efi_reboot_required of arch/x86/platform/efi/quirks.c, machine_real_restart of arch/x86/kernel/reboot.c).
const RESET_CODE: [u8; 7] = [0xb0, I8042_RESET, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// What a VM boots: its files read, and checked as far as that goes without the VM.
#[derive(Debug)]
pub struct Images<'a> {
    kernel: Kernel<'a>,
    initramfs: Option<Cow<'a, [u8]>>,
    cmdline: &'a str,
}

#[derive(Debug)]
enum Kernel<'a> {
    Elf(Cow<'a, [u8]>),
    BzImage(Cow<'a, [u8]>, bzimage::Header),
    Flat { image: Cow<'a, [u8]>, load_address: u64, entry: u64, ring: Ring },
}

impl<'a> Images<'a> {
    /// Reads the files.
    ///
    /// # Errors
    /// [`crate::Error::Image`] that says what is wrong with which.
    pub fn read(source: &'a KernelSource, initramfs: Option<&'a Bytes>, cmdline: &'a str) -> Result<Self> {
        let kernel = match source {
            KernelSource::Kernel(bytes) => kernel(bytes.load("the file")?)?,
            KernelSource::Flat { image, load_address, entry, ring } => Kernel::Flat {
                image: image.load("the file")?,
                load_address: *load_address,
                entry: *entry,
                ring: *ring,
            },
        };
        let longest = match &kernel {
            Kernel::BzImage(_, header) => header.cmdline_max(),
            Kernel::Elf(_) | Kernel::Flat { .. } => CMDLINE_MAX,
        };
        info::check_cmdline(cmdline, longest)?;
        let initramfs = initramfs.map(|file| file.load("its initramfs")).transpose()?;
        match (&kernel, &initramfs) {
            (Kernel::Flat { .. }, Some(_)) => Err(ImageError::FlatWithInitramfs.into()),
            (_, Some(file)) if file.is_empty() => Err(ImageError::InitramfsEmpty.into()),
            _ => Ok(Self { kernel, initramfs, cmdline }),
        }
    }

    /// Puts the images, the command line and everything the boot protocols want into guest memory, for a VM with so many
    /// vCPUs and devices in these slots.
    ///
    /// ` tsc_khz=N` is added to the command line, unless it is Linux's: other guests here cannot measure their clock.
    ///
    /// # Errors
    /// [`crate::Error::Image`] that says what does not fit.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        vcpus: u32,
        slots: &[Slot],
        tsc_khz: u32,
    ) -> Result<Start> {
        let mut told = info::Info::default();
        let (start, is_linux, end, highest) = match &self.kernel {
            Kernel::Elf(image) => {
                let elf::Loaded { entry, end } = elf::load(memory, image)?;
                let start = match entry {
                    ElfEntry::Pvh(entry) => Start::Pvh { entry },
                    ElfEntry::Long(entry) => Start::Elf64 { entry },
                };
                (start, elf::is_linux(image), end, u64::from(u32::MAX))
            }
            Kernel::BzImage(image, header) => {
                let bzimage::Loaded { entry, end, setup } = header.load(memory, image)?;
                told.setup = Some(setup);
                (Start::Elf64 { entry }, true, end, header.initramfs_max())
            }
            Kernel::Flat { image, load_address, entry, ring } => {
                check_place(memory, *load_address, image.len() as u64)?;
                memory.write(*load_address, image)?;
                (Start::Flat { entry: *entry, ring: *ring }, false, 0, 0)
            }
        };
        if let Some(file) = &self.initramfs {
            told.initramfs = Some(initramfs::load(memory, file, end, highest)?);
        }
        if !matches!(start, Start::Flat { .. }) {
            told.rsdp = Some(acpi::write(memory, vcpus, slots)?);
            memory.write(RESET_VECTOR, &RESET_CODE)?;
        }
        let cmdline = match self.cmdline {
            text if is_linux => text.to_owned(),
            text => format!("{text} tsc_khz={tsc_khz}").trim_start().to_owned(),
        };
        told.cmdline = &cmdline;
        info::write(memory, &told)?;
        if !matches!(start, Start::Pvh { .. }) {
            long_mode::write_tables(memory)?;
        }
        Ok(start)
    }
}

/// Finds out what kind of kernel a file is.
fn kernel(image: Cow<'_, [u8]>) -> Result<Kernel<'_>, ImageError> {
    if bzimage::is_one(&image) {
        let header = bzimage::check(&image)?;
        return Ok(Kernel::BzImage(image, header));
    }
    match elf::check(&image) {
        Ok(_) => Ok(Kernel::Elf(image)),
        Err(ImageError::NotKernel) => Err(stranger(&image)),
        Err(error) => Err(error),
    }
}

/// Says what a file is that is neither an ELF file nor a bzImage, where that is known.
fn stranger(image: &[u8]) -> ImageError {
    let has = |at: usize, magic: &[u8]| image.get(at..).is_some_and(|rest| rest.starts_with(magic));
    // Image headers: Documentation/arch/arm64/booting.rst and Documentation/arch/riscv/boot-image-header.rst; ARM's
    // zImage: arch/arm/boot/compressed/head.S.
    for (at, magic, name) in [
        (0x38, &b"ARM\x64"[..], "AArch64"),
        (0x38, b"RSC\x05", "RISC-V"),
        (0x24, b"\x18\x28\x6f\x01", "32-bit ARM"),
    ] {
        if has(at, magic) {
            return ImageError::Foreign(foreign(name));
        }
    }
    for (magic, name) in [
        (&b"\x1f\x8b"[..], "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"BZh", "bzip2"),
    ] {
        if has(0, magic) {
            return ImageError::Foreign(format!("it is packed with {name}: unpack it first"));
        }
    }
    ImageError::NotKernel
}

fn foreign(processor: &str) -> String {
    format!("it is made for {processor}, not for x86-64")
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

    fn boot(
        memory: &GuestMemory,
        source: &KernelSource,
        initramfs: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<Start> {
        let initramfs = initramfs.map(|bytes| Bytes::Inline(bytes.into()));
        Images::read(source, initramfs.as_ref(), cmdline)?.load(memory, 1, &[], 1_000_000)
    }

    fn inline(bytes: &[u8]) -> KernelSource {
        KernelSource::Kernel(Bytes::Inline(bytes.into()))
    }

    fn cmdline(memory: &GuestMemory) -> String {
        let mut bytes = [0; 64];
        memory.read(crate::addresses::CMDLINE, &mut bytes).unwrap();
        String::from_utf8(bytes.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap()
    }

    #[test]
    fn a_flat_image_must_lie_in_ram_above_the_boot_structures() {
        let memory = GuestMemory::create(2 << 20).unwrap();
        boot(&memory, &flat(0x10_0000, 4096), None, "a").unwrap();
        assert_eq!(cmdline(&memory), "a tsc_khz=1000000");
        for (address, length) in [(0x1000, 16), (0x1f_ffff, 2), (u64::MAX, 1), (0x4000_0000, 1)] {
            let error = boot(&memory, &flat(address, length), None, "a").unwrap_err();
            assert!(matches!(error, Error::Image(_)), "{address:#x}: {error}");
        }
        assert!(boot(&memory, &flat(0x10_0000, 4096), Some(b"x"), "a").is_err());
    }

    #[test]
    fn a_bzimage_starts_in_64_bit_mode_with_its_own_command_line() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        let file = inline(&bzimage::tests::bzimage(b"kernel"));
        let start = boot(&memory, &file, Some(b"cpio"), "console=ttyS0").unwrap();
        assert_eq!(start, Start::Elf64 { entry: 0x20_0200 });
        assert_eq!(cmdline(&memory), "console=ttyS0");
        let mut bytes = [0; 4];
        memory.read((4 << 20) - 4096, &mut bytes).unwrap();
        assert_eq!(&bytes, b"cpio");
        let mut rsdp = [0; 8];
        memory.read(crate::addresses::ACPI_START, &mut rsdp).unwrap();
        assert_eq!(&rsdp, b"RSD PTR ");
        let mut vector = [0; 7];
        memory.read(RESET_VECTOR, &mut vector).unwrap();
        assert_eq!(vector, RESET_CODE);
    }

    #[test]
    fn what_is_no_kernel_for_this_processor_is_refused_by_name() {
        let at = |at: usize, magic: &[u8]| {
            let mut file = vec![0; 0x1000];
            file[at..at + magic.len()].copy_from_slice(magic);
            file
        };
        for (file, says) in [
            (at(0, b"#!/bin/sh"), "neither an ELF file nor a bzImage"),
            (Vec::new(), "neither an ELF file nor a bzImage"),
            (at(0x38, b"ARM\x64"), "AArch64"),
            (at(0x38, b"RSC\x05"), "RISC-V"),
            (at(0, b"\x1f\x8b"), "gzip"),
        ] {
            let error = Images::read(&inline(&file), None, "").unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_command_line_longer_than_this_kernel_takes_is_refused() {
        let mut file = bzimage::tests::bzimage(b"kernel");
        // cmdline_size
        file[0x238..0x23c].copy_from_slice(&255_u32.to_le_bytes());
        let file = inline(&file);
        Images::read(&file, None, &"x".repeat(255)).unwrap();
        let error = Images::read(&file, None, &"x".repeat(256)).unwrap_err().to_string();
        assert!(error.contains("256 bytes, at most 255 fit"), "{error}");
    }

    #[test]
    fn an_initramfs_that_is_missing_or_empty_is_refused() {
        let file = inline(&bzimage::tests::bzimage(b"kernel"));
        let missing = Bytes::File("/nowhere/initrd.img".into());
        let error = Images::read(&file, Some(&missing), "").unwrap_err().to_string();
        assert!(error.contains("its initramfs /nowhere/initrd.img: No such file"), "{error}");
        let empty = Bytes::Inline([].into());
        assert!(Images::read(&file, Some(&empty), "").is_err());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let source = KernelSource::Kernel(Bytes::File("/nowhere/kernel".into()));
        let error = Images::read(&source, None, "").unwrap_err().to_string();
        assert!(error.contains("/nowhere/kernel"), "{error}");
    }
}
