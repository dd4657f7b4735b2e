//! What a running migration shows: a bar on a terminal, plain lines in a pipe, JSON for scripts.

use crate::cli::Common;
use crate::commands::{emit, say};
use crate::report::{ArrivalReport, Event, Observer, Outcome, Report, RoundReport};
use crate::restore;
use crate::units::{show_bytes, show_rate, show_us};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use protocol::page::PAGE_SIZE;
use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The observer for this command line, with the test hook around it where the environment asks for it.
pub fn observer(common: &Common) -> Box<dyn Observer> {
    let inner: Box<dyn Observer> = if common.json {
        Box::new(Json)
    } else if std::io::stderr().is_terminal() {
        Box::new(Bar::new())
    } else {
        Box::new(Lines)
    };
    held(inner)
}

/// An observer with the test hook around it where the environment asks for it.
pub(crate) fn held(inner: Box<dyn Observer>) -> Box<dyn Observer> {
    match std::env::var("MIGRATE_TEST_HOLD") {
        Ok(points) if !points.is_empty() => Box::new(Hold { inner, points }),
        _ => inner,
    }
}

/// One JSON object for each event; the report comes at the end by itself.
struct Json;

impl Observer for Json {
    fn event(&mut self, event: &Event) {
        if !matches!(event, Event::Done(_) | Event::Checkpointed(_) | Event::Arrived(_)) {
            emit(event);
        }
    }
}

/// A line on stderr for each round.
struct Lines;

impl Observer for Lines {
    fn event(&mut self, event: &Event) {
        if let Event::RoundEnd(round) = event {
            note(&round_line(round));
        }
        if let Some(line) = link_line(event) {
            note(&line);
        }
    }
}

fn note(line: &str) {
    // Nobody reads: that is no reason to stop moving a VM.
    writeln!(std::io::stderr(), "{line}").ok();
}

fn round_line(round: &RoundReport) -> String {
    let forecast = match round {
        RoundReport { frozen: true, .. } => "frozen".into(),
        RoundReport { throttle_percent: percent @ 1.., predicted_downtime_us, .. } => {
            format!("stop now: {}, slowed by {percent} %", show_us(*predicted_downtime_us))
        }
        RoundReport { predicted_downtime_us, .. } => format!("stop now: {}", show_us(*predicted_downtime_us)),
    };
    format!(
        "round {:>2}  {:>9} sent in {:>8} at {:>10}  {:>9} left  {forecast}",
        round.round,
        show_bytes(round.sent_bytes),
        show_us(round.duration_us),
        show_rate(round.rate_bytes_per_s),
        show_bytes(round.remaining_pages * PAGE_SIZE as u64),
    )
}

fn link_line(event: &Event) -> Option<String> {
    match event {
        Event::LinkLost { reason, wait_us } => {
            Some(format!("link lost, trying again for {}: {reason}", show_us(*wait_us)))
        }
        Event::Resumed { round, missing_pages, .. } => {
            let missing = show_bytes(missing_pages * PAGE_SIZE as u64);
            Some(format!("round {round:>2}  goes on over a new link, {missing} of it missing there"))
        }
        Event::CameBack { round, arrived_pages } => {
            let arrived = show_bytes(arrived_pages * PAGE_SIZE as u64);
            Some(format!("round {round:>2}  goes on over a new link, {arrived} of it here already"))
        }
        _ => None,
    }
}

/// A progress bar on stderr.
struct Bar {
    bar: ProgressBar,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr_with_hz(10));
        // The templates are constants, so this cannot fail for a reason that a user could see.
        if let Ok(style) = ProgressStyle::with_template("{prefix:<9} [{bar:30}] {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { bar }
    }
}

