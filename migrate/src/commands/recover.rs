//! `migrate recover`: VMs that stand still between two hosts. It asks, and never guesses.

use super::target::{Target, all};
use super::{cancel_on_signals, emit, say};
use crate::cli::Common;
use crate::container::keeper::{self, Note};
use crate::error::{Error, Result};
use crate::identity::{self, Identity, TrustStore};
use crate::link::Link;
use crate::link::quic;
use crate::outbound::{self, Word};
use crate::paths::RuntimeDir;
use crate::progress;
use crate::source::Donor as _;
use crate::source::vm::VmDonor;
use crate::units;
use protocol::control::Outcome;
use protocol::monitor::{Phase, Pledge};
use std::process::ExitCode;
use std::time::Duration;
use vmm::Client;

/// How long the VMM may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Which VM to settle, and how.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate recover web

Without a name it lists the VMs whose migration was cut off behind its commit. With one it asks the destination,
where migrate receive must listen, and does what follows from the answer. If the VM runs there and misses memory, that is
sent now. A VM whose migration ended before its commit is running already: there is nothing to recover. One that misses memory
because its migrate restore --lazy ended is helped by migrate restore --resume VM.")]
pub struct Args {
    /// The VM's name, or the path of its control socket.
    #[arg(id = "name", value_name = "VM")]
    vm: Option<String>,
    /// Where to ask, if not where the VM was sent to: HOST:PORT.
    #[arg(long, value_name = "ADDR", requires = "name")]
    at: Option<String>,
    /// Do not ask: you know that the destination does not have the VM and never will; it goes on here.
    #[arg(long, requires = "name", conflicts_with_all = ["discard", "at"])]
    resume: bool,
    /// Do not ask: you know that the VM runs at the destination and misses no memory there; the one here ends.
    #[arg(long, requires = "name", conflicts_with = "at")]
    discard: bool,
    /// How long to wait for an answer.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = units::duration)]
    ask_timeout: Duration,
}

/// Runs the verb.
///
/// # Errors
/// `InDoubt` when the destination does not know or does not answer.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let Some(vm) = &args.vm else { return list(common, &runtime) };
    if let Some(note) = keeper::notes(&runtime)?.into_iter().find(|note| note.id == *vm) {
        return container(common, args, &runtime, &note);
    }
    let target = Target::find(&runtime, vm)?;
    let status = target.status()?;
    let name = &status.name;
    let Some(pledge) = status.pledged_to.filter(|_| status.phase == Phase::Pledged) else {
        if let Some(pages) = status.awaiting_pages {
            return Err(Error::Workload(format!(
                "{name} misses {pages} pages. {}",
                super::how_they_come(name)
            )));
        }
        return Err(Error::Workload(format!("{name} is not in doubt: there is nothing to recover")));
    };
    // Taken before the question is asked: nobody else may settle it meanwhile.
    let wrong = |error: vmm::Error| Error::Workload(format!("{name} cannot be settled: {error}"));
    let mut client = target.hold("migrate recover", ANSWER_LIMIT)?;
    let outcome = match (args.resume, args.discard) {
        (true, _) => Outcome::Discarded,
        (_, true) => Outcome::Started,
        _ => match ask(common, args, name, &pledge)? {
            Word::Outcome(outcome) => outcome,
            Word::Incomplete => return donate(common, args, client, &pledge),
        },
    };
    let settled = match outcome {
        Outcome::Started => {
            client.hand_over(pledge.migration).map_err(wrong)?;
            "it runs at the destination; the one here has ended"
        }
        Outcome::Discarded => {
            client.resume(Some(pledge.migration)).map_err(wrong)?;
            "the destination will never start it; it goes on here"
        }
        Outcome::Unknown => return Err(proves_nothing(name, &pledge)),
    };
    show_settled(common, name, outcome, Some(&pledge), settled);
    Ok(ExitCode::SUCCESS)
}

fn proves_nothing(name: &str, pledge: &Pledge) -> Error {
    Error::InDoubt(format!(
        "the host at {} does not know migration {}, which proves nothing: look whether {name} runs there, then \
         say which it is with migrate recover {name} --resume or --discard",
        pledge.peer, pledge.migration
    ))
}

fn show_settled(common: &Common, name: &str, outcome: Outcome, pledge: Option<&Pledge>, settled: &str) {
    if common.json {
        let migration = pledge.map(|pledge| pledge.migration);
        emit(
            &serde_json::json!({"event": "settled", "name": name, "outcome": outcome, "migration": migration}),
        );
    } else {
        say(&format!("{name}: {settled}"));
    }
}

