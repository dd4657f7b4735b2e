//! `migrate vm run|list|show|stop`.

use super::target::{STATUS_LIMIT, Target, all};
use super::{check_name, emit, say};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::exit;
use crate::paths::RuntimeDir;
use crate::units;
use clap::{Args, Subcommand};
use protocol::monitor::{Phase, Status};
use protocol::page::PAGE_SIZE;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use vmm::cpuid::CpuModel;
use vmm::devices::virtio::{Allowed, ConsoleConfig, DeviceConfig, DiskConfig, NetConfig};
use vmm::{Bytes, ExitReason, KernelSource, Ring, SerialSink};

/// How long a detached VM may take to come up: a large image is read, and memory is mapped, but not touched.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Verbs for VMs of this host.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a VM in this process, until its guest powers off or it moves away.
    Run(RunArgs),
    /// List the VMs of this host.
    #[command(after_help = "Example: migrate vm list --json")]
    List,
    /// Show one VM.
    Show(NameArgs),
    /// Stop a VM: its memory is lost.
    Stop(NameArgs),
    /// Wait for a VM that arrives; `migrate receive` starts this.
    #[command(hide = true)]
    Incoming(IncomingArgs),
}

/// What to run.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: migrate vm run --name web --memory 1GiB --cmdline 'fill=768M ws=256M rate=100' --detach"
)]
pub struct RunArgs {
    /// The VM's name: letters, digits, '.', '_' and '-'.
    #[arg(long)]
    name: String,
    /// Its memory, for instance 512MiB or 4GiB.
    #[arg(long, default_value = "256MiB", value_parser = units::size)]
    memory: u64,
    /// Its number of vCPUs.
    #[arg(long, visible_alias = "cpus", default_value_t = 1)]
    vcpus: u32,
    /// The processor its guest is shown: host, x86-64-v2, x86-64-v3, or the file of a template (see migrate cpu).
    #[arg(long, value_name = "MODEL", default_value = "host")]
    cpu: String,
    /// Let the guest run VMs of its own, where this host can.
    #[arg(long)]
    nested: bool,
    /// A Linux kernel as distributions ship it (bzImage), or an ELF image with a PVH note or a 64-bit entry [default: the
    /// built-in ledger guest].
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's initramfs.
    #[arg(
        long,
        visible_alias = "initramfs",
        value_name = "FILE",
        requires = "kernel",
        conflicts_with = "flat"
    )]
    initrd: Option<PathBuf>,
    /// Load the kernel file as a flat image at this address, in hexadecimal, and enter it there in 64-bit mode.
    #[arg(long, value_name = "ADDRESS", requires = "kernel", value_parser = hexadecimal)]
    flat: Option<u64>,
    /// The guest's command line. For Linux: console=ttyS0 and more. For the ledger: seed= fill= ws= rate= pattern= content= and more.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Where the serial port goes: stdout, stdio (with input), socket:PATH (with input), none, or a file [default: stdout, or a
    /// file when detached].
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// A disk: a raw image or a block device. May be given several times.
    #[arg(long, value_name = "PATH[,readonly]")]
    disk: Vec<DiskConfig>,
    /// A network card on a tap that exists; its address is random if none is given. May be given several times.
    #[arg(long, value_name = "tap=NAME[,mac=ADDRESS]")]
    net: Vec<NetConfig>,
    /// A source of random bytes for the guest.
    #[arg(long)]
    rng: bool,
    /// A channel to a program of the guest (/dev/hvc0); its other end is socket:PATH, or a file.
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleConfig>,
    /// Where its control socket goes [default: NAME.sock in the runtime directory, where migrate vm list looks].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Run it in the background and come back when it runs.
    #[arg(long)]
    detach: bool,
    /// Set by --detach for the process that it starts.
    #[arg(long, hide = true, conflicts_with = "detach")]
    detached: bool,
}

/// Which VM.
#[derive(Debug, Args)]
#[command(after_help = "Example: migrate vm show web")]
pub struct NameArgs {
    /// The VM's name, or the path of its control socket.
    vm: String,
}

