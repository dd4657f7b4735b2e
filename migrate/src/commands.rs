//! The verbs, one a file, and what they share.

mod containers;
mod disks;
mod limits;
mod target;
pub mod vm;
pub mod cpu;
pub mod doctor;
pub mod send;
pub mod receive;
pub mod checkpoint;
pub mod status;
pub mod cancel;
pub mod set;
pub mod report;
pub mod replay;
pub mod estimate;
pub mod keys;
pub mod restore;
pub mod store;
pub mod recover;
pub mod ledger;
pub mod completions;
pub mod man;
pub mod bench_pipe;
pub mod container_keeper;

use crate::cancel::{CancelFlag, Signals};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::exit;
use serde::Serialize;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use tracing_subscriber::EnvFilter;

/// Logs go to stderr: warnings (of a daemon what it does, too), more with `-v`, or what `RUST_LOG` says. One line an event;
/// the journal has its own clock and no colours.
pub fn init_logging(common: &Common, daemon: bool) {
    let level = match common.verbose + u8::from(daemon) {
        0 => "warn,migrate=warn,vmm=warn",
        1 => "warn,migrate=info,vmm=info",
        2 => "info,migrate=debug,vmm=debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let built =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // Only a second call in one process can fail, and then the first one's choice stands.
    if is_journal() {
        built.without_time().with_ansi(false).try_init().ok();
    } else {
        built.with_ansi(std::io::stderr().is_terminal()).try_init().ok();
    }
}

/// Whether stderr is the journal: `JOURNAL_STREAM` names its device and inode (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(std::io::stderr())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Serves the figures of this process's migrations, and says where.
///
/// # Errors
/// `Host` when it cannot listen there.
pub(crate) fn serve_metrics(
    common: &Common,
    address: std::net::SocketAddr,
    fleet: &crate::metrics::Fleet,
) -> Result<crate::metrics::Server> {
    let server = crate::metrics::Server::start(address, fleet.clone())?;
    let url = format!("http://{}/metrics", server.address());
    if common.json {
        emit(&serde_json::json!({"event": "metrics", "url": url}));
    } else {
        say(&format!("metrics at {url}"));
    }
    Ok(server)
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

/// A flag that Ctrl-C and SIGTERM set. What a second one does is said at [`Signals`].
///
/// # Errors
/// `Host` when the signals cannot be heard.
pub fn cancel_on_signals() -> Result<CancelFlag> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let deaf = |error: std::io::Error| Error::Host(format!("signals cannot be caught: {error}"));
    let signals = Arc::new(Signals::default());
    let mut heard = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(deaf)?;
    let told = Arc::clone(&signals);
    let hear = move || {
        for signal in heard.forever() {
            if told.came() {
                // As if it had not been heard.
                signal_hook::low_level::emulate_default_handler(signal).ok();
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(hear).map_err(deaf)?;
    Ok(CancelFlag::over(signals))
}

/// How the pages come that a running VM misses.
fn how_they_come(name: &str) -> String {
    format!(
        "if it was restored from a store, run migrate restore --store STORE CHECKPOINT --resume {name}; if it came from another host, start \
         migrate receive here, and run migrate recover {name} there if its migrate send is gone"
    )
}

/// Checks a VM's name before it becomes part of a path.
///
/// # Errors
/// `Usage`.
pub fn check_name(name: &str) -> Result<()> {
    protocol::control::check_name(name)
        .map_err(|error| Error::Usage(format!("{name:?} cannot be a VM's name: {error}")))
}
