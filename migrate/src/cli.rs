//! The command line: one verb a file under `commands/`.

use crate::commands;
use crate::error::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Moves running virtual machines between Linux hosts.
#[derive(Debug, Parser)]
#[command(name = "migrate", version, arg_required_else_help = true, after_help = EXAMPLE)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLE: &str = "\
Example, on two hosts that trust each other's keys (migrate keys --help):
  b$ migrate receive --listen 0.0.0.0:7700
  a$ migrate vm run --name web --memory 1GiB --detach
  a$ migrate send web b.example:7700

Exit codes: 0 done, 2 usage, 3 this host, 4 the VM, 5 keys, 6 refused by the destination, 7 link lost,
8 protocol broken, 9 not converged, 10 in doubt (see migrate recover), 11 guest broken, 130 interrupted.";

/// What every verb understands.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Print one JSON object a line on stdout instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more to stderr; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Directory of VM sockets and logs [default: $XDG_RUNTIME_DIR/migrate, or /run/migrate for root].
    #[arg(long, global = true, value_name = "DIR", env = "MIGRATE_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Directory of this host's key and of the keys it trusts [default: $XDG_CONFIG_HOME/migrate].
    #[arg(long, global = true, value_name = "DIR", env = "MIGRATE_KEYS")]
    pub keys: Option<PathBuf>,
    /// Directory of what earlier moves taught [default: $XDG_STATE_HOME/migrate, or /var/lib/migrate for root].
    #[arg(long, global = true, value_name = "DIR", env = "MIGRATE_STATE")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run, list, show and stop VMs on this host.
    #[command(subcommand)]
    Vm(commands::vm::Verb),
    /// Move a running VM to another host.
    Send(commands::send::Args),
    /// Take a VM that another host sends.
    Receive(commands::receive::Args),
    /// Show the migrations that are under way on this host.
    Status(commands::status::Args),
    /// Stop a running migration; the VM goes on where it is.
    Cancel(commands::cancel::Args),
    /// Change the limits of a running migration.
    Set(commands::set::Args),
    /// Draw a report as a page.
    Report(commands::report::Args),
    /// Decide a recorded migration again, by our rules or by others'.
    Replay(commands::replay::Args),
    /// This host's identity, and the hosts it trusts.
    Keys(commands::keys::Args),
    /// Show and settle VMs that a lost connection left frozen between two hosts.
    Recover(commands::recover::Args),
    /// Ask a ledger guest for its account of itself, and check its memory from outside.
    Ledger(commands::ledger::Args),
    /// Measure the QUIC pipe with no guest behind it.
    #[command(hide = true)]
    BenchPipe(commands::bench_pipe::Args),
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    commands::init_logging(&cli.common);
    let result: Result<ExitCode> = match cli.verb {
        Verb::Vm(verb) => commands::vm::run(&cli.common, verb),
        Verb::Send(args) => commands::send::run(&cli.common, &args),
        Verb::Receive(args) => commands::receive::run(&cli.common, &args),
        Verb::Status(args) => commands::status::run(&cli.common, &args),
        Verb::Cancel(args) => commands::cancel::run(&cli.common, &args),
        Verb::Set(args) => commands::set::run(&cli.common, &args),
        Verb::Report(args) => commands::report::run(&cli.common, &args),
        Verb::Replay(args) => commands::replay::run(&cli.common, &args),
        Verb::Keys(args) => commands::keys::run(&cli.common, &args),
        Verb::Recover(args) => commands::recover::run(&cli.common, &args),
        Verb::Ledger(args) => commands::ledger::run(&cli.common, &args),
        Verb::BenchPipe(args) => commands::bench_pipe::run(&cli.common, &args),
    };
    result.unwrap_or_else(|error| commands::fail(&cli.common, &error))
}
