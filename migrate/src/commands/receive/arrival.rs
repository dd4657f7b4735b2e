//! One VM that arrives: served, shown on its own socket and in the metrics, and told about.

use crate::cancel::CancelFlag;
use crate::destination::any::{AnyDestination, Places};
use crate::error::Result;
use crate::inbound::{self, Desk, Offered, Options, Stranded};
use crate::metrics::Fleet;
use crate::report::{ArrivalReport, Document, Event, Observer};
use crate::steer::{self, Board, Server, Subject, Watched};
use protocol::MigrationId;
use protocol::steer::End;
use std::path::PathBuf;

/// What brings a VM.
pub(super) enum Job {
    /// Somebody offers one.
    Offered(Box<Offered>),
    /// One runs here already and misses pages.
    Stranded(Box<Stranded>),
}

impl Job {
    /// The next one at the desk.
    ///
    /// # Errors
    /// As [`Desk::next_offer`].
    pub(super) fn next(desk: &Desk, limit: std::time::Duration) -> Result<Option<Self>> {
        match desk.next_stranded() {
            Some(stranded) => Ok(Some(Self::Stranded(Box::new(stranded)))),
            None => Ok(desk.next_offer(limit)?.map(|offered| Self::Offered(Box::new(offered)))),
        }
    }

    /// Which migration.
    pub(super) fn migration(&self) -> MigrationId {
        match self {
            Self::Offered(offered) => offered.offer().migration,
            Self::Stranded(stranded) => stranded.migration(),
        }
    }

    /// The workload's name as its source has it; not known of one that is taken up.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Offered(offered) => Some(&offered.offer().name),
            Self::Stranded(_) => None,
        }
    }
}

/// A host that takes VMs.
pub(super) struct Host {
    pub(super) places: Places,
    pub(super) options: Options,
    /// Where steering sockets go.
    pub(super) steering: Option<steer::Place>,
    pub(super) fleet: Fleet,
    /// Where the report of each goes.
    pub(super) report: Option<PathBuf>,
}

impl Host {
    /// Takes one VM.
    ///
    /// # Errors
    /// Why it did not arrive.
    pub(super) fn serve(
        &self,
        desk: &Desk,
        job: Job,
        cancel: &CancelFlag,
        observer: &mut dyn Observer,
    ) -> Result<ArrivalReport> {
        let destination = Box::new(AnyDestination::new(self.places.clone()));
        let mut keeper = Keeper { inner: observer, report: None };
        let arrived = match job {
            Job::Stranded(stranded) => {
                inbound::take_up(*stranded, desk, destination.as_ref(), &self.options, cancel, &mut keeper)
            }
            Job::Offered(offered) => {
                let board = self.board(&offered, cancel);
                let name = board.status().workload;
                let server = self.steering.as_ref().and_then(|place| steered(place, &name, &board));
                let entry = self.fleet.add(board.clone());
                let mut watched = Watched { board, inner: &mut keeper };
                let arrived =
                    inbound::receive(*offered, desk, destination, &self.options, cancel, &mut watched);
                drop((server, entry));
                arrived
            }
        };
        if let (Some(path), Some(report)) = (&self.report, keeper.report)
            && let Err(error) = Document::Arrived(report).write(path)
        {
            tracing::warn!("{error}");
        }
        arrived
    }

    fn board(&self, offered: &Offered, cancel: &CancelFlag) -> Board {
        let offer = offered.offer();
        let subject = Subject {
            end: End::Receive,
            migration: offer.migration,
            workload: self.places.vm.name.clone().unwrap_or_else(|| offer.name.clone()),
            peer: offered.peer().to_owned(),
            memory_bytes: offer.layout.memory_bytes(),
        };
        Board::new(subject, cancel.clone(), None)
    }
}

/// The steering socket of an arrival; one that cannot be made is no reason not to take the VM.
fn steered(place: &steer::Place, name: &str, board: &Board) -> Option<Server> {
    // The peer chose the name, and it is checked as part of the offer only later.
    protocol::control::check_name(name).ok()?;
    Server::start(place, name, board.clone())
        .inspect_err(|error| tracing::warn!("this arrival cannot be steered from outside: {error}"))
        .ok()
}

/// An observer that keeps the report.
struct Keeper<'a> {
    inner: &'a mut dyn Observer,
    report: Option<Box<ArrivalReport>>,
}

impl Observer for Keeper<'_> {
    fn event(&mut self, event: &Event) {
        if let Event::Arrived(report) = event {
            self.report = Some(report.clone());
        }
        self.inner.event(event);
    }
}
