//! A checkpoint as files that other programs read: its memory as it lies in the guest, or an ELF core for a debugger.
//!
//! Both are sparse: pages of zeros are holes. A file that is there is never written over, and one that could not be finished is removed.

mod elf;

use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::restore::image::Image;
use crate::vault::Vault;
use protocol::layout::{Layout, Space};
use protocol::page::{PAGE_SIZE, PageRun};
use protocol::state::State;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

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
pub fn raw(image: &Image<'_>, path: &Path, cancel: &CancelFlag) -> Result<Exported> {
    let layout = layout(image)?;
    let bytes = layout.spaces.iter().map(|space| space.guest_address + length(space)).max().unwrap_or(0);
    let at = |space: &Space| Some(space.guest_address);
    new_file(path, |file| write(image, layout, file, path, &[], bytes, &at, cancel))
}

/// Writes an ELF core: memory by guest-physical addresses, and the registers of every vCPU as a thread.
///
/// # Errors
/// As [`raw`]; `Store` when the state is not that of a VM of ours.
pub fn core(vault: &Vault, image: &Image<'_>, path: &Path, cancel: &CancelFlag) -> Result<Exported> {
    let layout = layout(image)?;
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
    let vcpus = vmm::state::vcpus(&state).map_err(|error| wrong(error.to_string()))?;
    let core = elf::Core::new(&layout.spaces, &vcpus);
    let at = |space: &Space| core.offset(space.id);
    new_file(path, |file| write(image, layout, file, path, core.head(), core.bytes(), &at, cancel))
}

fn layout<'a>(image: &'a Image<'_>) -> Result<&'a Layout> {
    let newest = image.chain().first().ok_or_else(|| Error::Store("the chain is empty".into()))?;
    Ok(&newest.manifest.layout)
}

/// A space's length in bytes.
fn length(space: &Space) -> u64 {
    space.pages * PAGE_SIZE as u64
}

/// Makes a file and has it written; one that was not finished goes again.
///
/// # Errors
/// `Usage` when it is there, `Host`, or what the writing answers.
pub(crate) fn new_file<T>(path: &Path, write: impl FnOnce(&File) -> Result<T>) -> Result<T> {
    let made = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = made.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::Usage(format!("{} is there already: name another file, or remove it", path.display()))
        }
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
    image: &Image<'_>,
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
        let start = layout.space(run.space).and_then(at);
        let start =
            start.ok_or_else(|| Error::Store(format!("space {} is not in the layout", run.space.0)))?;
        data_bytes += pages.len() as u64;
        file.write_all_at(pages, start + run.offset()).map_err(|error| failed(&error))
    })?;
    Ok(Exported { bytes, data_bytes })
}
