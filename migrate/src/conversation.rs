//! Messages on the control stream of a link: whole ones, bounded, in time.
//!
//! Either end has one [`Conversation`], which owns the link. It *says* messages of its own direction and *hears*
//! those of the other. Every wait is cut into slices, between which the caller looks at what else may end it.

use crate::error::{Error, Result};
use crate::link::bundle::Bundle;
use crate::link::{Link, LinkStats};
use protocol::control::{Downstream, Upstream};
use protocol::handshake::{PREAMBLE_BYTES, Preamble};
use protocol::{ProtocolError, envelope};
use serde::{Serialize, de::DeserializeOwned};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// How long a wait goes on before it looks around: what a cancelled migration may take to notice.
const SLICE: Duration = Duration::from_millis(50);

/// A blob is read in portions of this many bytes, so that memory is used for what arrived and not for what was
/// announced.
const PORTION_BYTES: usize = 1 << 20;

/// What a link must move within the limit of a wait for the limit to begin again. More than the keep-alive packets of
/// a transport, so that a peer that is alive but stuck is found out.
pub(crate) const MOVED_BYTES: u64 = 64 << 10;

/// The sender's side of the control stream.
pub(crate) type Sender = Conversation<Downstream, Upstream>;

/// The receiver's side of the control stream.
pub(crate) type Receiver = Conversation<Upstream, Downstream>;

/// The control stream, seen by an end that says `S` and hears `H`.
pub(crate) struct Conversation<S, H> {
    /// `None` once it hung up.
    link: Option<Box<dyn Link>>,
    max_blob_bytes: u32,
    /// The peer's preamble was waited for and did not come whole.
    in_preamble: bool,
    /// The message that is arriving: its header's bytes, the header once it is whole, and its body, of which
    /// `body_bytes` are there.
    header_bytes: [u8; envelope::HEADER_BYTES],
    header: Option<envelope::Header>,
    body: Vec<u8>,
    body_bytes: usize,
    directions: PhantomData<fn(S) -> H>,
}

impl<S: Serialize, H: DeserializeOwned> Conversation<S, H> {
    /// A conversation over a new link; what is heard has blobs of at most `max_blob_bytes`.
    pub(crate) fn new(link: Box<dyn Link>, max_blob_bytes: u32) -> Self {
        Self { link: Some(link), max_blob_bytes, ..Self::none() }
    }

    /// A conversation that is yet to get a link.
    pub(crate) fn none() -> Self {
        Self {
            link: None,
            max_blob_bytes: 0,
            in_preamble: false,
            header_bytes: [0; envelope::HEADER_BYTES],
            header: None,
            body: Vec::new(),
            body_bytes: 0,
            directions: PhantomData,
        }
    }

    /// From now on what is heard may have blobs of up to `max_blob_bytes`.
    pub(crate) fn allow_blobs(&mut self, max_blob_bytes: u32) {
        self.max_blob_bytes = max_blob_bytes;
    }

    /// The link below.
    ///
    /// # Errors
    /// `Link` once it was hung up.
    pub(crate) fn link(&mut self) -> Result<&mut dyn Link> {
        open(&mut self.link)
    }

    /// What the transport measured; nothing once it was hung up.
    pub(crate) fn stats(&self) -> LinkStats {
        self.link.as_ref().map(|link| link.stats()).unwrap_or_default()
    }

    /// Says who we are: the preamble and `hello`, in one write.
    pub(crate) fn introduce(&mut self, hello: &S, limit: Duration) -> Result<()> {
        let mut bytes = Preamble::OURS.encode().to_vec();
        bytes.extend(envelope::encode(hello, &[])?);
        self.link()?.write(&bytes, limit)
    }

    /// Reads the peer's preamble; its hello is then heard like any message.
    pub(crate) fn preamble(&mut self, limit: Duration, watch: &mut dyn FnMut() -> Result<u64>) -> Result<()> {
        let mut bytes = [0; PREAMBLE_BYTES];
        let mut wait = Wait::new("the peer's greeting", limit);
        self.in_preamble = true;
        while !wait.slice(self.link()?, &mut bytes, watch)? {}
        self.in_preamble = false;
        Preamble::decode(&bytes)?;
        Ok(())
    }

    /// Says one message.
    pub(crate) fn say(&mut self, message: &S, blob: &[u8], limit: Duration) -> Result<()> {
        self.link()?.write(&envelope::encode(message, blob)?, limit)
    }

