//! The root file system of a container, where it travels with it.
//!
//! ```text
//! source        overlay? ─▶ walk ─▶ tree and stamps ─▶ held? ─▶ what changed ─▶ slots of the files' space
//! destination   tree ─▶ files ◀─ pages ─▶ the last tree ─▶ (overlay mounted)
//! ```
//!
//! Everything is reached by a [`Folder`]: whatever a container makes of its own files while they are looked at, and whatever a peer says, nothing
//! outside is touched.

mod folder;
mod held;
mod overlay;
mod walk;

pub(crate) use folder::Folder;
pub(crate) use held::Held;
pub(crate) use overlay::{Mounted, mount_points, unmount_all};
pub(crate) use walk::{Listing, Stamp, stamp, walk};

use crate::error::{Error, Result};
use protocol::ProtocolError;
use protocol::container::{MAX_RUNS, Placement, Run, Tree, tree};
use protocol::layout::Layout;
use protocol::page::SpaceId;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Pages of files are as those of memory.
pub(crate) const PAGE_BYTES: u64 = protocol::page::PAGE_SIZE as u64;

/// How hard listings are packed: at level 3 one of 30,000 files takes some 10 ms.
const LEVEL: i32 = 3;

/// The most pages of a file: offsets have 63 bits.
const MAX_FILE_PAGES: u64 = (1 << 63) / PAGE_BYTES;

/// The most bytes of an unpacked placement.
const MAX_PLACEMENT_BYTES: usize = 8 + 32 * MAX_RUNS;

/// What of a container's root file system goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RootCopy {
    /// Of an overlay the upper layer, of everything else all.
    Upper,
    /// All of it.
    Whole,
}

/// A tree as a section's body.
///
/// # Errors
/// `Protocol` when it is too large.
pub(crate) fn pack_tree(tree: &Tree) -> Result<Vec<u8>> {
    pack(&tree.encode()?)
}

/// The tree in a section's body.
///
/// # Errors
/// `Workload` or `Protocol`.
pub(crate) fn unpack_tree(body: &[u8]) -> Result<Tree> {
    Ok(Tree::decode(&unpack(body, tree::MAX_TREE_BYTES)?)?)
}

/// A placement as a section's body.
///
/// # Errors
/// `Protocol` when it is too large.
pub(crate) fn pack_placement(placement: &Placement) -> Result<Vec<u8>> {
    pack(&placement.encode()?)
}

/// The placement in a section's body, all of it in this space.
///
/// # Errors
/// `Workload` or `Protocol`.
pub(crate) fn unpack_placement(layout: &Layout, space: SpaceId, body: &[u8]) -> Result<Placement> {
    let placement = Placement::decode(layout, &unpack(body, MAX_PLACEMENT_BYTES)?)?;
    for Run { page, pages, space: found, slot, .. } in &placement.runs {
        let (first, count) = (*slot, u64::from(*pages));
        if *found != space {
            return Err(ProtocolError::OutsideLayout { space: found.0, first, count }.into());
        }
        if page + count > MAX_FILE_PAGES {
            return Err(ProtocolError::Value { what: "a page of a container's file", found: *page }.into());
        }
    }
    Ok(placement)
}

fn pack(bytes: &[u8]) -> Result<Vec<u8>> {
    zstd::encode_all(bytes, LEVEL).map_err(|error| {
        Error::Host(format!("the listing of the container's files cannot be packed: {error}"))
    })
}

fn unpack(body: &[u8], limit: usize) -> Result<Vec<u8>> {
    let wrong =
        |why: String| Error::Workload(format!("the listing of the container's files is unusable: {why}"));
    let decoder = zstd::Decoder::new(body).map_err(|error| wrong(error.to_string()))?;
    let mut bytes = Vec::new();
    decoder.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
    match bytes.len() > limit {
        true => Err(wrong(format!("it has more than {limit} bytes"))),
        false => Ok(bytes),
    }
}

/// Copies what lies in a file from an offset on; zeros behind its end.
///
/// # Errors
/// The kernel's.
pub(crate) fn read_filled(file: &File, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    into[done..].fill(0);
    Ok(())
}

/// Tells the pages in which a range of a file has data, by first page and number, ascending and apart: what is in none of them reads as zeros.
///
/// # Errors
/// The kernel's.
pub(crate) fn data_pages(file: &File, range: Range<u64>) -> std::io::Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let Range { start: mut at, end: size } = range;
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < size => data,
            Ok(_) | Err(Errno::NXIO) => break,
            // It cannot tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = match seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(size),
            Err(_) => size,
        };
        // One that became shorter meanwhile.
        let hole = hole.max(data + 1);
        let (first, end) = (data / PAGE_BYTES, hole.div_ceil(PAGE_BYTES));
        match found.last_mut().filter(|(last, count)| last + count >= first) {
            Some((last, count)) => *count = end - *last,
            None => found.push((first, end - first)),
        }
        at = hole;
    }
    Ok(found)
}

#[cfg(test)]
pub(crate) mod scribbler;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_no_data() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create_new(folder.path().join("sparse")).unwrap();
        let size = (1 << 30) + 5;
        file.set_len(size).unwrap();
        assert_eq!(data_pages(&file, 0..size).unwrap(), []);
        file.write_all_at(b"x", 5 << 20).unwrap();
        file.write_all_at(b"x", 1 << 30).unwrap();
        let found = data_pages(&file, 0..size).unwrap();
        let has = |page| found.iter().any(|(first, count)| (*first..first + count).contains(&page));
        assert!(has((5 << 20) / 4096) && has((1 << 30) / 4096) && !has(0), "{found:?}");
        // A file system may give more than a page at once, and never everything.
        assert!(found.iter().map(|(_, count)| count).sum::<u64>() < 1024, "{found:?}");
        assert_eq!(data_pages(&file, size..size).unwrap(), []);
        assert!(
            data_pages(&file, 1 << 29..size).unwrap().iter().all(|(first, _)| *first >= (1 << 29) / 4096)
        );
    }

    #[test]
    fn a_listing_that_would_fill_memory_is_refused() {
        let packed = pack(&vec![0; tree::MAX_TREE_BYTES + 1]).unwrap();
        assert!(packed.len() < 1 << 20);
        let error = unpack_tree(&packed).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
        unpack_tree(b"no zstd").unwrap_err();
    }
}
