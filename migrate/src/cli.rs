//! The command line: one verb a file under `commands/`.

use crate::commands;
use crate::error::Result;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Moves running virtual machines and containers between Linux hosts.
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
8 protocol broken, 9 not converged, 10 in doubt (see migrate recover), 11 guest broken, 12 store, 130 interrupted.";

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
    /// Show what guests see of this host's processor, and find what several hosts have in common.
    #[command(subcommand)]
    Cpu(commands::cpu::Verb),
    /// Say what works on this host, and what to do about what does not.
    Doctor(commands::doctor::Args),
    /// Move a running VM or container to another host.
    Send(commands::send::Args),
    /// Take a VM or container that another host sends.
    Receive(commands::receive::Args),
    /// Start a VM from a checkpoint.
    Restore(commands::restore::Args),
    /// Write a running VM down into a store, whole or what is new, once or again and again.
    Checkpoint(commands::checkpoint::Args),
    /// Forecast what moving a VM would take, without moving it.
    Estimate(commands::estimate::Args),
    /// Show the migrations and the series of checkpoints that are under way on this host.
    Status(commands::status::Args),
    /// Stop a running migration, or a series of checkpoints; the VM goes on where it is.
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
    /// List, show and give up the checkpoints of a store.
    #[command(subcommand)]
    Store(commands::store::Verb),
    /// Ask a ledger guest for its account of itself, and check its memory from outside.
    Ledger(commands::ledger::Args),
    /// Print what a shell needs to complete the words of this program.
    Completions(commands::completions::Args),
    /// Print the manual, or write a page for each verb.
    Man(commands::man::Args),
    /// Measure the QUIC pipe with no guest behind it.
    #[command(hide = true)]
    BenchPipe(commands::bench_pipe::Args),
    /// Let a container go on when the program that moves it ends.
    #[command(hide = true)]
    ContainerKeeper(commands::container_keeper::Args),
}

/// The command line as a tree, for completions and manual pages.
pub(crate) fn command() -> clap::Command {
    let mut command = Cli::command();
    // So that options that hold for every verb stand with each.
    command.build();
    command
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    if let Some(code) = crate::container::gate::stand_in() {
        return code;
    }
    let cli = Cli::parse();
    let daemon = matches!(&cli.verb, Verb::Receive(args) if args.is_daemon());
    commands::init_logging(&cli.common, daemon);
    allow_open_files();
    let result: Result<ExitCode> = match cli.verb {
        Verb::Vm(verb) => commands::vm::run(&cli.common, verb),
        Verb::Cpu(verb) => commands::cpu::run(&cli.common, &verb),
        Verb::Doctor(args) => commands::doctor::run(&cli.common, &args),
        Verb::Send(args) => commands::send::run(&cli.common, &args),
        Verb::Receive(args) => commands::receive::run(&cli.common, &args),
        Verb::Restore(args) => commands::restore::run(&cli.common, &args),
        Verb::Checkpoint(args) => commands::checkpoint::run(&cli.common, &args),
        Verb::Estimate(args) => commands::estimate::run(&cli.common, &args),
        Verb::Status(args) => commands::status::run(&cli.common, &args),
        Verb::Cancel(args) => commands::cancel::run(&cli.common, &args),
        Verb::Set(args) => commands::set::run(&cli.common, &args),
        Verb::Report(args) => commands::report::run(&cli.common, &args),
        Verb::Replay(args) => commands::replay::run(&cli.common, &args),
        Verb::Keys(args) => commands::keys::run(&cli.common, &args),
        Verb::Recover(args) => commands::recover::run(&cli.common, &args),
        Verb::Store(verb) => commands::store::run(&cli.common, &verb),
        Verb::Ledger(args) => commands::ledger::run(&cli.common, &args),
        Verb::Completions(args) => commands::completions::run(&cli.common, &args),
        Verb::Man(args) => commands::man::run(&cli.common, &args),
        Verb::BenchPipe(args) => commands::bench_pipe::run(&cli.common, &args),
        Verb::ContainerKeeper(args) => commands::container_keeper::run(&cli.common, &args),
    };
    result.unwrap_or_else(|error| commands::fail(&cli.common, &error))
}

/// Files that a process of ours may have open if its user may: a chain has a thousand links and more, each with a segment that stays open while it is
/// restored, and the soft limit is mostly 1024.
const OPEN_FILES: u64 = 1 << 16;

/// Raises the soft limit on open files as far as the hard one allows.
fn allow_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if limit.current.is_some_and(|current| current < most)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit })
    {
        tracing::debug!(%error, "the limit on open files stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every verb that does something, with the words that lead to it.
    fn verbs(command: &clap::Command, above: &str) -> Vec<(String, clap::Command)> {
        let below: Vec<_> =
            command.get_subcommands().filter(|one| !one.is_hide_set() && one.get_name() != "help").collect();
        let words = |name: &str| format!("{above} {name}").trim().to_owned();
        let leaf = |one: &clap::Command| one.get_subcommands().all(|one| one.get_name() == "help");
        let mut found = Vec::new();
        for one in below {
            if leaf(one) {
                found.push((words(one.get_name()), one.clone()));
            } else {
                found.extend(verbs(one, &words(one.get_name())));
            }
        }
        found
    }

    fn scripting() -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/scripting.md");
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn every_verb_has_an_example_and_json_and_every_option_a_word_about_it() {
        let all = verbs(&command(), "");
        assert!(all.len() >= 18, "{}", all.len());
        for (words, mut verb) in all {
            let help = verb.render_long_help().to_string();
            assert!(
                help.contains("Example") && help.contains(&format!("migrate {words}")),
                "migrate {words} shows no example:\n{help}"
            );
            assert!(help.contains("--json"), "migrate {words} does not offer --json");
            for option in verb.get_arguments() {
                assert!(
                    option.get_help().is_some(),
                    "migrate {words}: nothing is said of {}",
                    option.get_id()
                );
            }
        }
    }

    #[test]
    fn the_document_for_scripts_names_every_verb_and_every_exit_code() {
        let text = scripting();
        for (words, _) in verbs(&command(), "") {
            assert!(text.contains(&format!("\n| `{words}` |")), "docs/scripting.md has no row for `{words}`");
        }
        // The list at the end of the help is the document's.
        let listed = EXAMPLE.split("Exit codes:").nth(1).unwrap();
        let codes: Vec<u8> = listed.split([',', ' ', '\n']).filter_map(|word| word.parse().ok()).collect();
        assert!(codes.len() >= 11, "{codes:?}");
        for code in &codes {
            assert!(
                text.contains(&format!("\n| {code} |")),
                "docs/scripting.md does not explain exit code {code}"
            );
        }
        for number in 1..=u8::MAX {
            if text.contains(&format!("\n| {number} | ")) {
                assert!(codes.contains(&number), "the help does not name exit code {number}");
            }
        }
    }
}
