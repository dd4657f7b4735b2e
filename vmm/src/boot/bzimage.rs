//! bzImages, as distributions ship their kernels: a real-mode part that nobody runs any more, whose header says how to
//! load what follows, and a kernel that unpacks itself (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use std::io::Cursor;

use linux_loader::{
    bootparam::setup_header,
    loader::{BzImage, KernelLoader},
};
use vm_memory::{ByteValued, GuestAddress};

use super::{check_place, foreign};
use crate::{
    addresses::HIGH_MEMORY,
    error::{ImageError, Result},
    memory::GuestMemory,
};

// Offsets and values of boot.rst, "The Real-Mode Kernel Header".
const HEADER: usize = 0x1f1;
const MAGIC_AT: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
const SECTOR_BYTES: usize = 512;
/// How many sectors the real-mode part has if it says none.
const DEFAULT_SETUP_SECTORS: usize = 4;
/// The first version with `xloadflags`, of Linux 3.8.
const OLDEST: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// From the load address to the 64-bit entry ("64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;

/// A bzImage whose header makes sense.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    setup: setup_header,
    /// What the file has behind its real-mode part, in bytes.
    kernel_bytes: u64,
}

/// What there is to know of a loaded bzImage.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded {
    /// Where it starts in 64-bit mode.
    pub(super) entry: u64,
    /// One past what it needs while it unpacks itself.
    pub(super) end: u64,
    /// What goes into the guest's boot_params.
    pub(super) setup: setup_header,
}

/// Whether a file is a bzImage, good or bad.
pub(super) fn is_one(image: &[u8]) -> bool {
    image.get(MAGIC_AT..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Checks the header against the file.
///
/// # Errors
/// An [`ImageError`] that names what is wrong.
pub(super) fn check(image: &[u8]) -> Result<Header, ImageError> {
    let mut setup = setup_header::default();
    let bytes = image
        .get(HEADER..HEADER + size_of::<setup_header>())
        .ok_or(ImageError::Truncated("the setup header"))?;
    setup.as_mut_slice().copy_from_slice(bytes);
    let (version, flags, extended) = (setup.version, setup.loadflags, setup.xloadflags);
    if version < OLDEST || flags & LOADED_HIGH == 0 {
        return Err(ImageError::Foreign(format!(
            "it follows version {}.{} of Linux's boot protocol, and not at least 2.12, of Linux 3.8",
            version >> 8,
            version & 0xff
        )));
    }
    if extended & XLF_KERNEL_64 == 0 {
        return Err(ImageError::Foreign(foreign("32-bit x86")));
    }
    let sectors = match usize::from(setup.setup_sects) {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => sectors,
    };
    match image.len().checked_sub((sectors + 1) * SECTOR_BYTES) {
        None | Some(0) => Err(ImageError::Truncated("the kernel behind the setup sectors")),
        Some(kernel_bytes) => Ok(Header { setup, kernel_bytes: kernel_bytes as u64 }),
    }
}

impl Header {
    /// Where it wants to be loaded, and how many bytes it needs from there on. Loaded there it does not move itself.
    fn place(&self) -> (u64, u64) {
        let (preferred, needs) = (self.setup.pref_address, self.setup.init_size);
        (preferred.max(HIGH_MEMORY), u64::from(needs).max(self.kernel_bytes))
    }

    /// The longest command line it takes, in bytes without the NUL.
    pub(super) fn cmdline_max(&self) -> usize {
        self.setup.cmdline_size as usize
    }

    /// The last address that a byte of its initramfs may have.
    pub(super) fn initramfs_max(&self) -> u64 {
        self.setup.initrd_addr_max.into()
    }

    /// Loads it.
    ///
    /// # Errors
    /// [`crate::Error::Image`] when it does not fit into memory.
    pub(super) fn load(&self, memory: &GuestMemory, image: &[u8]) -> Result<Loaded> {
        let (start, length) = self.place();
        check_place(memory, start, length)?;
        let loaded = BzImage::load(memory.map(), Some(GuestAddress(start)), &mut Cursor::new(image), None)
            .map_err(|error| ImageError::Loader(error.to_string()))?;
        Ok(Loaded {
            entry: loaded.kernel_load.0 + ENTRY_64,
            end: start + length,
            setup: loaded.setup_header.unwrap_or(self.setup),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A bzImage of one setup sector and this kernel.
    pub(in crate::boot) fn bzimage(kernel: &[u8]) -> Vec<u8> {
        let mut setup = setup_header {
            setup_sects: 1,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            pref_address: 0x20_0000,
            init_size: 0x1_0000,
            code32_start: 0x10_0000,
            ..Default::default()
        };
        setup.header = u32::from_le_bytes(*b"HdrS");
        let mut file = vec![0; 2 * SECTOR_BYTES];
        file[HEADER..HEADER + size_of::<setup_header>()].copy_from_slice(setup.as_slice());
        file.extend(kernel);
        file
    }

    #[test]
    fn it_is_loaded_where_it_wants_to_be() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        let file = bzimage(b"kernel");
        let loaded = check(&file).unwrap().load(&memory, &file).unwrap();
        assert_eq!((loaded.entry, loaded.end), (0x20_0200, 0x21_0000));
        let mut bytes = [0; 6];
        memory.read(0x20_0000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"kernel");
        let small = GuestMemory::create(2 << 20).unwrap();
        assert!(check(&file).unwrap().load(&small, &file).is_err());
    }

    #[test]
    fn each_wrong_file_ends_in_its_own_error() {
        let good = bzimage(b"kernel");
        let with = |at: usize, byte: u8| {
            let mut file = good.clone();
            file[at] = byte;
            check(&file).unwrap_err().to_string()
        };
        assert!(with(0x236, 0).contains("32-bit x86"), "{}", with(0x236, 0));
        assert!(with(0x206, 0x0b).contains("2.11"), "{}", with(0x206, 0x0b));
        assert!(with(0x211, 0).contains("boot protocol"));
        assert_eq!(check(&good[..0x210]).unwrap_err(), ImageError::Truncated("the setup header"));
        let cut = check(&good[..2 * SECTOR_BYTES]).unwrap_err();
        assert_eq!(cut, ImageError::Truncated("the kernel behind the setup sectors"));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec((HEADER..HEADER + 123, any::<u8>()), 0..40), length in 0..1100_usize) {
            let memory = GuestMemory::create(4 << 20).unwrap();
            let mut file = bzimage(&[0x90; 100]);
            for (at, byte) in garbage {
                file[at] = byte;
            }
            file.truncate(length);
            if let Ok(header) = check(&file) {
                let _ = header.load(&memory, &file);
            }
        }
    }
}
