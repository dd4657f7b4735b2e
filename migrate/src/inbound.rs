//! The receiving side of a migration: from an offer to a workload that runs here.
//!
//! ```text
//!                    Offer            State           Commit
//! (desk) ─▶ (offer) ─▶ prepared, pages ─▶ loaded, Ready ─▶ started ─▶ settled (Done)
//!              │             │ ◀── Resume ── │               ▲ Ask: «Started»
//!            refuse       discard        Ask, Cancel,        │
//!                            │           nothing for long    │
//!                            ▼               ▼               │
//!                        discarded ◀──── discarded ◀── could not start
//!                                            ▲ Ask: «Discarded»
//! ```
//!
//! # Why two can never run
//!
//! One thread goes through these states, and there is one arrow to *started*: a whole `Commit` of this migration, read
//! in *loaded*. A sender that may have written `Commit` resumes only by our word `Failed` or `Discarded`, and we say
//! either only in *discarded*, from which no arrow leads to *started*: the destination was dropped first. A `Commit`
//! that still comes then is not read any more. A sender that has not written `Commit` may resume as it likes, because
//! there is none that we could read.
//!
//! # Why none runs only where that cannot be avoided
//!
//! A link that is lost in *loaded* is not the end: the sender may have committed and will ask, or may not have and comes
//! back to its rounds (`Resume`), for which everything is made anew. So *loaded* misses a lost link for [`Options::keep`] where
//! that can be. Discarding is always safe, as long as the answer is still there when it asks: the source stands still until
//! then. So what was discarded is written into the [`Ledger`], *discarded* (and *loaded* of a sender that cannot come back)
//! misses a lost link for [`Options::forget`] only, and whoever serves the next connection answers. *Started* waits for [`Options::linger`], longer than a sender asks, because the process may end behind it.
//! Only if both ends cannot reach each other for all of that time, or the ledger dies, does the sender stay in doubt, with its
//! workload frozen and whole.
//!
//! Whatever a peer sends is checked before memory is reserved for it, and a violation ends the migration with an error
//! that names what came: the sender is told, the destination discarded.

mod visitor;
mod probed;
mod admission;
mod desk;
mod parse;
mod decode;
#[cfg(test)]
mod play;
mod join;
mod streams;
mod resume;
mod ledger;
mod verify;
mod settle;
mod postcopy;

use crate::cancel::CancelFlag;
use crate::conversation::{self, out_of_order};
use crate::destination::{Destination, Refusal};
use crate::error::{Error, Result, clean};
use crate::identity::Fingerprint;
use crate::report::{ArrivalReport, Event, Observer, Phase, PhaseTime, Timed, micros, rate};
use crate::seed::Stores;
pub use admission::Limits;
use desk::Visitors;
pub use desk::{Accept, Desk, Notice, Notices, Offered, Stranded};
pub use ledger::{Ledger, MemoryLedger};
use protocol::control::{self, Downstream, MAX_BLOB_BYTES, MAX_CONNECTIONS, Offer, RefuseCode, Upstream};
use protocol::frame::MAX_PAGE_STREAMS;
use protocol::handshake;
use protocol::layout::Layout;
use protocol::page::PageSet;
use protocol::sparse;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::{Course, Streams};
use verify::Digests;
pub(crate) use visitor::MAX_MACHINE_BYTES;
use visitor::{Visitor, tell};

/// The shortest time between two reports of progress.
const TICK: Duration = Duration::from_millis(100);

/// What this host allows.
#[derive(Debug, Clone)]
pub struct Options {
    /// The most memory a workload may have.
    pub max_memory_bytes: u64,
    /// The most page streams a sender may open, at most [`MAX_PAGE_STREAMS`].
    pub max_page_streams: u16,
    /// The longest a sender may stay silent, before it is ready and while pages come.
    pub idle: Duration,
    /// How long to wait for `Commit`, and afterwards for the sender to know the outcome. Longer than a sender asks.
    pub linger: Duration,
    /// How long to keep what has arrived when the link is lost before `Commit`, for a sender that comes back: its memory stays
    /// taken for so long. Zero to discard at once.
    pub keep: Duration,
    /// How long to miss a link that is lost before anything was started. What is discarded then is in the ledger, so whoever
    /// goes on serving connections with it still has the answer; only one that ends then should wait for as long as `linger`.
    pub forget: Duration,
    /// The stores of checkpoints that a sender may refer to.
    pub seeds: Option<Stores>,
}