    /// Hears the next message and its blob.
    ///
    /// `watch` is called before every slice of the wait; an error of its ends the wait, and it answers how many bytes
    /// it saw move so far: as long as the link moves, the limit begins again. A wait that was ended can be taken up by
    /// another call, in the middle of a message too.
    ///
    /// # Errors
    /// Those of the link and of `watch`; `TimedOut` with `what`; `Protocol` for bytes that are not a message.
    pub(crate) fn hear(
        &mut self,
        what: &'static str,
        limit: Duration,
        watch: &mut dyn FnMut() -> Result<u64>,
    ) -> Result<(H, Vec<u8>)> {
        if self.in_preamble {
            // What came of it would be taken for the header of a message.
            return Err(Error::Link("it was lost in the middle of the greeting".into()));
        }
        let mut wait = Wait::new(what, limit);
        let header = loop {
            if let Some(header) = self.header {
                break header;
            }
            let Self { link, header_bytes, .. } = self;
            if wait.slice(open(link)?, header_bytes, watch)? {
                self.header = Some(envelope::Header::decode(&self.header_bytes, self.max_blob_bytes)?);
            }
        };
        while self.body_bytes < header.body_bytes() {
            let portion = PORTION_BYTES.min(header.body_bytes() - self.body_bytes);
            self.body.resize(self.body_bytes + portion, 0);
            let Self { link, body, body_bytes, .. } = self;
            if wait.slice(open(link)?, &mut body[*body_bytes..], watch)? {
                self.body_bytes += portion;
            }
        }
        self.header = None;
        self.body_bytes = 0;
        let mut json = std::mem::take(&mut self.body);
        let blob = json.split_off(header.json_bytes as usize);
        Ok((envelope::decode("control", &json)?, blob))
    }

    /// The link, behind the last message of a conversation that is over.
    ///
    /// # Errors
    /// `Link` once it was hung up.
    pub(crate) fn into_link(self) -> Result<Box<dyn Link>> {
        self.link.ok_or_else(hung_up)
    }

    /// Spreads the next `streams` page streams over these connections, too.
    pub(crate) fn widen(&mut self, further: Vec<Box<dyn Link>>, streams: u16) {
        if !further.is_empty() {
            self.link = self.link.take().map(|first| Box::new(Bundle::new(first, further, streams)) as _);
        }
    }

    /// Ends the link: what was said is delivered, and the peer sees the reason.
    pub(crate) fn hang_up(&mut self, reason: &str) {
        if let Some(link) = self.link.take() {
            link.close(reason);
        }
    }
}

fn open(link: &mut Option<Box<dyn Link>>) -> Result<&mut dyn Link> {
    match link {
        Some(link) => Ok(link.as_mut()),
        None => Err(hung_up()),
    }
}

fn hung_up() -> Error {
    Error::Link("it was closed at this end".into())
}

/// One wait for something on the control stream.
struct Wait {
    what: &'static str,
    limit: Duration,
    /// Since when nothing moved.
    still_since: Instant,
    /// How much had moved then.
    moved: u64,
}

impl Wait {
    fn new(what: &'static str, limit: Duration) -> Self {
        Self { what, limit, still_since: Instant::now(), moved: 0 }
    }

    /// Waits a slice for `buffer` to be filled; whether it was. A buffer that was not filled must come again.
    fn slice(
        &mut self,
        link: &mut dyn Link,
        buffer: &mut [u8],
        watch: &mut dyn FnMut() -> Result<u64>,
    ) -> Result<bool> {
        let moved = watch()?.saturating_add(link.stats().sent_wire_bytes);
        if moved >= self.moved.saturating_add(MOVED_BYTES) {
            self.moved = moved;
            self.still_since = Instant::now();
        }
        let left = self.limit.saturating_sub(self.still_since.elapsed());
        match link.read_exact(buffer, self.what, left.min(SLICE)) {
            Ok(()) => Ok(true),
            Err(Error::TimedOut { .. }) if left > SLICE => Ok(false),
            Err(Error::TimedOut { .. }) => Err(Error::TimedOut { what: self.what, after: self.limit }),
            Err(error) => Err(error),
        }
    }
}

/// The error for a message that was not due.
pub(crate) fn out_of_order(expected: &'static str, found: &str) -> Error {
    Error::Protocol(ProtocolError::OutOfOrder { expected, found: found.into() })
}
