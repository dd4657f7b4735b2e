//! A disk's image as a space.
//!
//! What is written to it must be safe before its VM is ready to start here. If all of that were left for the end, the VM would
//! stand still for as long as the disk takes for gigabytes; so it is made safe as it comes, some megabytes at a time, and whoever writes
//! waits for it.

use crate::error::{Error, Result};
use rustix::fs::{FallocateFlags, SeekFrom};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most that may be written and not be safe: 32 MiB, three seconds of a slow disk (10 MB/s).
const MOST_UNSAFE_BYTES: u64 = 32 << 20;

/// What is known of an image beside its file.
pub(super) struct Disk {
    name: String,
    /// Written since the last time that all was made safe.
    unsafe_bytes: AtomicU64,
}

impl Disk {
    pub(super) fn named(name: &str) -> Self {
        Self { name: name.into(), unsafe_bytes: AtomicU64::new(0) }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The length of its file or block device, which fits so many bytes of pages.
    ///
    /// # Errors
    /// `Workload` when it does not, `Host` when it cannot be told.
    pub(super) fn length(&self, file: &File, page_bytes: u64) -> Result<u64> {
        // For a block device too, whose metadata have no length.
        let found = rustix::fs::seek(file, SeekFrom::End(0)).map_err(|error| {
            Error::Host(format!("disk {}: its length cannot be told: {error}", self.name))
        })?;
        if found.next_multiple_of(super::PAGE_SIZE as u64) != page_bytes {
            return Err(Error::Workload(format!(
                "disk {}: it has {found} bytes, and the VM's layout {page_bytes}",
                self.name
            )));
        }
        Ok(found)
    }

    /// Notes that something was written, and makes all of it safe when that is much.
    pub(super) fn wrote(&self, file: &File, bytes: u64) -> Result<()> {
        let before = self.unsafe_bytes.fetch_add(bytes, Ordering::AcqRel);
        if before + bytes < MOST_UNSAFE_BYTES { Ok(()) } else { self.settle(file) }
    }

    /// Makes safe what was written before this call, but for what another thread is making safe at this moment.
    pub(super) fn settle(&self, file: &File) -> Result<()> {
        if self.unsafe_bytes.swap(0, Ordering::AcqRel) == 0 {
            return Ok(());
        }
        file.sync_data()
            .map_err(|error| Error::Host(format!("disk {}: it could not be made safe: {error}", self.name)))
    }

    /// Makes a hole. Answers whether the file system can.
    pub(super) fn punch(&self, file: &File, offset: u64, bytes: u64) -> Result<bool> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, how, offset, bytes)) {
            Ok(()) => self.wrote(file, 1).map(|()| true),
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(false),
            Err(error) => {
                Err(Error::Host(format!("disk {}: it could not be given a hole: {error}", self.name)))
            }
        }
    }
}
