//! The image behind a block device: a raw file, or the host's block device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileTypeExt,
    path::PathBuf,
};

use rustix::fs::{FallocateFlags, SeekFrom};

use super::{DiskConfig, ring::Slice};
use crate::{
    error::{Error, Result},
    sys::{self, FileLock},
};

/// Bytes of a sector: the unit of the device, whatever the image lies on.
pub(super) const SECTOR: u64 = 512;

/// Zeros that are written at once where the host cannot make them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// An image that is open, and perhaps ours.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    path: PathBuf,
    readonly: bool,
    sectors: u64,
    held: bool,
    /// Something was written since the last flush.
    unsafe_writes: bool,
}

impl Disk {
    /// Opens an image and looks whether it can be a disk. Whether another VM uses it is found by [`Disk::acquire`].
    ///
    /// # Errors
    /// [`Error::Config`] that names the image and what is wrong with it.
    pub(super) fn open(config: &DiskConfig) -> Result<Self> {
        let path = config.path.clone();
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", path.display()));
        let file = OpenOptions::new().read(true).write(!config.readonly).open(&path).map_err(|error| {
            match (error.kind(), config.readonly) {
                (io::ErrorKind::NotFound, _) => wrong("it does not exist".into()),
                (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem, false) => wrong(format!(
                    "it cannot be written ({error}): give it to a VM with ,readonly, or change its permissions"
                )),
                _ => wrong(error.to_string()),
            }
        })?;
        let metadata = file.metadata().map_err(|error| wrong(error.to_string()))?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(wrong("it is neither a file nor a block device".into()));
        }
        // For a block device too, whose metadata have no length.
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| wrong(error.to_string()))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(wrong(format!(
                "its length of {bytes} bytes is not a multiple of {SECTOR} above zero"
            )));
        }
        let readonly = config.readonly;
        Ok(Self { file, path, readonly, sectors: bytes / SECTOR, held: false, unsafe_writes: false })
    }

    /// Its length in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it is never written.
    pub(super) fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Locks it: for this VM alone, or against writers if it is read-only.
    ///
    /// The lock is an open file description's (fcntl(2), F_OFD_SETLK). Getting one is also what makes a network file system look
    /// anew at a file that another host wrote.
    ///
    /// # Errors
    /// [`Error::Config`] when it is in use, [`Error::Host`] when the host cannot lock.
    pub(super) fn acquire(&mut self) -> Result<()> {
        if self.held {
            return Ok(());
        }
        let kind = if self.readonly { FileLock::Shared } else { FileLock::Exclusive };
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", self.path.display()));
        if !sys::lock_file(&self.file, kind)
            .map_err(|error| wrong(format!("it cannot be locked: {error}")))?
        {
            return Err(wrong("it is in use: another VM or program has it open and locked".into()));
        }
        self.held = true;
        // A block device has a cache on each host, and this host's may be older than what the last user wrote.
        if let Err(error) = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed) {
            tracing::debug!(disk = %self.path.display(), %error, "its cache stays");
        }
        Ok(())
    }

    /// Makes safe what was written, and lets another VM have it.
    ///
    /// # Errors
    /// [`Error::Host`] when it could not be made safe.
    pub(super) fn release(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.held) {
            return Ok(());
        }
        let flushed = self.flush().map_err(Error::host("flush a disk"));
        let unlocked = sys::lock_file(&self.file, FileLock::None).map_err(Error::host("unlock a disk"));
        flushed.and(unlocked.map(drop))
    }

    /// Reads from a byte on, all that the slices hold.
    pub(super) fn read(&self, at: u64, slices: &[Slice<'_>]) -> io::Result<()> {
        sys::read_exactly(&self.file, at, slices)
    }

    /// Writes from a byte on, all of the slices.
    pub(super) fn write(&mut self, at: u64, slices: &[Slice<'_>]) -> io::Result<()> {
        self.unsafe_writes = true;
        sys::write_exactly(&self.file, at, slices)
    }

    /// Makes safe what was written.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.unsafe_writes {
            self.file.sync_data()?;
            self.unsafe_writes = false;
        }
        Ok(())
    }

    /// Gives room back to the host, if the host can take it: a driver only says that it needs no contents there.
    pub(super) fn discard(&mut self, at: u64, bytes: u64) -> io::Result<()> {
        self.unsafe_writes = true;
        match self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    /// Makes zeros, as holes if `unmap`.
    pub(super) fn write_zeroes(&mut self, at: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        self.unsafe_writes = true;
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(how | FallocateFlags::KEEP_SIZE, at, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            outcome => return Ok(outcome?),
        }
        let mut done = 0;
        while done < bytes {
            let piece = usize::try_from(bytes - done).unwrap_or(ZEROS.len()).min(ZEROS.len());
            std::os::unix::fs::FileExt::write_all_at(&self.file, &ZEROS[..piece], at + done)?;
            done += piece as u64;
        }
        Ok(())
    }

    fn allocate(&self, how: FallocateFlags, at: u64, bytes: u64) -> rustix::io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, how, at, bytes))
    }
}
