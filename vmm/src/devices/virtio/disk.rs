//! The image behind a block device: a raw file, or the host's block device.
//!
//! One that arrives with its VM is a file without a name (open(2), O_TMPFILE) until the VM starts: whatever dies before, nothing
//! of it is left.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::{AtFlags, CWD, FallocateFlags, SeekFrom};
use vm_memory::bitmap::{Bitmap, NewBitmap};

use super::{DiskConfig, ring::Slice};
use crate::{
    addresses::PAGE_SIZE,
    error::{Error, Result},
    memory::OwnWrites,
    sys::{self, FileLock},
};

/// Bytes of a sector: the unit of the device, whatever the image lies on.
pub(super) const SECTOR: u64 = 512;

/// Zeros that are written at once where the host cannot make them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What is shared of a disk: its contents, and which of its pages were written.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    sectors: u64,
    /// As of memory, the mark comes behind the bytes.
    writes: OwnWrites,
}

impl Image {
    /// Its length in pages, the last of which may go beyond its end.
    pub(crate) fn pages(&self) -> u64 {
        pages_of(self.sectors)
    }

    /// Moves the marks of what was written since the last call into `bits`, one bit a page.
    pub(crate) fn drain_writes(&self, bits: &mut [u64]) {
        self.writes.drain(bits);
    }

    /// Bytes that the host keeps for it: what is not a hole.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) fn allocated_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata().map_err(Error::host("examine a disk"))?;
        let length = self.sectors * SECTOR;
        Ok(if metadata.is_file() { (metadata.blocks() * 512).min(length) } else { length })
    }

    /// A descriptor of its own for another process: without our lock, and for reading alone where that is enough.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) fn share(&self, writable: bool) -> Result<OwnedFd> {
        let open = OpenOptions::new().read(true).write(writable).open(link_to(&self.file));
        Ok(open.map_err(Error::host("open a disk's image once more"))?.into())
    }

    fn new(file: File, path: PathBuf, sectors: u64) -> Self {
        let bytes = usize::try_from(sectors * SECTOR).unwrap_or(usize::MAX);
        Self { file, path, sectors, writes: OwnWrites::with_len(bytes) }
    }

    /// A new one of zeros in a folder, without a name.
    fn nameless(folder: &Path, name: &str, sectors: u64) -> Result<Self> {
        let path = folder.join(name);
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", path.display()));
        check_free(&path)?;
        let flags = rustix::fs::OFlags::TMPFILE.bits().cast_signed();
        let opened = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(folder);
        let file = opened.map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EISDIR) => wrong(
                "its image cannot arrive there: that file system has no files without names (O_TMPFILE); allow a folder of \
                 another one with --disks FOLDER"
                    .into(),
            ),
            _ => wrong(format!("it cannot be made: {error}")),
        })?;
        file.set_len(sectors * SECTOR)
            .map_err(|error| wrong(format!("it cannot have {sectors} sectors: {error}")))?;
        Ok(Self::new(file, path, sectors))
    }

    /// Gives it its name, and makes that safe.
    fn give_name(&self) -> Result<()> {
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", self.path.display()));
        rustix::fs::linkat(CWD, link_to(&self.file), CWD, &self.path, AtFlags::SYMLINK_FOLLOW).map_err(
            |error| match error {
                rustix::io::Errno::EXIST => taken(&self.path),
                other => wrong(format!("it cannot be given its name: {other}")),
            },
        )?;
        let safe = self.file.sync_all().and_then(|()| match self.path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        });
        safe.map_err(|error| {
            self.take_name();
            wrong(format!("it cannot be made safe: {error}"))
        })
    }

    fn take_name(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(disk = %self.path.display(), %error, "an image that did not arrive is still there");
        }
    }
}

/// Pages of so many sectors.
pub(crate) fn pages_of(sectors: u64) -> u64 {
    sectors.div_ceil(PAGE_SIZE / SECTOR)
}

/// A path that leads to an open file, whether it has a name or not (proc(5)).
fn link_to(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn taken(path: &Path) -> Error {
    Error::Config(format!(
        "disk {}: a file of that name is there already, and an image that arrives is a new one: move that file away, or \
         name another folder first with --disks FOLDER",
        path.display()
    ))
}

fn check_free(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::Config(format!("disk {}: {error}", path.display()))),
        Ok(_) => Err(taken(path)),
    }
}

