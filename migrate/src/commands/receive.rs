//! `migrate receive`: take a VM that another host sends.

use super::{cancel_on_signals, emit, say, send};
use crate::cli::Common;
use crate::destination::vm::{Place, VmDestination};
use crate::error::{Error, Result};
use crate::exit;
use crate::identity::{self, Identity};
use crate::inbound::{self, Desk, Ledger, Limits, MemoryLedger, Notice, Notices, Options};
use crate::link::Link;
use crate::link::quic::Listener;
use crate::paths::RuntimeDir;
use crate::progress;
use crate::units;
use protocol::MigrationId;
use protocol::control::Outcome;
use serde_json::json;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a receiver that waits looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(200);

/// Where to listen, and what to take.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate receive --listen 0.0.0.0:7700 --max-memory 8GiB

It takes one VM and ends; a failed attempt does not end it. The VM goes on in a process of its own: see migrate vm list.")]
pub struct Args {
    /// Address and UDP port; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Run the VM under this name instead of its own.
    #[arg(long)]
    name: Option<String>,
    /// The most memory a VM may have here [default: what this host has available].
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    max_memory: Option<u64>,
    /// Where the VM's serial port goes: none, or a file [default: a file in the runtime directory].
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// End after the first attempt, whatever came of it.
    #[arg(long)]
    once: bool,
    /// Give up when nobody has sent a VM for this long [default: wait forever].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// How long to wait for a sender that says nothing.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    link_timeout: Duration,
    /// How long to keep what has arrived when the link is lost, for a sender that comes back. 0s to discard at once.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::duration)]
    keep: Duration,
    /// How long to wait for the commit, and behind it for the sender to know that the VM runs here.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::duration)]
    ask_timeout: Duration,
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    if let Some(name) = &args.name {
        super::check_name(name)?;
    }
    let keys = identity::directory(common.keys.as_deref())?;
    let fingerprint = Identity::load(&keys)?.fingerprint();
    let program = std::env::current_exe()
        .map_err(|error| Error::Host(format!("this program's own path is not known: {error}")))?;
    let cancel = cancel_on_signals()?;
    let mut options = Options::new(match args.max_memory {
        Some(bytes) => bytes,
        None => available_memory_bytes()?,
    });
    options.idle = args.link_timeout;
    options.linger = args.ask_timeout;
    options.keep = args.keep;
    if args.once {
        // Nobody is here to answer afterwards.
        options.forget = args.ask_timeout;
    }
    let mut listener = Listener::bind(args.listen, &keys, send::settings(args.link_timeout))?;
    let address = listener.local_addr().to_string();
    if common.json {
        emit(&json!({"event": "listening", "address": address, "fingerprint": fingerprint}));
    } else {
        say(&format!("listening at {address} (UDP) as {fingerprint}"));
    }
    let place =
        Place { program, runtime: runtime.clone(), name: args.name.clone(), serial: args.serial.clone() };
    let ledger = Arc::new(HostLedger { runtime, memory: MemoryLedger::default() });
    let accept = move |limit| -> Result<Box<dyn Link>> { Ok(Box::new(listener.accept(limit)?)) };
    let desk = Desk::open(
        Box::new(accept),
        ledger,
        Limits::one(options.max_memory_bytes),
        args.link_timeout,
        notices(common.json, address.clone()),
    )?;
    let begun = Instant::now();
    loop {
        if cancel.is_set() {
            return Err(Error::Interrupted("no VM arrived".into()));
        }
        if let Some(limit) = args.timeout.filter(|limit| begun.elapsed() > *limit) {
            return Err(Error::TimedOut { what: "a VM to arrive", after: limit });
        }
        let mut observer = progress::observer(common);
        let destination = Box::new(VmDestination::new(place.clone()));
        let arrived = if let Some(stranded) = desk.next_stranded() {
            inbound::take_up(stranded, &desk, destination.as_ref(), &options, &cancel, observer.as_mut())
        } else {
            let Some(offered) = desk.next_offer(LOOK)? else { continue };
            inbound::receive(offered, &desk, destination, &options, &cancel, observer.as_mut())
        };
        match arrived {
            Ok(report) => {
                if common.json {
                    emit(&json!({"event": "arrived", "name": report.workload, "report": report}));
                } else {
                    progress::show_arrival(&report);
                }
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) if args.once || matches!(error.root(), Error::Interrupted(_)) => return Err(error),
            Err(error) => attempt_failed(common.json, &address, &error),
        }
    }
}

/// Tells what happened at the desk while a VM is waited for, or arrives.
fn notices(json: bool, address: String) -> Notices {
    Box::new(move |notice| match notice {
        Notice::Asked { migration, outcome } => {
            tracing::info!(%migration, ?outcome, "a sender asked and was told");
            if json {
                emit(&json!({"event": "asked", "migration": migration, "outcome": outcome}));
            }
        }
        Notice::TurnedAway { error, .. } => attempt_failed(json, &address, &error),
    })
}

fn attempt_failed(json: bool, address: &str, error: &Error) {
    tracing::warn!("an attempt failed: {error}; still listening at {address}");
    if json {
        let (class, message) = (exit::class(error), error.to_string());
        emit(&json!({"event": "attempt-failed", "address": address, "class": class, "message": message}));
    }
}

/// Memory that this host could give, in bytes: `MemAvailable` of /proc/meminfo (proc(5)).
fn available_memory_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| Error::Host(format!("/proc/meminfo cannot be read: {error}; say --max-memory")))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib.saturating_mul(1024)).ok_or_else(|| {
        Error::Host("/proc/meminfo does not tell the available memory; say --max-memory".into())
    })
}

/// What became of migrations, by this process's memory and by the VMs that run here: they remember which migration
/// brought them, so a sender gets its answer from a receiver that was started anew, too.
struct HostLedger {
    runtime: RuntimeDir,
    memory: MemoryLedger,
}

impl Ledger for HostLedger {
    fn outcome(&self, migration: MigrationId) -> Outcome {
        match self.memory.outcome(migration) {
            Outcome::Unknown => {
                let vms = super::target::all(&self.runtime).unwrap_or_default();
                // One that misses pages needs its source still.
                let arrived =
                    vms.iter().any(|(_, vm)| vm.arrived_by == Some(migration) && vm.awaiting_pages.is_none());
                if arrived { Outcome::Started } else { Outcome::Unknown }
            }
            known => known,
        }
    }

    fn is_incomplete(&self, migration: MigrationId) -> bool {
        let vms = super::target::all(&self.runtime).unwrap_or_default();
        vms.iter().any(|(_, vm)| vm.arrived_by == Some(migration) && vm.awaiting_pages.is_some())
    }

    fn record(&self, migration: MigrationId, outcome: Outcome) {
        self.memory.record(migration, outcome);
    }
}
