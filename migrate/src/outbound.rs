//! The sending side of a migration: from a running workload to one that runs elsewhere.
//!
//! ```text
//! greet ─▶ offer ─▶ track ─▶ rounds ─▶ freeze ─▶ (verify) ─▶ state ─▶ ready ─▶ pledge ║ commit ─▶ (ask) ─▶ settle
//!                                                                        ║
//!    a failure up to here resumes the source                             ║  from here on only the
//!                                                                        ║  destination's word does
//! ```
//!
//! # Never two, and never none that could be avoided
//!
//! The destination starts for one reason only: it has read a whole `Commit`. So before the first byte of it is
//! written the source *is* the workload, and whatever goes wrong resumes it. When that byte may have been written,
//! nobody at this end can know whether the message arrived, and from then on the source resumes for one reason only:
//! the destination said that it will never start this migration (`Failed`, or `Discarded` in answer to `Ask`), which
//! it says only behind having made sure. `Pledge` tells the source's VMM the same before `Commit` is written, so that
//! the rule holds even if this process dies between the two.
//!
//! A lost link behind `Commit` is therefore no failure but a question. It is asked over new connections until it is
//! answered or [`Options::ask`] is over; then the workload is left frozen, [`Error::InDoubt`] says how to find out,
//! and nothing was lost: either the destination runs, or the source can be resumed where it stood.
//!
//! Resuming and handing over both consume the source, and handing over needs a
//! [`Committed`](crate::source::Committed), which is made in one place: where the destination's word that it started
//! was read.
//!
//! # Dirty bits of a failed attempt
//!
//! Taking a page clears its dirty bit for whoever looks next: the next attempt, or a checkpoint. What was taken was
//! meant for a destination that is gone, so all of it is given back, whichever rounds had arrived there.

mod ticker;
mod wishes;
mod buffers;
mod encode;
mod lanes;
mod seeding;
mod rounds;
mod resume;
mod join;
mod verify;
mod commit;
mod settle;
mod postcopy;

use crate::cancel::CancelFlag;
use crate::controls::Controls;
use crate::converge::{Limits, Measured, OnTimeout};
use crate::conversation::{self, out_of_order};
use crate::error::{Error, Result, clean};
use crate::identity::Fingerprint;
use crate::link::Link;
use crate::report::{
    Connections, Event, FixedPart, Observer, Outcome, Phase, PostCopyReport, REPORT_VERSION, Report, Timed,
    micros,
};
use crate::seed::Seed;
use crate::select::hot::{HotPages, HotRule};
use crate::source::{Donor, Source};
use buffers::Buffers;
use commit::Answer;
pub use commit::{Word, ask};
pub use encode::Packs;
use encode::Plan;
pub(crate) use encode::{LEARNS_BYTES, PACKABLE_PART, PACKING_FEE, PROMISE};
use lanes::Lanes;
use postcopy::Donation;
use protocol::MigrationId;
use protocol::control::{Downstream, MAX_CONNECTIONS, Offer, Upstream};
use protocol::frame::MAX_PAGE_STREAMS;
use protocol::handshake::{CONNECTIONS, Hello, POST_COPY};
use protocol::page::PageSet;
use seeding::There;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ticker::Ticker;

/// What the operator wants.
#[derive(Debug, Clone)]
pub struct Options {
    /// The name of this migration: see [`new_migration_id`].
    pub migration: MigrationId,
    /// When to freeze, how long to try, and how fast: read at every decision, so that it may change meanwhile.
    pub controls: Controls,
    /// What freezing, saving, loading and starting cost, without pages and round trips: what the last migration of
    /// this kind measured, or a guess.
    pub fixed_cost: Duration,
    /// The moves that `fixed_cost` is known from; 0 for a guess.
    pub fixed_cost_known_from: u32,
    /// Which pages wait while there is much else to send, see [`crate::select::hot`].
    pub hot: HotRule,
    /// Page streams, 1 to [`MAX_PAGE_STREAMS`].
    pub page_streams: u16,
    /// How many connections they are spread over, 1 to [`MAX_CONNECTIONS`] and no more than they are, and why so many. A
    /// destination that can take only one gets one.
    pub connections: Connections,
    /// Which ways of packing pages may be used.
    pub packs: Packs,
    /// Whether all memory is compared while the workload stands still, before it may start there.
    pub verify: bool,
    /// A checkpoint of the workload that the destination may have, too: what it has is not sent again.
    pub seed: Option<Arc<Seed>>,
    /// The longest the peer may leave us waiting with nothing moving on the link.
    pub stall: Duration,
    /// The longest the destination may take to make room for the workload.
    pub prepare: Duration,
    /// How long to look for another link when one is lost before `Commit`; zero to give up at once. No longer than the
    /// destination keeps what it has.
    pub retry: Duration,
    /// How long to ask what became of the workload when the link was lost behind `Commit`, and to make the link again
    /// while pages follow.
    pub ask: Duration,
}

