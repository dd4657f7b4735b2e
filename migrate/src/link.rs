//! A connection between two engines: bytes in order, with back-pressure and time limits.
//!
//! A link knows nothing of messages. It has one control stream, both ways, and page streams that flow one way,
//! from the sender to the receiver. The engine is synchronous: every call blocks until it is done, its time is
//! up, or the link is lost.

pub(crate) mod bundle;
pub mod duplex;
pub mod quic;

use crate::error::Result;
use crate::identity::Fingerprint;
use bytes::Bytes;
use std::time::Duration;

/// One end of a connection.
pub trait Link: Send {
    /// Who is at the other end, for people: an address, a fingerprint.
    fn peer(&self) -> String;

    /// The key that the other end has proved to have: what tells one peer from another, whatever its address.
    fn peer_key(&self) -> Fingerprint;

    /// Writes all of `bytes` to the control stream and sends them at once.
    ///
    /// # Errors
    /// `Link` when the connection is lost, `TimedOut` when the peer takes nothing for `timeout`.
    fn write(&mut self, bytes: &[u8], timeout: Duration) -> Result<()>;

    /// Fills `buffer` from the control stream. What arrived before the connection ended can still be read behind
    /// its end, so that a peer's last word is not lost.
    ///
    /// A read that timed out has kept what it got: the next call continues where it stopped, so that a caller may
    /// wait in slices (and look at its cancel flag between them) as long as it asks for the same length again.
    ///
    /// # Errors
    /// `Link` when the connection is lost or ends before that, `TimedOut` (with `what`) when `timeout` is over.
    fn read_exact(&mut self, buffer: &mut [u8], what: &'static str, timeout: Duration) -> Result<()>;

    /// Sender: opens the next page stream.
    ///
    /// # Errors
    /// As [`Link::write`].
    fn open_page_stream(&mut self) -> Result<Box<dyn PageSender>>;

    /// Sender: opens a page stream that goes before the others whenever a packet is filled.
    ///
    /// # Errors
    /// As [`Link::write`].
    fn open_urgent_stream(&mut self) -> Result<Box<dyn PageSender>>;

    /// Receiver: takes the next page stream that the peer opened.
    ///
    /// # Errors
    /// As [`Link::read_exact`].
    fn accept_page_stream(&mut self, timeout: Duration) -> Result<Box<dyn PageReceiver>>;

    /// What the transport measured so far.
    fn stats(&self) -> LinkStats;

    /// Ends the connection: what was written before is delivered (within about a second), then the peer sees a
    /// clean end with this reason.
    fn close(self: Box<Self>, reason: &str);
}

/// The sending end of a page stream. Dropping it ends the stream cleanly, behind everything that was written.
pub trait PageSender: Send {
    /// Writes all chunks in order; blocks while the peer's window is full.
    ///
    /// # Errors
    /// `Link` when the connection is lost, `TimedOut` when nothing moved for the link's stall timeout.
    fn write(&mut self, chunks: &mut [Bytes]) -> Result<()>;
}

/// The receiving end of a page stream.
pub trait PageReceiver: Send {
    /// The next bytes, as many as the transport has in one piece; `None` at the clean end of the stream, which only
    /// the peer's sender makes: the end of the connection is never one.
    ///
    /// # Errors
    /// `Link` when the connection is lost or closed. It waits without limit while the connection lives: the link's own
    /// idle timeout bounds a dead peer, and closing the link ends the wait.
    fn read(&mut self) -> Result<Option<Bytes>>;
}

/// What a transport measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct LinkStats {
    /// Smoothed round-trip time in microseconds.
    pub rtt_us: u64,
    /// Bytes that went out, retransmissions and headers included.
    pub sent_wire_bytes: u64,
    /// Packets that were lost.
    pub lost_packets: u64,
    /// The path's largest packet in bytes, as far as found.
    pub mtu_bytes: u16,
}
