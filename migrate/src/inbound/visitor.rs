//! A connection that was greeted, and what it is about.

use crate::conversation::{Receiver, out_of_order};
use crate::error::{Error, Result, clean};
use crate::identity::Fingerprint;
use crate::link::Link;
use protocol::MigrationId;
use protocol::control::{Downstream, Offer, RefuseCode, Upstream};
use protocol::handshake::{Hello, POST_COPY};
use std::time::{Duration, Instant};

/// The longest blob of a first word, in bytes: a machine's description has some kilobytes, the listing of a container's files up to megabytes, and the
/// desk may hold a few dozens of them for peers that have not been accepted yet.
pub(crate) const MAX_MACHINE_BYTES: u32 = 4 << 20;

/// How long telling a peer something that nothing depends on may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a connection is about, by its first word.
#[derive(Debug)]
pub(super) enum Wish {
    /// A workload looks for a place; the blob describes its machine.
    Offer(Box<Offer>, Vec<u8>),
    /// What became of a migration?
    Ask(MigrationId),
    /// A further connection of a migration that is under way, and its number.
    Join(MigrationId, u16),
    /// The connection of a migration was lost, and this one takes its place.
    Resume(MigrationId),
    /// How fast is the path, for at most so many bytes?
    Probe(u64),
}

impl Wish {
    /// The wish behind a first word.
    fn of(word: Downstream, blob: Vec<u8>) -> Result<Self> {
        match word {
            Downstream::Offer(offer) => Ok(Self::Offer(Box::new(offer), blob)),
            Downstream::Ask { migration } => Ok(Self::Ask(migration)),
            Downstream::Join { migration, connection } => Ok(Self::Join(migration, connection)),
            Downstream::Resume { migration } => Ok(Self::Resume(migration)),
            Downstream::Probe { bytes } => Ok(Self::Probe(bytes)),
            Downstream::Cancel { reason } => Err(Error::PeerFailed { reason: clean(&reason) }),
            other => Err(out_of_order("Offer, Ask, Join, Resume or Probe", other.name())),
        }
    }

    /// Its first word's name, for logs.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Offer(..) => "Offer",
            Self::Ask(_) => "Ask",
            Self::Join(..) => "Join",
            Self::Resume(_) => "Resume",
            Self::Probe(_) => "Probe",
        }
    }
}

/// A connection whose ends know each other and have agreed on what they can, and its wish.
pub(super) struct Visitor {
    pub(super) talk: Receiver,
    /// Who it is, for people.
    pub(super) peer: String,
    /// Who it is, for decisions.
    pub(super) key: Fingerprint,
    /// What both ends can do.
    pub(super) capabilities: Vec<&'static str>,
    pub(super) wish: Wish,
    /// Both ends can do post-copy.
    pub(super) post_copy: bool,
    /// How long it took until the wish was heard.
    pub(super) greeted_in: Duration,
}

impl Visitor {
    /// Greets a new connection and hears what it wants. Each of its messages may take `limit`; `watch` is called in
    /// every wait, and its error ends it.
    ///
    /// # Errors
    /// Those of the link and of `watch`; `TimedOut`; `Protocol`; `Refused` when the two cannot talk, which was told.
    pub(super) fn greet(
        link: Box<dyn Link>,
        limit: Duration,
        watch: &mut dyn FnMut() -> Result<u64>,
    ) -> Result<Self> {
        let begun = Instant::now();
        let (peer, key) = (link.peer(), link.peer_key());
        let mut talk = Receiver::new(link, MAX_MACHINE_BYTES);
        match Self::first_word(&mut talk, limit, watch) {
            Ok((capabilities, wish)) => {
                let post_copy = capabilities.contains(&POST_COPY);
                Ok(Self { talk, peer, key, capabilities, wish, post_copy, greeted_in: begun.elapsed() })
            }
            Err(error) => {
                talk.hang_up("the greeting failed");
                Err(error)
            }
        }
    }

    fn first_word(
        talk: &mut Receiver,
        limit: Duration,
        watch: &mut dyn FnMut() -> Result<u64>,
    ) -> Result<(Vec<&'static str>, Wish)> {
        talk.introduce(&Upstream::Hello(Hello::ours()), limit)?;
        talk.preamble(limit, watch)?;
        let hello = match talk.hear("the sender's greeting", limit, watch)? {
            (Downstream::Hello(hello), _) => hello,
            (other, _) => return Err(out_of_order("Hello", other.name())),
        };
        let capabilities = match hello.agree() {
            Ok(capabilities) => capabilities,
            Err(error) => {
                let (code, reason) = (RefuseCode::Version, error.to_string());
                tell(talk, &Upstream::Refuse { code, reason: reason.clone() });
                return Err(Error::Refused { code, reason });
            }
        };
        tracing::info!(peer = clean(&hello.software), ?capabilities, "greeted");
        let (word, blob) = talk.hear("the sender's wish", limit, watch)?;
        Ok((capabilities, Wish::of(word, blob)?))
    }

    /// The memory of the workload that it offers, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        match &self.wish {
            Wish::Offer(offer, _) => offer.layout.memory_bytes(),
            _ => 0,
        }
    }

    /// The name of the workload that it offers.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.wish {
            Wish::Offer(offer, _) => Some(&offer.name),
            _ => None,
        }
    }

    /// Says no, and hangs up.
    pub(super) fn refuse(mut self, code: RefuseCode, reason: &str) {
        tracing::info!(peer = self.peer, wish = self.wish.name(), reason, "refused");
        tell(&mut self.talk, &Upstream::Refuse { code, reason: reason.into() });
        self.talk.hang_up(reason);
    }
}

/// Says something that nothing depends on.
pub(super) fn tell(talk: &mut Receiver, message: &Upstream) {
    if let Err(error) = talk.say(message, &[], FAREWELL) {
        tracing::debug!(%error, message = message.name(), "the sender could not be told");
    }
}
