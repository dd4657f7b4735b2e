//! One machine, one network, and attempts to move the one over the other.

use migrate::cancel::CancelFlag;
use migrate::converge::OnTimeout;
use migrate::destination::scripted as place;
use migrate::error::{Error, Result};
use migrate::inbound::{self, Accept, Desk, Limits, MemoryLedger, Notices};
use migrate::link::duplex::{Network, Profile};
use migrate::outbound::{self, Failed};
use migrate::report::{ArrivalReport, Observer, Quiet, Report};
use migrate::source::scripted::{Machine, Who, Witness};
use protocol::MigrationId;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Two spaces: one of several stripes with an end inside one, and a small one.
pub(crate) fn layout() -> Layout {
    let space =
        |id, pages, guest_address| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address };
    Layout { spaces: vec![space(0, 1100, 0), space(1, 70, 1 << 32)] }
}

pub(crate) fn sending() -> outbound::Options {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let migration = MigrationId(u128::from(NEXT.fetch_add(1, Ordering::Relaxed)));
    let mut options = outbound::Options::new(migration);
    options.controls.change(|limits| limits.max_rounds = 6);
    options.controls.change(|limits| limits.on_timeout = OnTimeout::Force);
    options.stall = 20 * SECOND;
    // What a lost link means without another one. With one: see `resume`.
    options.retry = Duration::ZERO;
    options
}

pub(crate) fn receiving() -> inbound::Options {
    let mut options = inbound::Options::new(1 << 30);
    options.idle = 20 * SECOND;
    // Long enough for nothing: whoever asks later is answered from the ledger.
    options.linger = SECOND / 10;
    options.keep = Duration::ZERO;
    options
}

/// The front desk of a host at this network.
pub(crate) fn desk(network: &Network, ledger: &Arc<MemoryLedger>) -> Desk {
    let network = network.clone();
    desk_at(Box::new(move |limit| network.accept(limit)), ledger, Box::new(|_| {}))
}

/// The front desk behind `accept`.
pub(crate) fn desk_at(accept: Accept, ledger: &Arc<MemoryLedger>, notices: Notices) -> Desk {
    let limits = Limits { waiting: Duration::ZERO, ..Limits::one(1 << 30) };
    Desk::open(accept, ledger.clone(), limits, 20 * SECOND, notices).unwrap()
}

/// How an attempt ended at both ends.
pub(crate) struct Ended {
    pub(crate) sent: std::result::Result<Report, Box<Failed>>,
    /// What every offer came to.
    pub(crate) received: Vec<Result<ArrivalReport>>,
}

impl Ended {
    /// The error at the source.
    pub(crate) fn error(&self) -> &Error {
        match &self.sent {
            Ok(report) => panic!("it moved: {report:?}"),
            Err(failed) => failed.error.root(),
        }
    }
}

pub(crate) struct World {
    pub(crate) name: String,
    pub(crate) witness: Witness,
    pub(crate) machine: Machine,
    pub(crate) ledger: Arc<MemoryLedger>,
    /// Where it arrives.
    pub(crate) site: place::Site,
}

/// Sets a flag when it goes.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl World {
    pub(crate) fn new(seed: u64, pages_per_call: u64) -> Self {
        Self::named("scripted", seed, pages_per_call)
    }

    pub(crate) fn named(name: &str, seed: u64, pages_per_call: u64) -> Self {
        Self::of(layout(), name, seed, pages_per_call)
    }

    pub(crate) fn of(layout: Layout, name: &str, seed: u64, pages_per_call: u64) -> Self {
        let witness = Witness::default();
        let machine = Machine::new(layout, seed, pages_per_call, witness.clone()).named(name);
        Self { name: name.into(), witness, machine, ledger: Arc::default(), site: place::Site::default() }
    }

    /// One attempt over a network without faults, to a place without faults.
    pub(crate) fn move_it(&self) -> Ended {
        let network = Network::new(Profile::default(), None);
        self.attempt(&network, None, &sending(), &CancelFlag::default(), &mut Quiet)
    }

    /// One attempt. A receiver serves offer behind offer for as long as the sender is at it.
    pub(crate) fn attempt(
        &self,
        network: &Network,
        fail_at: Option<place::Call>,
        options: &outbound::Options,
        cancel: &CancelFlag,
        observer: &mut dyn Observer,
    ) -> Ended {
        self.attempt_with(network, fail_at, &receiving(), options, cancel, observer, &mut Quiet)
    }

    /// The same with another receiver.
    #[allow(clippy::too_many_arguments, reason = "both ends' options, and who watches them")]
    pub(crate) fn attempt_with(
        &self,
        network: &Network,
        fail_at: Option<place::Call>,
        receiving: &inbound::Options,
        options: &outbound::Options,
        cancel: &CancelFlag,
        observer: &mut dyn Observer,
        at_receiver: &mut (dyn Observer + Send),
    ) -> Ended {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let desk = desk(network, &self.ledger);
                let mut received = vec![];
                while !over.load(Ordering::Acquire) {
                    let Some(offered) = desk.next_offer(Duration::from_millis(5)).unwrap() else { continue };
                    received.push(inbound::receive(
                        offered,
                        &desk,
                        place::Scripted::at(self.site.clone(), self.witness.clone(), fail_at),
                        receiving,
                        &CancelFlag::default(),
                        at_receiver,
                    ));
                }
                received
            });
            // Also when the sender panics: the test shall fail then, not wait.
            let end = OnDrop(&over);
            let sent = network.dial().map(|link| {
                outbound::send(self.machine.attach(), link, &mut || network.dial(), options, cancel, observer)
            });
            drop(end);
            let received = receiver.join().expect("the receiver does not panic");
            Ended { sent: sent.expect("the first connection is made"), received }
        })
    }

    /// The workload runs at the destination, with the memory it was frozen with, and nowhere else.
    pub(crate) fn assert_moved(&self, ended: &Ended) {
        if let Err(failed) = &ended.sent {
            panic!("it did not move: {failed}; {:?}", ended.received);
        }
        assert!(self.witness.memory_arrived(), "memory differs");
        assert!(self.witness.is_running(Who::Destination));
        assert!(!self.witness.is_running(Who::Source));
        assert!(!self.witness.saw_two());
        assert!(self.machine.is_gone());
    }

    /// The workload runs at the source with all dirty bits, and nowhere else; and the next attempt moves it.
    pub(crate) fn assert_stayed_and_moves_next(&self, ended: &Ended) {
        let error = ended.error();
        assert!(self.witness.is_running(Who::Source), "{error}; {:?}", ended.received);
        assert!(!self.witness.is_running(Who::Destination), "{error}");
        assert!(!self.witness.saw_two());
        assert_eq!(self.machine.missing_pages(), 0, "{error}");
        self.machine.heal();
        self.assert_moved(&self.move_it());
    }
}
