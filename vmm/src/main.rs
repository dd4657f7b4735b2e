//! The VMM as a program of its own: `vmm run` boots a VM, `vmm receive` waits for one.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use vmm::{
    Bytes, ExitReason, IncomingConfig, KernelSource, Result, Ring, SerialSink, VmConfig, cpuid::CpuModel,
    devices::virtio::Allowed,
};

/// Runs one virtual machine that other processes can move away while it runs.
///
/// Exit status: 0 to 99 the guest's own power-off code (0 also when it was moved away or terminated), 120
/// the guest asked for a reset, 121 it crashed, 122 it did not arrive, 123 it could not be run, 2 usage.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boot a VM and run it to its end.
    Run(Run),
    /// Wait for a VM from elsewhere and run it to its end.
    Receive(Receive),
}

#[derive(Args)]
struct Common {
    /// Where to serve the control protocol.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What to call the VM.
    #[arg(long, default_value = "vm")]
    name: String,
    /// Where the serial port goes: `stdout`, `stdio`, `none`, `socket:PATH`, or a file to append to.
    #[arg(long, default_value = "stdout", value_name = "WHERE")]
    serial: String,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    common: Common,
    /// The kernel: a bzImage, or an ELF file with a PVH note or a 64-bit entry.
    #[arg(long, value_name = "FILE", required_unless_present = "flat")]
    kernel: Option<PathBuf>,
    /// A flat image instead, loaded at 1 MiB and started there in 64-bit mode.
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    flat: Option<PathBuf>,
    /// Start the flat image at CPL 3.
    #[arg(long, requires = "flat")]
    user: bool,
    /// The kernel's initramfs.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "", value_name = "TEXT")]
    cmdline: String,
    /// Memory in MiB.
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    memory_mib: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// The processor its guest is shown: `host`, `x86-64-v2`, `x86-64-v3`, or a template's file.
    #[arg(long, default_value = "host", value_name = "MODEL")]
    cpu: String,
    /// The guest may run guests of its own.
    #[arg(long)]
    nested: bool,
}

#[derive(Args)]
struct Receive {
    #[command(flatten)]
    common: Common,
    /// The most memory the VM may have, in MiB.
    #[arg(long, default_value_t = 16 << 10, value_name = "MIB")]
    max_memory_mib: u64,
    /// The most that its guest may have been shown of a processor.
    #[arg(long, default_value = "host", value_name = "MODEL")]
    cpu: String,
}

/// Where a flat image is loaded and started: the first byte behind a PC's legacy area.
const FLAT_ADDRESS: u64 = 0x10_0000;

const MIB: u64 = 1 << 20;

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")))
        .init();
    let outcome = match cli.verb {
        Verb::Run(args) => run(args),
        Verb::Receive(args) => receive(args),
    };
    match outcome {
        Ok(reason) => {
            if matches!(reason, ExitReason::Crashed { .. } | ExitReason::Reset) {
                eprintln!("vmm: {reason}");
            }
            ExitCode::from(reason.exit_code())
        }
        Err(error) => {
            eprintln!("vmm: {error}");
            ExitCode::from(ExitReason::FAILED)
        }
    }
}

fn run(args: Run) -> Result<ExitReason> {
    let kernel = match (args.kernel, args.flat) {
        (_, Some(flat)) => KernelSource::Flat {
            image: Bytes::File(flat),
            load_address: FLAT_ADDRESS,
            entry: FLAT_ADDRESS,
            ring: if args.user { Ring::User } else { Ring::Kernel },
        },
        (kernel, None) => KernelSource::Kernel(Bytes::File(kernel.unwrap_or_default())),
    };
    vmm::run(VmConfig {
        name: args.common.name,
        memory_bytes: args.memory_mib.saturating_mul(MIB),
        vcpus: args.vcpus,
        cpu: CpuModel::parse(&args.cpu)?,
        nested: args.nested,
        kernel,
        initramfs: args.initrd.map(Bytes::File),
        cmdline: args.cmdline,
        serial: SerialSink::parse(&args.common.serial)?,
        devices: Vec::new(),
        socket_path: Some(args.common.socket),
    })
}

fn receive(args: Receive) -> Result<ExitReason> {
    vmm::run_incoming(IncomingConfig {
        name: args.common.name,
        max_memory_bytes: args.max_memory_mib.saturating_mul(MIB),
        serial: SerialSink::parse(&args.common.serial)?,
        allowed: Allowed::default(),
        cpu: CpuModel::parse(&args.cpu)?,
        socket_path: args.common.socket,
    })
}