impl Options {
    /// The defaults for a migration of this name.
    pub fn new(migration: MigrationId) -> Self {
        Self {
            migration,
            controls: Controls::new(Limits::default()),
            fixed_cost: Duration::from_millis(2),
            fixed_cost_known_from: 0,
            hot: HotRule::default(),
            page_streams: 2,
            connections: Connections::default(),
            packs: Packs::default(),
            verify: false,
            seed: None,
            stall: Duration::from_secs(10),
            // Touching fresh memory was measured at up to 2 s/GiB on a machine that must get it back from its host.
            prepare: Duration::from_secs(120),
            // A minute less than a receiver keeps what arrived, which notices the loss a little later or earlier.
            retry: Duration::from_secs(540),
            ask: Duration::from_secs(30),
        }
    }

    /// The limits as they are now.
    pub fn limits(&self) -> Limits {
        self.controls.limits()
    }
}

/// A name for a migration: 128 bits of the kernel's randomness.
///
/// # Errors
/// `Host` when it has none.
pub fn new_migration_id() -> Result<MigrationId> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Error::Host(format!("/dev/urandom gave no randomness: {error}")))?;
    Ok(MigrationId(u128::from_le_bytes(bytes)))
}

/// A migration that did not come to its end: why, and what it did until then.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// Its numbers.
    pub report: Report,
}

/// Moves a workload to the other end of `link`. `dial` makes further connections to the same peer: as many as the options
/// ask for, and whenever the link is lost.
///
/// # Errors
/// Everything that can go wrong before `Commit`, naming its phase: the workload runs on at the source then, unless it
/// is `NotResumed`. Behind `Commit`: an error of the destination's, and the workload runs on at the source; or
/// `InDoubt`, and it stands still there.
pub fn send(
    source: Box<dyn Source>,
    link: Box<dyn Link>,
    dial: &mut dyn FnMut() -> Result<Box<dyn Link>>,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn Observer,
) -> std::result::Result<Report, Box<Failed>> {
    Outbound::new(source, link, dial, options, cancel, observer).run()
}

/// Sends what a workload misses that runs at a destination already, from what is left of it here: as the sender would
/// have that is gone. `peer` is where it runs, as an operator writes it.
///
/// # Errors
/// `InDoubt` when it could not be brought to its end; nothing is lost then, and it can be called again.
pub fn donate(
    donor: Box<dyn Donor>,
    peer: &str,
    dial: &mut dyn FnMut() -> Result<Box<dyn Link>>,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn Observer,
) -> Result<PostCopyReport> {
    let mut ticker = Ticker::new(observer);
    ticker.event(&Event::Phase { phase: Phase::PostCopy });
    let mut talk = conversation::Sender::none();
    let mut donation = Donation {
        donor: donor.as_ref(),
        migration: options.migration,
        peer: peer.into(),
        dial,
        stall: options.stall,
        ask: options.ask,
        cancel,
        ticker: &mut ticker,
        report: PostCopyReport::default(),
    };
    let completed = donation.serve(&mut talk, None)?;
    let report = donation.report;
    let migration = completed.migration();
    donor.finish(completed)?;
    // Nothing depends on its arrival.
    if let Err(error) = talk.say(&Downstream::Done { migration }, &[], options.stall) {
        tracing::debug!(%error, "the destination was not told that the donor ended");
    }
    talk.hang_up("done");
    Ok(report)
}

struct Outbound<'a> {
    source: Box<dyn Source>,
    talk: conversation::Sender,
    lanes: Lanes,
    buffers: Buffers,
    dial: &'a mut dyn FnMut() -> Result<Box<dyn Link>>,
    options: &'a Options,
    cancel: &'a CancelFlag,
    ticker: Ticker<'a>,
    report: Report,
    /// Who the destination is: nobody else may take its place.
    peer_key: Fingerprint,
    /// Every page that was taken from the source, in all rounds.
    taken: Vec<PageSet>,
    /// Where memory there began with a checkpoint: what of it was not written since and need not be sent.
    there: Option<There>,
    /// The pages of the round under way: what the destination must have before it is over.
    owed: Vec<PageSet>,
    /// The round under way.
    round: u32,
    /// The rounds that were acknowledged.
    measured: Vec<Measured>,
    /// Which pages wait for the last round, and which were taken without being sent.
    hot: HotPages,
    /// How much the workload is slowed down, in percent.
    throttle_percent: u8,
    /// What a message there and its answer back take.
    round_trip: Duration,
    /// The capabilities of both ends.
    agreed: Vec<&'static str>,
    begun: Instant,
    /// While rounds are sent: when they began.
    rounds_since: Option<Instant>,
    /// When the first round began, over whichever link.
    rounds_begun: Option<Instant>,
    frozen_at: Option<Instant>,
    /// What comparing memory was forecast to take.
    verify_cost: Duration,
    /// Whether both ends can do post-copy.
    peer_can_post_copy: bool,
    /// Once it is decided that the last pages follow behind the start: what is missing, known from the freeze on.
    missing: Option<Vec<PageSet>>,
}

