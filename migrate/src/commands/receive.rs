//! `migrate receive`: take a VM that another host sends, or, as a daemon, all that are sent.

mod arrival;
mod daemon;

use super::containers::PlaceArgs;
use super::{cancel_on_signals, emit, say, send};
use crate::cancel::CancelFlag;
use crate::cli::Common;
use crate::connections;
use crate::container::arrivals;
use crate::destination::any::Places;
use crate::destination::vm::Place;
use crate::error::{Error, Result};
use crate::exit;
use crate::identity::{self, Identity};
use crate::inbound::{Desk, Ledger, Limits, MemoryLedger, Notice, Notices, Options};
use crate::link::Link;
use crate::link::quic::{Cut, Listener};
use crate::metrics::Fleet;
use crate::paths::RuntimeDir;
use crate::progress;
use crate::seed;
use crate::steer;
use crate::units;
use arrival::{Host, Job};
use daemon::Daemon;
use protocol::MigrationId;
use protocol::control::Outcome;
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::cpuid::CpuModel;
use vmm::devices::virtio::{Allowed, ConsoleConfig};

/// How often a receiver that waits looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(200);

/// Where to listen, and what to take.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate receive --listen 0.0.0.0:7700 --max-memory 8GiB
  migrate receive --listen 0.0.0.0:7700 --containers /srv/containers

It takes one VM and ends; a failed attempt does not end it. The VM goes on in a process of its own: see migrate vm list.