/// Checks that a folder's file system has room for so many bytes, as it is now.
///
/// # Errors
/// [`Error::Config`] that names the folder.
pub(super) fn check_room(folder: &Path, bytes: u64) -> Result<()> {
    let wrong = |why: String| Error::Config(format!("disk folder {}: {why}", folder.display()));
    let found = rustix::fs::statvfs(folder).map_err(|error| wrong(error.to_string()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if bytes <= free {
        return Ok(());
    }
    Err(wrong(format!("no space: the disks that are to come need {bytes} bytes, and {free} are free")))
}

/// An image that is open, and perhaps ours.
#[derive(Debug)]
pub(super) struct Disk {
    image: Arc<Image>,
    readonly: bool,
    held: bool,
    /// Something was written since the last flush.
    unsafe_writes: bool,
    /// It came with its VM, which has not started yet.
    is_nameless: bool,
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
        Ok(Self::of(Image::new(file, path, bytes / SECTOR), config.readonly, false))
    }

    /// A new one of zeros for a VM that arrives. It gets its name when that starts, and is gone with this process before.
    ///
    /// # Errors
    /// [`Error::Config`] that names the image and says why it cannot be.
    pub(super) fn arriving(folder: &Path, name: &str, sectors: u64) -> Result<Self> {
        Ok(Self::of(Image::nameless(folder, name, sectors)?, false, true))
    }

    fn of(image: Image, readonly: bool, is_nameless: bool) -> Self {
        Self { image: Arc::new(image), readonly, held: false, unsafe_writes: false, is_nameless }
    }

    /// Its contents.
    pub(super) fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Where it is, or will be.
    pub(super) fn path(&self) -> &Path {
        &self.image.path
    }

    /// Its length in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.image.sectors
    }

    /// Gives an image that arrived its name, if it has none yet. Answers whether it did.
    ///
    /// # Errors
    /// [`Error::Config`] that names it: it has no name then.
    pub(super) fn publish(&mut self) -> Result<bool> {
        if self.is_nameless {
            self.image.give_name()?;
        }
        Ok(std::mem::take(&mut self.is_nameless))
    }

    /// Takes back the name that [`Disk::publish`] gave.
    pub(super) fn retract(&mut self) {
        self.image.take_name();
        self.is_nameless = true;
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
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", self.path().display()));
        if !sys::lock_file(&self.image.file, kind)
            .map_err(|error| wrong(format!("it cannot be locked: {error}")))?
        {
            return Err(wrong("it is in use: another VM or program has it open and locked".into()));
        }
        self.held = true;
        // A block device has a cache on each host, and this host's may be older than what the last user wrote. What arrived here a moment
        // ago is what the guest wants next.
        if !self.is_nameless
            && let Err(error) = rustix::fs::fadvise(&self.image.file, 0, None, rustix::fs::Advice::DontNeed)
        {
            tracing::debug!(disk = %self.path().display(), %error, "its cache stays");
        }
        Ok(())
    }

    /// Checks that this is the very file that the VM writes which is to come: that VM runs still, and has it locked. A file that
    /// nobody has locked is another one, or lies where locks of another host are not seen, and then it is not safe there.
    ///
    /// # Errors
    /// [`Error::Config`] that names it.
    pub(super) fn check_shared(&self) -> Result<()> {
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", self.path().display()));
        if self.held
            || sys::is_locked(&self.image.file)
                .map_err(|error| wrong(format!("its lock is not known: {error}")))?
        {
            return Ok(());
        }
        Err(wrong(
            "it is not the file that the VM writes at the source, or the storage does not show that host's lock on it: share it \
             with locks, or let it go with the VM (migrate send --copy-disk)"
                .into(),
        ))
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
        let unlocked = sys::lock_file(&self.image.file, FileLock::None).map_err(Error::host("unlock a disk"));
        flushed.and(unlocked.map(drop))
    }

    /// Reads from a byte on, all that the slices hold.
    pub(super) fn read(&self, at: u64, slices: &[Slice<'_>]) -> io::Result<()> {
        sys::read_exactly(&self.image.file, at, slices)
    }

    /// Writes from a byte on, all of the slices.
    pub(super) fn write(&mut self, at: u64, slices: &[Slice<'_>]) -> io::Result<()> {
        let bytes = slices.iter().map(Slice::len).sum::<usize>() as u64;
        let outcome = sys::write_exactly(&self.image.file, at, slices);
        self.wrote(at, bytes);
        outcome
    }

    /// A part was changed, or some of it was, if that failed.
    fn wrote(&mut self, at: u64, bytes: u64) {
        self.unsafe_writes = true;
        if let (Ok(at), Ok(bytes)) = (usize::try_from(at), usize::try_from(bytes)) {
            self.image.writes.mark_dirty(at, bytes);
        }
    }

    /// Makes safe what was written.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.unsafe_writes {
            self.image.file.sync_data()?;
            self.unsafe_writes = false;
        }
        Ok(())
    }

    /// Gives room back to the host, if the host can take it: a driver only says that it needs no contents there.
    pub(super) fn discard(&mut self, at: u64, bytes: u64) -> io::Result<()> {
        let outcome = self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, bytes);
        self.wrote(at, bytes);
        match outcome {
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    /// Makes zeros, as holes if `unmap`.
    pub(super) fn write_zeroes(&mut self, at: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let outcome = self.make_zeroes(at, bytes, unmap);
        self.wrote(at, bytes);
        outcome
    }

    fn make_zeroes(&self, at: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(how | FallocateFlags::KEEP_SIZE, at, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            outcome => return Ok(outcome?),
        }
        let mut done = 0;
        while done < bytes {
            let piece = usize::try_from(bytes - done).unwrap_or(ZEROS.len()).min(ZEROS.len());
            std::os::unix::fs::FileExt::write_all_at(&self.image.file, &ZEROS[..piece], at + done)?;
            done += piece as u64;
        }
        Ok(())
    }

    fn allocate(&self, how: FallocateFlags, at: u64, bytes: u64) -> rustix::io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.image.file, how, at, bytes))
    }
}
