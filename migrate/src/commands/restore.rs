//! `migrate restore`: start a VM from a checkpoint, with all of its memory or before that.

use super::containers::PlaceArgs;
use super::store::StoreArgs;
use super::target::Target;
use super::{cancel_on_signals, emit};
use crate::cli::Common;
use crate::destination::Destination;
use crate::destination::any::{AnyDestination, Places};
use crate::destination::vm::Place;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::progress;
use crate::restore::report::{Event, Report};
use crate::restore::{self, Options};
use crate::units;
use std::path::PathBuf;
use std::process::ExitCode;
use vmm::devices::virtio::{Allowed, ConsoleConfig};

/// Which checkpoint, and as what.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate restore --store /var/lib/checkpoints web
  migrate restore --store /var/lib/checkpoints --group shop
  migrate restore --store /var/lib/checkpoints web --disks /srv/vms
  migrate restore --store /var/lib/checkpoints 2026-11-23T19:48:31Z --name web2 --lazy
  migrate restore --store /var/lib/checkpoints cart --containers /srv/containers

A checkpoint can be restored any number of times, also at once, each time under another --name. Nothing is started where anything of it is
missing or damaged. With --lazy the VM runs at once and its memory follows, what it touches first; if the store fails meanwhile, the VM
waits for what it touches, and this goes on trying. Were it killed, --resume goes on in its place. With --group all VMs of a checkpoint
that was taken with --group are restored, and none of them starts before all of them could.")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Its name or the beginning of it, a time (the newest until then), a VM's name, VM@latest or VM@TIME, or latest.
    #[arg(value_name = "CHECKPOINT", default_value = "latest")]
    checkpoint: String,
    /// Restore all VMs of a group: the newest checkpoint of it, or NAME@ID.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["checkpoint", "name", "resume", "serial"])]
    group: Option<String>,
    /// Run the VM under this name instead of its own.
    #[arg(long)]
    name: Option<String>,
    /// Start the VM at once; its memory follows while it runs.
    #[arg(long)]
    lazy: bool,
    /// Go on with this VM, which was restored lazily and misses memory since its restore ended.
    #[arg(long, value_name = "VM", conflicts_with_all = ["name", "lazy", "serial"])]
    resume: Option<String>,
    /// Where the VM's serial port goes: none, socket:PATH (with input), or a file [default: a file in the runtime directory].
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// A folder in which the VM's disks may lie; those that it writes are made anew in the first. Without it no VM with disks is
    /// restored. May be given several times.
    #[arg(long, value_name = "FOLDER")]
    disks: Vec<PathBuf>,
    /// A tap that a network card of the VM may use. May be given several times.
    #[arg(long, value_name = "NAME")]
    taps: Vec<String>,
    /// Where the other end of the VM's console is, if it has one: socket:PATH, or a file [default: nowhere].
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleConfig>,
    #[command(flatten)]
    place: PlaceArgs,
    /// The most memory the VM may have [default: what this host has available].
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    max_memory: Option<u64>,
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
    let program = std::env::current_exe()
        .map_err(|error| Error::Host(format!("this program's own path is not known: {error}")))?;
    let cancel = cancel_on_signals()?;
    let vault = args.store.open()?;
    let max_memory_bytes = match args.max_memory {
        Some(bytes) => bytes,
        None => super::receive::available_memory_bytes()?,
    };
    let options = Options { lazy: args.lazy, ..Options::new(max_memory_bytes) };
    let allowed =
        Allowed { disk_folders: args.disks.clone(), taps: args.taps.clone(), console: args.console.clone() };
    let container = args.place.place(&runtime, args.name.as_deref())?;
    if let Some(group) = &args.group {
        let group = vault.resolve_group(group)?;
        let open = || {
            let (program, runtime, allowed) = (program.clone(), runtime.clone(), allowed.clone());
            let cpu = "host".into();
            let place =
                Place { program, runtime, name: None, serial: None, allowed, cpu, holder: "migrate restore" };
            let container = container.clone();
            let destination: Box<dyn Destination> =
                Box::new(AnyDestination::new(Places { vm: place, container }));
            let observer: Box<dyn FnMut(&Event)> = Box::new(progress::restoring(common));
            (destination, observer)
        };
        let reports = restore::restore_group(&vault, &group, &open, &options, &cancel)?;
        reports.iter().for_each(|report| show(common, report));
        return Ok(ExitCode::SUCCESS);
    }
    let id = vault.resolve(&args.checkpoint)?;
    let place = Place {
        program,
        runtime: runtime.clone(),
        name: args.name.clone(),
        serial: args.serial.clone(),
        allowed,
        cpu: "host".into(),
        holder: "migrate restore",
    };
    let destination = AnyDestination::new(Places { vm: place, container });
    let mut observer = progress::restoring(common);
    let report = match &args.resume {
        None => restore::restore(&vault, id, Box::new(destination), &options, &cancel, &mut observer)?,
        Some(vm) => {
            let status = Target::find(&runtime, vm)?.status()?;
            let Some(migration) = status.arrived_by.filter(|_| status.awaiting_pages.is_some()) else {
                return Err(Error::Workload(format!(
                    "{} misses no memory: there is nothing to go on with",
                    status.name
                )));
            };
            restore::take_up(&vault, id, &destination, migration, &options, &cancel, &mut observer)?
        }
    };
    show(common, &report);
    Ok(ExitCode::SUCCESS)
}

fn show(common: &Common, report: &Report) {
    if common.json {
        emit(&serde_json::json!({"event": "restored", "name": report.name, "report": report}));
    } else {
        progress::show_restored(report);
    }
}
