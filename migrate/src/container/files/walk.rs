//! What is in a directory, all the way down, as it is now.

use super::folder::{Folder, identity};
use crate::error::{Error, Result};
use protocol::container::Tree;
use protocol::container::tree::{Attribute, Entry, Kind, MAX_ENTRIES, Time};
use rustix::fs::{AtFlags, Dir, FileType, Stat, lgetxattr, llistxattr, major, minor, readlinkat, statat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::time::{Duration, SystemTime};

/// A file that was changed so shortly before it was looked at may be changed again without its times telling: the clock behind them goes in steps of
/// at most 10 ms (`CONFIG_HZ=100`), and whoever writes may be held up between telling and writing.
const UNSURE: Duration = Duration::from_millis(100);

/// Attributes of an upper layer that are true only where it was made: they name files by handles (fs/overlayfs/overlayfs.h).
const LOCAL: [&[u8]; 4] =
    [b"trusted.overlay.origin", b"trusted.overlay.uuid", b"user.overlay.origin", b"user.overlay.uuid"];

/// The bytes that a call for attributes is tried with first.
const USUAL_BYTES: usize = 1024;

/// By what it is told whether a file was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Device and inode.
    pub(crate) identity: (u64, u64),
    pub(crate) size: u64,
    /// Whether it may have holes: fewer blocks than its size.
    pub(crate) is_sparse: bool,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
}

/// A tree, and the stamps of its entries.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// The numbers of its files are those that were given to them, 0 at first.
    pub(crate) tree: Tree,
    /// In the order of the entries.
    pub(crate) stamps: Vec<Stamp>,
    /// The entry of each file, and of everything else.
    entries: HashMap<(u64, u64), u32>,
    /// Changes behind this moment may not be told.
    sure_until: Time,
}

impl Listing {
    /// Whether this may have been changed since without a word.
    pub(crate) fn is_unsure(&self, stamp: &Stamp) -> bool {
        let key = |time: Time| (time.s, time.ns);
        key(stamp.ctime) >= key(self.sure_until)
    }

    /// The files, by their entries.
    pub(crate) fn files(&self) -> impl Iterator<Item = (usize, Stamp)> {
        let all = self.tree.entries.iter().zip(&self.stamps).enumerate();
        all.filter(|(_, (entry, _))| matches!(entry.kind, Kind::File { .. }))
            .map(|(at, (_, stamp))| (at, *stamp))
    }

    /// Gives the file of an entry its number.
    pub(crate) fn set_number(&mut self, at: usize, number: u32) {
        if let Some(Entry { kind: Kind::File { number: own, .. }, .. }) = self.tree.entries.get_mut(at) {
            *own = number;
        }
    }

    /// The same entry when it was looked at before, if nothing about it has changed since.
    fn unchanged(&self, stamp: &Stamp) -> Option<&Entry> {
        let at = *self.entries.get(&stamp.identity)? as usize;
        let before = self.stamps.get(at).filter(|before| *before == stamp && !self.is_unsure(before))?;
        self.tree.entries.get(at).filter(|_| before == stamp)
    }
}

/// Lists what there is. What goes away meanwhile is left out, and what lies in another file system is: of a directory that something is mounted on
/// there is the directory. `before` is an earlier look, which spares asking for what has not changed. `is_layer` says that it is an overlay's upper layer.
///
/// # Errors
/// `Host` when something cannot be read, `Workload` when there is too much.
pub(crate) fn walk(top: &Folder, before: Option<&Listing>, is_layer: bool) -> Result<Listing> {
    let now = SystemTime::now()
        .checked_sub(UNSURE)
        .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    let now = now.unwrap_or_default();
    let sure_until = Time { s: i64::try_from(now.as_secs()).unwrap_or(i64::MAX), ns: now.subsec_nanos() };
    let mut walk = Walk { found: Listing { sure_until, ..Listing::default() }, before, is_layer };
    let failed = |path: &[u8], error: Errno| {
        let path = String::from_utf8_lossy(path).into_owned();
        Error::Host(format!("the container's file /{path} cannot be read: {error}"))
    };
    let stat = rustix::fs::fstat(top).map_err(|error| failed(b"", error))?;
    walk.add(0, Vec::new(), top, &stat).map_err(|error| failed(b"", error))?;
    let mut next = 0;
    while let Some(entry) = walk.found.tree.entries.get(next) {
        if entry.kind == Kind::Directory {
            let path = walk.found.tree.path(next);
            match top.folder(&path) {
                Ok(folder) => walk.children(next as u32, &folder).map_err(|error| failed(&path, error))?,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
                Err(error) => return Err(failed(&path, error)),
            }
        }
        if walk.found.tree.entries.len() > MAX_ENTRIES {
            return Err(Error::Workload(format!(
                "the container's root file system has more than {MAX_ENTRIES} files, which cannot be copied: leave it where both hosts reach it, \
                 and move the container without --copy-rootfs"
            )));
        }
        next += 1;
    }
    Ok(walk.found)
}

