//! The bundle of a container that arrives.
//!
//! One that was made here has a file that says so, and what was made in it; so nothing of somebody else's is overwritten or removed. Whoever makes one
//! holds a lock on that file until the container runs: what a killed process left is told by that from what is under way, and the next one removes
//! it.

use crate::container::files::{mount_points, unmount_all};
use rustix::fs::{FlockOperation, flock};
use std::fs::{DirBuilder, File};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// The file in a bundle that says that it was made here.
const MARK: &str = ".made-by-migrate";

const CONFIG: &str = "config.json";

/// Where the container's root is, where it is made here.
const ROOT: &str = "rootfs";

/// An overlay's upper layer, and the directory that it works in.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// What is needed only until everything has arrived: a trial of the overlay, files on their way to another name, and pages that came later.
const TRIAL: &str = ".trial";
const MOVED: &str = ".moved";
const LATER: &str = ".later";

/// What is noted in the mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Mark {
    /// Its container does not run yet: only whoever holds the lock needs it.
    is_arriving: bool,
    /// The root file system in it was made here, too.
    has_root: bool,
}

impl Mark {
    fn read(bundle: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(bundle.join(MARK)).ok()?;
        let has = |word: &str| text.lines().any(|line| line == word);
        Some(Self { is_arriving: has("arriving"), has_root: has("rootfs") })
    }

    fn write(self, bundle: &Path) -> Result<()> {
        let words = [(self.is_arriving, "arriving\n"), (self.has_root, "rootfs\n")];
        let text: String = words.into_iter().filter(|(is_so, _)| *is_so).map(|(_, word)| word).collect();
        // Into the very file that is locked.
        std::fs::write(bundle.join(MARK), text)
    }
}

/// A bundle that was made here, and is removed when it is dropped before its container runs. Nothing else in its folder is touched.
pub(super) struct Bundle {
    pub(super) path: PathBuf,
    mark: Mark,
    /// It has a root of an earlier container, which this one does not need.
    has_other_root: bool,
    is_needed: bool,
    _lock: File,
}

impl Bundle {
    /// A new one; or in the place of one that was made here before, whose container is gone. `has_root` says that the root file system will be in
    /// it: what there was of an earlier one is removed.
    pub(super) fn make(path: PathBuf, config: &[u8], has_root: bool) -> Result<Self> {
        let before = Mark::read(&path);
        if before.is_none() {
            // Somebody else's is not to be overwritten, and certainly not to be removed.
            DirBuilder::new().mode(0o700).create(&path)?;
        }
        let lock = locked(&path)?;
        let before = before.unwrap_or_default();
        if has_root {
            match before.has_root {
                true => remove_root(&path)?,
                false if made(&path).any(|path| path.symlink_metadata().is_ok()) => {
                    return Err(Error::new(
                        ErrorKind::AlreadyExists,
                        "it has a root file system that somebody else made",
                    ));
                }
                false => {}
            }
        }
        let mark = Mark { is_arriving: true, has_root };
        let has_other_root = before.has_root && !has_root;
        let bundle = Self { path, mark, has_other_root, is_needed: false, _lock: lock };
        mark.write(&bundle.path)?;
        std::fs::write(bundle.path.join(CONFIG), config)?;
        Ok(bundle)
    }

    /// Where something in it is.
    fn at(&self, part: Part) -> PathBuf {
        self.path.join(part.name())
    }

    /// A directory of the root file system that is made, and for it alone.
    pub(super) fn folder(&self, part: Part) -> Result<PathBuf> {
        let path = self.at(part);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(path)
    }

    /// Forgets a directory that is not needed any more.
    pub(super) fn forget(&self, part: Part) -> Result<()> {
        remove(&self.at(part))
    }

    /// Its container is about to run, and it stays: from now on not even this process's end is a reason to remove it.
    pub(super) fn keep(&mut self) -> Result<()> {
        self.mark.is_arriving = false;
        Mark { has_root: self.mark.has_root || self.has_other_root, ..self.mark }.write(&self.path)
    }

    /// Its container runs.
    pub(super) fn runs(&mut self) {
        self.is_needed = true;
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if self.is_needed {
            return;
        }
        let removed = match self.has_other_root {
            true => std::fs::remove_file(self.path.join(CONFIG))
                .and_then(|()| Mark { is_arriving: false, has_root: true }.write(&self.path)),
            false => remove_bundle(&self.path, self.mark),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "the bundle of a container that did not arrive is left");
        }
    }
}

/// A directory in a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The container's root.
    Root,
    /// An overlay's upper layer.
    Upper,
    /// What the overlay works in.
    Work,
    /// For trying whether an overlay can be.
    Trial,
    /// Files on their way to another name.
    Moved,
    /// Pages that came later.
    Later,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Root => ROOT,
            Self::Upper => UPPER,
            Self::Work => WORK,
            Self::Trial => TRIAL,
            Self::Moved => MOVED,
            Self::Later => LATER,
        }
    }
}

/// Where the root is that is made in a bundle.
pub(super) fn root_in(bundle: &Path) -> PathBuf {
    bundle.join(ROOT)
}

