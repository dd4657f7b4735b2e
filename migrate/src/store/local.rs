//! A store in a directory.
//!
//! ```text
//! ROOT/tmp/RANDOM     an object that is being written, or was when something crashed
//! ROOT/NAME           an object, whole
//! ROOT/lock           who writes, and a lock of the file system on it
//! ```
//!
//! An object is written under `tmp/`, made durable, renamed to where nothing may be yet, and then its directory is made durable, and
//! those above it that the store has not made durable before. So a crash leaves it whole or leaves a leftover.
//!
//! Assumed of the file system: rename(2) or link(2) is atomic, fsync(2) of a file and of a directory does what it says, and flock(2) holds
//! across all hosts that write here. ext4, XFS, Btrfs and tmpfs on one host do so, and NFS version 4, where flock is a lock of the server;
//! NFS that is mounted with `nolock` or `local_lock` does not.

mod directory;
mod lock;
mod writer;

use super::{Attempt, ObjectInfo, ObjectReader, ObjectWriter, Store, fault, name, ranges};
use crate::error::Result;
use directory::Root;
use std::fs::File;
use std::io::{Error as IoError, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

/// See the module.
pub struct LocalStore {
    root: Arc<Root>,
}

impl LocalStore {
    /// The one at this path. Nothing is made or looked for there before it is used.
    pub fn new(path: &Path) -> Self {
        Self { root: Arc::new(Root::new(path)) }
    }

    fn failed(&self, doing: &str, error: &IoError) -> crate::error::Error {
        fault::of_io(self.root.place(), doing, error)
    }
}

impl Store for LocalStore {
    fn place(&self) -> String {
        self.root.place().to_owned()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        name::check(name)?;
        if self.contains(name)? {
            return Err(fault::taken(self.root.place(), name));
        }
        Ok(Box::new(writer::Writer::begin(&self.root, name)?))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut writer = self.create(name)?;
        writer.append(bytes)?;
        writer.finish().map(|_| ())
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        name::check(name)?;
        // Not blocking: a fifo somebody put there must not hang us.
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let path = self.root.path(name);
        let opened = File::options().read(true).custom_flags(flags).open(path);
        let opened = opened.and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Ok((metadata, file)) if metadata.is_file() => Ok(Box::new(Reader {
                place: self.place(),
                name: name.to_owned(),
                bytes: metadata.len(),
                file,
            })),
            Ok(_) => Err(self.failed(&format!("read the object {name}"), &IoError::other("it is no file"))),
            Err(error) if is_missing(&error) => Err(fault::missing(self.root.place(), name)),
            Err(error) => Err(self.failed(&format!("open the object {name}"), &error)),
        }
    }

    fn contains(&self, name: &str) -> Result<bool> {
        name::check(name)?;
        match self.root.path(name).symlink_metadata() {
            Ok(_) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(self.failed(&format!("look for the object {name}"), &error)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        name::check_prefix(prefix)?;
        let listed = self.root.list(prefix);
        listed.map_err(|error| self.failed(&format!("list its objects {prefix}*"), &error))
    }

    fn delete(&self, name: &str) -> Result<()> {
        name::check(name)?;
        self.root.remove(name).map_err(|error| self.failed(&format!("delete the object {name}"), &error))
    }

    fn leftovers(&self) -> Result<Vec<ObjectInfo>> {
        let listed = self.root.list_leftovers();
        listed.map_err(|error| self.failed("list what crashes left", &error))
    }

    fn remove_leftover(&self, name: &str) -> Result<()> {
        name::check_leftover(name)?;
        self.root.remove(name).map_err(|error| self.failed(&format!("delete the leftover {name}"), &error))
    }

    fn try_lock(&self, owner: &str) -> Result<Attempt> {
        lock::attempt(&self.root, owner)
    }

    fn is_remote(&self) -> bool {
        false
    }
}

/// Whether there is nothing of this name.
fn is_missing(error: &IoError) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

struct Reader {
    place: String,
    name: String,
    bytes: u64,
    file: File,
}

impl ObjectReader for Reader {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => fault::short(&self.place, &self.name, self.bytes),
            _ => fault::of_io(&self.place, &format!("read the object {}", self.name), &error),
        })
    }

    fn read_ranges(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        ranges::each(&self.name, ranges, buffer, |offset, part| self.read_at(offset, part))
    }
}
