//! `migrate send`: move a running VM to another host.

use super::containers::{RuntimeArgs, WishArgs};
use super::disks::DiskArgs;
use super::limits::LimitArgs;
use super::target::Target;
use super::{cancel_on_signals, emit};
use crate::cancel::CancelFlag;
use crate::cli::Common;
use crate::connections::{self, Host, Meter, Wanted};
use crate::controls::{check_bandwidth, check_limits};
use crate::converge::Limits;
use crate::converge::trace::Recorder;
use crate::error::{Error, Result};
use crate::history::History;
use crate::identity::{self, Identity, TrustStore};
use crate::link::Link;
use crate::link::quic::{self, Cut, Settings};
use crate::metrics::Fleet;
use crate::outbound::{self, Options, Packs};
use crate::paths::{self, RuntimeDir};
use crate::progress;
use crate::report::{Document, Event, Observer, Outcome};
use crate::seed::{self, Seed};
use crate::select::hot::HotRule;
use crate::source::Source;
use crate::source::container::ContainerSource;
use crate::source::vm::VmSource;
use crate::speed::{Gauge, Speedometer};
use crate::steer::{self, Board, Place, Server, Watched};
use crate::units;
use protocol::monitor::{Phase, Status};
use protocol::steer::End;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// The downtime that a container's move aims at, and the longest of one that stalled: dumping and restoring a small process tree takes 0.3 to
/// 0.5 s before a page is sent (November 2026).
const DOWNTIME: Duration = Duration::from_secs(1);
const MAX_DOWNTIME: Duration = Duration::from_secs(3);

/// What of it is neither pages nor round trips, before it was measured.
const FIXED_COST: Duration = Duration::from_millis(500);

/// What to send where, and within which limits.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate send web b.example:7700 --downtime 20ms
  migrate send web b.example:7700 --on-stall minimum,cancel --max-downtime 500ms
  migrate send web b.example:7700 --copy-disk
  migrate send web b.example:7700 --trace web.trace
  migrate send --container shop b.example:7700
  migrate send --container shop b.example:7700 --copy-rootfs")]
