//! A directory, and what is in it: nothing else is ever reached from it, whatever stands in a path.

use crate::error::{Error, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags, Stat, openat2};
use rustix::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

/// What openat2(2) is told for every path: no way out of the directory, over no symbolic link, into no other file system.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A directory that is open.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl Folder {
    /// One by its path on this host, which an operator or runc has said.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).map(Self).map_err(|error| {
            Error::Host(format!("the directory {} cannot be opened: {error}", path.display()))
        })
    }

    /// A directory below it; it itself for an empty path.
    ///
    /// # Errors
    /// The kernel's: `XDEV` for one of another file system, `LOOP` or `NOTDIR` for what is no directory.
    pub(crate) fn folder(&self, path: &[u8]) -> io::Result<Self> {
        self.at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).map(Self)
    }

    /// Something below it; it itself for an empty path.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn at(&self, path: &[u8], flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        io::retry_on_intr(|| openat2(&self.0, path, flags, mode, INSIDE))
    }

    /// The path by which calls that take nothing else reach a name in this very directory. They must not follow symbolic links.
    pub(crate) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}/", self.0.as_raw_fd()).into_bytes();
        path.extend_from_slice(if name.is_empty() { b"." } else { name });
        path
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What tells a file from all others: its device, and its number there.
pub(crate) fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn nothing_outside_is_reached() {
        let parent = tempfile::tempdir().unwrap();
        let (inside, outside) = (parent.path().join("inside"), parent.path().join("outside"));
        for folder in [&inside, &outside] {
            std::fs::create_dir_all(folder.join("sub")).unwrap();
            std::fs::write(folder.join("sub/file"), "x").unwrap();
        }
        std::os::unix::fs::symlink(&outside, inside.join("absolute")).unwrap();
        std::os::unix::fs::symlink("../outside", inside.join("relative")).unwrap();
        std::os::unix::fs::symlink("sub", inside.join("own")).unwrap();
        let folder = Folder::open(&inside).unwrap();
        let open = |path: &str| folder.at(path.as_bytes(), OFlags::RDONLY, Mode::empty()).map(drop);
        open("sub/file").unwrap();
        for path in [
            "absolute/sub/file",
            "relative/sub/file",
            "../outside/sub/file",
            "/etc/passwd",
            "own/file",
            "own",
        ] {
            assert!(matches!(open(path), Err(Errno::LOOP | Errno::XDEV)), "{path}: {:?}", open(path));
        }
        folder.folder(b"").unwrap().folder(b"sub").unwrap();
        assert_eq!(folder.folder(b"sub/file").unwrap_err(), Errno::NOTDIR);
    }
}