impl Observer for Bar {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Phase { phase } => {
                self.bar.set_prefix(phase.name());
                self.bar.set_message(phase.to_string());
            }
            Event::RoundBegin { round, dirty_pages } => {
                self.bar.set_prefix(format!("round {round}"));
                self.bar.set_length((*dirty_pages).max(1));
                self.bar.set_position(0);
            }
            Event::Progress(progress) => {
                self.bar.set_position(progress.done_pages);
                let left = show_bytes(progress.remaining_pages * PAGE_SIZE as u64);
                let forecast =
                    progress.predicted_downtime_us.map(|us| format!(", forecast downtime {}", show_us(us)));
                self.bar.set_message(format!(
                    "{}, {left} left{}",
                    show_rate(progress.rate_bytes_per_s),
                    forecast.unwrap_or_default()
                ));
            }
            Event::RoundEnd(round) => self.bar.println(round_line(round)),
            Event::Receiving { round, received_bytes, rate_bytes_per_s } => {
                self.bar.set_prefix(format!("round {round}"));
                self.bar.set_message(format!(
                    "{} received, {}",
                    show_bytes(*received_bytes),
                    show_rate(*rate_bytes_per_s)
                ));
                self.bar.tick();
            }
            Event::LinkLost { .. } | Event::Resumed { .. } | Event::CameBack { .. } => {
                if let Some(line) = link_line(event) {
                    self.bar.println(line);
                }
            }
            Event::Decided(_) => {}
            Event::Donating { missing_pages, .. } | Event::Following { missing_pages } => {
                let left = show_bytes(missing_pages * PAGE_SIZE as u64);
                self.bar.set_message(format!("it runs at the destination; {left} are still to follow"));
            }
            Event::Done(_) | Event::Checkpointed(_) | Event::Arrived(_) => self.bar.finish_and_clear(),
        }
    }
}

/// A test hook, documented in docs/scripting.md: stops this process with SIGSTOP when it enters a phase or a round, so that
/// a test can kill or cut whatever it wants at exactly that point.
struct Hold {
    inner: Box<dyn Observer>,
    /// Where to stop, in this order: names of phases, and `round-N`, separated by commas.
    points: String,
}

/// How long the handlers of signals that waited may take.
const SIGNALS_HANDLED: Duration = Duration::from_millis(20);

/// How many of the points this process has reached: each stops it once, however many migrations it sees.
static REACHED: AtomicUsize = AtomicUsize::new(0);

impl Observer for Hold {
    fn event(&mut self, event: &Event) {
        self.inner.event(event);
        let here = match event {
            Event::Phase { phase } => phase.name().to_owned(),
            Event::RoundBegin { round, .. } => format!("round-{round}"),
            _ => return,
        };
        stop_at(&self.points, &here);
    }
}

/// Stops this process if this is the next of the points to stop at.
fn stop_at(points: &str, here: &str) {
    if points.split(',').nth(REACHED.load(Ordering::SeqCst)).is_none_or(|point| point != here) {
        return;
    }
    REACHED.fetch_add(1, Ordering::SeqCst);
    let own = rustix::process::getpid();
    if let Err(error) = rustix::process::kill_process(own, rustix::process::Signal::STOP) {
        tracing::error!(%error, "this process could not stop itself");
    }
    // A signal that came meanwhile is handled by any of the threads that wake now, and this one must not overtake it.
    std::thread::sleep(SIGNALS_HANDLED);
}

/// What a restore shows: plain lines, or JSON for scripts; with the test hook where the environment asks for it.
pub fn restoring(common: &Common) -> impl FnMut(&restore::report::Event) + use<> {
    use restore::report::Event as Restoring;
    let json = common.json;
    let points = std::env::var("MIGRATE_TEST_HOLD").unwrap_or_default();
    move |event| {
        match event {
            event if json => emit(event),
            Restoring::Running { name, running_us, missing_pages, .. } => {
                let more = match missing_pages {
                    0 => String::new(),
                    pages => format!("; {} of its memory follow", show_bytes(pages * PAGE_SIZE as u64)),
                };
                note(&format!("{name} runs after {}{more}", show_us(*running_us)));
            }
            // That the store is in trouble is logged as a warning.
            Restoring::Step { .. } | Restoring::Reading { .. } | Restoring::StoreTrouble { .. } => {}
        }
        if let Restoring::Step { step } = event {
            stop_at(&points, step.name());
        }
    }
}

