//! One writer: a lock of the file system, which ends with the process that holds it, and beside it who that is.
//!
//! The file is never removed: whoever opened it just before would lock a file that nobody else sees.

use super::super::holder::{Holder, MAX_RECORD_BYTES};
use super::super::{Attempt, Lease, fault, name};
use super::directory::Root;
use crate::error::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tries to become the one writer.
pub(super) fn attempt(root: &Arc<Root>, owner: &str) -> Result<Attempt> {
    let failed = |error: &std::io::Error| fault::of_io(root.place(), "be locked", error);
    let mode = root.make().map_err(|error| failed(&error))?;
    let path = root.path(name::LOCK);
    // Over NFS only a file that is open for writing can be locked.
    let opened = File::options().read(true).write(true).create(true).truncate(false).mode(mode).open(path);
    let file = opened.map_err(|error| failed(&error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(Attempt::Refused(holder(&file))),
        Err(Errno::NOLCK | Errno::NOTSUP | Errno::NOSYS) => {
            return Err(Error::Store(format!(
                "the store {} lies on a file system without locks, where two writers cannot be kept apart: use another \
                 one (NFS version 4 has them)",
                root.place()
            )));
        }
        Err(error) => return Err(failed(&error.into())),
    }
    let holder = Holder::here(owner);
    let record = |record: &[u8]| {
        file.set_len(0)?;
        file.write_all_at(record, 0)
    };
    record(&holder.to_record()).map_err(|error| failed(&error))?;
    Ok(Attempt::Held(Box::new(Held { root: Arc::clone(root), file, since: Instant::now() })))
}

/// Who holds the lock of this file, as far as it says.
fn holder(file: &File) -> Holder {
    let mut record = vec![0; MAX_RECORD_BYTES];
    let read = file.read_at(&mut record, 0).unwrap_or_default();
    record.truncate(read);
    Holder::from_record(&record).unwrap_or_else(Holder::unknown)
}

struct Held {
    root: Arc<Root>,
    file: File,
    since: Instant,
}

impl Lease for Held {
    fn check(&self) -> Result<()> {
        let same = || {
            let (own, there) = (self.file.metadata()?, std::fs::metadata(self.root.path(name::LOCK))?);
            Ok((own.dev(), own.ino()) == (there.dev(), there.ino()))
        };
        let found: std::io::Result<bool> = same();
        if found
            .map_err(|error| fault::of_io(self.root.place(), "tell whether it is still locked", &error))?
        {
            return Ok(());
        }
        Err(Error::Store(format!(
            "the lock of the store {} was replaced while it was held: nothing more is written; see who removed the file {}",
            self.root.place(),
            name::LOCK
        )))
    }

    fn held_for(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The lock goes with the file; the record is for people only.
        let _ = self.file.set_len(0);
    }
}
