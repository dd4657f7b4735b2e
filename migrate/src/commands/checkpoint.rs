//! `migrate checkpoint`: write a running VM down, once or again and again.

mod group;
mod series;
mod show;

use super::cancel_on_signals;
use super::target::Target;
use crate::cancel::CancelFlag;
use crate::checkpoint::{self, CheckpointReport, Options};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::progress;
use crate::source::vm::VmSource;
use crate::speed::Speedometer;
use crate::store::{self, Attempt, Lease, Store};
use crate::units;
use crate::vault::{Vault, new_id};
use protocol::monitor::{Phase, Status};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often somebody who waits for a store's lock tries again.
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// Which VM, where to, and how often.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate checkpoint web --store /var/lib/checkpoints
  migrate checkpoint web --store /var/lib/checkpoints --every 30s
  migrate checkpoint web --store /mnt/shared/checkpoints --suspend
  migrate checkpoint --group shop web db --store /var/lib/checkpoints

The VM runs on while it is written down, and is paused for its last pages and its state alone. A checkpoint has only what was written
since the last one, if that lies in this store; else it is a full one. It exists only once all of it is durable: one that fails, or is
interrupted, changes nothing. With --group all of the VMs are written down as they were at one instant, at which all of them stood
still, or none is.")]
pub struct Args {
    /// The VM's name, or the path of its control socket; with --group several.
    #[arg(value_name = "VM", required = true)]
    vms: Vec<String>,
    /// Take one checkpoint of several VMs, of one instant, under this name.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["every", "suspend"])]
    group: Option<String>,
    /// For a test: freeze the VMs of a group whenever each of them is ready.
    #[arg(long, hide = true, requires = "group")]
    no_barrier: bool,
    /// Where the checkpoints lie: a directory. It becomes a store if it is none.
    #[arg(long, value_name = "STORE")]
    store: String,
    /// Take a full checkpoint, whatever a delta could stand on.
    #[arg(long)]
    full: bool,
    /// The pause to aim at. What is left of a VM that writes faster than it can be copied takes longer, and that is said.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = units::duration)]
    max_pause: Duration,
    /// How long to wait for whoever else writes to the store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
    /// End the VM with its checkpoint, to restore it elsewhere: it stands still while it is written, and goes on if anything fails.
    #[arg(long, conflicts_with = "every")]
    suspend: bool,
    /// Go on until interrupted: a checkpoint in every such interval, counted from the beginning of one to that of the next.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    every: Option<Duration>,
    /// With --every: a full checkpoint behind so many deltas.
    #[arg(long, value_name = "N", default_value = "100", requires = "every", value_parser = clap::value_parser!(u32).range(0..=4096))]
    max_deltas: u32,
    /// Memory to keep what was read and is not written yet, at most; twice as much while the VM is paused.
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = units::size)]
    stage: u64,
    /// For measurements: do not pack.
    #[arg(long, hide = true)]
    raw: bool,
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
        target: Target::find(&runtime, vm)?,
        store: store::open(&args.store)?,
        cancel: cancel_on_signals()?,
    };
    match args.every {
        Some(interval) => series::run(&writer, interval),
        None => {
            writer.take(&Wanted::first(args), &writer.cancel)?;
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
    target: Target,
    store: Arc<dyn Store>,
    cancel: CancelFlag,
}

impl Writer<'_> {
    /// Takes one checkpoint and prints it, or what was done of it. The VM and the store are held no longer than that.
    fn take(&self, wanted: &Wanted, cancel: &CancelFlag) -> Result<CheckpointReport> {
        let status = writable(&self.target)?;
        let lease = lock(self.store.as_ref(), &status.name, self.args.wait, cancel)?;
        let vault = Vault::open_or_create(Arc::clone(&self.store), None)?;
        let source = VmSource::checkpoint(&status.name, self.target.socket())?;
        let gauge = source.gauge();
        let mut options = Options::new(new_id()?);
        options.full = wanted.full;
        options.fixed_cost = wanted.fixed_cost.unwrap_or(options.fixed_cost);
        self.args.apply(&mut options);
        let mut observer = progress::observer(self.common);
        let mut speedometer = Speedometer::new(gauge, observer.as_mut());
        let taken =
            checkpoint::take(Box::new(source), &vault, lease.as_ref(), &options, cancel, &mut speedometer);
        let (mut report, failure) = match taken {
            Ok(report) => (report, None),
            Err(failed) => (failed.report, Some(failed.error)),
        };
        report.guest = speedometer.finish();
        show::report(self.common, &report);
        failure.map_or(Ok(report), Err)
    }
}

/// How a VM is that can be written down.
fn writable(target: &Target) -> Result<Status> {
    let status = target.status()?;
    if status.phase == Phase::Pledged {
        return Err(Error::Workload(format!(
            "{} stands still because the outcome of a migration is not known: settle it with migrate recover {0}",
            status.name
        )));
    }
    if let Some(pages) = status.awaiting_pages {
        return Err(Error::Workload(format!(
            "{} cannot be written down yet: {pages} pages of it have not arrived; migrate vm status shows when none is missing",
            status.name
        )));
    }
    Ok(status)
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
    /// What holds for every checkpoint.
    fn apply(&self, options: &mut Options) {
        options.max_pause = self.max_pause;
        options.stage_bytes = self.stage;
        options.pack = !self.raw;
        options.suspend = self.suspend;
    }
}