pub struct Args {
    /// The VM's name, or the path of its control socket.
    vm: String,
    /// It is no VM: it is the id of a container under runc.
    #[arg(long, conflicts_with_all = ["verify", "post_copy", "copy_disk", "seed_from"])]
    container: bool,
    #[command(flatten)]
    wishes: WishArgs,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Where migrate receive listens: HOST:PORT.
    address: String,
    #[command(flatten)]
    limits: LimitArgs,
    /// The most to send in a second, such as 2Gbit/s or 250MB/s; 0 is no limit. It holds for the page streams together, and
    /// not for the last pages, which are sent while the VM stands still.
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = units::bandwidth)]
    bandwidth: u64,
    /// How many connections carry the pages: 1 to 8, or auto for as many as paid in earlier moves to that host.
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    connections: Wanted,
    /// How pages are packed: for comparing, and for finding faults.
    #[arg(long, value_enum, default_value = "measured", hide = true)]
    pack: Packs,
    /// Compare all memory at both ends before the VM starts there, by BLAKE3: it stands still meanwhile. A difference ends the
    /// move, and the VM goes on here. Not together with --post-copy.
    #[arg(long, conflicts_with = "post_copy")]
    verify: bool,
    #[command(flatten)]
    disks: DiskArgs,
    /// A store with checkpoints of the VM that migrate receive --seed-from can read, too: what is as in the last one is not sent.
    #[arg(long, value_name = "STORE")]
    seed_from: Option<String>,
    /// The file of that store's key, if it is sealed.
    #[arg(long, value_name = "FILE", requires = "seed_from")]
    seed_key: Option<PathBuf>,
    /// Serve figures as OpenMetrics at http://ADDR:PORT/metrics while it moves.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// Write the report to this file, also when the move fails: a page, or JSON where it ends in .json.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write everything that each decision looks at to this file: see migrate replay.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// For measurements: whether pages that are dirty in every round wait while there is much else to send.
    #[arg(long, hide = true, action = clap::ArgAction::Set, default_value_t = true)]
    hot_pages_last: bool,
    /// How long to wait for a peer that says nothing.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    link_timeout: Duration,
    /// How long to look for another link when one is lost before the commit; the VM runs on meanwhile. 0s to give up at once.
    #[arg(long, value_name = "TIME", default_value = "9m", value_parser = units::duration)]
    retry_for: Duration,
    /// How long to ask for the answer when the link breaks behind the commit.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    ask_timeout: Duration,
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let keys = identity::directory(common.keys.as_deref())?;
    let identity = Identity::load(&keys)?;
    let mut settings = settings(args.link_timeout);
    settings.cut = Cut::of_environment()?;
    let mut dial = || -> Result<Box<dyn Link>> {
        // Read anew for every connection, so that a key revoked meanwhile is not trusted.
        let trust = TrustStore::load(&keys)?;
        Ok(Box::new(quic::dial(&args.address, &identity, &trust, &settings, args.link_timeout)?))
    };
    let cancel = cancel_on_signals()?;
    let Subject { source, gauge, seed, limits, fixed_cost, kind } = match args.container {
        true => container(args, &runtime)?,
        false => vm(args, &runtime, &cancel)?,
    };
    let name = source.workload().name.clone();
    let link = dial()?;
    let mut options = Options::new(outbound::new_migration_id()?);
    options.seed = seed;
    options.fixed_cost = fixed_cost.unwrap_or(options.fixed_cost);
    let limits = args.limits.over(&limits);
    check_limits(&limits).map_err(Error::Usage)?;
    options.controls.change(|now| *now = limits);
    if args.bandwidth > 0 {
        check_bandwidth(args.bandwidth).map_err(Error::Usage)?;
        options.controls.cap_bandwidth(Some(args.bandwidth));
    }
    options.packs = args.pack;
    options.verify = args.verify;
    let peer = link.peer_key().to_string();
    let history = paths::state_dir(common.state_dir.as_deref()).map(|dir| History::in_dir(&dir));
    if let Some((fixed, moves)) = history.as_ref().and_then(|history| history.fixed(&format!("{peer}{kind}")))
    {
        options.fixed_cost = fixed;
        options.fixed_cost_known_from = u32::try_from(moves).unwrap_or(u32::MAX);
    }
    let carried = history.as_ref().map(|history| history.carried(&peer)).unwrap_or_default();
    options.connections = connections::choose(args.connections, &carried, Host::now());
    options.page_streams = options.page_streams.max(options.connections.number);
    if !args.hot_pages_last {
        options.hot = HotRule::NEVER;
    }
    options.stall = args.link_timeout;
    options.ask = args.ask_timeout;
    options.retry = args.retry_for;
    let inner = progress::observer(common);
    let mut observer = match &args.trace {
        Some(path) => tracing_to(path, &name, inner)?,
        None => inner,
    };
    let board = Board::new(
        steer::Subject {
            end: End::Send,
            migration: options.migration,
            workload: name.clone(),
            peer: peer.clone(),
            memory_bytes: source.workload().layout.memory_bytes(),
        },
        cancel.clone(),
        Some(options.controls.clone()),
    );
    let fleet = Fleet::default();
    let _entry = fleet.add(board.clone());
    let _metrics = args.metrics.map(|at| super::serve_metrics(common, at, &fleet)).transpose()?;
    let server = Place::open(&runtime).and_then(|place| Server::start(&place, &name, board.clone()));
    if let Err(error) = &server {
        tracing::warn!("this migration cannot be steered from outside: {error}");
    }
    let mut meter = Meter::new(observer.as_mut());
    let mut speedometer = Speedometer::new(gauge, &mut meter);
    let mut watched = Watched { board, inner: &mut speedometer };
    let sent = outbound::send(source, link, &mut dial, &options, &cancel, &mut watched);
    drop(server);
    let (mut report, failure) = match sent {
        Ok(report) => (report, None),
        Err(failed) => (failed.report, Some(failed.error)),
    };
    report.guest = speedometer.finish();
    if let Some(path) = &args.report
        && let Err(error) = Document::Sent(Box::new(report.clone())).write(path)
    {
        // The VM has moved or it has not: that is what the exit code is about.
        tracing::warn!("{error}");
    }
    // How long the rest takes cannot be told from a downtime in which memory was compared.
    if let (Some(history), Outcome::Moved, false) = (history, &report.outcome, args.verify) {
        // What a limit held back says nothing of what connections carry.
        let carried = meter.carried(report.connections.number).filter(|_| args.bandwidth == 0);
        let fixed = Duration::from_micros(report.fixed.actual_us);
        history.record(&format!("{peer}{kind}"), fixed, carried).unwrap_or_else(|error| {
            tracing::warn!(%error, "what this move cost is not remembered");
        });
    }
    if common.json {
        let mut line = serde_json::to_value(&report).unwrap_or_default();
        line["event"] = "report".into();
        emit(&line);
    } else if failure.is_none() {
        progress::show_report(&report);
    }
    failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// What is sent.
