//! The front desk: every connection comes by here, and goes where its first word says.
//!
//! ```text
//! accept ─▶ greet (a thread each, few, in time) ─┬─ Offer ──▶ waits for its turn ─▶ whoever serves
//!                                                ├─ Ask, Join, Resume of a migration under way, by the peer that
//!                                                │  offered it ─▶ that migration's thread
//!                                                ├─ Ask of any other ─▶ answered from the ledger
//!                                                ├─ Probe ─▶ its bytes are counted and dropped, one at a time
//!                                                └─ anything else ─▶ refused
//! ```
//!
//! One thread accepts and does nothing else that could take long, so a peer that says nothing, or talks nonsense, or
//! comes a hundred times keeps nobody waiting but itself. The desk decides nothing about a migration: what is known of
//! it is the ledger's, and what is under way is its thread's, which is told of visitors and hears them one by one.

use super::admission::{Admission, Brought, Limits, Taken};
use super::ledger::Ledger;
use super::probed;
use super::visitor::{Visitor, Wish};
use crate::destination::Refusal;
use crate::error::{Error, Result};
use crate::identity::Fingerprint;
use crate::link::Link;
use crossbeam_channel::{Receiver, bounded};
use protocol::MigrationId;
use protocol::control::{Offer, Outcome, RefuseCode, Upstream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the accepting thread waits before it looks around.
const LOOK: Duration = Duration::from_millis(50);

/// The most peers that are greeted at once, and of one key. A thread each.
const MAX_GREETED: usize = 24;
const MAX_GREETED_OF_ONE: usize = 6;

/// Stack of a thread that greets: it decodes nested JSON.
const STACK_BYTES: usize = 1 << 20;

/// The most visitors that wait for one migration.
const MAX_VISITORS: usize = 8;

/// How long a sender that was answered may take to say that it heard.
const HEARD: Duration = Duration::from_secs(2);

/// Waits for the next connection for at most the time it is given.
///
/// `TimedOut` says that none came; every other error, that none can come any more.
pub type Accept = Box<dyn FnMut(Duration) -> Result<Box<dyn Link>> + Send>;

/// What happened at the desk without reaching a migration.
#[derive(Debug)]
pub enum Notice {
    /// A sender asked what became of a migration and was told from the ledger.
    Asked {
        /// Which one.
        migration: MigrationId,
        /// What it was told.
        outcome: Outcome,
    },
    /// A connection came to nothing: it could not be greeted, or was refused.
    TurnedAway {
        /// Who it was, for people.
        peer: String,
        /// Why.
        error: Error,
    },
}

/// Hears what happened at the desk; called from its threads.
pub type Notices = Box<dyn Fn(Notice) + Send + Sync>;

/// The front desk of a host that receives.
pub struct Desk {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    limits: Limits,
    /// How long a peer may take for each message of its greeting.
    greeting: Duration,
    ledger: Arc<dyn Ledger>,
    notices: Notices,
    admission: Mutex<Admission>,
    changed: Condvar,
    closing: AtomicBool,
    /// A path is being measured.
    probing: AtomicBool,
    /// Why no further connection can come.
    deaf: Mutex<Option<String>>,
}

impl Desk {
    /// Opens a desk where `accept` brings connections, each of which may take `greeting` for each message until its
    /// wish is known.
    ///
    /// # Errors
    /// `Host` when no thread can be started.
    pub fn open(
        accept: Accept,
        ledger: Arc<dyn Ledger>,
        limits: Limits,
        greeting: Duration,
        notices: Notices,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            limits,
            greeting,
            ledger,
            notices,
            admission: Mutex::default(),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
            probing: AtomicBool::new(false),
            deaf: Mutex::new(None),
        });
        let accepting = shared.clone();
        let thread = std::thread::Builder::new()
            .name("desk".into())
            .spawn(move || accepting.accept_all(accept))
            .map_err(|error| Error::Host(format!("could not start a thread: {error}")))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits for an offer whose turn it is: there is a place and memory for it, which are its own until it is dropped.
    ///
    /// # Errors
    /// `Link` when no connection can come any more.
    pub fn next_offer(&self, limit: Duration) -> Result<Option<Offered>> {
        let until = Instant::now() + limit;
        let mut admission = self.shared.lock();
        loop {
            if let Some((visitor, bytes)) = admission.next(&self.shared.limits) {
                let slot = Slot { shared: self.shared.clone(), bytes };
                drop(admission);
                return Ok(Offered::of(visitor, slot));
            }
            // Whoever is being greeted may still have one.
            if admission.greets_nobody() {
                self.check()?;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            admission =
                self.shared.changed.wait_timeout(admission, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A sender that asks about a workload which runs here and misses pages, and which nobody serves, if one came.
    pub fn next_stranded(&self) -> Option<Stranded> {
        self.shared.lock().next_stranded().map(|(migration, visitor)| Stranded { migration, visitor })
    }

    /// Lets the desk answer a visitor from the ledger.
    pub(super) fn dismiss(&self, visitor: Visitor) {
        self.shared.clone().attend(|shared| shared.tell_outcome(visitor));
    }

    /// What became of migrations.
    pub(super) fn ledger(&self) -> &dyn Ledger {
        self.shared.ledger.as_ref()
    }

    /// Whether connections can still come.
    ///
    /// # Errors
    /// `Link` with the reason why not.
    pub(super) fn check(&self) -> Result<()> {
        match &*self.shared.deaf.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(reason) => Err(Error::Link(reason.clone())),
            None => Ok(()),
        }
    }

    /// A migration begins: from now on the further connections of the peer that offered it come to it.
    ///
    /// # Errors
    /// What to tell the sender: one of its id or its name is under way.
    pub(super) fn begin(&self, offer: &Offer, key: Fingerprint) -> std::result::Result<Visitors, Refusal> {
        self.begin_as(offer.migration, &offer.name, key)
    }

    /// The same for one that is taken up, under the name that its workload has here.
    ///
    /// # Errors
    /// As [`Desk::begin`].
    pub(super) fn begin_as(
        &self,
        migration: MigrationId,
        name: &str,
        key: Fingerprint,
    ) -> std::result::Result<Visitors, Refusal> {
        let (send, visitors) = bounded(MAX_VISITORS);
        let refusal = |code, reason: String| Refusal { code, reason };
        self.shared.lock().begin(migration, key, name, send).map_err(|taken| match taken {
            Taken::Id => refusal(RefuseCode::BadOffer, "a migration of this id is under way".into()),
            Taken::Name => {
                refusal(RefuseCode::NameTaken, format!("another workload named {name} is arriving here"))
            }
        })?;
        Ok(Visitors { shared: self.shared.clone(), migration, visitors })
    }
}

/// Who waits is turned away; nobody new gets in.
impl Drop for Desk {
    fn drop(&mut self) {
        self.shared.closing.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say that would matter now.
            let _ = thread.join();
        }
        let waiting = self.shared.lock().close();
        for visitor in waiting {
            visitor.refuse(RefuseCode::Busy, "the receiver ends");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Admission> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept_all(self: Arc<Self>, mut accept: Accept) {
        while !self.closing.load(Relaxed) {
            match accept(LOOK) {
                Ok(link) => self.clone().receive(link),
                Err(Error::TimedOut { .. }) => {}
                Err(error) => {
                    *self.deaf.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
                    self.changed.notify_all();
                    break;
                }
            }
            let overdue = self.lock().overdue(&self.limits);
            for visitor in overdue {
                self.clone().attend(|shared| {
                    shared.refuse(
                        visitor,
                        RefuseCode::Busy,
                        "too much is arriving there: try again in a minute",
                    );
                });
            }
        }
    }

    /// Greets a new connection, unless too many are being greeted.
    fn receive(self: Arc<Self>, link: Box<dyn Link>) {
        let (peer, key) = (link.peer(), link.peer_key());
        if !self.lock().greet(key, MAX_GREETED, MAX_GREETED_OF_ONE) {
            self.turned_away(peer, Error::Link("too many connections at once".into()));
            link.close("too many connections at once: try again");
            return;
        }
        let greeted = Greeted { shared: self.clone(), key };
        self.attend(move |shared| {
            let _greeted = greeted;
            let mut watch = || match shared.closing.load(Relaxed) {
                true => Err(Error::Link("the receiver ends".into())),
                false => Ok(0),
            };
            match Visitor::greet(link, shared.greeting, &mut watch) {
                Ok(visitor) => shared.route(visitor),
                Err(error) => shared.turned_away(peer, error),
            }
        });
    }

    /// Does something that may take a while. The number of such things is bounded by those who ask for them.
    fn attend(self: Arc<Self>, what: impl FnOnce(&Self) + Send + 'static) {
        let thread = std::thread::Builder::new().name("greet".into()).stack_size(STACK_BYTES);
        if let Err(error) = thread.spawn(move || what(&self)) {
            tracing::warn!(%error, "a connection was dropped: no thread could be started for it");
        }
    }

    /// Brings a visitor to where it wants.
    fn route(&self, visitor: Visitor) {
        let migration = match visitor.wish {
            Wish::Offer(..) => return self.wait(visitor),
            Wish::Probe(bytes) => return self.probe(visitor, bytes),
            Wish::Ask(migration) | Wish::Join(migration, _) | Wish::Resume(migration) => migration,
        };
        let brought = self.lock().bring(migration, visitor);
        match brought {
            Brought::There => {}
            Brought::Unknown(visitor) => self.answer(visitor),
            Brought::TooMany(visitor) => {
                self.refuse(visitor, RefuseCode::Busy, "too many connections of this migration wait there");
            }
        }
    }

    fn wait(&self, visitor: Visitor) {
        let too_many = self.lock().wait(visitor, &self.limits);
        match too_many {
            None => self.changed.notify_all(),
            Some(visitor) => {
                self.refuse(visitor, RefuseCode::Busy, "too many wait there: try again in a minute");
            }
        }
    }

    /// Answers a visitor whose migration is not under way.
    fn answer(&self, visitor: Visitor) {
        if let Wish::Ask(migration) = visitor.wish
            && visitor.post_copy
            && self.ledger.is_incomplete(migration)
        {
            match self.lock().strand(migration, visitor) {
                None => self.changed.notify_all(),
                Some(visitor) => {
                    self.refuse(visitor, RefuseCode::Busy, "too many wait there: try again in a minute");
                }
            }
            return;
        }
        self.tell_outcome(visitor);
    }

    /// Tells a visitor what became of its migration.
    fn tell_outcome(&self, mut visitor: Visitor) {
        let Wish::Ask(migration) = visitor.wish else {
            if matches!(visitor.wish, Wish::Join(..)) {
                let reason = "no further connection of this migration is due there";
                return self.refuse(visitor, RefuseCode::NoSuchMigration, reason);
            }
            let reason = "what arrived of this migration is not there any more (the receiver was started anew, or its \
                          --keep is over): send it again";
            return self.refuse(visitor, RefuseCode::NoSuchMigration, reason);
        };
        let outcome = self.ledger.outcome(migration);
        if let Err(error) = visitor.talk.say(&Upstream::Outcome { migration, outcome }, &[], self.greeting) {
            return self.turned_away(visitor.peer, error);
        }
        // Its `Done` only says that it heard; without it it asks again.
        let _ = visitor.talk.hear("the sender to have heard the answer", HEARD, &mut || Ok(0));
        visitor.talk.hang_up("answered");
        (self.notices)(Notice::Asked { migration, outcome });
    }

    /// Lets a visitor measure the path, unless another does: two would measure each other.
    fn probe(&self, visitor: Visitor, bytes: u64) {
        let peer = visitor.peer.clone();
        if self.probing.swap(true, Relaxed) {
            return self.refuse(visitor, RefuseCode::Busy, "another path is being measured: try again");
        }
        let served = probed::serve(visitor, bytes, self.greeting, Probing(&self.probing));
        match served {
            Ok(()) => tracing::info!(peer, "measured a path"),
            Err(error) => self.turned_away(peer, error),
        }
    }

    fn refuse(&self, visitor: Visitor, code: RefuseCode, reason: &str) {
        let peer = visitor.peer.clone();
        visitor.refuse(code, reason);
        self.turned_away(peer, Error::Refused { code, reason: reason.into() });
    }

    fn turned_away(&self, peer: String, error: Error) {
        tracing::info!(peer, %error, "turned away");
        (self.notices)(Notice::TurnedAway { peer, error });
    }
}

/// A peer that counts as being greeted.
struct Greeted {
    shared: Arc<Shared>,
    key: Fingerprint,
}

impl Drop for Greeted {
    fn drop(&mut self) {
        self.shared.lock().greeted(self.key);
        self.shared.changed.notify_all();
    }
}

/// A place at the desk's host, and the memory that is reserved there, until it is dropped.
struct Slot {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.lock().release(self.bytes);
        self.shared.changed.notify_all();
    }
}

/// An offer whose turn it is: [`receive`](super::receive) serves it.
pub struct Offered {
    pub(super) visitor: Visitor,
    pub(super) offer: Offer,
    pub(super) machine: Vec<u8>,
    /// Its place, until the migration is over.
    pub(super) place: Place,
}

/// A sender whose workload runs here and misses pages, and which nobody serves: [`take_up`](super::take_up) does.
pub struct Stranded {
    pub(super) migration: MigrationId,
    pub(super) visitor: Visitor,
}

/// Keeps a place at the desk.
pub(super) struct Place {
    _slot: Slot,
}

impl Stranded {
    /// Which migration brought it.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }
}

impl Offered {
    fn of(mut visitor: Visitor, slot: Slot) -> Option<Self> {
        // Nothing but offers waits for a turn.
        let wish = std::mem::replace(&mut visitor.wish, Wish::Ask(MigrationId(0)));
        match wish {
            Wish::Offer(offer, machine) => {
                Some(Self { visitor, offer: *offer, machine, place: Place { _slot: slot } })
            }
            _ => None,
        }
    }

    /// What is offered.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Who offers it, for people.
    pub fn peer(&self) -> &str {
        &self.visitor.peer
    }
}

/// The further connections of one migration, until it is over.
pub(super) struct Visitors {
    shared: Arc<Shared>,
    migration: MigrationId,
    visitors: Receiver<Visitor>,
}

impl Visitors {
    /// Waits for the next one.
    pub(super) fn next(&self, limit: Duration) -> Option<Visitor> {
        self.visitors.recv_timeout(limit).ok()
    }

    /// Whether the same peer offers the same workload anew.
    pub(super) fn is_superseded(&self) -> bool {
        self.shared.lock().is_superseded(self.migration)
    }

    /// Lets the desk answer a visitor with whom this migration has nothing to do now.
    pub(super) fn dismiss(&self, visitor: Visitor) {
        self.shared.clone().attend(|shared| shared.answer(visitor));
    }
}

/// What is known of the migration then is in the ledger: who still waits is answered from there.
impl Drop for Visitors {
    fn drop(&mut self) {
        self.shared.lock().end(self.migration);
        while let Ok(visitor) = self.visitors.try_recv() {
            self.dismiss(visitor);
        }
    }
}

/// Whoever has it measures the path; the next one may once it is dropped.
pub(super) struct Probing<'a>(&'a AtomicBool);

impl Drop for Probing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}
