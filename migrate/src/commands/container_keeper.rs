//! `migrate container-keeper`: what `migrate send --container` starts beside itself, see [`crate::container`].

use super::containers::RuntimeArgs;
use crate::cli::Common;
use crate::container::keeper::Kept;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

/// Which container.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Its id.
    id: String,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    super::check_name(&args.id)?;
    let runtime_dir = RuntimeDir::open(common.runtime_dir.as_deref())?;
    // Whoever started this is at the other end.
    let first = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| Error::Host(format!("nobody gives orders on the standard input: {error}")))?;
    Kept::run(runtime_dir, args.runtime.runtime()?, &args.id, first.into())?;
    Ok(ExitCode::SUCCESS)
}