With --daemon it takes all that are sent, several at a time, until SIGTERM: see docs/operating.md for a systemd unit.")]
pub struct Args {
    /// Address and UDP port; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Run the VM under this name instead of its own.
    #[arg(long)]
    name: Option<String>,
    /// Take all VMs that are sent, and never end by itself.
    #[arg(long, conflicts_with_all = ["name", "once", "timeout", "report"])]
    daemon: bool,
    /// The most VMs that may arrive at the same time; others wait a few seconds for their turn.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=64), requires = "daemon")]
    max_migrations: usize,
    /// How long VMs that arrive have to come in when the daemon is told to stop; then they stay where they are.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration, requires = "daemon")]
    grace: Duration,
    /// Serve figures as OpenMetrics at http://ADDR:PORT/metrics.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// Write the report of the last attempt to this file: a page, or JSON where it ends in .json.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The most memory that VMs which arrive may have together [default: what this host has available].
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    max_memory: Option<u64>,
    /// Where the VM's serial port goes: none, socket:PATH (with input), or a file [default: a file in the runtime directory].
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// A folder in which the disks of a VM that arrives may lie; images that come with it (send --copy-disk) are made in the first.
    /// Without it no VM with disks is taken. May be given several times.
    #[arg(long, value_name = "FOLDER")]
    disks: Vec<PathBuf>,
    /// A tap that a network card of a VM that arrives may use. May be given several times.
    #[arg(long, value_name = "NAME")]
    taps: Vec<String>,
    /// Where the other end of the VM's console is, if it has one: socket:PATH, or a file [default: nowhere].
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleConfig>,
    /// The most that the guest of a VM that arrives may have been shown of a processor: host, x86-64-v2, x86-64-v3, or the file of a
    /// template (see migrate cpu). One that was shown more is refused.
    #[arg(long, value_name = "MODEL", default_value = "host")]
    cpu: String,
    #[command(flatten)]
    place: PlaceArgs,
    /// End after the first attempt, whatever came of it.
    #[arg(long)]
    once: bool,
    /// Give up when nobody has sent a VM for this long [default: wait forever].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// A store of checkpoints that a sender may refer to, so that it need not send what is there. May be given several times.
    #[arg(long, value_name = "STORE")]
    seed_from: Vec<String>,
    /// The file of those stores' key, if they are sealed.
    #[arg(long, value_name = "FILE", requires = "seed_from")]
    seed_key: Option<PathBuf>,
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

impl Args {
    /// Whether it runs for long and writes a log rather than a screen.
    pub(crate) fn is_daemon(&self) -> bool {
        self.daemon
    }
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
    if !args.seed_from.is_empty() {
        options.seeds = Some(seed::open_stores(&args.seed_from, args.seed_key.as_deref())?);
    }
    if args.once {
        // Nobody is here to answer afterwards.
        options.forget = args.ask_timeout;
    }
    let mut settings = send::settings(args.link_timeout);
    settings.cut = Cut::of_environment()?;
    if connections::Host::now().has_many_cores() {
        // One socket serves all connections, but each of them can be decrypted by another thread.
        settings.workers = 2;
    }
    let mut listener = Listener::bind(args.listen, &keys, settings)?;
    let address = listener.local_addr().to_string();
    if common.json {
        emit(&json!({"event": "listening", "address": address, "fingerprint": fingerprint}));
    } else {
        say(&format!("listening at {address} (UDP) as {fingerprint}"));
    }
    let limits = match args.daemon {
        false => Limits::one(options.max_memory_bytes),
        true => Limits { max_migrations: args.max_migrations, ..Limits::one(options.max_memory_bytes) },
    };
    let steering = steer::Place::open(&runtime)
        .inspect_err(|error| tracing::warn!("arrivals cannot be steered from outside: {error}"))
        .ok();
    let host = Host {
        places: Places {
            container: args.place.place(&runtime, args.name.as_deref())?,
            vm: Place {
                program,
                runtime: runtime.clone(),
                name: args.name.clone(),
                serial: args.serial.clone(),
                cpu: cpu(&args.cpu)?,
                allowed: Allowed {
                    disk_folders: args.disks.clone(),
                    taps: args.taps.clone(),
                    console: args.console.clone(),
                },
                holder: "migrate receive",
            },
        },
        options,
        steering,
        fleet: Fleet::default(),
        report: args.report.clone(),
    };
    let _metrics = args.metrics.map(|at| super::serve_metrics(common, at, &host.fleet)).transpose()?;
    let ledger = Arc::new(HostLedger { runtime, memory: MemoryLedger::default() });
    let accept = move |limit| -> Result<Box<dyn Link>> { Ok(Box::new(listener.accept(limit)?)) };
    let notices = notices(common.json, address.clone());
    let desk = Desk::open(Box::new(accept), ledger, limits, args.link_timeout, notices)?;
    if args.daemon {
        Daemon::new(common, &host, &desk, &address).run(&cancel, args.grace)?;
        return Ok(ExitCode::SUCCESS);
    }
    take_one(common, args, &host, &desk, &cancel, &address)
}

/// A model as a VMM that is started later can read it, whatever its directory is then.
///
/// # Errors
/// `Usage` when it is none.
pub(super) fn cpu(model: &str) -> Result<String> {
    match CpuModel::parse(model)? {
        CpuModel::Template(template) if template.name() != model => {
            let path = std::path::absolute(model)
                .map_err(|error| Error::Host(format!("the path of {model} is not known: {error}")))?;
            Ok(path.to_string_lossy().into_owned())
        }
        _ => Ok(model.to_owned()),
    }
}

/// Takes one VM, trying until one has arrived.
fn take_one(
    common: &Common,
    args: &Args,
    host: &Host,
    desk: &Desk,
    cancel: &CancelFlag,
    address: &str,
) -> Result<ExitCode> {
    let begun = Instant::now();
    loop {
        if cancel.is_set() {
            return Err(Error::Interrupted("no VM arrived".into()));
        }
        if let Some(limit) = args.timeout.filter(|limit| begun.elapsed() > *limit) {
            return Err(Error::TimedOut { what: "a VM to arrive", after: limit });
        }
        let Some(job) = Job::next(desk, LOOK)? else { continue };
        let migration = job.migration();
        let mut observer = progress::observer(common);
        // Whoever cancels this one over its socket does not end the receiver.
        match host.serve(desk, job, &cancel.for_one(), observer.as_mut()) {
            Ok(report) => {
                if common.json {
                    emit(&json!({"event": "arrived", "name": report.workload, "report": report}));
                } else {
                    progress::show_arrival(&report);
                }
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) if args.once || cancel.is_set() => return Err(error),
            Err(error) => attempt_failed(common.json, address, Some(migration), &error),
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
        Notice::TurnedAway { error, .. } => attempt_failed(json, &address, None, &error),
    })
}

fn attempt_failed(json: bool, address: &str, migration: Option<MigrationId>, error: &Error) {
    tracing::warn!("an attempt failed: {error}; still listening at {address}");
    if json {
        let (class, message) = (exit::class(error), error.to_string());
        emit(&json!({
            "event": "attempt-failed", "address": address, "migration": migration, "class": class, "message": message,
        }));
    }
}

/// Memory that this host could give, in bytes: `MemAvailable` of /proc/meminfo (proc(5)).
pub(super) fn available_memory_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| Error::Host(format!("/proc/meminfo cannot be read: {error}; say --max-memory")))?;
    units::meminfo_bytes(&text, "MemAvailable").ok_or_else(|| {
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
                let arrived = arrived || arrivals::has(&self.runtime, migration);
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
