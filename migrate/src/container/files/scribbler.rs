//! For tests: somebody who changes what is in a directory, and a look at what is there.

use super::read_filled;
use rustix::fs::{AtFlags, CWD, FileType, Mode, XattrFlags, mknodat};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

/// One change.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Writes these bytes at an offset; makes the file if there is none.
    Write(usize, u64, u8, usize),
    /// Makes a file shorter or longer.
    Resize(usize, u64),
    Rename(usize, usize),
    Link(usize, usize),
    Remove(usize),
    Symlink(usize, u8),
    Folder(usize),
    Fifo(usize),
    Mode(usize, u32),
    Note(usize, u8),
}

/// Names that there can be: some are in directories that there may be.
const NAMES: [&str; 12] = ["a", "b", "c", "d", "a/a", "a/b", "a/c", "b/a", "b/b", "a/b/a", "a/b/c", "e"];

pub(crate) fn changes() -> impl proptest::strategy::Strategy<Value = Vec<Change>> {
    use proptest::prelude::*;
    let name = || 0..NAMES.len();
    let change = prop_oneof![
        5 => (name(), 0_u64..60_000, any::<u8>(), 0_usize..30_000).prop_map(|(at, offset, byte, bytes)| Change::Write(at, offset, byte, bytes)),
        1 => (name(), Just(1_u64 << 28), any::<u8>(), 0_usize..9000).prop_map(|(at, offset, byte, bytes)| Change::Write(at, offset, byte, bytes)),
        2 => (name(), 0_u64..60_000).prop_map(|(at, size)| Change::Resize(at, size)),
        2 => (name(), name()).prop_map(|(from, to)| Change::Rename(from, to)),
        1 => (name(), name()).prop_map(|(from, to)| Change::Link(from, to)),
        2 => name().prop_map(Change::Remove),
        1 => (name(), any::<u8>()).prop_map(|(at, target)| Change::Symlink(at, target)),
        2 => name().prop_map(Change::Folder),
        1 => name().prop_map(Change::Fifo),
        1 => (name(), prop_oneof![Just(0o600), Just(0o755), Just(0o700), Just(0o4711)]).prop_map(|(at, mode)| Change::Mode(at, mode)),
        1 => (name(), any::<u8>()).prop_map(|(at, value)| Change::Note(at, value)),
    ];
    prop::collection::vec(change, 0..40)
}

/// Makes changes; what cannot be is left.
pub(crate) fn scribble(folder: &Path, changes: &[Change]) {
    let path = |at: &usize| folder.join(NAMES[*at]);
    let is_file = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
    for change in changes {
        let done = match change {
            Change::Write(at, offset, byte, bytes) => {
                let path = path(at);
                if path.symlink_metadata().is_ok() && !is_file(&path) {
                    continue;
                }
                let file = File::options().write(true).create(true).truncate(false).open(path);
                file.and_then(|file| file.write_all_at(&vec![*byte; *bytes], *offset))
            }
            Change::Resize(at, size) if is_file(&path(at)) => {
                File::options().write(true).open(path(at)).and_then(|file| file.set_len(*size))
            }
            Change::Rename(from, to) => fs::rename(path(from), path(to)),
            Change::Link(from, to) if is_file(&path(from)) => fs::hard_link(path(from), path(to)),
            Change::Remove(at) => fs::remove_file(path(at)).or_else(|_| fs::remove_dir_all(path(at))),
            Change::Symlink(at, target) => symlink(format!("../../{target}"), path(at)),
            Change::Folder(at) => fs::create_dir(path(at)),
            Change::Fifo(at) => {
                mknodat(CWD, path(at), FileType::Fifo, Mode::RUSR, 0).map_err(std::io::Error::from)
            }
            Change::Mode(at, mode) if is_file(&path(at)) => {
                fs::set_permissions(path(at), fs::Permissions::from_mode(*mode))
            }
            Change::Note(at, value) if is_file(&path(at)) => {
                let set = rustix::fs::setxattr(path(at), "user.note", &[*value], XattrFlags::empty());
                set.map_err(std::io::Error::from)
            }
            _ => Ok(()),
        };
        drop(done);
    }
}

/// What is seen of each name below a directory.
pub(crate) fn everything(top: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![top.to_path_buf()];
    let mut firsts = BTreeMap::new();
    while let Some(path) = left.pop() {
        let stat = rustix::fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let inside = path.strip_prefix(top).unwrap().to_path_buf();
        let mut seen = format!(
            "{:o} {}:{} {}.{}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        if metadata.is_symlink() {
            seen += &format!(" to {:?}", fs::read_link(&path).unwrap());
        } else if metadata.is_file() {
            let file = File::open(&path).unwrap();
            let mut bytes = vec![0; 100_000];
            let mut hash = blake3::Hasher::new();
            for offset in [0, 1 << 28] {
                read_filled(&file, offset, &mut bytes).unwrap();
                hash.update(&bytes);
            }
            let mut note = [0; 10];
            let note =
                rustix::fs::getxattr(&path, "user.note", &mut note[..]).map(|bytes| note[..bytes].to_vec());
            seen += &format!(" {} bytes {} {note:?} {}", metadata.len(), hash.finalize(), stat.st_nlink);
            assert!(stat.st_blocks < 1 << 11, "{} is a hole still", path.display());
            // Which names are of one file.
            let first = firsts.entry(stat.st_ino).or_insert_with(Vec::new);
            first.push(inside.clone());
        }
        found.insert(inside, seen);
    }
    for mut names in firsts.into_values().filter(|names| names.len() > 1) {
        names.sort();
        for name in &names {
            found.entry(name.clone()).and_modify(|seen| *seen += &format!(" = {names:?}"));
        }
    }
    found
}
