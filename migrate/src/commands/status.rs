//! `migrate status`: how the migrations of this host are, and its series of checkpoints.

use super::{emit, say};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::steer::{Client, Place};
use crate::units::{self, show_bytes, show_rate, show_us};
use crate::vault::now_unix_ms;
use protocol::page::PAGE_SIZE;
use protocol::steer::{End, Limits, Outcome, Series, Status};
use std::process::ExitCode;
use std::time::Duration;

/// Which migrations.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate status web --watch

Without a name it shows all migrations that are under way on this host, those that leave and those that arrive, and all series of
checkpoints (migrate checkpoint --every).")]
pub struct Args {
    /// The VM that moves, or is written down.
    #[arg(id = "name", value_name = "VM")]
    vm: Option<String>,
    /// Show it again and again until it has ended.
    #[arg(short, long, requires = "name")]
    watch: bool,
    /// How often to show it.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::duration, requires = "watch")]
    interval: Duration,
}

/// Runs the verb.
///
/// # Errors
/// `Workload` when the VM that was named neither moves nor is written down.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let (moves, series) = (Place::open(&runtime)?, Place::of_series(&runtime)?);
    let Some(name) = &args.vm else { return all(common, &moves, &series) };
    match connect_either(&moves, &series, name)? {
        Either::Migration(mut client) => {
            if let (false, Some(mut series)) = (args.watch, Client::connect(&series, name)?) {
                show_series(common, &series.series()?);
            }
            let ask = |client: &mut Client, limit| client.status_at_end(limit);
            follow(args, &mut client, ask, |status| status.outcome.is_some(), |status| show(common, status))?;
        }
        Either::Series(mut client) => {
            let ask = |client: &mut Client, limit| client.series_at_end(limit);
            follow(args, &mut client, ask, |series| series.ended, |series| show_series(common, series))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows how something is, and with `--watch` again and again until it is over.
fn follow<T>(
    args: &Args,
    client: &mut Client,
    ask: impl Fn(&mut Client, Duration) -> Result<T>,
    is_over: impl Fn(&T) -> bool,
    show: impl Fn(&T),
) -> Result<()> {
    let mut found = ask(client, Duration::ZERO)?;
    show(&found);
    while args.watch && !is_over(&found) {
        found = ask(client, args.interval.max(Duration::from_millis(20)))?;
        show(&found);
    }
    Ok(())
}

fn all(common: &Common, moves: &Place, series: &Place) -> Result<ExitCode> {
    let migrations = each(moves, Client::status, |status| show(common, status))?;
    let series = each(series, Client::series, |series| show_series(common, series))?;
    if migrations + series == 0 && !common.json {
        say("no migration is under way here, and no series of checkpoints");
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks everything at a place, and answers how many there are.
fn each<T>(place: &Place, ask: fn(&mut Client) -> Result<T>, show: impl Fn(&T)) -> Result<usize> {
    let mut found = 0;
    for name in place.names()? {
        // One that ends meanwhile, or does not answer, is no reason not to show the others.
        let status = match Client::connect(place, &name) {
            Ok(Some(mut client)) => ask(&mut client),
            Ok(None) => continue,
            Err(error) => Err(error),
        };
        match status {
            Ok(status) => {
                found += 1;
                show(&status);
            }
            Err(error) => tracing::warn!(%error, "one is not shown"),
        }
    }
    Ok(found)
}

/// What is under way with a VM.
pub(super) enum Either {
    Migration(Client),
    Series(Client),
}

/// The running migration of a VM, or else the series of checkpoints that is taken of it.
///
/// # Errors
/// `Workload` when there is neither.
pub(super) fn connect_either(moves: &Place, series: &Place, name: &str) -> Result<Either> {
    super::check_name(name)?;
    if let Some(client) = Client::connect(moves, name)? {
        return Ok(Either::Migration(client));
    }
    let client = Client::connect(series, name)?;
    client.map(Either::Series).ok_or_else(|| {
        Error::Workload(format!(
            "no migration of {name} is under way here, and no series of checkpoints; migrate status shows what is"
        ))
    })
}

/// The running migration of a VM.
///
/// # Errors
/// `Workload` when there is none.
pub(super) fn connect(place: &Place, name: &str) -> Result<Client> {
    super::check_name(name)?;
    Client::connect(place, name)?.ok_or_else(|| {
        Error::Workload(format!(
            "no migration of {name} is under way here; migrate status shows those that are"
        ))
    })
}

/// Prints a status.
pub(super) fn show(common: &Common, status: &Status) {
    if common.json {
        let mut line = serde_json::to_value(status).unwrap_or_default();
        line["event"] = "status".into();
        emit(&line);
        return;
    }
    for line in lines(status) {
        say(&line);
    }
}

/// Prints how a series is.
fn show_series(common: &Common, series: &Series) {
    if common.json {
        let mut line = serde_json::to_value(series).unwrap_or_default();
        line["event"] = "series-status".into();
        emit(&line);
        return;
    }
    for line in series_lines(series) {
        say(&line);
    }
}

fn series_lines(series: &Series) -> Vec<String> {
    let how = if series.ended { "ended" } else { &series.phase };
    let elapsed = show_us(series.elapsed_us);
    let mut lines = vec![format!("{} into {}: {how}, {elapsed}", series.workload, series.store)];
    let mut line = |what: &str, text: String| lines.push(format!("  {what:<9} {text}"));
    let (taken, bytes) = (series.taken, show_bytes(series.stored_bytes));
    line("taken", format!("{taken} with {bytes}; {} failed, {} missed", series.failed, series.missed));
    if let Some(last) = &series.last {
        let ago = now_unix_ms().saturating_sub(last.durable_unix_ms) * 1000;
        let (pause, bytes) = (show_us(last.pause_us), show_bytes(last.stored_bytes));
        line("last", format!("{}, {} ago, pause {pause}, {bytes}", last.id, show_us(ago)));
    }
    if let Some(next) = series.next_us {
        let every = series.interval_us.map_or(String::new(), |us| format!(", every {}", show_us(us)));
        line("next", format!("in {}{every}", show_us(next)));
    }
    if let Some(failure) = &series.failure {
        line("failure", failure.clone());
    }
    lines
}

fn lines(status: &Status) -> Vec<String> {
    let direction = match status.end {
        End::Send => "to",
        End::Receive => "from",
    };
    let how = match status.outcome {
        None => format!("{}, round {}", status.phase, status.round),
        Some(Outcome::Moved) => "moved".into(),
        Some(Outcome::Failed) => "failed".into(),
        Some(Outcome::InDoubt) => "in doubt".into(),
    };
    let elapsed = show_us(status.elapsed_us);
    let mut lines = vec![format!("{} {direction} {}: {how}, {elapsed}", status.workload, status.peer)];
    let mut line = |what: &str, text: String| lines.push(format!("  {what:<9} {text}"));
    if let Some(reason) = &status.reason {
        line("reason", reason.clone());
    }
    line("moved", format!("{} at {}", show_bytes(status.moved_bytes), show_rate(status.rate_bytes_per_s)));
    if status.end == End::Send && status.outcome.is_none() {
        let pages = |pages: u64| show_bytes(pages.saturating_mul(PAGE_SIZE as u64));
        line("round", format!("{} of {}", pages(status.done_pages), pages(status.dirty_pages)));
        if let Some(dirty) = status.dirty_bytes_per_s {
            line("dirtied", show_rate(dirty));
        }
        if let Some(us) = status.predicted_downtime_us {
            line("downtime", format!("{} if it stopped now", show_us(us)));
        }
        if let Some(percent) = status.throttle_percent {
            line("throttle", format!("{percent} %"));
        }
        line("left", status.eta_us.map_or_else(|| "not known".into(), |us| format!("about {}", show_us(us))));
        line("limits", limits(&status.limits));
    }
    if status.outcome.is_none() && !status.cancellable {
        line("cancel", "too late: it will be finished".into());
    }
    lines
}

fn limits(limits: &Limits) -> String {
    let mut parts = Vec::new();
    let mut part = |text: Option<String>| parts.extend(text);
    part(limits.downtime_us.map(|us| format!("downtime {}", show_us(us))));
    part(limits.max_downtime_us.map(|us| format!("at most {} on a stall", show_us(us))));
    part(limits.max_rounds.map(|rounds| format!("{rounds} rounds")));
    part(limits.timeout_us.map(|us| format!("{} in all", show_us(us))));
    part(limits.on_timeout.as_ref().map(|word| format!("then {word}")));
    part(limits.on_stall.as_ref().map(|words| format!("stall: {}", words.join(", "))));
    part(limits.max_throttle_percent.map(|percent| format!("throttle up to {percent} %")));
    part(limits.bandwidth_bytes_per_s.map(|rate| format!("{} of the link", show_rate(rate))));
    parts.join(", ")
}