/// Where an arriving VM waits.
#[derive(Debug, Args)]
pub struct IncomingArgs {
    /// The name it will have.
    #[arg(long)]
    name: String,
    /// Where its serial port goes.
    #[arg(long, default_value = "none")]
    serial: String,
    /// The most memory it may have, in bytes.
    #[arg(long, default_value_t = u64::MAX)]
    max_memory: u64,
    /// Folders in which its disks may lie.
    #[arg(long)]
    disks: Vec<PathBuf>,
    /// Taps that it may use.
    #[arg(long)]
    taps: Vec<String>,
    /// Where the other end of its console is.
    #[arg(long)]
    console: Option<ConsoleConfig>,
    /// The most that its guest may have been shown of a processor.
    #[arg(long, default_value = "host")]
    cpu: String,
}

impl RunArgs {
    /// Its devices, in the order in which the guest finds them.
    fn devices(&self) -> Vec<DeviceConfig> {
        let disks = self.disk.iter().cloned().map(DeviceConfig::Disk);
        let cards = self.net.iter().cloned().map(DeviceConfig::Net);
        let console = self.console.clone().map(DeviceConfig::Console);
        disks.chain(cards).chain(self.rng.then_some(DeviceConfig::Rng)).chain(console).collect()
    }
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, verb: Verb) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    match verb {
        Verb::Run(args) if args.detach => detach(common, &runtime, &args),
        Verb::Run(args) => run_here(&runtime, args),
        Verb::Incoming(args) => {
            check_name(&args.name)?;
            outlive_the_starter()?;
            let config = vmm::IncomingConfig {
                name: args.name.clone(),
                max_memory_bytes: args.max_memory,
                serial: SerialSink::parse(&args.serial)?,
                allowed: Allowed { disk_folders: args.disks, taps: args.taps, console: args.console },
                cpu: CpuModel::parse(&args.cpu)?,
                socket_path: runtime.socket(&args.name),
            };
            let reason = vmm::run_incoming(config)?;
            Ok(report_exit(&args.name, &reason))
        }
        Verb::List => list(common, &runtime),
        Verb::Show(args) => {
            let target = Target::find(&runtime, &args.vm)?;
            show(common, &target, &target.status()?);
            Ok(ExitCode::SUCCESS)
        }
        Verb::Stop(args) => stop(&Target::find(&runtime, &args.vm)?),
    }
}

/// A VM must not end because the program or the terminal that it was started from does: the kernel sends SIGHUP when
/// a terminal hangs up, and also to a process group with a stopped process in it when the last parent outside it ends
/// (POSIX, exit(): orphaned process groups). So a VM that somebody stops for a moment while `receive` ends would die.
fn outlive_the_starter() -> Result<()> {
    // A flag that nobody reads: what counts is that the signal is caught.
    signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::new(AtomicBool::new(false)))
        .map(drop)
        .map_err(|error| Error::Host(format!("signals cannot be caught: {error}")))
}

fn run_here(runtime: &RuntimeDir, args: RunArgs) -> Result<ExitCode> {
    if args.detached {
        outlive_the_starter()?;
    }
    let target = check_free(runtime, &args)?;
    let devices = args.devices();
    let image = args.kernel.map_or_else(|| Bytes::Inline(ledger::IMAGE.into()), Bytes::File);
    let kernel = match args.flat {
        None => KernelSource::Kernel(image),
        Some(address) => {
            KernelSource::Flat { image, load_address: address, entry: address, ring: Ring::User }
        }
    };
    let config = vmm::VmConfig {
        name: args.name.clone(),
        memory_bytes: args.memory,
        vcpus: args.vcpus,
        cpu: CpuModel::parse(&args.cpu)?,
        nested: args.nested,
        kernel,
        initramfs: args.initrd.map(Bytes::File),
        cmdline: args.cmdline,
        serial: SerialSink::parse(args.serial.as_deref().unwrap_or("stdout"))?,
        devices,
        socket_path: Some(target.socket().to_owned()),
    };
    let reason = vmm::run(config)?;
    Ok(report_exit(&args.name, &reason))
}

