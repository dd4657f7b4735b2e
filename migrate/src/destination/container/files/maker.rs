//! One entry of a tree after the other, made in a directory.

use crate::container::files::Folder;
use crate::error::{Error, Result};
use protocol::container::tree::{Attribute, Entry, Kind, Time, Tree};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmodat,
    chownat, ftruncate, linkat, llistxattr, lremovexattr, lsetxattr, makedev, mkdirat, mknodat, renameat,
    symlinkat, utimensat,
};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;

pub(super) fn failed(what: &str, path: &[u8], error: Errno) -> Error {
    Error::Host(format!(
        "the container's file /{} could not be {what}: {error}",
        String::from_utf8_lossy(path)
    ))
}

/// Makes entries of a tree in a directory.
pub(super) struct Maker<'a> {
    top: &'a Folder,
    pub(super) tree: &'a Tree,
    /// The entries that are there, and what they were in the tree before.
    pub(super) have: HashMap<usize, usize>,
    /// The directory that was used last.
    last: Option<(u32, Folder)>,
}

/// What is known of an entry that is there.
#[derive(Clone, Copy)]
pub(super) enum Before<'a> {
    /// It was just made, in a directory that gave it nothing.
    Nothing,
    /// It was just made, and may have rules of its directory.
    Inherited,
    /// It was as this one says; but for what writing to a file takes away.
    Was(&'a Entry),
}

impl<'a> Maker<'a> {
    pub(super) fn new(top: &'a Folder, tree: &'a Tree) -> Self {
        Self { top, tree, have: HashMap::new(), last: None }
    }