impl<'a> Outbound<'a> {
    fn new(
        source: Box<dyn Source>,
        link: Box<dyn Link>,
        dial: &'a mut dyn FnMut() -> Result<Box<dyn Link>>,
        options: &'a Options,
        cancel: &'a CancelFlag,
        observer: &'a mut dyn Observer,
    ) -> Self {
        let workload = source.workload();
        let pages: Vec<u64> = workload.layout.spaces.iter().map(|space| space.pages).collect();
        let report = Report {
            version: REPORT_VERSION,
            migration: options.migration,
            workload: workload.name.clone(),
            peer: link.peer(),
            outcome: Outcome::Underway,
            tracking: String::new(),
            memory_bytes: workload.layout.memory_bytes(),
            disk_bytes: workload.layout.disk_bytes(),
            page_streams: options.page_streams,
            connections: options.connections.clone(),
            phases: Vec::new(),
            rounds: Vec::new(),
            sent_pages: 0,
            packed_pages: 0,
            zero_pages: 0,
            skipped_pages: 0,
            seeded_pages: 0,
            sent_bytes: 0,
            state_bytes: 0,
            resumes: 0,
            downtime_us: 0,
            verify_us: 0,
            fixed: FixedPart {
                assumed_us: micros(options.fixed_cost),
                known_from: options.fixed_cost_known_from,
                ..FixedPart::default()
            },
            total_us: 0,
            post_copy: None,
            guest: None,
            link: link.stats(),
            warnings: Vec::new(),
        };
        Self {
            there: None,
            taken: workload.layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect(),
            peer_key: link.peer_key(),
            owed: Vec::new(),
            round: 0,
            source,
            talk: conversation::Sender::new(link, 0),
            lanes: Lanes::none(),
            buffers: Buffers::default(),
            dial,
            options,
            cancel,
            ticker: Ticker::new(observer),
            report,
            measured: Vec::new(),
            hot: HotPages::new(&pages, options.hot),
            throttle_percent: 0,
            round_trip: Duration::ZERO,
            agreed: Vec::new(),
            begun: Instant::now(),
            rounds_since: None,
            rounds_begun: None,
            frozen_at: None,
            verify_cost: Duration::ZERO,
            peer_can_post_copy: false,
            missing: None,
        }
    }

    fn run(mut self) -> std::result::Result<Report, Box<Failed>> {
        if let Err(error) = self.deliver() {
            return Err(self.give_up(error));
        }
        let _answers = self.cancel.answers();
        let answer = self
            .phase(Phase::Commit, Self::commit)
            .or_else(|lost| self.phase(Phase::Ask, |outbound| outbound.ask(lost)));
        match answer {
            Ok(Answer::Started(committed)) => match self.missing.take() {
                Some(missing) => self.donate(committed, missing),
                None => Ok(self.hand_over(committed)),
            },
            Ok(Answer::Discarded(why)) => Err(self.take_back(why)),
            Err(error) => Err(self.leave_in_doubt(error)),
        }
    }

    /// Everything before `Commit`. An error leaves the source free to resume.
    fn deliver(&mut self) -> Result<()> {
        self.phase(Phase::Greet, Self::greet)?;
        self.phase(Phase::Offer, Self::offer)?;
        self.phase(Phase::Track, Self::track)?;
        while let Err(error) = self.until_ready() {
            if !self.may_resume(&error) {
                return Err(error);
            }
            self.phase(Phase::Resume, |outbound| outbound.resume(error))?;
        }
        self.phase(Phase::Pledge, Self::pledge)
    }

    /// The rounds, and everything that a lost link leads back into them.
    fn until_ready(&mut self) -> Result<()> {
        self.phase(Phase::Rounds, Self::rounds)?;
        self.phase(Phase::Freeze, Self::freeze)?;
        if self.options.verify {
            self.phase(Phase::Verify, Self::verify)?;
        }
        self.phase(Phase::State, Self::state)?;
        self.phase(Phase::Ready, Self::ready)
    }

    /// One phase: told, timed, logged, and named in its error.
    fn phase<T>(&mut self, phase: Phase, body: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let timed = Timed::begin(phase);
        self.ticker.event(&Event::Phase { phase });
        let result = body(self);
        timed.end(result, &mut self.report.phases)
    }

