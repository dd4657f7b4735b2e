//! A checkpoint as files that other programs read: its memory as it lies in the guest, an ELF core for a debugger, or its disks.
//!
//! Both are sparse: pages of zeros are holes. A file that is there is never written over, and one that could not be finished is removed.

mod elf;

use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::restore::image::Image;
use crate::vault::Vault;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use protocol::state::State;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use vmm::devices::virtio::Description;
use vmm::state::VcpuState;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// The file's length, with its holes.
    pub bytes: u64,
    /// What of it are pages that are not zeros.
    pub data_bytes: u64,
}

/// Writes memory as it lies in the guest: each byte at its guest-physical address.
///
/// # Errors
/// `Usage` when the file is there, `Host` when it cannot be written, `Store`, `Interrupted`.
pub fn raw(image: &Image, path: &Path, cancel: &CancelFlag) -> Result<Exported> {
    let layout = layout(image)?;
    let bytes = raw_forecast(image)?.bytes;
    let at = |space: &Space| Some(space.guest_address);
    new_file(path, |file| write(image, layout, file, path, &[], bytes, &at, cancel))
}

/// What [`raw`] would write.
///
/// # Errors
/// `Store`.
pub fn raw_forecast(image: &Image) -> Result<Exported> {
    let spaces = layout(image)?.of_kind(SpaceKind::Memory);
    let bytes = spaces.map(|space| space.guest_address + length(space)).max().unwrap_or(0);
    Ok(Exported { bytes, data_bytes: data_bytes(image) })
}

/// Writes an ELF core: memory by guest-physical addresses, and the registers of every vCPU as a thread.
///
/// # Errors
/// As [`raw`]; `Store` when the state is not that of a VM of ours.
pub fn core(vault: &Vault, image: &Image, path: &Path, cancel: &CancelFlag) -> Result<Exported> {
    core_of(image, &vcpus(vault, image)?, path, cancel)
}

/// What [`core()`] would write.
///
/// # Errors
/// `Store`, as of [`core()`].
pub fn core_forecast(vault: &Vault, image: &Image) -> Result<Exported> {
    let core = elf::Core::new(&memory_of(layout(image)?), &vcpus(vault, image)?);
    Ok(Exported { bytes: core.bytes(), data_bytes: data_bytes(image) })
}

/// The registers of every vCPU of a VM of ours.
fn vcpus(vault: &Vault, image: &Image) -> Result<Vec<VcpuState>> {
    let manifest = image.chain().first().map(|link| &link.manifest);
    let manifest = manifest.ok_or_else(|| Error::Store("the chain is empty".into()))?;
    let (_, state) = vault.state(manifest)?;
    let wrong = |why: String| {
        Error::Store(format!(
            "checkpoint {}: its state has no registers that could be exported: {why}",
            manifest.id
        ))
    };
    let state = State::decode(&state).map_err(|error| wrong(error.to_string()))?;
    vmm::state::vcpus(&state).map_err(|error| wrong(error.to_string()))
}

fn core_of(image: &Image, vcpus: &[VcpuState], path: &Path, cancel: &CancelFlag) -> Result<Exported> {
    let layout = layout(image)?;
    let core = elf::Core::new(&memory_of(layout), vcpus);
    let at = |space: &Space| core.offset(space.id);
    new_file(path, |file| write(image, layout, file, path, core.head(), core.bytes(), &at, cancel))
}

fn layout(image: &Image) -> Result<&Layout> {
    let newest = image.chain().first().ok_or_else(|| Error::Store("the chain is empty".into()))?;
    Ok(&newest.manifest.layout)
}

fn memory_of(layout: &Layout) -> Vec<Space> {
    layout.of_kind(SpaceKind::Memory).cloned().collect()
}

/// Bytes of the pages of memory that are not zeros.
fn data_bytes(image: &Image) -> u64 {
    let spaces = layout(image).map(memory_of).unwrap_or_default();
    let data = spaces.iter().filter_map(|space| image.plan().data.get(usize::from(space.id.0)));
    data.map(PageSet::count).sum::<u64>() * PAGE_SIZE as u64
}

/// A disk in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The name of its image.
    pub name: String,
    /// Its space.
    pub space: SpaceId,
    /// Its length in bytes.
    pub bytes: u64,
}

