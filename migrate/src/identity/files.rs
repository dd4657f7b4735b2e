//! The files of an identity: written whole or not at all, and readable by their owner alone.

use crate::error::{Error, Result};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// The most bytes read of any of the files: ten thousand trusted hosts, and far more than a key.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The directory to use: `given` if the operator named one, else `$XDG_CONFIG_HOME/migrate`, else
/// `~/.config/migrate` (XDG base directory specification 0.8).
///
/// # Errors
/// `Identity` when neither is known.
pub fn directory(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))
        .map(|base| base.join("migrate"))
        .ok_or_else(|| {
            Error::Identity("where the keys are is not known, as HOME is not set: say --keys DIR".into())
        })
}

/// Makes the directory, 0700, and its parents.
pub(super) fn create_directory(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Error::Identity(format!("cannot make the directory {}: {error}", dir.display())))
}

/// Which rights of others make a file unusable.
#[derive(Clone, Copy)]
pub(crate) enum Guard {
    /// Nobody else may read it: mode & 077 is zero.
    Secret,
    /// Nobody else may write to it: mode & 022 is zero.
    Unforged,
}

/// Reads a file; `None` when it is not there.
pub(crate) fn read(path: &Path, guard: Guard) -> Result<Option<Vec<u8>>> {
    let shown = path.display();
    let failed = |error: std::io::Error| Error::Identity(format!("cannot read {shown}: {error}"));
    // Not blocking: a fifo somebody put there must not hang us.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    // The rights are read from the open file, so that it cannot be swapped in between.
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o777;
    match guard {
        Guard::Secret if mode & 0o077 != 0 => {
            return Err(Error::Identity(format!(
                "{shown} is a secret and others may read it (mode {mode:03o}): run `chmod 600 {shown}`, and make a \
                 new key if somebody else has used this host"
            )));
        }
        Guard::Unforged if mode & 0o022 != 0 => {
            return Err(Error::Identity(format!(
                "{shown} can be changed by others (mode {mode:03o}): look through it, then run `chmod 600 {shown}`"
            )));
        }
        _ if !metadata.is_file() => return Err(Error::Identity(format!("{shown} is not a file"))),
        _ => {}
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::Identity(format!("{shown} is larger than 1 MiB: that is not what migrate wrote")));
    }
    Ok(Some(bytes))
}

/// Replaces a file as a whole, mode 0600: after a crash it is the old one or the new one.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::Identity(format!("cannot write {}: {error}", path.display()));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || {
        // What a crashed process with our number left behind is of no use to anybody.
        let _ = std::fs::remove_file(&temporary);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        failed(error)
    })
}

/// Holds the directory against another `migrate keys` until dropped.
pub(super) fn lock(dir: &Path) -> Result<File> {
    let file = File::open(dir)
        .map_err(|error| Error::Identity(format!("cannot open the directory {}: {error}", dir.display())))?;
    let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    // Whoever holds it writes a few hundred bytes: two seconds are plenty.
    for _ in 0..200 {
        match rustix::fs::flock(&file, operation) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(std::time::Duration::from_millis(10)),
            Err(error) => {
                return Err(Error::Identity(format!("cannot lock the directory {}: {error}", dir.display())));
            }
        }
    }
    Err(Error::TimedOut {
        what: "another `migrate keys` to let go of the key directory",
        after: std::time::Duration::from_secs(2),
    })
}