impl Options {
    /// The defaults on a host that allows this much memory.
    pub fn new(max_memory_bytes: u64) -> Self {
        Self {
            max_memory_bytes,
            max_page_streams: 16,
            idle: Duration::from_secs(20),
            linger: Duration::from_secs(60),
            keep: Duration::from_secs(600),
            forget: Duration::from_secs(1),
            seeds: None,
        }
    }
}

/// Serves one offer: takes its workload, or says why not. May run on several threads at once, for as many offers as the
/// desk has given out.
///
/// # Errors
/// Why no workload arrived; nothing of it is left here then.
pub fn receive(
    offered: Offered,
    desk: &Desk,
    destination: Box<dyn Destination>,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn Observer,
) -> Result<ArrivalReport> {
    let Offered { visitor, offer, machine, place } = offered;
    let mut report = ArrivalReport::of(&visitor.peer);
    report.migration = Some(offer.migration);
    report.workload.clone_from(&offer.name);
    report.phases.push(PhaseTime { phase: Phase::Greet, duration_us: micros(visitor.greeted_in) });
    let mut inbound = Inbound {
        talk: visitor.talk,
        key: visitor.key,
        keeps: !options.keep.is_zero() && visitor.capabilities.contains(&handshake::RESUME),
        begins_anew: visitor.capabilities.contains(&handshake::ANEW),
        is_anew: false,
        may_join: visitor.capabilities.contains(&handshake::CONNECTIONS),
        desk,
        visitors: None,
        came_back: None,
        round: 0,
        received_before_bytes: 0,
        options,
        cancel,
        observer,
        streams: Streams::none(),
        verifies: visitor.capabilities.contains(&handshake::VERIFY),
        post_copy: visitor.post_copy,
        layout: Arc::default(),
        missing: None,
        report,
        last_tick: Instant::now(),
    };
    inbound.talk.allow_blobs(MAX_BLOB_BYTES);
    let begun = Instant::now();
    let result = inbound.run(&offer, &machine, destination);
    let result = inbound.end(result, begun);
    // Only now: its memory has gone, or is a running workload's.
    drop(place);
    result
}

/// Goes on with a workload that runs here and misses pages, whose engine is gone: its sender has asked for it.
///
/// # Errors
/// Why it could not be brought to its end; it runs on, and whoever touches a missing page waits.
pub fn take_up(
    stranded: Stranded,
    desk: &Desk,
    destination: &dyn Destination,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn Observer,
) -> Result<ArrivalReport> {
    let Stranded { migration, visitor } = stranded;
    let workload = match destination.take_up(migration) {
        Ok(Some(workload)) => workload,
        Ok(None) => {
            desk.dismiss(visitor);
            return Err(Error::Workload(format!(
                "nothing that migration {migration} brought misses pages here"
            )));
        }
        Err(error) => {
            visitor.refuse(RefuseCode::Busy, &clean(&error.to_string()));
            return Err(error);
        }
    };
    let visitors = match desk.begin_as(migration, workload.name(), visitor.key) {
        Ok(visitors) => visitors,
        Err(Refusal { code, reason }) => {
            visitor.refuse(code, &reason);
            return Err(Error::Refused { code, reason });
        }
    };
    let mut report = ArrivalReport::of(&visitor.peer);
    report.migration = Some(migration);
    let mut inbound = Inbound {
        talk: visitor.talk,
        key: visitor.key,
        desk,
        visitors: Some(visitors),
        options,
        cancel,
        observer,
        streams: Streams::none(),
        keeps: false,
        begins_anew: false,
        is_anew: false,
        may_join: false,
        verifies: false,
        came_back: None,
        round: 0,
        received_before_bytes: 0,
        post_copy: true,
        layout: Arc::default(),
        missing: None,
        report,
        last_tick: Instant::now(),
    };
    let begun = Instant::now();
    let result = inbound.go_on_with(workload, migration);
    inbound.end(result, begun)
}

