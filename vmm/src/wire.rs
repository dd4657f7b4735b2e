//! Messages over a unix stream socket, for both ends: envelopes of [`protocol::envelope`], file
//! descriptors with the first byte, and a time limit for everything.

use std::{
    io::{IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use protocol::{
    envelope::{self, HEADER_BYTES, Header},
    monitor::{MAX_BLOB_BYTES, MAX_FDS},
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{Error, Result};

/// What is read at once: memory for a blob grows by this as its bytes come in, not by what a header
/// promises. Bytes.
const CHUNK: usize = 256 << 10;

/// A whole message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) json: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// What the JSON says.
    ///
    /// # Errors
    /// [`Error::Protocol`].
    pub(crate) fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        envelope::decode("control", &self.json).map_err(|error| Error::Protocol(error.to_string()))
    }
}

/// One end of a control connection.
pub(crate) struct Wire {
    stream: UnixStream,
    /// Whether descriptors may come in. A server never wants any.
    takes_fds: bool,
}

/// How long to wait for a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For its first byte; `None`: for ever.
    pub(crate) first: Option<Duration>,
    /// For the rest of it, once it began.
    pub(crate) rest: Duration,
}

impl Wire {
    pub(crate) fn new(stream: UnixStream, takes_fds: bool) -> Self {
        Self { stream, takes_fds }
    }

    /// Sends a message within `limit`.
    ///
    /// # Errors
    /// [`Error::Timeout`], or [`Error::Protocol`] when the other end is gone or the message too large.
    pub(crate) fn send<T: Serialize>(
        &mut self,
        message: &T,
        blob: &[u8],
        fds: &[OwnedFd],
        limit: Duration,
    ) -> Result<()> {
        let bytes = envelope::encode(message, blob).map_err(|error| Error::Protocol(error.to_string()))?;
        let deadline = Instant::now() + limit;
        let mut rest = &bytes[..];
        let mut fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        while !rest.is_empty() {
            let left = remaining(deadline).ok_or_else(|| timeout("send a message", limit))?;
            self.stream.set_write_timeout(Some(left)).map_err(Error::host("limit a send"))?;
            match send_some(&self.stream, rest, &fds) {
                Ok(sent) => {
                    fds.clear();
                    rest = rest.get(sent..).unwrap_or(&[]);
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(Error::Protocol(format!("sending failed: {error}"))),
            }
        }
        Ok(())
    }

    /// Waits for a message. `None`: the other end closed the connection between two messages.
    ///
    /// # Errors
    /// [`Error::Timeout`], or [`Error::Protocol`] for what is not a message of at most the documented
    /// size, or ends in the middle.
    pub(crate) fn receive(&mut self, patience: Patience) -> Result<Option<Message>> {
        let mut header = [0; HEADER_BYTES];
        let (first, fds) = match self.receive_first(&mut header, patience.first)? {
            (0, _) => return Ok(None),
            first => first,
        };
        let deadline = Instant::now() + patience.rest;
        let waited = patience.rest;
        self.fill(header.get_mut(first..).unwrap_or(&mut []), deadline, waited)?;
        let header =
            Header::decode(&header, MAX_BLOB_BYTES).map_err(|error| Error::Protocol(error.to_string()))?;
        let json = self.read_part(header.json_bytes as usize, deadline, waited)?;
        let blob = self.read_part(header.blob_bytes as usize, deadline, waited)?;
        Ok(Some(Message { json, blob, fds }))
    }

    fn read_part(&mut self, length: usize, deadline: Instant, waited: Duration) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let start = bytes.len();
            bytes.resize(length.min(start + CHUNK), 0);
            self.fill(&mut bytes[start..], deadline, waited)?;
        }
        Ok(bytes)
    }

    fn fill(&mut self, mut buffer: &mut [u8], deadline: Instant, waited: Duration) -> Result<()> {
        while !buffer.is_empty() {
            let left = remaining(deadline).ok_or_else(|| timeout("receive the rest of a message", waited))?;
            self.stream.set_read_timeout(Some(left)).map_err(Error::host("limit a receive"))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(Error::Protocol("the connection ended inside a message".into())),
                Ok(read) => buffer = buffer.get_mut(read..).unwrap_or(&mut []),
                Err(error) if is_retry(error.kind()) => {}
                Err(error) => return Err(Error::Protocol(format!("receiving failed: {error}"))),
            }
        }
        Ok(())
    }

    /// The first bytes of a message and the descriptors that came with them.
    fn receive_first(&mut self, buffer: &mut [u8], limit: Option<Duration>) -> Result<(usize, Vec<OwnedFd>)> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = match deadline {
                Some(deadline) => Some(
                    remaining(deadline)
                        .ok_or_else(|| timeout("receive a message", limit.unwrap_or_default()))?,
                ),
                None => None,
            };
            self.stream.set_read_timeout(left).map_err(Error::host("limit a receive"))?;
            match receive_some(&self.stream, buffer, self.takes_fds) {
                Ok(received) => return Ok(received),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok((0, Vec::new())),
                Err(error) => return Err(Error::Protocol(format!("receiving failed: {error}"))),
            }
        }
    }
}

