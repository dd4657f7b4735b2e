//! What became of a connection, in words for an operator.

use crate::error::{Error, clean};
use crate::identity::{Fingerprint, this_host};
use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// TLS alerts (RFC 8446, section 6.2) that tell what to do.
mod alert {
    /// Sent for a key that is not trusted: see `Gate::check`.
    pub(super) const ACCESS_DENIED: u8 = 49;
    pub(super) const CERTIFICATE_REQUIRED: u8 = 116;
    pub(super) const NO_APPLICATION_PROTOCOL: u8 = 120;
}

/// What an error message needs to know of a connection.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    /// Address, and name and fingerprint as far as known.
    pub(super) peer: String,
    /// This host's own key.
    pub(super) own: Fingerprint,
    /// How long the peer may be silent.
    pub(super) idle_timeout: Duration,
    /// Set when the peer's kernel says that its process is gone.
    pub(super) gone: Arc<AtomicBool>,
}

impl Ends {
    /// What is known before anything was heard of the peer but its address.
    pub(super) fn new(address: SocketAddr, own: Fingerprint, idle_timeout: Duration) -> Self {
        Self { peer: address.to_string(), own, idle_timeout, gone: Arc::default() }
    }

    /// Why the connection is no more.
    pub(super) fn lost(&self, error: &ConnectionError) -> Error {
        let peer = &self.peer;
        let code = match error {
            ConnectionError::TransportError(error) => Some(error.code),
            ConnectionError::ConnectionClosed(close) => Some(close.error_code),
            _ => None,
        };
        let alert = |number| code == Some(TransportErrorCode::crypto(number));
        if alert(alert::ACCESS_DENIED) {
            return Error::Identity(format!(
                "{peer} does not trust this host: run `migrate keys trust {} {}` there",
                this_host(),
                self.own
            ));
        }
        if alert(alert::CERTIFICATE_REQUIRED) {
            return Error::Identity(format!("{peer} showed no key: only another `migrate` may connect"));
        }
        if alert(alert::NO_APPLICATION_PROTOCOL) {
            return Error::Link(format!(
                "{peer} speaks QUIC, but not this version of migrate's protocol: run the same release on both hosts"
            ));
        }
        Error::Link(match error {
            ConnectionError::TimedOut => format!(
                "{peer} sent nothing for {} s: the host or the network between is down",
                self.idle_timeout.as_secs_f32()
            ),
            ConnectionError::ApplicationClosed(close) => {
                let reason = clean(&String::from_utf8_lossy(&close.reason));
                match reason.trim() {
                    "" => format!("{peer} ended the connection without a word: see its log"),
                    reason => format!("{peer} ended the connection: {reason}"),
                }
            }
            ConnectionError::ConnectionClosed(close) => {
                format!("{peer} ended the connection: {}", clean(&close.to_string()))
            }
            ConnectionError::TransportError(error) => {
                format!("the connection to {peer} broke QUIC's rules: {}", clean(&error.to_string()))
            }
            ConnectionError::VersionMismatch => {
                format!(
                    "{peer} speaks no version of QUIC that this host speaks: run the same release on both"
                )
            }
            ConnectionError::Reset => format!("{peer} forgot the connection: was `migrate` restarted there?"),
            ConnectionError::LocallyClosed if self.gone.load(Ordering::Relaxed) => {
                format!("{peer} is gone: nobody listens at that port any more; see the log there")
            }
            ConnectionError::LocallyClosed => format!("the connection to {peer} was closed here"),
            ConnectionError::CidsExhausted => format!("too many connections to {peer}"),
        })
    }

    /// Why a write failed.
    pub(super) fn not_written(&self, error: &WriteError) -> Error {
        match error {
            WriteError::ConnectionLost(error) => self.lost(error),
            WriteError::Stopped(_) => Error::Link(format!("{} stopped taking this stream", self.peer)),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                Error::Link(format!("the stream to {} is closed here already", self.peer))
            }
        }
    }

    /// This end cut a stream, because a test wants it.
    pub(super) fn cut(&self) -> Error {
        Error::Link(format!("a stream to {} was cut here for a test", self.peer))
    }

    /// Why a read failed.
    pub(super) fn not_read(&self, error: &ReadError) -> Error {
        match error {
            ReadError::ConnectionLost(error) => self.lost(error),
            ReadError::Reset(_) => Error::Link(format!("{} cut a stream short", self.peer)),
            other => Error::Link(format!("the stream from {} cannot be read: {other}", self.peer)),
        }
    }
}

/// The peer as people know it: address, name in the trust store, key.
pub(super) struct Peer<'a> {
    pub(super) address: &'a dyn fmt::Display,
    pub(super) name: Option<&'a str>,
    pub(super) key: Fingerprint,
}

impl fmt::Display for Peer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name {
            Some(name) => write!(f, "{name} at {} ({})", self.address, self.key),
            None => write!(f, "{} ({})", self.address, self.key),
        }
    }
}
