//! From a store into an archive.

use super::PIECE_BYTES;
use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::vault::Vault;
use protocol::checkpoint::name::{self, CheckpointId};
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Checkpoints: the one that was meant, and what it stands on.
    pub checkpoints: usize,
    /// Objects.
    pub objects: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Writes a checkpoint and all that it stands on. Objects are not examined: whoever imports them does that.
///
/// # Errors
/// `Store`, `Interrupted`, or `Host` when the archive cannot be written.
pub fn export(vault: &Vault, id: CheckpointId, out: &mut dyn Write, cancel: &CancelFlag) -> Result<Exported> {
    let (checkpoints, names) = contents(vault, id)?;
    let mut archive = tar::Builder::new(out);
    let mut bytes = 0;
    for name in &names {
        bytes += append(vault, &mut archive, name, cancel)?;
    }
    archive.finish().map_err(|error| unwritable(&error))?;
    Ok(Exported { checkpoints, objects: names.len(), bytes })
}

/// What [`export`] would write.
///
/// # Errors
/// `Store`, also when an object is missing.
pub fn export_forecast(vault: &Vault, id: CheckpointId) -> Result<Exported> {
    let (checkpoints, names) = contents(vault, id)?;
    let mut bytes = 0;
    for name in &names {
        bytes += vault.store().open(name)?.bytes();
    }
    Ok(Exported { checkpoints, objects: names.len(), bytes })
}

/// How many checkpoints a chain has, and its objects in the order of an archive.
fn contents(vault: &Vault, id: CheckpointId) -> Result<(usize, Vec<String>)> {
    let chain = vault.chain(id)?;
    let mut names = vec![name::STORE.to_owned()];
    names.extend(chain.iter().map(|link| name::manifest(link.manifest.id)));
    let groups: BTreeSet<_> = chain.iter().filter_map(|link| link.manifest.group).collect();
    // A parent's group may be gone: the chain does not need it.
    for group in groups.into_iter().map(name::group) {
        if vault.store().contains(&group)? {
            names.push(group);
        }
    }
    let segments = chain.iter().flat_map(|link| &link.manifest.segments);
    let segments: BTreeSet<_> =
        segments.map(|segment| name::segment(segment.checkpoint, segment.number)).collect();
    names.extend(segments);
    names
        .extend(chain.iter().flat_map(|link| [name::index(link.manifest.id), name::state(link.manifest.id)]));
    Ok((chain.len(), names))
}

fn unwritable(error: &std::io::Error) -> Error {
    Error::Host(format!("the archive cannot be written: {error}"))
}

fn append(
    vault: &Vault,
    archive: &mut tar::Builder<&mut dyn Write>,
    name: &str,
    cancel: &CancelFlag,
) -> Result<u64> {
    let reader = vault.store().open(name)?;
    let bytes = reader.bytes();
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes);
    header.set_mode(0o600);
    let mut object =
        Pieces { reader: &*reader, offset: 0, piece: Vec::new(), taken: 0, cancel, failed: None };
    let appended = archive.append_data(&mut header, name, &mut object);
    if let Some(error) = object.failed.take() {
        return Err(error);
    }
    appended.map_err(|error| unwritable(&error))?;
    Ok(bytes)
}

/// An object as a stream. An error of the store is kept: as one of the stream it would lose its class.
struct Pieces<'a> {
    reader: &'a dyn crate::store::ObjectReader,
    offset: u64,
    piece: Vec<u8>,
    taken: usize,
    cancel: &'a CancelFlag,
    failed: Option<Error>,
}

impl Pieces<'_> {
    fn next(&mut self) -> Result<()> {
        self.cancel.check()?;
        let left = self.reader.bytes().saturating_sub(self.offset);
        self.piece.resize(left.min(PIECE_BYTES as u64) as usize, 0);
        self.reader.read_at(self.offset, &mut self.piece)?;
        self.offset += self.piece.len() as u64;
        self.taken = 0;
        Ok(())
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.taken == self.piece.len()
            && let Err(error) = self.next()
        {
            self.failed = Some(error);
            return Err(ErrorKind::Other.into());
        }
        let mut rest = self.piece.get(self.taken..).unwrap_or_default();
        let count = rest.read(buffer)?;
        self.taken += count;
        Ok(count)
    }
}
