//! Which VM a verb is about: one of this host by its name, or any by its control socket.

use super::check_name;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use protocol::monitor::{Role, Status};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmm::Client;

/// How long a VMM may take to say how it is.
pub(super) const STATUS_LIMIT: Duration = Duration::from_secs(5);

/// A VM as the operator names it.
#[derive(Debug, Clone)]
pub(super) struct Target {
    text: String,
    socket: PathBuf,
}

impl Target {
    /// The VM with this name, or, if there is a slash in it, behind the control socket of this path.
    ///
    /// # Errors
    /// `Usage` for a name that is none.
    pub(super) fn find(runtime: &RuntimeDir, text: &str) -> Result<Self> {
        if text.contains('/') {
            return Ok(Self { text: text.into(), socket: text.into() });
        }
        check_name(text)?;
        Ok(Self { text: text.into(), socket: runtime.socket(text) })
    }

    /// Its control socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// How it is.
    ///
    /// # Errors
    /// `Workload` when there is none.
    pub(super) fn status(&self) -> Result<Status> {
        Client::connect(&self.socket, Role::Query, "migrate", STATUS_LIMIT)
            .map(|client| client.welcome().clone())
            .map_err(|error| {
                Error::Workload(format!(
                    "there is no VM {}: {error}; migrate vm list shows those there are",
                    self.text
                ))
            })
    }

    /// Takes hold of it; `client` is who asks, for others who want it meanwhile.
    ///
    /// # Errors
    /// `Workload` when there is none, or somebody else holds it.
    pub(super) fn hold(&self, client: &str, limit: Duration) -> Result<Client> {
        self.status()?;
        Client::connect(&self.socket, Role::Session, client, limit)
            .map_err(|error| Error::Workload(format!("{} cannot be taken: {error}", self.text)))
    }
}

/// All VMs of this host that answer, by name.
///
/// # Errors
/// `Host` when the runtime directory cannot be read.
pub(super) fn all(runtime: &RuntimeDir) -> Result<Vec<(Target, Status)>> {
    let answering = |name: &String| {
        let target = Target::find(runtime, name).ok()?;
        let status = target.status().ok()?;
        Some((target, status))
    };
    Ok(runtime.names()?.iter().filter_map(answering).collect())
}