struct Subject {
    source: Box<dyn Source>,
    /// A look at how fast it is, if it says so itself.
    gauge: Option<Gauge>,
    seed: Option<Arc<Seed>>,
    /// When to stop, where the operator does not say.
    limits: Limits,
    /// What freezing and starting cost, if that is not what it usually is.
    fixed_cost: Option<Duration>,
    /// What tells moves of this kind to a host from others, in what is remembered of them.
    kind: &'static str,
}

/// A VM that can be moved now.
fn vm(args: &Args, runtime: &RuntimeDir, cancel: &CancelFlag) -> Result<Subject> {
    let target = Target::find(runtime, &args.vm)?;
    let status = target.status()?;
    if status.phase == Phase::Pledged {
        return Err(Error::Workload(format!(
            "{0} stands still because the outcome of a migration is not known: settle it with migrate recover {0}",
            status.name
        )));
    }
    if let Some(pages) = status.awaiting_pages {
        return Err(Error::Workload(format!(
            "{} cannot be sent on yet: it misses {pages} pages; migrate vm show tells when none is missing. If nothing arrives: {}",
            status.name,
            super::how_they_come(&status.name)
        )));
    }
    let source = VmSource::connect(&status.name, target.socket(), &args.address, &args.disks.copied())?;
    // Before the destination is asked: it may take a moment, and nobody shall wait for it.
    let seed = args
        .seed_from
        .as_deref()
        .and_then(|place| seed(place, args.seed_key.as_deref(), &status, &source, cancel));
    Ok(Subject {
        gauge: source.gauge(),
        source: Box::new(source),
        seed,
        limits: Limits::default(),
        fixed_cost: None,
        kind: "",
    })
}

/// A container that can be moved now.
fn container(args: &Args, runtime_dir: &RuntimeDir) -> Result<Subject> {
    let program = std::env::current_exe()
        .map_err(|error| Error::Host(format!("this program's own path is not known: {error}")))?;
    let source = ContainerSource::connect(
        &args.vm,
        &args.runtime.runtime()?,
        runtime_dir,
        &program,
        &args.address,
        args.wishes.wishes(),
        None,
    )?;
    let limits = Limits { downtime: DOWNTIME, max_downtime: MAX_DOWNTIME, ..Limits::default() };
    Ok(Subject {
        source: Box::new(source),
        gauge: None,
        seed: None,
        limits,
        fixed_cost: Some(FIXED_COST),
        kind: "/container",
    })
}

/// The checkpoint in a store that the VM is tracked from, or else its newest; one that cannot be had is no reason not to move.
fn seed(
    place: &str,
    key: Option<&Path>,
    vm: &Status,
    source: &VmSource,
    cancel: &CancelFlag,
) -> Option<Arc<Seed>> {
    let open = || {
        let vault = seed::open_store(place, key)?;
        let tracked = vm.baseline.filter(|id| vault.manifest(*id).is_ok());
        let id = tracked.map_or_else(|| vault.resolve(&format!("{}@latest", vm.name)), Ok)?;
        Seed::open(&vault, id, &source.workload().layout, cancel)
    };
    match open() {
        Ok(seed) => Some(Arc::new(seed)),
        Err(error) => {
            tracing::warn!("everything is sent, because no checkpoint can be counted from: {error}");
            None
        }
    }
}

/// The link's settings for a limit on a peer's silence.
pub(super) fn settings(link_timeout: Duration) -> Settings {
    let mut settings = Settings::default();
    settings.idle_timeout = link_timeout;
    settings.keep_alive = (link_timeout / 5).min(settings.keep_alive);
    settings.stall_timeout = link_timeout;
    settings
}

/// An observer that writes a trace besides.
struct Traced {
    inner: Box<dyn Observer>,
    trace: Option<Recorder<File>>,
}

fn tracing_to(path: &Path, workload: &str, inner: Box<dyn Observer>) -> Result<Box<dyn Observer>> {
    let trace = File::create(path)
        .and_then(|file| Recorder::begin(file, workload))
        .map_err(|error| Error::Host(format!("the trace {} cannot be written: {error}", path.display())))?;
    Ok(Box::new(Traced { inner, trace: Some(trace) }))
}

impl Observer for Traced {
    fn event(&mut self, event: &Event) {
        self.inner.event(event);
        if let (Event::Decided(entry), Some(trace)) = (event, &mut self.trace)
            && let Err(error) = trace.add(entry)
        {
            // A move is worth more than its trace.
            tracing::warn!(%error, "the trace ends here");
            self.trace = None;
        }
    }
}
