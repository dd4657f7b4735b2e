//! `migrate completions`: what a shell needs to complete this program's words.

use super::emit;
use crate::cli::{self, Common};
use crate::error::Result;
use clap_complete::{Shell, generate};
use std::io::Write as _;
use std::process::ExitCode;

/// For which shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate completions bash > /etc/bash_completion.d/migrate")]
pub struct Args {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs the verb.
///
/// # Errors
/// None.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let mut script = Vec::new();
    generate(args.shell, &mut cli::command(), "migrate", &mut script);
    if common.json {
        let script = String::from_utf8_lossy(&script);
        let shell = args.shell.to_string();
        emit(&serde_json::json!({"event": "completions", "shell": shell, "script": script}));
    } else {
        // A reader that went away needs none.
        std::io::stdout().write_all(&script).ok();
    }
    Ok(ExitCode::SUCCESS)
}