struct Walk<'a> {
    found: Listing,
    before: Option<&'a Listing>,
    is_layer: bool,
}

impl Walk<'_> {
    /// Everything in a directory, in the order of names.
    fn children(&mut self, parent: u32, folder: &Folder) -> rustix::io::Result<()> {
        let mut names = Vec::new();
        for entry in Dir::read_from(folder)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.sort_unstable();
        names.dedup();
        for name in names {
            let added = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW)
                .and_then(|stat| self.add(parent, name, folder, &stat));
            match added {
                // It is gone, or something else by now.
                Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn add(&mut self, parent: u32, name: Vec<u8>, folder: &Folder, stat: &Stat) -> rustix::io::Result<()> {
        let stamp = stamp(stat);
        let type_of = FileType::from_raw_mode(stat.st_mode);
        let index = self.found.tree.entries.len() as u32;
        let first = self.found.entries.get(&stamp.identity).copied();
        // Not what had its inode a moment ago.
        let first = first.filter(|first| {
            let entry = self.found.tree.entries.get(*first as usize);
            matches!(entry, Some(Entry { kind: Kind::File { .. }, .. }))
        });
        if let Some(to) = first.filter(|_| type_of == FileType::RegularFile) {
            let mtime = Time::default();
            let kind = Kind::Link { to };
            let entry = Entry { parent, name, kind, mode: 0, uid: 0, gid: 0, mtime, attributes: Vec::new() };
            self.push(entry, stamp);
            return Ok(());
        }
        let known = self.before.and_then(|before| before.unchanged(&stamp));
        let kind = match type_of {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File { number: 0, size: stamp.size },
            FileType::Symlink => match known.map(|known| &known.kind) {
                Some(Kind::Symlink { target }) => Kind::Symlink { target: target.clone() },
                _ => Kind::Symlink { target: readlinkat(folder, &name, Vec::new())?.into_bytes() },
            },
            FileType::CharacterDevice => {
                Kind::CharDevice { major: major(stat.st_rdev), minor: minor(stat.st_rdev) }
            }
            FileType::BlockDevice => {
                Kind::BlockDevice { major: major(stat.st_rdev), minor: minor(stat.st_rdev) }
            }
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            // There is no other.
            FileType::Unknown => return Ok(()),
        };
        let attributes = match known {
            Some(known) => known.attributes.clone(),
            None => self.attributes(&folder.path_of(&name))?,
        };
        let entry = Entry {
            parent,
            name,
            kind,
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stamp.mtime,
            attributes,
        };
        // A file is the first of its names, whatever has its inode a moment later.
        match entry.kind {
            Kind::File { .. } => drop(self.found.entries.insert(stamp.identity, index)),
            _ => drop(self.found.entries.entry(stamp.identity).or_insert(index)),
        }
        self.push(entry, stamp);
        Ok(())
    }

    fn push(&mut self, entry: Entry, stamp: Stamp) {
        self.found.tree.entries.push(entry);
        self.found.stamps.push(stamp);
    }

    fn attributes(&self, path: &[u8]) -> rustix::io::Result<Vec<Attribute>> {
        let list = match growing(|buffer| llistxattr(path, buffer)) {
            Ok(list) => list,
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if self.is_layer && LOCAL.contains(&name) {
                continue;
            }
            match growing(|buffer| lgetxattr(path, name, buffer)) {
                Ok(value) => found.push(Attribute { name: name.to_vec(), value }),
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        // The kernel gives them in the order in which they lie on the disk.
        found.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }
}

/// What a call gives that says how much it was, with as much room as it needs.
fn growing(call: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; USUAL_BYTES];
    loop {
        match call(&mut buffer) {
            Ok(bytes) => {
                buffer.truncate(bytes);
                return Ok(buffer);
            }
            // A list or value has at most 64 KiB (xattr(7)).
            Err(Errno::RANGE) if buffer.len() < 1 << 17 => buffer.resize(buffer.len() * 2, 0),
            Err(error) => return Err(error),
        }
    }
}

/// What a file is told by.
pub(crate) fn stamp(stat: &Stat) -> Stamp {
    // No size, number of blocks or nanosecond is negative.
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    let time = |s, ns| Time { s, ns: u32::try_from(ns).unwrap_or(0).min(999_999_999) };
    Stamp {
        identity: identity(stat),
        size,
        // stat(2) counts in blocks of 512 bytes.
        is_sparse: blocks.saturating_mul(512) < size,
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, mknodat};
    use std::path::Path;

    fn looked_at(path: &Path, before: Option<&Listing>) -> Listing {
        walk(&Folder::open(path).unwrap(), before, false).unwrap()
    }

    #[test]
    fn everything_is_listed_in_an_order_that_can_be_sent() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(path("b/deep")).unwrap();
        std::fs::write(path("b/file"), "hello").unwrap();
        std::fs::write(path("c"), "").unwrap();
        std::fs::hard_link(path("b/file"), path("a")).unwrap();
        std::os::unix::fs::symlink("../nowhere", path("b/link")).unwrap();
        let top = Folder::open(folder.path()).unwrap();
        mknodat(&top, "fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
        let mut found = looked_at(folder.path(), None);
        let files: Vec<usize> = found.files().map(|(at, _)| at).collect();
        files.iter().for_each(|at| found.set_number(*at, *at as u32));
        let tree = Tree::decode(&found.tree.encode().unwrap()).unwrap();
        let names: Vec<_> =
            (0..tree.entries.len()).map(|at| String::from_utf8(tree.path(at)).unwrap()).collect();
        assert_eq!(names, ["", "a", "b", "c", "fifo", "b/deep", "b/file", "b/link"]);
        assert_eq!(tree.entries[1].kind, Kind::File { number: 1, size: 5 });
        assert_eq!(tree.entries[6].kind, Kind::Link { to: 1 });
        assert_eq!(tree.entries[7].kind, Kind::Symlink { target: b"../nowhere".to_vec() });
        assert_eq!(found.stamps[1].identity, found.stamps[6].identity);
    }

    #[test]
    fn attributes_are_read_anew_when_they_may_have_changed() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let set =
            |value: &[u8]| rustix::fs::setxattr(&file, "user.test", value, rustix::fs::XattrFlags::empty());
        if let Err(error) = set(b"1") {
            eprintln!("attributes are not tested: this file system has none: {error}");
            return;
        }
        let value = |listing: &Listing| listing.tree.entries[1].attributes.clone();
        let long = vec![7; 3000];
        let first = looked_at(folder.path(), None);
        assert_eq!(value(&first), [Attribute { name: b"user.test".to_vec(), value: b"1".to_vec() }]);
        assert!(first.is_unsure(&first.stamps[1]));
        set(&long).unwrap();
        let second = looked_at(folder.path(), Some(&first));
        assert_eq!(value(&second)[0].value, long);
        std::thread::sleep(UNSURE + UNSURE / 2);
        let third = looked_at(folder.path(), Some(&second));
        assert!(!third.is_unsure(&third.stamps[1]));
        assert_eq!(value(&looked_at(folder.path(), Some(&third))), value(&second));
    }
}
