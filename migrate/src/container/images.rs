//! The directory that CRIU writes its images to, or reads them from: in memory, because the memory of processes is in it.

use super::files::mount_points;
use crate::error::{Error, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// What all image files together may have that are no pages of private memory: what a state has room for.
pub(crate) const IMAGE_LIMIT: u64 = 60 << 20;

/// `TMPFS_MAGIC` (include/uapi/linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// How often making one is tried where others look for stale ones at the same time.
const TRIES: u32 = 10;

/// What the names of such directories begin with.
const PREFIX: &str = "migrate-images-";

/// A directory that is gone when it is dropped. One that a killed process left behind is found by its lock, and removed by the next.
pub(crate) struct Images {
    path: PathBuf,
    _lock: OwnedFd,
}

impl Images {
    /// A new directory on a tmpfs: below the runtime directory, if that is on one, or below /dev/shm.
    ///
    /// # Errors
    /// `Host` when there is none.
    pub(crate) fn new(runtime: &Path) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let is_memory = |path: &Path| rustix::fs::statfs(path).is_ok_and(|found| found.f_type == TMPFS);
        let places = [runtime, Path::new("/dev/shm"), Path::new("/run")];
        let place = places.into_iter().find(|path| is_memory(path)).ok_or_else(|| {
            Error::Host(format!(
                "there is no tmpfs for what CRIU writes, which must not reach a disk: mount one at /dev/shm, or name a directory on one \
                 instead of {} with --runtime-dir",
                runtime.display()
            ))
        })?;
        remove_stale(place);
        let make = |path: &Path| -> std::io::Result<Option<OwnedFd>> {
            DirBuilder::new().mode(0o700).create(path)?;
            match locked(path) {
                // Whoever removes what is stale may have come between the two, and have taken it for that.
                Ok(lock) => Ok(path.exists().then_some(lock)),
                Err(Errno::NOENT | Errno::WOULDBLOCK) => Ok(None),
                Err(error) => Err(error.into()),
            }
        };
        let mut last = PathBuf::new();
        for _ in 0..TRIES {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = place.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match make(&path) {
                Ok(Some(lock)) => return Ok(Self { path, _lock: lock }),
                Ok(None) => last = path,
                Err(error) => {
                    let path = path.display();
                    return Err(Error::Host(format!(
                        "the directory {path} for images cannot be made: {error}"
                    )));
                }
            }
        }
        Err(Error::Host(format!(
            "somebody removes the directories for images as soon as they are made: {} was the last",
            last.display()
        )))
    }

    /// A directory in it, made when it is missing.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|error| {
            Error::Host(format!("the directory {} for images cannot be made: {error}", path.display()))
        })?;
        Ok(path)
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "images are left in memory");
        }
    }
}

/// The lock of whoever made a directory; nobody can have it while that one lives.
fn locked(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Removes such a directory. A CRIU that was killed leaves the control groups of this host mounted there: what they hold is not to be touched.
fn remove(path: &Path) -> std::io::Result<()> {
    while let Some(point) = mount_points(path)?.pop() {
        unmount(point, UnmountFlags::DETACH)?;
    }
    std::fs::remove_dir_all(path)
}

/// Removes what killed processes left: it is memory.
fn remove_stale(place: &Path) {
    let Ok(entries) = std::fs::read_dir(place) else { return };
    let ours = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with(PREFIX));
    for entry in entries.flatten().filter(|entry| ours(&entry.file_name())) {
        if let Ok(_lock) = locked(&entry.path())
            && let Err(error) = remove(&entry.path())
        {
            tracing::debug!(path = %entry.path().display(), %error, "stale images are left in memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_in_memory_and_go_with_their_owner() {
        let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
        let images = Images::new(runtime.path()).unwrap();
        let path = images.folder("last").unwrap();
        std::fs::write(path.join("pages-1.img"), b"x").unwrap();
        // What somebody else left who was killed.
        let stale = runtime.path().join(format!("{PREFIX}1-1"));
        std::fs::create_dir(&stale).unwrap();
        let other = Images::new(runtime.path()).unwrap();
        assert!(!stale.exists() && path.exists() && other.path != images.path);
        drop(images);
        assert!(!path.exists() && other.path.exists());
    }

    #[test]
    fn many_at_once_take_nothing_from_each_other() {
        let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        Images::new(runtime.path()).unwrap().folder("dump").unwrap();
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(runtime.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_mounted_in_images_is_not_removed_with_them() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root may mount");
            return;
        }
        let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
        let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(elsewhere.path().join("theirs"), b"x").unwrap();
        let images = Images::new(runtime.path()).unwrap();
        let (path, at) = (images.path.clone(), images.folder("work/cgyard").unwrap());
        rustix::mount::mount_bind(elsewhere.path(), &at).unwrap();
        assert!(at.join("theirs").exists());
        drop(images);
        assert!(!path.exists() && elsewhere.path().join("theirs").exists());
    }
}
