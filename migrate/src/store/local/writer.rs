//! An object that is being written: a file under `tmp/` until it is whole and durable.

use super::super::holder::random;
use super::super::{ObjectWriter, fault, name};
use super::directory::Root;
use crate::error::{Error, Result};
use crate::sys::writeback;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{Error as IoError, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is gathered before it is written.
const BUFFER_BYTES: usize = 1 << 20;

/// After so many bytes the disk is set to work on them, so that `finish` need not wait for all.
const WRITEBACK_BYTES: u64 = 16 << 20;

/// How often the directory of an object is made again when it is removed at the same time, being empty.
const TRIES: usize = 8;

pub(super) struct Writer {
    root: Arc<Root>,
    name: String,
    temporary: PathBuf,
    file: File,
    buffer: Vec<u8>,
    /// What was given to the system, in bytes.
    written_bytes: u64,
    /// What the disk was set to work on, in bytes.
    started_bytes: u64,
}

impl Writer {
    pub(super) fn begin(root: &Arc<Root>, name: &str) -> Result<Self> {
        let begin = || {
            let mode = root.make()?;
            let temporary = root.path(&format!("{}/{:016x}", name::TEMPORARY, random()));
            let file = File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
            Ok((temporary, file))
        };
        let (temporary, file) = begin()
            .map_err(|error| fault::of_io(root.place(), &format!("begin the object {name}"), &error))?;
        let (root, name) = (Arc::clone(root), name.to_owned());
        Ok(Self { root, name, temporary, file, buffer: Vec::new(), written_bytes: 0, started_bytes: 0 })
    }

    fn failed(&self, error: &IoError) -> Error {
        fault::of_io(self.root.place(), &format!("write the object {}", self.name), error)
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.written_bytes += bytes.len() as u64;
        if self.written_bytes - self.started_bytes >= WRITEBACK_BYTES {
            writeback::start(&self.file, self.started_bytes, self.written_bytes - self.started_bytes);
            self.started_bytes = self.written_bytes;
        }
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        self.write(&buffer)?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    /// Puts the file where its name says, where nothing may be yet, and makes that durable.
    fn publish(&self) -> Result<()> {
        let target = self.root.path(&self.name);
        let mut tries = 0..TRIES;
        loop {
            let moved = self
                .root
                .make_parent(&self.name)
                .and_then(|()| move_new(&self.temporary, &target, &self.file));
            match moved {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::NotFound && tries.next().is_some() => {}
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return Err(fault::taken(self.root.place(), &self.name));
                }
                Err(error) => return Err(self.failed(&error)),
            }
        }
        self.root.settle(&self.name).map_err(|error| {
            // It would be read, and might be gone after a loss of power.
            let _ = fs::remove_file(&target);
            self.failed(&error)
        })
    }
}

impl ObjectWriter for Writer {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut append = || {
            if self.buffer.len() + bytes.len() > BUFFER_BYTES {
                self.flush()?;
            }
            if bytes.len() >= BUFFER_BYTES {
                return self.write(bytes);
            }
            self.buffer.extend_from_slice(bytes);
            Ok(())
        };
        append().map_err(|error| self.failed(&error))
    }

    fn finish(mut self: Box<Self>) -> Result<u64> {
        let durable = self.flush().and_then(|()| self.file.sync_data());
        durable.map_err(|error| self.failed(&error))?;
        self.publish()?;
        Ok(self.written_bytes)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // It is not there any more once it is finished. What cannot be removed is a leftover.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Moves a file to where nothing may be.
fn move_new(from: &Path, to: &Path, file: &File) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // NFS and some others have no such rename.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_new(from, to, file),
        renamed => Ok(renamed?),
    }
}

fn link_new(from: &Path, to: &Path, file: &File) -> std::io::Result<()> {
    match fs::hard_link(from, to) {
        // Over NFS the answer to a call that succeeded may be lost, and the call repeated; the number of names tells (open(2)).
        Err(error) if error.kind() == ErrorKind::AlreadyExists && file.metadata()?.nlink() == 2 => {}
        linked => linked?,
    }
    // If this fails, the second name is a leftover.
    let _ = fs::remove_file(from);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_way_of_moving_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for way in [move_new, link_new] {
            let (from, to) = (dir.path().join("from"), dir.path().join("to"));
            fs::write(&to, "old").unwrap();
            fs::write(&from, "new").unwrap();
            let file = File::open(&from).unwrap();
            assert_eq!(way(&from, &to, &file).unwrap_err().kind(), ErrorKind::AlreadyExists);
            assert_eq!(fs::read_to_string(&to).unwrap(), "old");
            fs::remove_file(&to).unwrap();
            way(&from, &to, &file).unwrap();
            assert_eq!(fs::read_to_string(&to).unwrap(), "new");
            assert!(!from.exists());
        }
    }
}
