//! `migrate receive --daemon`: a host that takes VMs until it is told to stop, several at a time.
//!
//! A VM that arrived lives in a process of its own and goes on when the daemon ends. SIGTERM ends it in three steps: no
//! further VM is taken; those that arrive have a grace time to come in; then what is not behind its commit is cancelled, and
//! goes on at its source. What is behind it is finished, whatever that takes.

use super::arrival::{Host, Job};
use super::{LOOK, attempt_failed};
use crate::cancel::CancelFlag;
use crate::cli::Common;
use crate::commands::emit;
use crate::error::{Result, clean};
use crate::inbound::Desk;
use crate::progress;
use crate::report::{ArrivalReport, Event, Observer};
use crate::units::{show_bytes, show_us};
use protocol::MigrationId;
use sd_notify::NotifyState;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a daemon that ends looks whether it has.
const LOOK_AT_END: Duration = Duration::from_millis(20);

/// A host that takes VMs until it is told to stop.
pub(super) struct Daemon<'a> {
    common: &'a Common,
    host: &'a Host,
    desk: &'a Desk,
    address: &'a str,
    underway: Mutex<BTreeMap<u64, CancelFlag>>,
}

impl<'a> Daemon<'a> {
    pub(super) fn new(common: &'a Common, host: &'a Host, desk: &'a Desk, address: &'a str) -> Self {
        Self { common, host, desk, address, underway: Mutex::default() }
    }

    /// Takes VMs until `stop` is set, and then brings those that arrive to an end.
    ///
    /// # Errors
    /// `Link` when no connection can come any more.
    pub(super) fn run(&self, stop: &CancelFlag, grace: Duration) -> Result<()> {
        tracing::info!(address = self.address, "ready for VMs");
        tell(&[NotifyState::Ready, NotifyState::Status("ready for VMs")]);
        std::thread::scope(|scope| {
            let mut number = 0;
            let result = loop {
                if stop.is_set() {
                    break Ok(());
                }
                match Job::next(self.desk, LOOK) {
                    Ok(None) => {}
                    Ok(Some(job)) => {
                        number += 1;
                        let cancel = CancelFlag::default();
                        self.underway().insert(number, cancel.clone());
                        self.say_how_many();
                        let serving = std::thread::Builder::new().name(format!("arrival-{number}"));
                        let spawned = serving.spawn_scoped(scope, move || {
                            self.serve(job, &cancel);
                            self.underway().remove(&number);
                            self.say_how_many();
                        });
                        if let Err(error) = spawned {
                            self.underway().remove(&number);
                            tracing::warn!(%error, "no thread for a VM that was offered: it stays where it is");
                        }
                    }
                    Err(error) => break Err(error),
                }
            };
            self.end(grace);
            result
        })
    }

    fn serve(&self, job: Job, cancel: &CancelFlag) {
        let migration = job.migration();
        let vm = job.name().map_or_else(|| "(taken up)".into(), clean);
        let span = tracing::info_span!("arrival", %migration, vm);
        let _inside = span.enter();
        tracing::info!("a VM is offered");
        let mut observer: Box<dyn Observer> = if self.common.json {
            progress::held(Box::new(Tagged { migration }))
        } else {
            progress::held(Box::new(crate::report::Quiet))
        };
        match self.host.serve(self.desk, job, cancel, observer.as_mut()) {
            Ok(report) => self.arrived(&report),
            Err(error) => attempt_failed(self.common.json, self.address, Some(migration), &error),
        }
    }

    fn arrived(&self, report: &ArrivalReport) {
        tracing::info!(
            name = report.workload,
            peer = clean(&report.peer),
            received = show_bytes(report.received_bytes),
            rounds = report.rounds,
            took = show_us(report.total_us),
            "a VM arrived and runs here"
        );
        if self.common.json {
            let migration = report.migration;
            emit(
                &json!({"event": "arrived", "migration": migration, "name": report.workload, "report": report}),
            );
        }
    }

    /// No further VM is taken: those that arrive come in, or are cancelled.
    fn end(&self, grace: Duration) {
        let underway = self.underway().len();
        tracing::info!(underway, "ending: no further VM is taken");
        tell(&[NotifyState::Stopping, NotifyState::Status("ending")]);
        let until = Instant::now() + grace;
        while Instant::now() < until && !self.underway().is_empty() {
            std::thread::sleep(LOOK_AT_END);
        }
        for cancel in self.underway().values() {
            if cancel.set() {
                tracing::info!("an arrival is cancelled: its VM goes on at its source");
            }
        }
        // The threads are waited for by their scope.
    }

    fn say_how_many(&self) {
        let status = match self.underway().len() {
            0 => "ready for VMs".to_owned(),
            1 => "1 VM arrives".to_owned(),
            many => format!("{many} VMs arrive"),
        };
        tell(&[NotifyState::Status(&status)]);
    }

    fn underway(&self) -> MutexGuard<'_, BTreeMap<u64, CancelFlag>> {
        self.underway.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the service manager, if there is one.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}

/// Events as JSON, each with the migration it is about.
struct Tagged {
    migration: MigrationId,
}

impl Observer for Tagged {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Done(_) | Event::Arrived(_)) {
            return;
        }
        let mut line = serde_json::to_value(event).unwrap_or_default();
        line["migration"] = self.migration.to_string().into();
        emit(&line);
    }
}
