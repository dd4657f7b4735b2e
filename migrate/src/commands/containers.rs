//! Which programs containers run under, as an operator says it.

use crate::container::Runtime;
use crate::destination::any::ContainerPlace;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use std::path::{Path, PathBuf};

/// runc and CRIU.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Containers")]
pub(super) struct RuntimeArgs {
    /// The runc that containers run under [default: the one in PATH].
    #[arg(long, value_name = "FILE")]
    pub(super) runc: Option<PathBuf>,
    /// The directory of that runc's state [default: its own].
    #[arg(long, value_name = "DIR")]
    pub(super) runc_root: Option<PathBuf>,
    /// The CRIU that it uses [default: the one in PATH].
    #[arg(long, value_name = "FILE")]
    pub(super) criu: Option<PathBuf>,
}

impl RuntimeArgs {
    /// Finds the programs.
    ///
    /// # Errors
    /// As [`Runtime::find`].
    pub(super) fn runtime(&self) -> Result<Runtime> {
        Runtime::find(self.runc.as_deref(), self.runc_root.as_deref(), self.criu.as_deref())
    }
}

/// Where containers go: their bundles into a folder, if they are taken at all, and with the root file system of this host, if it is not where it
/// was.
///
/// # Errors
/// `Host` when a path cannot be made absolute.
pub(super) fn place(
    runtime: &RuntimeArgs,
    runtime_dir: &RuntimeDir,
    bundles: Option<&Path>,
    root: Option<&Path>,
    name: Option<&str>,
) -> Result<ContainerPlace> {
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|error| Error::Host(format!("the path of {} is not known: {error}", path.display())))
    };
    let RuntimeArgs { runc, runc_root, criu } = runtime.clone();
    Ok(ContainerPlace {
        runc,
        runc_root,
        criu,
        runtime_dir: runtime_dir.clone(),
        bundles: bundles.map(absolute).transpose()?,
        name: name.map(str::to_owned),
        root: root.map(absolute).transpose()?,
    })
}