    fn greet(&mut self) -> Result<()> {
        if !(1..=MAX_PAGE_STREAMS).contains(&self.options.page_streams) {
            return Err(Error::Usage(format!(
                "{} page streams cannot be: 1 to {MAX_PAGE_STREAMS} can",
                self.options.page_streams
            )));
        }
        let (connections, most) =
            (self.report.connections.number, self.options.page_streams.min(MAX_CONNECTIONS));
        if !(1..=most).contains(&connections) {
            return Err(Error::Usage(format!(
                "{connections} connections cannot be for {} page streams: 1 to {most} can",
                self.options.page_streams
            )));
        }
        let (begun, stall) = (Instant::now(), self.options.stall);
        self.talk.introduce(&Downstream::Hello(Hello::ours()), stall)?;
        let cancel = self.cancel;
        self.talk.preamble(stall, &mut || cancel.check().map(|()| 0))?;
        match self.hear("the destination's greeting", stall)? {
            Upstream::Hello(hello) => {
                let capabilities = hello.agree()?;
                self.peer_can_post_copy = capabilities.contains(&POST_COPY);
                if self.options.limits().post_copy_after.is_some() && !self.peer_can_post_copy {
                    return Err(Error::Usage(
                        "the destination's release cannot do post-copy: move the workload without it".into(),
                    ));
                }
                self.round_trip = begun.elapsed();
                tracing::info!(peer = clean(&hello.software), ?capabilities, "greeted");
                if connections > 1 && !capabilities.contains(&CONNECTIONS) {
                    self.report.connections =
                        Connections { number: 1, reason: "the destination's release takes only one".into() };
                }
                self.agreed = capabilities;
                self.check_wishes()
            }
            other => Err(out_of_order("Hello", other.name())),
        }
    }

    fn offer(&mut self) -> Result<()> {
        let workload = self.source.workload();
        let offer = Offer {
            migration: self.options.migration,
            kind: workload.kind,
            name: workload.name.clone(),
            layout: workload.layout.clone(),
            page_streams: self.options.page_streams,
            connections: self.report.connections.number,
            seed: self.seed().map(|seed| seed.name().clone()),
        };
        self.talk.say(&Downstream::Offer(offer), &workload.machine, self.options.stall)?;
        match self.hear("the destination to make room", self.options.prepare)? {
            Upstream::Accept => {}
            Upstream::Seeded { pages } => self.is_seeded(pages)?,
            other => return Err(out_of_order("Accept", other.name())),
        }
        self.lanes = self.open_lanes()?;
        Ok(())
    }

    /// New page streams on the link that is there and further ones, which know nothing of what others sent.
    fn open_lanes(&mut self) -> Result<Lanes> {
        self.join()?;
        let Options { page_streams, packs, controls, .. } = self.options;
        Lanes::open(self.talk.link()?, *page_streams, Plan::new(*packs, &self.agreed), &controls.bandwidth())
    }

    fn track(&mut self) -> Result<()> {
        self.report.tracking = self.source.track(self.dirty_at_first())?;
        self.find_what_is_there()?;
        if self.options.verify { self.forecast_verify() } else { Ok(()) }
    }

    fn pledge(&mut self) -> Result<()> {
        self.cancel.pass()?;
        self.source.pledge(self.options.migration, &self.report.peer)
    }

    /// The peer's next message, before `Commit`. Cancelling, a failing page stream and the peer's own failure end the
    /// wait.
    fn hear(&mut self, what: &'static str, limit: Duration) -> Result<Upstream> {
        let Self { talk, lanes, cancel, ticker, rounds_since, options, .. } = self;
        let mut watch = || {
            cancel.check()?;
            check_deadline(*rounds_since, options)?;
            lanes.check()?;
            ticker.tick(lanes.sent());
            Ok(lanes.sent().bytes)
        };
        understood(talk.hear(what, limit, &mut watch)?.0)
    }
}

/// A message, if it is not the peer's giving up.
fn understood(message: Upstream) -> Result<Upstream> {
    match message {
        Upstream::Failed { reason } => Err(Error::PeerFailed { reason: clean(&reason) }),
        Upstream::Refuse { code, reason } => Err(Error::Refused { code, reason: clean(&reason) }),
        other => Ok(other),
    }
}

/// Ends the rounds of a migration that is not to be forced once they take too long, in the middle of one too.
fn check_deadline(rounds_since: Option<Instant>, options: &Options) -> Result<()> {
    let (timeout, on_timeout) = options.controls.read(|limits| (limits.timeout, limits.on_timeout));
    if on_timeout != OnTimeout::Cancel || rounds_since.is_none_or(|since| since.elapsed() < timeout) {
        return Ok(());
    }
    Err(Error::NotConverged(format!(
        "memory was not copied within {} s: allow more time, or freeze the workload then",
        timeout.as_secs_f32()
    )))
}
