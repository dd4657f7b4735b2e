//! Where the steering sockets of a host are, and which of them belong to a process that lives.

use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use rustix::fs::{Mode, OFlags};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

/// The directory of steering sockets, by a descriptor: the path of a unix socket may have 107 bytes, and a runtime
/// directory may be longer (unix(7)).
#[derive(Debug, Clone)]
pub struct Place {
    directory: Arc<OwnedFd>,
    path: PathBuf,
    /// What is under way where a socket is, in words.
    what: &'static str,
}

/// What is at the place of a name.
#[derive(Debug)]
pub enum Found {
    /// A migration that lives.
    Running(UnixStream),
    /// Nothing, or what a dead process left, which was removed.
    Nothing,
}

impl Place {
    /// The place of migrations in this runtime directory, made when it is missing.
    ///
    /// # Errors
    /// `Host`.
    pub fn open(runtime: &RuntimeDir) -> Result<Self> {
        Self::at(runtime.moves(), "migration")
    }

    /// The place of series of checkpoints, of which there may be one of a VM that moves.
    ///
    /// # Errors
    /// `Host`.
    pub fn of_series(runtime: &RuntimeDir) -> Result<Self> {
        Self::at(runtime.series(), "series of checkpoints")
    }

    fn at(path: PathBuf, what: &'static str) -> Result<Self> {
        let cannot =
            |error: std::io::Error| Error::Host(format!("{} cannot be used: {error}", path.display()));
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(cannot(error)),
            _ => {}
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(&path, flags, Mode::empty()).map_err(|error| cannot(error.into()))?;
        Ok(Self { directory: Arc::new(directory), path, what })
    }

    /// Listens for a migration of this name; a dead socket of that name is replaced.
    ///
    /// # Errors
    /// `Host`, for instance because one of that name is under way.
    pub(super) fn bind(&self, name: &str) -> Result<vmm::Socket> {
        if let Found::Running(_) = self.find(name)? {
            return Err(Error::Host(format!(
                "a {} of {name} is under way already: see migrate status",
                self.what
            )));
        }
        Ok(vmm::Socket::bind(&self.short(name))?)
    }

    /// What is there under this name.
    ///
    /// # Errors
    /// `Host` when it can be neither reached nor removed.
    pub fn find(&self, name: &str) -> Result<Found> {
        let path = self.short(name);
        let cannot = |error: std::io::Error| {
            Error::Host(format!("{} cannot be reached: {error}", self.path.join(file(name)).display()))
        };
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Found::Running(stream)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Found::Nothing),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => return Err(cannot(error)),
                    _ => {}
                }
                Ok(Found::Nothing)
            }
            Err(error) => Err(cannot(error)),
        }
    }

    /// What is under way where a socket is, in words.
    pub(super) fn what(&self) -> &'static str {
        self.what
    }

    /// Names that have a socket here, sorted; some may be of dead processes.
    ///
    /// # Errors
    /// `Host`.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path)
            .map_err(|error| Error::Host(format!("{} cannot be read: {error}", self.path.display())))?;
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".sock").map(str::to_owned))
            .filter(|name| protocol::control::check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// A path that is short whatever the runtime directory's is.
    fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd())).join(file(name))
    }
}

fn file(name: &str) -> String {
    format!("{name}.sock")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_is_found_only_while_its_process_lives_however_long_its_path() {
        let parent = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(Some(&parent.path().join("d".repeat(150)))).unwrap();
        let place = Place::open(&runtime).unwrap();
        assert!(matches!(place.find("web").unwrap(), Found::Nothing));
        let socket = place.bind("web").unwrap();
        let file = runtime.moves().join("web.sock");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(place.find("web").unwrap(), Found::Running(_)));
        assert!(place.bind("web").unwrap_err().to_string().contains("under way already"));
        assert_eq!(place.names().unwrap(), ["web"]);
        drop(socket);
        assert!(!file.exists());

        // As a process that was killed leaves it.
        drop(UnixListener::bind(place.short("web")).unwrap());
        assert!(file.exists());
        assert!(matches!(place.find("web").unwrap(), Found::Nothing));
        assert!(!file.exists());
        drop(UnixListener::bind(place.short("web")).unwrap());
        place.bind("web").unwrap();
    }
}