/// The disks in a checkpoint.
///
/// # Errors
/// `Store` when the checkpoint is not of a VM of ours.
pub fn disks_of(vault: &Vault, image: &Image) -> Result<Vec<Disk>> {
    let newest = image.chain().first().ok_or_else(|| Error::Store("the chain is empty".into()))?;
    let (machine, _) = vault.state(&newest.manifest)?;
    let (_, devices) = vmm::state::Machine::decode(&machine)?;
    let copied = devices.iter().filter_map(|device| match device {
        Description::Copied { path, sectors, .. } => Some((path, *sectors)),
        _ => None,
    });
    let spaces = newest.manifest.layout.of_kind(SpaceKind::Disk);
    let disks = copied.zip(spaces).map(|((path, sectors), space)| {
        let name = Path::new(path).file_name().and_then(|name| name.to_str());
        let fits = sectors.checked_mul(512).filter(|bytes| *bytes <= length(space));
        let found =
            name.zip(fits).map(|(name, bytes)| Disk { name: name.to_owned(), space: space.id, bytes });
        found.ok_or_else(|| {
            Error::Store(format!("checkpoint {}: disk {path} does not fit its space", newest.manifest.id))
        })
    });
    disks.collect()
}

/// Writes the image of a disk.
///
/// # Errors
/// As [`raw`].
pub fn disk(image: &Image, disk: &Disk, path: &Path, cancel: &CancelFlag) -> Result<Exported> {
    let Disk { space, bytes, .. } = *disk;
    new_file(path, |file| {
        file.set_len(bytes).map_err(|error| unwritable(path, &error))?;
        let mut data_bytes = 0;
        image.each(cancel, &mut |run: PageRun, pages, _| {
            if run.space != space {
                return Ok(());
            }
            // The last page may go beyond the disk's end.
            let inside = usize::try_from(bytes.saturating_sub(run.offset())).unwrap_or(usize::MAX);
            let pages = &pages[..inside.min(pages.len())];
            data_bytes += pages.len() as u64;
            file.write_all_at(pages, run.offset()).map_err(|error| unwritable(path, &error))
        })?;
        Ok(Exported { bytes, data_bytes })
    })
}

/// A space's length in bytes.
fn length(space: &Space) -> u64 {
    space.pages * PAGE_SIZE as u64
}

/// That a file could be made here, as far as that can be told without making it.
///
/// # Errors
/// `Usage` when it is there, `Host` when its directory is not.
pub(crate) fn check_new(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        return Err(there(path));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let found = parent.unwrap_or(Path::new(".")).metadata();
    found.map(drop).map_err(|error| unwritable(path, &error))
}

fn there(path: &Path) -> Error {
    Error::Usage(format!("{} is there already: name another file, or remove it", path.display()))
}

/// Makes a file and has it written; one that was not finished goes again.
///
/// # Errors
/// `Usage` when it is there, `Host`, or what the writing answers.
pub(crate) fn new_file<T>(path: &Path, write: impl FnOnce(&File) -> Result<T>) -> Result<T> {
    let made = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = made.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => there(path),
        _ => unwritable(path, &error),
    })?;
    let written = write(&file).and_then(|written| {
        file.sync_all().map_err(|error| unwritable(path, &error))?;
        Ok(written)
    });
    if written.is_err() {
        std::fs::remove_file(path).ok();
    }
    written
}

fn unwritable(path: &Path, error: &std::io::Error) -> Error {
    Error::Host(format!("{} cannot be written: {error}", path.display()))
}

