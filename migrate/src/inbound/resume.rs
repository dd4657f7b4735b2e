//! A link that is lost in the rounds, and taken up over another one.
//!
//! The destination's memory is kept for [`Options::keep`](super::Options::keep), and what is known of it: the round under
//! way, and which of its pages arrived whole. A sender that says `Resume` in time is told both, and sends the rest of that
//! round and what was written since.
//!
//! *What arrived whole is told once, and only of the link that was lost.* The sender takes what it hears off the list of
//! what it owes, and what it does not hear it sends again. Were it told a second time, behind another lost link, the sender
//! could have sent a newer version of such a page meanwhile, and would take the old one for it.
//!
//! *A loaded destination begins anew.* Loading a state writes to memory here and there, and nobody knows where. So a sender that
//! lost its link behind `State`, and has not committed, finds new memory that is all zeros, and sends everything. It is told so by
//! `Anew` until it has opened a page stream behind it: a sender that took `Resumed` for the answer would leave out what it
//! had sent before.

use super::Inbound;
use super::desk::Visitors;
use super::streams::{Course, Streams};
use super::visitor::{Visitor, Wish};
use crate::destination::{Destination, Refusal};
use crate::error::{Error, Result};
use crate::report::{Event, micros};
use protocol::control::{MAX_BLOB_BYTES, Offer, Upstream};
use protocol::sparse;
use std::time::{Duration, Instant};

/// How long to wait for a visitor before looking around.
const LOOK: Duration = Duration::from_millis(50);

/// Whether an error says no more than that the link, or the peer behind it, is gone.
pub(super) fn is_lost(error: &Error) -> bool {
    matches!(error.root(), Error::Link(_) | Error::TimedOut { .. })
}

/// Looks who has come while the rounds go on. A sender that says `Resume` has given up the old link, whatever it looks
/// like from here.
pub(super) fn look(visitors: Option<&Visitors>, keeps: bool, came_back: &mut Option<Visitor>) -> Result<()> {
    let Some(visitors) = visitors else { return Ok(()) };
    while let Some(visitor) = visitors.next(Duration::ZERO) {
        if keeps && matches!(visitor.wish, Wish::Resume(_)) {
            *came_back = Some(visitor);
            return Err(Error::Link("the sender came back on another connection".into()));
        }
        // Nothing is decided yet, and the sender has not asked for that: whoever comes now is told what is known.
        visitors.dismiss(visitor);
    }
    Ok(())
}

impl Inbound<'_> {
    /// Whether the sender may come back to its rounds although its state is loaded.
    pub(super) fn comes_back_when_loaded(&self) -> bool {
        self.keeps && self.begins_anew
    }

    /// Loaded, and the sender goes back to its rounds: forgets all that arrived, and then tells it so.
    ///
    /// # Errors
    /// As [`Inbound::keep`]; `Host` where no room can be made any more.
    pub(super) fn begin_anew(
        &mut self,
        destination: &mut dyn Destination,
        course: Course,
        (offer, machine): (&Offer, &[u8]),
        visitor: Visitor,
    ) -> Result<Course> {
        self.let_go();
        // The old memory goes before there is new one: a host may not have room for both.
        drop(course);
        self.streams.take_arrived();
        self.is_anew = true;
        self.cancel.reopen();
        if let Err(Refusal { code, reason }) = destination.prepare(offer, machine) {
            visitor.refuse(code, &reason);
            return Err(Error::Host(format!("no room could be made anew: {reason}")));
        }
        let course = self.course(offer, destination);
        match self.take_up(&course, visitor) {
            Err(lost) if is_lost(&lost) => self.keep(&course, lost)?,
            done => done?,
        }
        Ok(course)
    }

    /// Keeps what arrived until the sender comes back.
    ///
    /// # Errors
    /// `lost` when it does not come in time, or its last word; `Interrupted`.
    pub(super) fn keep(&mut self, course: &Course, lost: Error) -> Result<()> {
        let lost = self.last_word(lost);
        if !is_lost(&lost) {
            return Err(lost);
        }
        self.let_go();
        tracing::warn!(error = %lost, keep_s = self.options.keep.as_secs(), "the link is lost; what arrived is kept");
        let reason = lost.to_string();
        self.observer.event(&Event::LinkLost { reason, wait_us: micros(self.options.keep) });
        let until = Instant::now() + self.options.keep;
        loop {
            self.cancel.check()?;
            let visitors = self.visitors.as_ref();
            if visitors.is_some_and(Visitors::is_superseded) {
                return Err(Error::Link("its sender has begun anew".into()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(lost);
            }
            let next = || visitors.and_then(|visitors| visitors.next(left.min(LOOK)));
            match self.came_back.take().or_else(next) {
                Some(visitor) if matches!(visitor.wish, Wish::Resume(_)) => {
                    match self.take_up(course, visitor) {
                        Err(error) if is_lost(&error) => {
                            tracing::warn!(%error, "the link was lost again");
                            self.let_go();
                        }
                        done => return done,
                    }
                }
                Some(visitor) => {
                    if let Some(visitors) = visitors {
                        visitors.dismiss(visitor);
                    }
                }
                None => self.desk.check()?,
            }
        }
    }

    /// Ends the old link. Behind this nothing writes to memory, and what arrived is known.
    fn let_go(&mut self) {
        self.talk.hang_up("lost");
        self.streams.join();
    }

    /// Goes on over a new link.
    fn take_up(&mut self, course: &Course, visitor: Visitor) -> Result<()> {
        let arrived = self.streams.take_arrived();
        self.received_before_bytes += self.streams.bytes();
        self.streams = Streams::none();
        self.missing = None;
        self.talk = visitor.talk;
        self.talk.allow_blobs(MAX_BLOB_BYTES);
        let (round, idle) = (self.round, self.options.idle);
        if self.is_anew {
            self.talk.say(&Upstream::Anew { round }, &[], idle)?;
        } else {
            let mut blob = sparse::encode(&arrived);
            if blob.len() as u64 > u64::from(MAX_BLOB_BYTES) {
                // What is not told is sent again.
                blob.clear();
            }
            self.talk.say(&Upstream::Resumed { round }, &blob, idle)?;
        }
        let arrived_pages = arrived.iter().map(protocol::page::PageSet::count).sum();
        self.observer.event(&Event::CameBack { round, arrived_pages });
        tracing::info!(round, arrived_pages, peer = visitor.peer, "the sender came back");
        self.report.resumes += 1;
        self.take_streams(course)?;
        // It opens them only behind the answer.
        self.is_anew = false;
        Ok(())
    }
}
