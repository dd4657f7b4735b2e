//! Further connections of a migration: all of them are there before the first page is.

use super::Inbound;
use super::visitor::{Visitor, Wish};
use crate::conversation::{Receiver, out_of_order};
use crate::error::{Error, Result, clean};
use crate::link::Link;
use protocol::control::{Downstream, RefuseCode, Upstream};
use protocol::handshake::CONNECTIONS;
use std::time::{Duration, Instant};

/// How long to wait for a connection before looking around.
const LOOK: Duration = Duration::from_millis(20);

impl Inbound<'_> {
    /// Sends away who came before the offer was accepted.
    pub(super) fn turn_away_the_early(&self) {
        let Some(visitors) = &self.visitors else { return };
        while let Some(visitor) = visitors.next(Duration::ZERO) {
            match visitor.wish {
                Wish::Join(..) => {
                    visitor.refuse(
                        RefuseCode::BadOffer,
                        "the offer of this migration has not been accepted yet",
                    );
                }
                _ => visitors.dismiss(visitor),
            }
        }
    }

    /// Takes the further ones of `connections`, each once, over which the next `streams` page streams are spread.
    ///
    /// # Errors
    /// `TimedOut` when they do not all come; the sender's giving up; `Link` where a connection is lost, or the sender
    /// came back on another one.
    pub(super) fn join(&mut self, connections: u16, streams: u16) -> Result<()> {
        let (what, after) = ("all connections of the sender", self.options.idle);
        let mut further: Vec<Option<Box<dyn Link>>> = (1..connections).map(|_| None).collect();
        let until = Instant::now() + after;
        while further.iter().any(Option::is_none) {
            self.cancel.check()?;
            if Instant::now() >= until {
                return Err(Error::TimedOut { what, after });
            }
            match self.visitors.as_ref().and_then(|visitors| visitors.next(LOOK)) {
                Some(visitor) => self.take(visitor, &mut further)?,
                None => self.nothing_else(what)?,
            }
        }
        self.talk.widen(further.into_iter().flatten().collect(), streams);
        Ok(())
    }

    /// One who came while connections are due.
    fn take(&mut self, mut visitor: Visitor, further: &mut [Option<Box<dyn Link>>]) -> Result<()> {
        let number = match visitor.wish {
            Wish::Join(_, number) => usize::from(number),
            Wish::Resume(_) if self.keeps => {
                self.came_back = Some(visitor);
                return Err(Error::Link("the sender came back on another connection".into()));
            }
            _ => {
                if let Some(visitors) = &self.visitors {
                    visitors.dismiss(visitor);
                }
                return Ok(());
            }
        };
        if !visitor.capabilities.contains(&CONNECTIONS) {
            visitor.refuse(
                RefuseCode::BadOffer,
                "this connection did not greet with the capability connections",
            );
            return Ok(());
        }
        match number.checked_sub(1).and_then(|at| further.get_mut(at)) {
            None => {
                let reason = format!("there is no further connection {number}: {} are due", further.len());
                visitor.refuse(RefuseCode::BadOffer, &reason);
            }
            Some(Some(_)) => visitor.refuse(RefuseCode::Busy, "a connection of this number is here already"),
            Some(place) => {
                visitor.talk.say(&Upstream::Accept, &[], self.options.idle)?;
                tracing::debug!(number, peer = visitor.peer, "a further connection");
                *place = Some(Receiver::into_link(visitor.talk)?);
            }
        }
        Ok(())
    }

    /// Until all connections are there, the sender has nothing to say on the first one but that it gives up.
    fn nothing_else(&mut self, what: &'static str) -> Result<()> {
        match self.talk.hear(what, Duration::ZERO, &mut || Ok(0)) {
            Err(Error::TimedOut { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok((Downstream::Cancel { reason }, _)) => Err(Error::PeerFailed { reason: clean(&reason) }),
            Ok((other, _)) => Err(out_of_order("Cancel or nothing", other.name())),
        }
    }
}