/// Removes the bundles in a folder that killed processes left behind.
pub(super) fn remove_stale(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_stale = |mark: &Mark| mark.is_arriving;
        if Mark::read(&path).is_none_or(|mark| !is_stale(&mark)) {
            continue;
        }
        let Ok(_lock) = locked(&path) else { continue };
        // Once more, behind the lock: it may have been taken over, and run by now.
        if let Some(mark) = Mark::read(&path).filter(is_stale)
            && let Err(error) = remove_bundle(&path, mark)
        {
            tracing::warn!(path = %path.display(), %error, "the bundle of a container that did not arrive is left");
        }
    }
}

/// The lock of whoever makes a bundle.
fn locked(bundle: &Path) -> Result<File> {
    let file = File::options().read(true).append(true).create(true).open(bundle.join(MARK))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| Error::new(ErrorKind::WouldBlock, "another container is arriving in it"))?;
    Ok(file)
}

fn remove_bundle(path: &Path, mark: Mark) -> Result<()> {
    if mark.has_root {
        remove_root(path)?;
    }
    match std::fs::remove_file(path.join(CONFIG)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::remove_file(path.join(MARK))?;
    std::fs::remove_dir(path)
}

/// What can have been made in a bundle for its root file system.
fn made(bundle: &Path) -> impl Iterator<Item = PathBuf> {
    [ROOT, UPPER, WORK, TRIAL, MOVED, LATER].into_iter().map(|name| bundle.join(name))
}

/// Removes the root file system that was made in a bundle, and everything that was made for it.
fn remove_root(bundle: &Path) -> Result<()> {
    // The mounts of this host are told by their real paths.
    let bundle = bundle.canonicalize()?;
    for path in [bundle.join(ROOT), bundle.join(TRIAL).join(ROOT)] {
        unmount_all(&path)?;
    }
    if let Some(point) = mount_points(&bundle)?.first() {
        return Err(Error::other(format!("something is mounted at {}", point.display())));
    }
    made(&bundle).try_for_each(|path| remove(&path))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_elses_bundle_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let theirs = path("theirs");
        std::fs::create_dir_all(theirs.join("rootfs")).unwrap();
        std::fs::write(theirs.join("config.json"), "theirs").unwrap();
        for has_root in [false, true] {
            assert!(Bundle::make(theirs.clone(), b"ours", has_root).is_err());
        }
        assert_eq!(std::fs::read(theirs.join("config.json")).unwrap(), b"theirs");
        assert!(theirs.join("rootfs").is_dir());

        let mut ours = Bundle::make(path("ours"), b"1", false).unwrap();
        assert!(Bundle::make(path("ours"), b"2", false).is_err(), "it is arriving");
        ours.keep().unwrap();
        ours.runs();
        drop(ours);
        // Its container is gone, and comes again; meanwhile somebody put something there.
        std::fs::write(path("ours").join("notes"), "x").unwrap();
        drop(Bundle::make(path("ours"), b"2", false).unwrap());
        assert_eq!(std::fs::read_dir(path("ours")).unwrap().count(), 1);
        drop(Bundle::make(path("new"), b"3", false).unwrap());
        assert!(!path("new").exists());
    }

    #[test]
    fn a_root_of_ours_is_replaced_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web");
        let arrive = |has_root: bool| -> Bundle {
            let mut bundle = Bundle::make(path.clone(), b"1", has_root).unwrap();
            if has_root {
                let root = bundle.folder(Part::Root).unwrap();
                std::fs::write(root.join("file"), "x").unwrap();
            }
            bundle.keep().unwrap();
            bundle
        };
        let kept = |mut bundle: Bundle| bundle.runs();
        kept(arrive(true));
        // It came back to another root, and went again: the first is still there, and whose it is is known.
        kept(arrive(false));
        drop(arrive(false));
        assert!(path.join("rootfs/file").exists() && !path.join("config.json").exists());
        kept(arrive(true));
        drop(arrive(true));
        assert!(!path.exists());
        // Somebody's own beside a bundle of ours.
        kept(arrive(false));
        std::fs::create_dir(path.join("rootfs")).unwrap();
        assert_eq!(Bundle::make(path.clone(), b"1", true).err().unwrap().kind(), ErrorKind::AlreadyExists);
        assert!(path.join("rootfs").is_dir() && path.join("config.json").exists());
    }

    #[test]
    fn what_a_killed_process_left_is_removed_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let make = |name: &str| {
            let bundle = Bundle::make(path(name), b"1", true).unwrap();
            std::fs::write(bundle.folder(Part::Root).unwrap().join("file"), "x").unwrap();
            bundle
        };
        let (left, mut runs, arriving) = (make("left"), make("runs"), make("arriving"));
        runs.keep().unwrap();
        for killed in [left, runs] {
            let Bundle { path, _lock: lock, .. } = &killed;
            flock(lock, FlockOperation::Unlock).unwrap();
            assert!(path.exists());
            std::mem::forget(killed);
        }
        std::fs::create_dir(path("other")).unwrap();
        remove_stale(folder.path());
        assert!(!path("left").exists());
        assert!(
            path("runs/rootfs/file").exists()
                && path("other").exists()
                && path("arriving/rootfs/file").exists()
        );
        drop(arriving);
        assert!(!path("arriving").exists());
    }
}
