//! The verbs, one a file, and what they share.

pub mod vm;
pub mod keys;
pub mod ledger;
pub mod bench_pipe;

use crate::cli::Common;
use crate::error::{Error, Result};
use crate::exit;
use serde::Serialize;
use std::io::Write as _;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Logs go to stderr: warnings, more with `-v`, or what `RUST_LOG` says.
pub fn init_logging(common: &Common) {
    let level = match common.verbose {
        0 => "warn,migrate=warn,vmm=warn",
        1 => "warn,migrate=info,vmm=info",
        2 => "info,migrate=debug,vmm=debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let built =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // Only a second call in one process can fail, and then the first one's choice stands.
    built.try_init().ok();
}

/// Says on stderr (and, with `--json`, on stdout) what went wrong, and gives the exit code for it.
pub fn fail(common: &Common, error: &Error) -> ExitCode {
    if common.json {
        emit(&serde_json::json!({
            "event": "error",
            "class": exit::class(error),
            "exit_code": exit::code(error),
            "message": error.to_string(),
        }));
    }
    // A closed stderr is no reason to lose the exit code.
    writeln!(std::io::stderr(), "migrate: {error}").ok();
    ExitCode::from(exit::code(error))
}

/// Prints one JSON object on a line of its own.
pub fn emit<T: Serialize>(value: &T) {
    if let Ok(line) = serde_json::to_string(value) {
        say(&line);
    }
}

/// Prints a line; a reader that went away (a closed pipe) must not end a migration.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// Checks a VM's name before it becomes part of a path.
///
/// # Errors
/// `Usage`.
pub fn check_name(name: &str) -> Result<()> {
    protocol::control::check_name(name)
        .map_err(|error| Error::Usage(format!("{name:?} cannot be a VM's name: {error}")))
}
