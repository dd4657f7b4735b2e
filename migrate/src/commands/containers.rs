//! Which programs containers run under, as an operator says it.

use crate::container::{RootCopy, Runtime, Tracking, Wishes};
use crate::destination::any::ContainerPlace;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use std::path::PathBuf;

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

/// What is wanted of a container that is moved or written down.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Containers")]
pub(super) struct WishArgs {
    /// How it is found what a container writes.
    #[arg(long, value_enum, default_value = "auto", requires = "container")]
    tracking: Tracking,
    /// Let the container's TCP connections go with it. They go on where it has the same addresses.
    #[arg(long, requires = "container")]
    tcp_established: bool,
    /// Copy the container's root file system as well, in rounds: of an overlay what its upper layer has, which takes the layers below at the other
    /// end; of everything else, or if `whole` is said, all of it. Volumes (bind mounts) are not a part of it.
    #[arg(long, value_enum, value_name = "PART", num_args = 0..=1, require_equals = true, default_missing_value = "upper", requires = "container")]
    copy_rootfs: Option<RootCopy>,
}

impl WishArgs {
    /// As the source wants it.
    pub(super) fn wishes(self) -> Wishes {
        let Self { tracking, tcp_established, copy_rootfs } = self;
        Wishes { tracking, tcp_established, copy_root: copy_rootfs }
    }
}

/// What an arriving container has of this host.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Containers")]
pub(super) struct PlaceArgs {
    /// Take containers, too, and make their bundles in this folder. *Whoever sends one can then run programs as root on this host:* what
    /// a container may do is said by its configuration, which comes with it.
    #[arg(long, value_name = "FOLDER")]
    containers: Option<PathBuf>,
    /// Where the root file system of the container is on this host [default: at the same path as on its own]. Not for one that is copied: that is
    /// made in the bundle.
    #[arg(long, value_name = "DIR", requires = "containers")]
    rootfs: Option<PathBuf>,
    /// A layer that lies below the copied upper layer of an overlay, the top first; given for each of them, as many as it has [default: at the same
    /// paths as on its own host].
    #[arg(long, value_name = "DIR", requires = "containers", conflicts_with = "rootfs")]
    lower: Vec<PathBuf>,
    /// The network namespace of the container on this host [default: at the same path as on its own].
    #[arg(long, value_name = "PATH", requires = "containers")]
    netns: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

impl PlaceArgs {
    /// Where containers go; this is their name here, if that is another one.
    ///
    /// # Errors
    /// `Host` when a path cannot be made absolute.
    pub(super) fn place(&self, runtime_dir: &RuntimeDir, name: Option<&str>) -> Result<ContainerPlace> {
        let absolute = |path: &Option<PathBuf>| {
            let absolute = path.as_deref().map(std::path::absolute).transpose();
            absolute.map_err(|error| Error::Host(format!("the path of {path:?} is not known: {error}")))
        };
        let lower = self.lower.iter().map(|path| absolute(&Some(path.clone())));
        let RuntimeArgs { runc, runc_root, criu } = self.runtime.clone();
        Ok(ContainerPlace {
            runc,
            runc_root,
            criu,
            runtime_dir: runtime_dir.clone(),
            bundles: absolute(&self.containers)?,
            name: name.map(str::to_owned),
            root: absolute(&self.rootfs)?,
            lower: lower.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect(),
            netns: absolute(&self.netns)?,
        })
    }
}