#[allow(clippy::too_many_arguments, reason = "what both kinds of files differ in")]
fn write(
    image: &Image,
    layout: &Layout,
    file: &File,
    path: &Path,
    head: &[u8],
    bytes: u64,
    at: &dyn Fn(&Space) -> Option<u64>,
    cancel: &CancelFlag,
) -> Result<Exported> {
    let failed = |error: &std::io::Error| unwritable(path, error);
    file.set_len(bytes).map_err(|error| failed(&error))?;
    file.write_all_at(head, 0).map_err(|error| failed(&error))?;
    let mut data_bytes = 0;
    image.each(cancel, &mut |run: PageRun, pages, _| {
        if layout.space(run.space).is_some_and(|space| space.kind == SpaceKind::Disk) {
            return Ok(());
        }
        let start = layout.space(run.space).and_then(at);
        let start =
            start.ok_or_else(|| Error::Store(format!("space {} is not in the layout", run.space.0)))?;
        data_bytes += pages.len() as u64;
        file.write_all_at(pages, start + run.offset()).map_err(|error| failed(&error))
    })?;
    Ok(Exported { bytes, data_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::sample;
    use std::os::unix::fs::MetadataExt as _;
    use std::process::Command;

    fn vcpu(rip: u64, rax: u64) -> VcpuState {
        let mut vcpu = VcpuState {
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Vec::new(),
            xcrs: Default::default(),
            debug_regs: Default::default(),
            lapic: Default::default(),
            msrs: Vec::new(),
            events: Default::default(),
            nested: None,
            tsc_offset: None,
        };
        vcpu.regs.rip = rip;
        vcpu.regs.rax = rax;
        vcpu.sregs.cs.selector = 0x10;
        vcpu.sregs.gs.base = 0xffff_8880_0000_0000;
        vcpu
    }

    #[test]
    fn an_image_has_each_byte_at_its_address_and_holes_for_zeros() {
        let vault = sample::vault();
        let (links, images) = sample::chain(&vault, 3);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let image = Image::open(&vault, links[3].manifest.id).unwrap();
        check_new(&path).unwrap();
        let forecast = raw_forecast(&image).unwrap();
        let done = raw(&image, &path, &CancelFlag::default()).unwrap();
        assert_eq!(forecast, done);
        assert!(matches!(check_new(&path).unwrap_err(), Error::Usage(_)));
        assert!(matches!(check_new(&folder.path().join("not/there")).unwrap_err(), Error::Host(_)));
        let file = File::open(&path).unwrap();
        for (space, expected) in sample::layout().spaces.iter().zip(&images[3]) {
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, space.guest_address).unwrap();
            assert!(found == *expected, "space {}", space.id.0);
        }
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), (4 << 30) + 90 * PAGE_SIZE as u64);
        assert_eq!(
            (done.bytes, done.data_bytes),
            (metadata.len(), image.plan().data_pages() * PAGE_SIZE as u64)
        );
        assert!(metadata.blocks() * 512 <= done.data_bytes + (1 << 20), "{} blocks", metadata.blocks());
        let error = raw(&image, &path, &CancelFlag::default()).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
        let cancel = CancelFlag::default();
        cancel.set();
        raw(&image, &folder.path().join("other"), &cancel).unwrap_err();
        assert!(!folder.path().join("other").exists(), "what was not finished is removed");
    }

    #[test]
    fn gdb_opens_a_core_and_finds_registers_and_memory() {
        let vault = sample::vault();
        let (links, images) = sample::chain(&vault, 2);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("core");
        let image = Image::open(&vault, links[2].manifest.id).unwrap();
        let vcpus = [vcpu(0xffff_ffff_8100_1234, 7), vcpu(0x7c00, 0xabcd_ef01_2345_6789)];
        core_of(&image, &vcpus, &path, &CancelFlag::default()).unwrap();
        let word = |space: usize, offset: usize| {
            u64::from_le_bytes(*images[2][space][offset..].first_chunk().unwrap())
        };
        // The first page of each space that is not zeros.
        let full = |space: usize| {
            let pages = images[2][space].as_chunks::<PAGE_SIZE>().0;
            pages.iter().position(|page| page.iter().any(|byte| *byte != 0)).unwrap() * PAGE_SIZE
        };
        let (low, high) = (full(0), full(1));
        let shown = Command::new("gdb")
            .args(["-nx", "-batch", "-ex", "info threads", "-ex", "thread 1", "-ex", "p/x $rip"])
            .args(["-ex", "p/x $gs_base", "-ex", "thread 2", "-ex", "p/x $rax", "-ex", "p/x $cs"])
            .args([
                "-ex",
                &format!("x/gx {low:#x}"),
                "-ex",
                &format!("x/gx {:#x}", (4_u64 << 30) + high as u64),
            ])
            .arg("-c")
            .arg(&path)
            .env("LC_ALL", "C")
            .output()
            .expect("gdb runs: install gdb");
        let text = String::from_utf8_lossy(&shown.stdout) + String::from_utf8_lossy(&shown.stderr);
        for expected in [
            "0xffffffff81001234".to_owned(),
            "0xffff888000000000".into(),
            "0xabcdef0123456789".into(),
            "= 0x10".into(),
            format!("{low:#x}:\t{:#018x}", word(0, low)),
            format!("{:#x}:\t{:#018x}", (4_u64 << 30) + high as u64, word(1, high)),
        ] {
            assert!(text.contains(&expected), "no {expected:?} in\n{text}");
        }
    }

    #[test]
    fn a_state_without_registers_is_refused_by_name() {
        let vault = sample::vault();
        let (links, _) = sample::chain(&vault, 0);
        let folder = tempfile::tempdir().unwrap();
        let image = Image::open(&vault, links[0].manifest.id).unwrap();
        core_forecast(&vault, &image).unwrap_err();
        let error = core(&vault, &image, &folder.path().join("core"), &CancelFlag::default()).unwrap_err();
        assert!(error.to_string().contains(&links[0].manifest.id.to_string()), "{error}");
        assert!(!folder.path().join("core").exists());
    }
}