struct Inbound<'a> {
    talk: conversation::Receiver,
    /// Who made the offer.
    key: Fingerprint,
    /// Whether a sender that loses its link in the rounds may take them up over another one.
    keeps: bool,
    /// Whether one that loses it behind its state may, too, and sends everything anew.
    begins_anew: bool,
    /// All that had arrived is gone, and the sender may not know it yet.
    is_anew: bool,
    /// Whether both ends can do several connections.
    may_join: bool,
    desk: &'a Desk,
    /// Further connections of this migration, once it has begun.
    visitors: Option<Visitors>,
    /// The sender, on a new connection, while the old one still seemed to live.
    came_back: Option<Visitor>,
    /// The first round that is not in memory whole.
    round: u32,
    /// What came over links that were lost.
    received_before_bytes: u64,
    options: &'a Options,
    cancel: &'a CancelFlag,
    observer: &'a mut dyn Observer,
    streams: Streams,
    /// Both ends can compare memory before the start.
    verifies: bool,
    /// Both ends can do post-copy.
    post_copy: bool,
    layout: Arc<Layout>,
    /// What the sender announced as missing.
    missing: Option<Vec<PageSet>>,
    report: ArrivalReport,
    last_tick: Instant,
}

/// What comes behind the last round.
enum Last {
    /// The workload's state.
    State(Vec<u8>),
    /// Digests of its memory, and only then its state.
    Digests(Digests),
}

/// What a loaded destination was told to do.
enum Order {
    /// `Commit`.
    Start,
    /// `Ask`: the link was lost, and nobody knows whether `Commit` was on it.
    Answer,
    /// `Resume`: the link was lost, and `Commit` was not on it.
    BeginAnew(Box<Visitor>),
}