    fn entry(&self, at: usize) -> Result<&'a Entry> {
        self.tree
            .entries
            .get(at)
            .ok_or_else(|| Error::Workload(format!("there is no entry {at} of the container's files")))
    }

    fn failed(&self, what: &str, at: usize, error: Errno) -> Error {
        failed(what, &self.tree.path(at), error)
    }

    /// The directory that an entry is in.
    fn folder(&mut self, at: usize) -> Result<&Folder> {
        let parent = self.entry(at)?.parent;
        let last = match self.last.take().filter(|(last, _)| *last == parent) {
            Some(last) => last,
            None => {
                let path = self.tree.path(parent as usize);
                (parent, self.top.folder(&path).map_err(|error| failed("opened", &path, error))?)
            }
        };
        Ok(&self.last.insert(last).1)
    }

    /// Makes an entry where nothing is.
    pub(super) fn make(&mut self, at: usize) -> Result<()> {
        let Entry { name, kind, .. } = self.entry(at)?;
        if let Kind::Link { to } = kind {
            return self.link(*to as usize, at);
        }
        let (file, folder) = (Mode::RUSR | Mode::WUSR, Mode::RWXU);
        let node = |parent: &Folder, kind, device| mknodat(parent, name, kind, file, device);
        let parent = self.folder(at)?;
        let made = match kind {
            Kind::Directory => mkdirat(parent, name, folder),
            Kind::File { size, .. } => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                parent.at(name, flags, file).and_then(|file| ftruncate(&file, *size))
            }
            Kind::Symlink { target } => symlinkat(target, parent, name),
            Kind::CharDevice { major, minor } => {
                node(parent, FileType::CharacterDevice, makedev(*major, *minor))
            }
            Kind::BlockDevice { major, minor } => {
                node(parent, FileType::BlockDevice, makedev(*major, *minor))
            }
            Kind::Fifo => node(parent, FileType::Fifo, 0),
            Kind::Socket => node(parent, FileType::Socket, 0),
            // It was made above.
            Kind::Link { .. } => Ok(()),
        };
        made.map_err(|error| self.failed("made", at, error))
    }

    /// Gives a file that is there one more name.
    pub(super) fn link(&mut self, from: usize, at: usize) -> Result<()> {
        let (entry, name) = (self.entry(from)?, &self.entry(at)?.name);
        let other = self.tree.path(entry.parent as usize);
        let other = self.top.folder(&other).map_err(|error| failed("opened", &other, error))?;
        linkat(&other, &entry.name, self.folder(at)?, name, AtFlags::empty())
            .map_err(|error| self.failed("linked", at, error))
    }

    /// Brings a file that was put aside to its place. Answers whether there is one.
    pub(super) fn bring(&mut self, moved: &Folder, number: u32, at: usize) -> Result<bool> {
        let name = &self.entry(at)?.name;
        match renameat(moved, number.to_string(), self.folder(at)?, name) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.failed("moved", at, error)),
        }
    }

    /// Opens a file for writing.
    pub(super) fn open(&mut self, at: usize) -> Result<File> {
        let name = &self.entry(at)?.name;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = self.folder(at)?.at(name, flags, Mode::empty());
        opened.map(File::from).map_err(|error| self.failed("opened", at, error))
    }

    /// Gives an entry its owner, attributes, mode and time, in this order: the first takes something away from those behind it.
    pub(super) fn dress(&mut self, at: usize, before: Before<'_>) -> Result<()> {
        let entry = self.entry(at)?;
        let Entry { name, kind, mode, uid, gid, mtime, attributes, .. } = entry;
        if matches!(kind, Kind::Link { .. }) {
            return Ok(());
        }
        let name: &[u8] = if name.is_empty() { b"." } else { name };
        let was = match before {
            Before::Was(was) => Some(was),
            _ => None,
        };
        let is_file = matches!(kind, Kind::File { .. });
        let folder = self.folder(at)?;
        let path = folder.path_of(name);
        let mut modes_again = was.is_none_or(|was| was.mode != *mode) || (is_file && mode & 0o6000 != 0);
        if was.is_none_or(|was| (was.uid, was.gid) != (*uid, *gid)) {
            modes_again = true;
            let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
            chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| self.failed("given to its owner", at, error))?;
        }
        let is_unwanted = |name: &[u8]| !attributes.iter().any(|attribute| attribute.name == name);
        let unwanted: Vec<Vec<u8>> = match before {
            Before::Nothing => Vec::new(),
            Before::Inherited => inherited(&path),
            Before::Was(was) => was.attributes.iter().map(|attribute| attribute.name.clone()).collect(),
        };
        for name in unwanted.iter().filter(|name| is_unwanted(name)) {
            modes_again = true;
            match lremovexattr(path.as_slice(), name.as_slice()) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => return Err(self.failed("rid of an attribute", at, error)),
            }
        }
        for attribute in attributes {
            // Writing to a file takes its capabilities away.
            if was.is_some_and(|was| !is_file && was.attributes.contains(attribute)) {
                continue;
            }
            modes_again = true;
            let Attribute { name, value } = attribute;
            lsetxattr(path.as_slice(), name.as_slice(), value, XattrFlags::empty()).map_err(|error| {
                let what = format!("given the attribute {}", String::from_utf8_lossy(name));
                self.failed(&what, at, error)
            })?;
        }
        let folder = self.folder(at)?;
        if modes_again && !matches!(kind, Kind::Symlink { .. }) {
            chmodat(folder, name, Mode::from_raw_mode((*mode).into()), AtFlags::empty())
                .map_err(|error| self.failed("given its mode", at, error))?;
        }
        let Time { s, ns } = *mtime;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: s, tv_nsec: ns.into() },
        };
        let folder = self.folder(at)?;
        utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.failed("given its time", at, error))
    }
}

/// The rules that something new got from its directory (acl(5)).
fn inherited(path: &[u8]) -> Vec<Vec<u8>> {
    let mut list = vec![0; 1 << 16];
    let bytes = llistxattr(path, &mut list[..]).unwrap_or(0);
    let names = list[..bytes].split(|byte| *byte == 0);
    names.filter(|name| name.starts_with(b"system.posix_acl_")).map(<[u8]>::to_vec).collect()
}
