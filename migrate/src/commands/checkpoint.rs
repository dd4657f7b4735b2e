//! `migrate checkpoint`: write a running VM down, once or again and again.

mod group;
mod series;
mod subject;
mod show;

use super::cancel_on_signals;
use super::containers::{RuntimeArgs, WishArgs};
use super::store::KeepArgs;
use crate::cancel::CancelFlag;
use crate::chains::Chains;
use crate::checkpoint::{self, CheckpointReport, Options};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::progress;
use crate::report::Observer;
use crate::retention::{Plan, prune};
use crate::schedule::Aim;
use crate::seal::StoreKey;
use crate::speed::Speedometer;
use crate::steer::{SeriesBoard, WatchedSeries};
use crate::store::{self, Attempt, Lease, Store};
use crate::units;
use crate::vault::{Vault, new_id};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use subject::Subject;

/// How often somebody who waits for a store's lock tries again.
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// The pause to aim at.
const VM_PAUSE: Duration = Duration::from_millis(5);
const CONTAINER_PAUSE: Duration = Duration::from_secs(1);

/// What a container's pause takes without pages, before it was measured.
const CONTAINER_COST: Duration = Duration::from_millis(300);

/// The shortest interval of a series.
const SHORTEST: Duration = Duration::from_millis(100);

/// Which VM, where to, and how often.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate checkpoint web --store /var/lib/checkpoints
  migrate checkpoint web --store /var/lib/checkpoints --every 30s
  migrate checkpoint web --store /var/lib/checkpoints --every auto --recovery-time 5s --overhead 2% --mtbf 24h
  migrate checkpoint web --store /var/lib/checkpoints --every 10m --keep-last 6 --keep-hourly 24 --keep-daily 7
  migrate checkpoint web --store /mnt/shared/checkpoints --suspend
  migrate checkpoint --group shop web db --store /var/lib/checkpoints
  migrate checkpoint --container cart --store /var/lib/checkpoints --every 10s

The VM runs on while it is written down, and is paused for its last pages and its state alone. A checkpoint has only what was written
since the last one, if that lies in this store; else it is a full one. It exists only once all of it is durable: one that fails, or is
interrupted, changes nothing. With --group all of the VMs are written down as they were at one instant, at which all of them stood
still, or none is.")]
pub struct Args {
    /// The VM's name, or the path of its control socket; with --group several.
    #[arg(value_name = "VM", required = true)]
    vms: Vec<String>,
    /// They are no VMs: they are the ids of containers under runc.
    #[arg(long)]
    container: bool,
    #[command(flatten)]
    wishes: WishArgs,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Take one checkpoint of several VMs, of one instant, under this name.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["every", "suspend"])]
    group: Option<String>,
    /// For a test: freeze the VMs of a group whenever each of them is ready.
    #[arg(long, hide = true, requires = "group")]
    no_barrier: bool,
    /// Where the checkpoints lie: a directory, or s3://BUCKET/PREFIX. It becomes a store if it is none.
    #[arg(long, value_name = "STORE")]
    store: String,
    /// The file of the store's key. A store that is made with one is sealed; a sealed one needs it.
    #[arg(long, value_name = "FILE")]
    encrypt: Option<PathBuf>,
    /// Take a full checkpoint, whatever a delta could stand on.
    #[arg(long)]
    full: bool,
    /// The pause to aim at [default: 5ms; of a container 1s]. What is left of a VM that writes faster than it can be copied takes longer,
    /// and that is said.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    max_pause: Option<Duration>,
    /// How long to wait for whoever else writes to the store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
    /// End the VM with its checkpoint, to restore it elsewhere: it stands still while it is written, and goes on if anything fails.
    #[arg(long, conflicts_with = "every")]
    suspend: bool,
    /// Go on until interrupted: a checkpoint in every such interval, counted from the beginning of one to that of the next; or auto for
    /// the interval that costs least, by what checkpoints were measured to cost and --mtbf.
    #[arg(long, value_name = "TIME|auto", value_parser = every)]
    every: Option<Every>,
    #[command(flatten)]
    aim: AimArgs,
    #[command(flatten)]
    keep: KeepArgs,
    /// Memory to keep what was read and is not written yet, at most; twice as much while the VM is paused.
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = units::size)]
    stage: u64,
    /// For measurements: do not pack.
    #[arg(long, hide = true)]
    raw: bool,
    /// For measurements: do not look for what is stored already.
    #[arg(long, hide = true)]
    unshared: bool,
}

/// What a series aims at.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "With --every")]
struct AimArgs {
    /// How long restoring may take: a full checkpoint is taken before a chain takes longer.
    #[arg(long, value_name = "TIME", default_value = "5s", requires = "every", value_parser = units::duration)]
    recovery_time: Duration,
    /// With auto: the most of its time that the VM may lose to checkpoints.
    #[arg(long, value_name = "PERCENT", default_value = "2%", requires = "every", value_parser = percent)]
    overhead: f64,
    /// With auto: how long this host lives on average between two failures.
    #[arg(long, value_name = "TIME", default_value = "24h", requires = "every", value_parser = units::duration)]
    mtbf: Duration,
    /// Serve figures as OpenMetrics at http://ADDR:PORT/metrics while it goes on.
    #[arg(long, value_name = "ADDR:PORT", requires = "every")]
    metrics: Option<SocketAddr>,
    /// The most deltas on a full checkpoint.
    #[arg(long, value_name = "N", default_value = "100", requires = "every", value_parser = clap::value_parser!(u32).range(0..=4096))]
    max_deltas: u32,
}

impl AimArgs {
    fn aim(&self) -> Aim {
        let Self { recovery_time, overhead, mtbf, max_deltas, .. } = *self;
        Aim { recovery_time, overhead, mtbf, max_deltas }
    }
}