/// A container that stands still, with its keeper or without one.
fn container(common: &Common, args: &Args, runtime_dir: &RuntimeDir, note: &Note) -> Result<ExitCode> {
    let name = &note.id;
    let outcome = match &note.pledge {
        // Nobody was promised anything.
        None if note.is_kept(runtime_dir) => {
            return Err(Error::Workload(format!("{name} is being moved: there is nothing to recover")));
        }
        None => Outcome::Discarded,
        Some(_) if args.resume => Outcome::Discarded,
        Some(_) if args.discard => Outcome::Started,
        Some(pledge) => match ask(common, args, name, pledge)? {
            Word::Outcome(outcome) => outcome,
            Word::Incomplete => Outcome::Unknown,
        },
    };
    let settled = match (outcome, &note.pledge) {
        (Outcome::Started, _) => "it runs at the destination; the one here has ended",
        (Outcome::Discarded, None) => "its move was cut off before anything was promised; it goes on here",
        (Outcome::Discarded, Some(_)) => "the destination will never start it; it goes on here",
        (Outcome::Unknown, Some(pledge)) => return Err(proves_nothing(name, pledge)),
        (Outcome::Unknown, None) => return Err(Error::InDoubt(format!("nothing is known of {name}"))),
    };
    note.settle(runtime_dir, outcome == Outcome::Discarded)?;
    show_settled(common, name, outcome, note.pledge.as_ref(), settled);
    Ok(ExitCode::SUCCESS)
}

/// It runs at the destination and misses pages: sends them, as the engine would have that is gone.
fn donate(common: &Common, args: &Args, client: Client, pledge: &Pledge) -> Result<ExitCode> {
    let donor = Box::new(VmDonor::of(client, pledge.migration)?);
    let cancel = cancel_on_signals()?;
    let name = donor.name().to_owned();
    let address = args.at.as_deref().unwrap_or(&pledge.peer);
    let mut observer = progress::observer(common);
    let options = outbound::Options { ask: args.ask_timeout, ..outbound::Options::new(pledge.migration) };
    let mut dial = || dial(common, args, pledge);
    let report = outbound::donate(donor, address, &mut dial, &options, &cancel, observer.as_mut())?;
    if common.json {
        emit(
            &serde_json::json!({"event": "donated", "name": name, "migration": pledge.migration, "post_copy": report}),
        );
    } else {
        say(&format!("{name}: it runs at the destination and has all of its memory; the one here has ended"));
    }
    Ok(ExitCode::SUCCESS)
}

fn dial(common: &Common, args: &Args, pledge: &Pledge) -> Result<Box<dyn Link>> {
    let keys = identity::directory(common.keys.as_deref())?;
    let identity = Identity::load(&keys)?;
    let trust = TrustStore::load(&keys)?;
    let settings = super::send::settings(args.ask_timeout);
    let address = args.at.as_deref().unwrap_or(&pledge.peer);
    Ok(Box::new(quic::dial(address, &identity, &trust, &settings, args.ask_timeout)?))
}

fn ask(common: &Common, args: &Args, name: &str, pledge: &Pledge) -> Result<Word> {
    dial(common, args, pledge)
        .and_then(|link| outbound::ask(link, pledge.migration, args.ask_timeout))
        .map_err(|error| match error {
            Error::Identity(_) => error,
            other => Error::InDoubt(format!(
                "{other}; {name} stays as it is. Let migrate receive listen at the destination and say where with --at, or \
                 look there yourself and say which it is with --resume or --discard"
            )),
        })
}

fn list(common: &Common, runtime: &RuntimeDir) -> Result<ExitCode> {
    let mut found = false;
    for (_, vm) in all(runtime)? {
        if let Some(pages) = vm.awaiting_pages.filter(|_| !common.json) {
            found = true;
            say(&format!("{}: runs, and misses {pages} pages. {}", vm.name, super::how_they_come(&vm.name)));
        }
        let Some(pledge) = &vm.pledged_to else { continue };
        found = true;
        if common.json {
            emit(&serde_json::json!({
                "name": vm.name,
                "phase": vm.phase,
                "migration": pledge.migration,
                "peer": pledge.peer,
                "holder_pid": vm.holder_pid,
            }));
        } else {
            let held = vm.holder_pid.map_or_else(String::new, |pid| format!(", held by process {pid}"));
            say(&format!(
                "{}: stands still, offered to {} by migration {}{held}",
                vm.name, pledge.peer, pledge.migration
            ));
        }
    }
    for note in keeper::notes(runtime)?.iter().filter(|note| note.pledge.is_some() || !note.is_kept(runtime))
    {
        found = true;
        let (name, pledge) = (&note.id, note.pledge.as_ref());
        if common.json {
            emit(&serde_json::json!({
                "name": name,
                "phase": if pledge.is_some() { "pledged" } else { "frozen" },
                "migration": pledge.map(|pledge| pledge.migration),
                "peer": pledge.map(|pledge| &pledge.peer),
                "holder_pid": null,
            }));
        } else if let Some(Pledge { migration, peer }) = pledge {
            say(&format!("{name}: stands still, offered to {peer} by migration {migration}"));
        } else {
            say(&format!(
                "{name}: stands still since its move was cut off; let it go on with migrate recover {name}"
            ));
        }
    }
    if !found && !common.json {
        say("no VM and no container is in doubt");
    }
    Ok(ExitCode::SUCCESS)
}
