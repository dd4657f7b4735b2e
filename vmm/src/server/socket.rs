//! The listening end: a socket that only its owner can reach, and that no two VMMs share.

use std::{
    fs::{DirBuilder, File},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::error::{Error, Result};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A listening control socket. Its file goes when it is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Listens at `path` with mode 0600. Its directory is made with mode 0700 if it is not there. What a
    /// dead VMM left there is replaced.
    ///
    /// # Errors
    /// [`Error::Socket`] that says whether a living VM, another file or the host is in the way.
    pub fn bind(path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Socket { path: path.to_owned(), reason };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| wrong(format!("{}: {error}", directory.display())))?;
        // Two VMMs that find the same stale socket would else each replace the other's.
        let lock = File::open(directory).map_err(|error| wrong(error.to_string()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|error| wrong(error.to_string()))?;
        check_free(path)?;
        // Listening first, named after: whoever sees the name can connect. The rename also replaces a
        // stale socket.
        let unnamed = directory.join(format!(".{}", std::process::id()));
        let _ = std::fs::remove_file(&unnamed);
        let fd = listen(&unnamed).map_err(|error| wrong(error.to_string()))?;
        std::fs::rename(&unnamed, path).map_err(|error| wrong(error.to_string()))?;
        drop(lock);
        Ok(Self { path: path.to_owned(), listener: fd.into() })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What listens.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "the control socket was gone already");
        }
    }
}

/// Checks that nothing is in the way but the socket of a VMM that died: nothing else is ever replaced.
fn check_free(path: &Path) -> Result<()> {
    let wrong = |reason: String| Error::Socket { path: path.to_owned(), reason };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(wrong(error.to_string())),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(wrong("something is there that is not a socket: choose another path".into()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(stream) => {
            let pid = rustix::net::sockopt::socket_peercred(&stream).map_or_else(
                |_| "unknown".into(),
                |credentials| credentials.pid.as_raw_nonzero().to_string(),
            );
            Err(wrong(format!("a VM is running there already (process {pid})")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the control socket of a VMM that died");
            Ok(())
        }
        Err(error) => Err(wrong(error.to_string())),
    }
}

fn listen(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the socket's file the mode of the unbound socket: there is no moment in which it is
    // wider (unix_bind of net/unix/af_unix.c), and the process-wide umask stays alone.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn only_the_owner_can_reach_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vms/a.sock");
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path).unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(error.contains("a VM is running there already"), "{error}");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(socket);
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(Socket::bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