impl Inbound<'_> {
    fn run(&mut self, offer: &Offer, machine: &[u8], mut destination: Box<dyn Destination>) -> Result<()> {
        let migration = offer.migration;
        let mut course = match self.phase(Phase::Offer, |me| me.offer(destination.as_mut(), offer, machine)) {
            Ok(course) => course,
            Err(error) => return Err(self.fail(destination, error)),
        };
        loop {
            if let Err(error) = self.until_ready(destination.as_mut(), &course) {
                return Err(self.fail(destination, error));
            }
            match self.phase(Phase::Commit, Self::commit) {
                Ok(Order::Start) => return self.start(destination, migration),
                Ok(Order::Answer) => {
                    let error = Error::Link("it was lost before Commit arrived".into()).during(Phase::Commit);
                    let answer = Upstream::Outcome { migration, outcome: control::Outcome::Discarded };
                    return Err(self.discard(destination, migration, error, &answer));
                }
                Ok(Order::BeginAnew(visitor)) => {
                    let anew = self.phase(Phase::Resume, |me| {
                        me.begin_anew(destination.as_mut(), course, (offer, machine), *visitor)
                    });
                    match anew {
                        Ok(anew) => course = anew,
                        Err(error) => return Err(self.fail(destination, error)),
                    }
                }
                Err(error) => {
                    let word = Upstream::Failed { reason: clean(&error.to_string()) };
                    return Err(self.discard(destination, migration, error, &word));
                }
            }
        }
    }

    /// Everything from the first page up to `Ready`. An error leaves nothing in doubt: there can be no `Commit` yet.
    fn until_ready(&mut self, destination: &mut dyn Destination, course: &Course) -> Result<()> {
        let state = loop {
            match self.phase(Phase::Rounds, |me| me.rounds(course))? {
                Last::State(state) => break state,
                Last::Digests(first) => match self.phase(Phase::Verify, |me| me.verify(course, first)) {
                    Err(lost) if self.keeps && resume::is_lost(&lost) => {
                        self.phase(Phase::Resume, |me| me.keep(course, lost))?;
                    }
                    done => break done?,
                },
            }
        };
        self.report.rounds += 1;
        self.report.state_bytes = state.len() as u64;
        let missing = self.missing.take();
        self.phase(Phase::State, |_| {
            destination.load(&state)?;
            missing.as_deref().map_or(Ok(()), |missing| destination.expect(missing))
        })?;
        self.missing = missing;
        self.phase(Phase::Ready, |me| {
            // Behind this the sender may commit, and its word counts.
            me.cancel.pass()?;
            match me.talk.say(&Upstream::Ready, &[], me.options.idle) {
                // It may have arrived all the same, or the sender comes back for it.
                Err(lost) if me.comes_back_when_loaded() && resume::is_lost(&lost) => {
                    tracing::warn!(error = %lost, "the link is lost, with the state loaded");
                    me.talk.hang_up("lost");
                    Ok(())
                }
                said => said,
            }
        })
    }

    /// One phase: told, timed, logged, and named in its error.
    fn phase<T>(&mut self, phase: Phase, body: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let timed = Timed::begin(phase);
        self.observer.event(&Event::Phase { phase });
        let result = body(self);
        timed.end(result, &mut self.report.phases)
    }

    /// Checks the offer, makes room, accepts, and takes the page streams.
    fn offer(&mut self, destination: &mut dyn Destination, offer: &Offer, machine: &[u8]) -> Result<Course> {
        if let Err(Refusal { code, reason }) = check(offer, self.options, self.may_join) {
            return Err(self.refuse(code, &reason));
        }
        match self.desk.begin(offer, self.key) {
            Ok(visitors) => self.visitors = Some(visitors),
            Err(Refusal { code, reason }) => return Err(self.refuse(code, &reason)),
        }
        // The ledger's word on a migration is a promise: a second one of that name would break it.
        if self.desk.ledger().outcome(offer.migration) != control::Outcome::Unknown {
            return Err(self.refuse(RefuseCode::BadOffer, "a migration of this id was already here"));
        }
        if let Err(Refusal { code, reason }) = destination.prepare(offer, machine) {
            return Err(self.refuse(code, &reason));
        }
        self.cancel.check()?;
        self.turn_away_the_early();
        let accept = self.seeded(offer, destination)?;
        self.cancel.check()?;
        self.talk.say(&accept, &[], self.options.idle)?;
        self.layout = Arc::new(offer.layout.clone());
        let course = self.course(offer, destination);
        match self.take_streams(&course) {
            // To the sender the rounds have begun, so it comes back for them.
            Err(lost) if self.keeps && resume::is_lost(&lost) => self.keep(&course, lost)?,
            done => done?,
        }
        Ok(course)
    }

    /// Where pages go, in the memory that was prepared last.
    fn course(&self, offer: &Offer, destination: &dyn Destination) -> Course {
        let Offer { page_streams, connections, .. } = *offer;
        Course { layout: self.layout.clone(), memory: destination.memory(), page_streams, connections }
    }

    /// Begins memory with the checkpoint that the offer names, if it is here. One that is not, or is damaged, is no reason to refuse.
    fn seeded(&mut self, offer: &Offer, destination: &dyn Destination) -> Result<Upstream> {
        let (Some(seed), Some(stores)) = (&offer.seed, &self.options.seeds) else {
            return Ok(Upstream::Accept);
        };
        match stores.load(seed, &offer.layout, &*destination.memory(), self.cancel) {
            Ok(pages) => {
                self.report.seeded_pages = pages;
                Ok(Upstream::Seeded { pages })
            }
            Err(error @ (Error::Host(_) | Error::Interrupted(_))) => Err(error),
            Err(error) => {
                tracing::warn!("memory does not begin with the sender's checkpoint: {error}");
                Ok(Upstream::Accept)
            }
        }
    }

    /// Takes the further connections of the link and the page streams of all, from the round under way on.
    fn take_streams(&mut self, course: &Course) -> Result<()> {
        self.join(course.connections, course.page_streams)?;
        self.streams.accept(self.talk.link()?, course, self.round, self.keeps, self.options.idle)
    }

    /// Acknowledges rounds until what follows the last one; answers a state once every page stream has ended. A link
    /// that is lost meanwhile may be taken up again.
    fn rounds(&mut self, course: &Course) -> Result<Last> {
        loop {
            match self.rounds_of_link() {
                Err(lost) if self.keeps && resume::is_lost(&lost) => self.keep(course, lost)?,
                done => return done,
            }
        }
    }

    fn rounds_of_link(&mut self) -> Result<Last> {
        let idle = self.options.idle;
        loop {
            let round = self.round;
            match self.hear("the sender's next round")? {
                (Downstream::RoundSent { round: sent }, _) if sent == round => {
                    {
                        let (streams, mut watch) = self.watching();
                        streams.await_round(round, idle, &mut watch)?;
                    }
                    self.round = round
                        .checked_add(1)
                        .ok_or_else(|| out_of_order("the last round", "one more than can be counted"))?;
                    self.report.rounds += 1;
                    self.talk.say(&Upstream::RoundDone { round }, &[], idle)?;
                }
                (Downstream::Missing { pages }, sets) if self.post_copy && self.missing.is_none() => {
                    let missing = sparse::decode(&self.layout, &sets)?;
                    tracing::info!(pages, "the sender announces missing pages");
                    self.missing = Some(missing);
                }
                (Downstream::Verify { last_round, first: 0 }, blob)
                    if self.verifies && self.missing.is_none() && last_round == round =>
                {
                    return Ok(Last::Digests(Digests { last_round, blob }));
                }
                (Downstream::State { last_round }, state) if last_round == round => {
                    {
                        let (streams, mut watch) = self.watching();
                        streams.await_end(last_round, idle, &mut watch)?;
                    }
                    return Ok(Last::State(state));
                }
                (other, _) => return Err(out_of_order("RoundSent or State of this round", other.name())),
            }
        }
    }

    /// The page streams, and what else may end a wait for them.
    fn watching(&mut self) -> (&mut Streams, impl FnMut() -> Result<()>) {
        let Self { streams, visitors, came_back, cancel, keeps, .. } = self;
        let watch = || {
            cancel.check()?;
            resume::look(visitors.as_ref(), *keeps, came_back)
        };
        (streams, watch)
    }

    /// The sender's next message, before `Ready`. Cancelling, a failing page stream and the sender's own giving up end
    /// the wait.
    fn hear(&mut self, what: &'static str) -> Result<(Downstream, Vec<u8>)> {
        let Self { talk, visitors, came_back, keeps, streams, cancel, observer, report, last_tick, .. } =
            self;
        let before_bytes = self.received_before_bytes;
        let mut watch = || {
            cancel.check()?;
            resume::look(visitors.as_ref(), *keeps, came_back)?;
            streams.check()?;
            let received_bytes = before_bytes + streams.bytes();
            if last_tick.elapsed() >= TICK && received_bytes > report.received_bytes {
                let rate_bytes_per_s = rate(received_bytes - report.received_bytes, last_tick.elapsed());
                (report.received_bytes, *last_tick) = (received_bytes, Instant::now());
                observer.event(&Event::Receiving { round: report.rounds, received_bytes, rate_bytes_per_s });
            }
            Ok(received_bytes)
        };
        match talk.hear(what, self.options.idle, &mut watch)? {
            (Downstream::Cancel { reason }, _) => Err(Error::PeerFailed { reason: clean(&reason) }),
            other => Ok(other),
        }
    }

    /// Tells the sender that its workload is not taken.
    fn refuse(&mut self, code: RefuseCode, reason: &str) -> Error {
        let reason = reason.to_owned();
        tell(&mut self.talk, &Upstream::Refuse { code, reason: reason.clone() });
        Error::Refused { code, reason }
    }
}

/// Checks everything about an offer that needs no host: before anything is made for it.
fn check(offer: &Offer, options: &Options, may_join: bool) -> std::result::Result<(), Refusal> {
    let bad = |reason: String| Err(Refusal { code: RefuseCode::BadOffer, reason });
    if let Err(error) = control::check_name(&offer.name) {
        return bad(error.to_string());
    }
    let most = options.max_page_streams.min(MAX_PAGE_STREAMS);
    if !(1..=most).contains(&offer.page_streams) {
        return bad(format!("{} page streams cannot be: 1 to {most} can", offer.page_streams));
    }
    let most = if may_join { MAX_CONNECTIONS.min(offer.page_streams) } else { 1 };
    if !(1..=most).contains(&offer.connections) {
        return bad(format!("{} connections cannot be: 1 to {most} can", offer.connections));
    }
    match offer.layout.validate(options.max_memory_bytes) {
        Ok(()) => Ok(()),
        Err(error @ protocol::ProtocolError::TooLarge { .. }) => {
            Err(Refusal { code: RefuseCode::Memory, reason: error.to_string() })
        }
        Err(error) => bad(error.to_string()),
    }
}
