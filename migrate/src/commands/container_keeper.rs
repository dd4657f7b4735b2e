//! `migrate container-keeper`: what `migrate send --container` starts beside itself, see [`crate::container`].

use super::containers::RuntimeArgs;
use crate::cli::Common;
use crate::container::keeper::Kept;
use crate::error::Result;
use crate::paths::RuntimeDir;
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
    Kept::run(runtime_dir, args.runtime.runtime()?, &args.id)?;
    Ok(ExitCode::SUCCESS)
}
