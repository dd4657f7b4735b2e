//! A peer's reading loops, without the socket: what the fuzz targets and the tests feed bytes to.

use protocol::envelope::{self, Header};
use protocol::frame::{self, Frame, StreamPreamble};
use protocol::layout::Layout;
use protocol::{ProtocolError, Result};
use serde::de::DeserializeOwned;

/// Cuts `count` bytes off the front, as a read that fills a buffer does.
pub(crate) fn take<'a>(rest: &mut &'a [u8], count: usize, what: &'static str) -> Result<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(count).ok_or(ProtocolError::Truncated {
        what,
        found: rest.len() as u64,
        needed: count as u64,
    })?;
    *rest = tail;
    Ok(head)
}

/// The same for a length known at compile time.
pub(crate) fn array<const N: usize>(rest: &mut &[u8], what: &'static str) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    bytes.copy_from_slice(take(rest, N, what)?);
    Ok(bytes)
}

/// One message and its blob.
pub(crate) fn message<'a, T: DeserializeOwned>(
    rest: &mut &'a [u8],
    max_blob_bytes: u32,
) -> Result<(T, &'a [u8])> {
    let header = Header::decode(&array(rest, "the header of a message")?, max_blob_bytes)?;
    let body = take(rest, header.body_bytes(), "a message")?;
    let (json, blob) = body.split_at(header.json_bytes as usize);
    Ok((envelope::decode("test", json)?, blob))
}

/// A page stream from its first byte to its last, every check in the order of docs/wire-protocol.md.
pub(crate) fn page_stream(mut rest: &[u8], layout: &Layout, streams: u16) -> Result<Vec<Frame>> {
    let rest = &mut rest;
    let stream = StreamPreamble::decode(&array(rest, "the preamble of a page stream")?, streams)?.stream;
    let mut frames = Vec::new();
    let mut round_due = 0;
    while !rest.is_empty() {
        let (frame, mut sum) = Frame::decode(&array(rest, "the header of a page frame")?)?;
        let round = match &frame {
            Frame::Pages { run, round, .. } => {
                layout.check(run)?;
                frame::check_stream(run, stream, streams)?;
                assert!(run.end() > run.first && run.offset() / 4096 == run.first);
                *round
            }
            Frame::RoundEnd { round } => *round,
        };
        if round != round_due {
            let found = format!("round {round}");
            return Err(ProtocolError::OutOfOrder { expected: "the current round", found });
        }
        if matches!(frame, Frame::RoundEnd { .. }) {
            round_due += 1;
        }
        sum.update(take(rest, frame.payload_bytes(), "the payload of a page frame")?);
        sum.verify()?;
        frames.push(frame);
    }
    Ok(frames)
}