/// When the next checkpoint of a series is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Every {
    Interval(Duration),
    Auto,
}

fn every(text: &str) -> std::result::Result<Every, String> {
    if text == "auto" {
        return Ok(Every::Auto);
    }
    match units::duration(text)? {
        interval if interval >= SHORTEST => Ok(Every::Interval(interval)),
        _ => Err(format!("take an interval of {} ms or more, or auto", SHORTEST.as_millis())),
    }
}

/// A part of a whole, from text such as `2%`.
fn percent(text: &str) -> std::result::Result<f64, String> {
    let number = text.trim().trim_end_matches('%').trim_end();
    match number.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        _ => Err(format!("{text:?} is no part of the time: write for instance 2%")),
    }
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    if args.stage < 1 << 20 {
        return Err(Error::Usage("--stage takes 1MiB or more".into()));
    }
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    if let Some(name) = &args.group {
        return group::run(common, args, &runtime, name);
    }
    let [vm] = args.vms.as_slice() else {
        return Err(Error::Usage("several VMs are one checkpoint only as a group: say --group NAME".into()));
    };
    let writer = Writer {
        common,
        args,
        subject: Subject::find(args, &runtime, vm)?,
        store: store::open(&args.store)?,
        key: args.key()?,
        cancel: cancel_on_signals()?,
    };
    match args.every {
        Some(every) => series::run(&writer, &runtime, every),
        None => {
            writer.take(&Wanted::first(args), &writer.cancel, None)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What differs from one checkpoint of a series to the next.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    full: bool,
    /// What a pause takes without pages, if that is known.
    fixed_cost: Option<Duration>,
}

impl Wanted {
    fn first(args: &Args) -> Self {
        Self { full: args.full, fixed_cost: None }
    }
}

/// Writes one VM down into one store.
struct Writer<'a> {
    common: &'a Common,
    args: &'a Args,
    subject: Subject,
    store: Arc<dyn Store>,
    key: Option<StoreKey>,
    cancel: CancelFlag,
}

impl Writer<'_> {
    /// Takes one checkpoint and prints it, or what was done of it. The VM and the store are held no longer than that. One of a series stands
    /// on its board.
    fn take(
        &self,
        wanted: &Wanted,
        cancel: &CancelFlag,
        board: Option<&SeriesBoard>,
    ) -> Result<CheckpointReport> {
        let name = self.subject.check()?;
        let lease = lock(self.store.as_ref(), &name, self.args.wait, cancel)?;
        let vault = Vault::open_or_create(Arc::clone(&self.store), self.key.as_ref())?;
        let (source, gauge) = self.subject.open()?;
        let mut options = Options::new(new_id()?);
        self.args.apply(&mut options);
        options.full = wanted.full;
        options.fixed_cost = wanted.fixed_cost.unwrap_or(options.fixed_cost);
        let mut observer = progress::observer(self.common);
        let mut speedometer = Speedometer::new(gauge, observer.as_mut());
        let take = |observer: &mut dyn Observer| {
            checkpoint::take(source, &vault, lease.as_ref(), &options, cancel, observer)
        };
        let taken = match board.cloned() {
            Some(board) => take(&mut WatchedSeries { board, inner: &mut speedometer }),
            None => take(&mut speedometer),
        };
        let (mut report, failure) = match taken {
            Ok(report) => (report, None),
            Err(failed) => (failed.report, Some(failed.error)),
        };
        report.guest = speedometer.finish();
        show::report(self.common, &report);
        if let Some(error) = failure {
            return Err(error);
        }
        self.args.prune(self.common, &vault, lease.as_ref(), &[&report.workload]);
        Ok(report)
    }
}

/// The right to write, waiting for it as long as that is wanted.
fn lock(store: &dyn Store, what: &str, wait: Duration, cancel: &CancelFlag) -> Result<Box<dyn Lease>> {
    let owner = format!("migrate checkpoint {what}");
    let until = Instant::now() + wait;
    loop {
        match store.try_lock(&owner)? {
            Attempt::Held(lease) => return Ok(lease),
            // Says who has it.
            Attempt::Refused(_) if Instant::now() >= until => return store.lock(&owner),
            Attempt::Refused(_) => {
                cancel.check()?;
                std::thread::sleep(LOCK_RETRY);
            }
        }
    }
}

impl Args {
    /// The key of the store, if it has one.
    fn key(&self) -> Result<Option<StoreKey>> {
        self.encrypt.as_deref().map(StoreKey::load).transpose()
    }

    /// Gives up what no rule keeps of these workloads, if there are any rules. That it failed is told, and no more: the checkpoint is what
    /// this is about, and it is there.
    fn prune(&self, common: &Common, vault: &Vault, lease: &dyn Lease, workloads: &[&str]) {
        let keep = self.keep.keep();
        if keep.is_empty() {
            return;
        }
        let gone = vault
            .manifests()
            .and_then(|listing| prune(vault, lease, &Plan::new(&Chains::of(&listing), &keep, workloads)));
        match gone {
            Ok(gone) => show::pruned(common, &gone),
            Err(error) => show::not_pruned(common, &error),
        }
    }

    /// What holds for every checkpoint.
    fn apply(&self, options: &mut Options) {
        let (max_pause, fixed_cost) = match self.container {
            true => (CONTAINER_PAUSE, CONTAINER_COST),
            false => (VM_PAUSE, options.fixed_cost),
        };
        options.max_pause = self.max_pause.unwrap_or(max_pause);
        options.fixed_cost = fixed_cost;
        options.stage_bytes = self.stage;
        options.pack = !self.raw;
        options.share = !self.unshared;
        options.suspend = self.suspend;
    }
}
