//! Where sockets, logs and keys live.

use crate::error::{Error, Result};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The directory of sockets and logs of one host's VMs: mode 0700, its owner alone may reach them.
#[derive(Debug, Clone)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// The directory the operator named, or `$XDG_RUNTIME_DIR/migrate`, or `/run/migrate` for root, or
    /// `/tmp/migrate-UID`; made when it is missing.
    ///
    /// # Errors
    /// `Host` when it cannot be made, or when others than its owner could reach the sockets in it.
    pub fn open(named: Option<&Path>) -> Result<Self> {
        let path = Self::place(named);
        let cannot = |error: std::io::Error| {
            Error::Host(format!(
                "the runtime directory {} cannot be used: {error}; name another with --runtime-dir",
                path.display()
            ))
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(cannot)?;
        let metadata = std::fs::metadata(&path).map_err(cannot)?;
        if metadata.permissions().mode() & 0o077 != 0 {
            return Err(Error::Host(format!(
                "other users can reach the runtime directory {}: run chmod 700 on it, or name another with --runtime-dir",
                path.display()
            )));
        }
        Ok(Self(path))
    }

    /// Where [`RuntimeDir::open`] has it; nothing is made.
    pub fn place(named: Option<&Path>) -> PathBuf {
        match (named, std::env::var_os("XDG_RUNTIME_DIR")) {
            (Some(path), _) => path.to_path_buf(),
            (None, Some(base)) if !base.is_empty() => Path::new(&base).join("migrate"),
            _ if rustix::process::geteuid().is_root() => PathBuf::from("/run/migrate"),
            _ => PathBuf::from(format!("/tmp/migrate-{}", rustix::process::geteuid().as_raw())),
        }
    }

    /// The control socket of the VM with this name.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.sock"))
    }

    /// The directory of the sockets by which running migrations are steered.
    pub fn moves(&self) -> PathBuf {
        self.0.join("moves")
    }

    /// The directory of the sockets by which series of checkpoints are looked at and ended.
    pub fn series(&self) -> PathBuf {
        self.0.join("series")
    }

    /// What the VMM of this VM says when it runs detached.
    pub fn log(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.log"))
    }

    /// What the guest says on its serial port when nothing else was named.
    pub fn serial(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.serial"))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Names that have a control socket here, sorted.
    ///
    /// # Errors
    /// `Host` when the directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.0)
            .map_err(|error| Error::Host(format!("{} cannot be read: {error}", self.0.display())))?;
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".sock").map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    }
}

/// The directory of what this host remembers between runs: what the operator named, or `$XDG_STATE_HOME/migrate`, or
/// `/var/lib/migrate` for root, or `$HOME/.local/state/migrate`. Nothing where none of them is known. It is made by
/// whoever writes to it first.
pub fn state_dir(named: Option<&Path>) -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match (named, variable("XDG_STATE_HOME")) {
        (Some(path), _) => Some(path.to_path_buf()),
        (None, Some(base)) => Some(base.join("migrate")),
        _ if rustix::process::geteuid().is_root() => Some(PathBuf::from("/var/lib/migrate")),
        _ => variable("HOME").map(|home| home.join(".local/state/migrate")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run");
        let dir = RuntimeDir::open(Some(&path)).unwrap();
        std::fs::write(dir.socket("b"), "").unwrap();
        std::fs::write(dir.socket("a"), "").unwrap();
        std::fs::write(dir.log("c"), "").unwrap();
        assert_eq!(dir.names().unwrap(), ["a", "b"]);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(RuntimeDir::open(Some(&path)).unwrap_err().to_string().contains("chmod 700"));
    }
}