/// What is left until a deadline; `None`: nothing. Never zero, which sockets take for "no limit".
fn remaining(deadline: Instant) -> Option<Duration> {
    let left = deadline.checked_duration_since(Instant::now())?;
    (!left.is_zero()).then(|| left.max(Duration::from_micros(1)))
}

fn timeout(what: &'static str, waited: Duration) -> Error {
    Error::Timeout { what, waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX) }
}

fn is_retry(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(kind, Interrupted | TimedOut | WouldBlock)
}

fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::MSGSIZE);
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

fn receive_some(
    stream: &UnixStream,
    buffer: &mut [u8],
    takes_fds: bool,
) -> rustix::io::Result<(usize, Vec<OwnedFd>)> {
    let room = if takes_fds { rustix::cmsg_space!(ScmRights(MAX_FDS)) } else { 0 };
    let mut space = vec![MaybeUninit::uninit(); room];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((received.bytes, fds))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsRawFd};

    use protocol::monitor::{Reply, Request};

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const PATIENCE: Patience = Patience { first: Some(SOON), rest: SOON };

    fn pair() -> (Wire, Wire) {
        let (one, two) = UnixStream::pair().unwrap();
        (Wire::new(one, false), Wire::new(two, true))
    }

    #[test]
    fn messages_blobs_and_descriptors_arrive() {
        let (mut server, mut client) = pair();
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let blob = vec![7; 3 * CHUNK / 2];
        let sender = std::thread::spawn(move || {
            server.send(&Reply::Saved, &blob, &[file], Duration::from_secs(5)).unwrap();
            server
        });
        let patience = Patience { first: None, rest: Duration::from_secs(5) };
        let message = client.receive(patience).unwrap().unwrap();
        assert_eq!(message.decode::<Reply>().unwrap(), Reply::Saved);
        assert_eq!(message.blob.len(), 3 * CHUNK / 2);
        assert!(message.fds[0].as_raw_fd() > 2);
        drop(sender.join().unwrap());
        assert!(client.receive(patience).unwrap().is_none());
    }

    #[test]
    fn a_peer_that_stops_talking_is_timed_out() {
        let (mut server, mut client) = pair();
        assert!(matches!(server.receive(PATIENCE), Err(Error::Timeout { what: "receive a message", .. })));
        client.stream.write_all(&[1, 0]).unwrap();
        let silent = server.receive(PATIENCE).unwrap_err();
        assert!(matches!(silent, Error::Timeout { what: "receive the rest of a message", .. }));
    }

    #[test]
    fn garbage_is_refused_before_it_is_read() {
        for garbage in [
            vec![0xff; 8],
            vec![0; 8],
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            vec![1, 0, 0, 0, 0, 0, 0, 0, b'x'],
        ] {
            let (mut server, mut client) = pair();
            client.stream.write_all(&garbage).unwrap();
            let outcome = server.receive(PATIENCE).and_then(|message| match message {
                Some(message) => message.decode::<Request>().map(drop),
                None => Ok(()),
            });
            assert!(matches!(outcome, Err(Error::Protocol(_))), "{garbage:?}: {outcome:?}");
        }
    }

    #[test]
    fn an_end_in_the_middle_is_not_an_end() {
        let (mut server, mut client) = pair();
        client.stream.write_all(&[9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
        drop(client);
        assert!(matches!(server.receive(PATIENCE), Err(Error::Protocol(_))));
    }

    #[test]
    fn descriptors_that_nobody_asked_for_are_closed() {
        let (mut server, mut client) = pair();
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        client.send(&Request::Status, &[], &[file], SOON).unwrap();
        assert!(server.receive(PATIENCE).unwrap().unwrap().fds.is_empty());
    }
}