/// Prints what was restored, for people.
pub fn show_restored(report: &restore::report::Report) {
    let links = match report.links {
        1 => "a full checkpoint".into(),
        links => format!("a chain of {links} checkpoints"),
    };
    say(&format!(
        "{} is restored from {}: {} of {} in memory, from {} in {links}; it ran after {}, and is whole after {}",
        report.name,
        report.checkpoint,
        show_bytes(report.data_pages * PAGE_SIZE as u64),
        show_bytes(report.memory_bytes),
        show_bytes(report.stored_bytes),
        show_us(report.running_us),
        show_us(report.total_us)
    ));
}

/// Prints what arrived, for people.
pub fn show_arrival(report: &ArrivalReport) {
    say(&format!(
        "{} arrived from {}: {} in {} rounds and {} of state, in {}",
        report.workload,
        report.peer,
        show_bytes(report.received_bytes),
        report.rounds,
        show_bytes(report.state_bytes),
        show_us(report.total_us)
    ));
    if let Some(followed) = &report.post_copy {
        say(&format!(
            "{} pages followed behind the start in {}; {} were waited for, {} in the mean, {} at most",
            followed.received_pages,
            show_us(followed.duration_us),
            followed.faults,
            show_us(followed.fault_mean_us),
            show_us(followed.fault_max_us)
        ));
    }
}

/// Prints the final report for people.
pub fn show_report(report: &Report) {
    let moved = match &report.outcome {
        Outcome::Moved => format!("{} moved to {}", report.workload, report.peer),
        Outcome::Failed { .. } => format!("{} did not move and runs here", report.workload),
        Outcome::InDoubt { .. } => format!("{} is in doubt and stands still here", report.workload),
        Outcome::Underway => format!("{} is underway", report.workload),
    };
    say(&moved);
    say("");
    say("round    dirty     sent     zero  untouched       bytes        time          rate   stop then");
    for round in &report.rounds {
        say(&format!(
            "{:>5} {:>8} {:>8} {:>8} {:>10} {:>11} {:>11} {:>13}   {}",
            round.round,
            round.dirty_pages,
            round.sent_pages,
            round.zero_pages,
            round.skipped_pages,
            show_bytes(round.sent_bytes),
            show_us(round.duration_us),
            show_rate(round.rate_bytes_per_s),
            if round.frozen { "frozen".into() } else { show_us(round.predicted_downtime_us) },
        ));
    }
    say("");
    let predicted =
        report.rounds.iter().rev().find(|round| !round.frozen).map(|round| round.predicted_downtime_us);
    say(&format!("memory    {} tracked by {}", show_bytes(report.memory_bytes), report.tracking));
    if report.disk_bytes > 0 {
        say(&format!("and       {} of disks or files went along", show_bytes(report.disk_bytes)));
    }
    say(&format!(
        "sent      {} and {} of state",
        show_bytes(report.sent_bytes),
        show_bytes(report.state_bytes)
    ));
    if let Some(followed) = &report.post_copy {
        say(&format!(
            "followed  {} pages behind the start in {}: {} asked for, {} near those, {} in their turn",
            followed.missing_pages,
            show_us(followed.duration_us),
            followed.asked_pages,
            followed.prefetched_pages,
            followed.pushed_pages
        ));
    }
    say(&format!("total     {}", show_us(report.total_us)));
    say(&format!(
        "downtime  {}, predicted {} (the guest's own figure: migrate ledger, on the other host)",
        show_us(report.downtime_us),
        predicted.map_or_else(|| "nothing".into(), show_us)
    ));
    if report.downtime_us > 0 && report.outcome == Outcome::Moved {
        let from = match report.fixed.known_from {
            0 => "guessed".into(),
            moves => format!("known from {moves} moves"),
        };
        let (assumed, actual) = (show_us(report.fixed.assumed_us), show_us(report.fixed.actual_us));
        say(&format!("          of it {actual} that no page explains; {assumed} were counted with, {from}"));
    }
    for warning in &report.warnings {
        say(&format!("warning   {warning}"));
    }
}