/// Says on stderr how a VM ended, and gives the exit code for it.
fn report_exit(name: &str, reason: &ExitReason) -> ExitCode {
    eprintln!("migrate: {name}: {reason}");
    match reason {
        ExitReason::PoweredOff { code: 0 }
        | ExitReason::HandedOver
        | ExitReason::Terminated
        | ExitReason::Discarded => ExitCode::SUCCESS,
        ExitReason::PoweredOff { .. } | ExitReason::Reset | ExitReason::Crashed { .. } => {
            ExitCode::from(exit::GUEST)
        }
    }
}

/// Where the VM will be, unless one is there. Two that come at the same moment are told apart by the socket.
fn check_free(runtime: &RuntimeDir, args: &RunArgs) -> Result<Target> {
    check_name(&args.name)?;
    let target = match &args.socket {
        // As a path, also if it is a plain file name.
        Some(path) => Target::find(runtime, &Path::new(".").join(path).to_string_lossy())?,
        None => Target::find(runtime, &args.name)?,
    };
    match target.status() {
        Ok(vm) => Err(Error::Workload(format!("a VM named {} runs there already (pid {})", vm.name, vm.pid))),
        Err(_) => Ok(target),
    }
}

fn detach(common: &Common, runtime: &RuntimeDir, args: &RunArgs) -> Result<ExitCode> {
    let target = check_free(runtime, args)?;
    let cannot = |what: &str, error: std::io::Error| Error::Host(format!("{what}: {error}"));
    let log_path = runtime.log(&args.name);
    let log = File::create(&log_path).map_err(|error| cannot("the VM's log cannot be written", error))?;
    let program =
        std::env::current_exe().map_err(|error| cannot("this program's own path is not known", error))?;
    let default_serial = runtime.serial(&args.name).to_string_lossy().into_owned();
    let mut command = Command::new(program);
    command.args(["vm", "run", "--detached", "--name", &args.name, "--cmdline", &args.cmdline]);
    command.args(["--memory", &args.memory.to_string(), "--vcpus", &args.vcpus.to_string()]);
    command.args(["--cpu", &args.cpu]).args(args.nested.then_some("--nested"));
    command.args(["--serial", args.serial.as_deref().unwrap_or(&default_serial)]);
    command.arg("--runtime-dir").arg(runtime.path());
    if args.socket.is_some() {
        command.arg("--socket").arg(target.socket());
    }
    for disk in &args.disk {
        command.arg("--disk").arg(disk.to_string());
    }
    for card in &args.net {
        command.arg("--net").arg(card.to_string());
    }
    command.args(args.rng.then_some("--rng"));
    if let Some(console) = &args.console {
        command.arg("--console").arg(console.to_string());
    }
    if let Some(kernel) = &args.kernel {
        command.arg("--kernel").arg(kernel);
    }
    if let Some(initrd) = &args.initrd {
        command.arg("--initrd").arg(initrd);
    }
    if let Some(address) = args.flat {
        command.args(["--flat", &format!("{address:x}")]);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(|error| cannot("the VM's process cannot be started", error))?;
    let until = Instant::now() + START_LIMIT;
    loop {
        if let Ok(status) = target.status() {
            show(common, &target, &status);
            return Ok(ExitCode::SUCCESS);
        }
        let said = || {
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            log.lines().last().unwrap_or("it said nothing").trim_start_matches("migrate: ").to_owned()
        };
        match child.try_wait() {
            Ok(Some(ended)) if ended.success() => return Ok(ExitCode::SUCCESS),
            Ok(Some(ended)) if ended.code() == Some(exit::GUEST.into()) => {
                return Ok(ExitCode::from(exit::GUEST));
            }
            Ok(Some(ended)) if ended.code() == Some(4) => return Err(Error::Workload(said())),
            Ok(Some(ended)) if ended.code() == Some(2) => return Err(Error::Usage(said())),
            Ok(Some(_)) => return Err(Error::Host(said())),
            _ if Instant::now() > until => {
                child.kill().ok();
                return Err(Error::TimedOut {
                    what: "the VM to answer on its control socket",
                    after: START_LIMIT,
                });
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn list(common: &Common, runtime: &RuntimeDir) -> Result<ExitCode> {
    let vms = all(runtime)?;
    if !common.json {
        if vms.is_empty() {
            say("no VMs run here");
            return Ok(ExitCode::SUCCESS);
        }
        say(&format!("{:<20} {:<10} {:>8} {:>10} {:>6}  HELD BY", "NAME", "PHASE", "PID", "MEMORY", "VCPUS"));
    }
    for (target, vm) in &vms {
        if common.json {
            emit(&with_socket(target, vm));
        } else {
            let held =
                vm.holder_pid.map(|pid| format!("{} (pid {pid})", vm.holder.clone().unwrap_or_default()));
            say(&format!(
                "{:<20} {:<10} {:>8} {:>10} {:>6}  {}",
                vm.name,
                if vm.awaiting_pages.is_some() { "incomplete".into() } else { phase(vm.phase) },
                vm.pid,
                units::show_bytes(vm.memory_bytes),
                vm.vcpus,
                held.unwrap_or_else(|| "-".into())
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn with_socket(target: &Target, status: &Status) -> serde_json::Value {
    let mut value = serde_json::to_value(status).unwrap_or_default();
    value["socket"] = target.socket().to_string_lossy().into();
    value
}

fn show(common: &Common, target: &Target, vm: &Status) {
    if common.json {
        emit(&with_socket(target, vm));
        return;
    }
    say(&format!("{} is {} (pid {})", vm.name, phase(vm.phase), vm.pid));
    say(&format!("  memory   {}, {} vCPUs", units::show_bytes(vm.memory_bytes), vm.vcpus));
    say(&format!("  up       {:.1} s", vm.uptime_ms as f64 / 1e3));
    say(&format!("  serial   {}", vm.serial));
    say(&format!("  socket   {}", target.socket().display()));
    if let Some(pid) = vm.holder_pid {
        say(&format!("  held by  {} (pid {pid})", vm.holder.clone().unwrap_or_default()));
    }
    if let Some(percent @ 1..) = vm.throttle_percent {
        say(&format!("  slowed   stands still {percent} % of its time, so that it can be moved"));
    }
    if let Some(checkpoint) = vm.baseline {
        say(&format!(
            "  tracked  since checkpoint {checkpoint}: the next one has only what was written since"
        ));
    }
    if let Some(migration) = vm.arrived_by {
        say(&format!("  arrived  by migration {migration}"));
    }
    if let Some(pages) = vm.awaiting_pages {
        let left = units::show_bytes(pages.saturating_mul(PAGE_SIZE as u64));
        let who = if vm.holder_pid.is_some() { "they follow" } else { "start migrate receive here to go on" };
        say(&format!("  awaits   {left} of its memory from the host it came from: {who}"));
    }
    if let Some(pledge) = &vm.pledged_to {
        say(&format!("  pledged  to migration {} at {}: see migrate recover", pledge.migration, pledge.peer));
    }
}

/// A phase as people and JSON read it.
pub(super) fn phase(phase: Phase) -> String {
    serde_json::to_value(phase).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn stop(target: &Target) -> Result<ExitCode> {
    target.hold("migrate vm stop", STATUS_LIMIT)?.terminate()?;
    let until = Instant::now() + STATUS_LIMIT;
    while target.status().is_ok() {
        if Instant::now() > until {
            return Err(Error::TimedOut { what: "the VM's process to end", after: STATUS_LIMIT });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(ExitCode::SUCCESS)
}

fn hexadecimal(text: &str) -> std::result::Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
        .map_err(|error| format!("{text:?} is not an address: {error}"))
}
