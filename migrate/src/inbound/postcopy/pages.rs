//! A page stream whose pages go to a workload that runs: whole frames, checked before anything is done with them.

use super::News;
use super::books::Books;
use crate::destination::Incomplete;
use crate::error::{Error, Result};
use crate::link::PageReceiver;
use bytes::Bytes;
use crossbeam_channel::Sender;
use protocol::ProtocolError;
use protocol::frame::{Frame, HEADER_BYTES, POST_COPY_STREAMS, PREAMBLE_BYTES, StreamPreamble};
use protocol::payload::Encoding;

/// One stream, from its first byte to its clean end.
pub(super) fn run(
    stream: Box<dyn PageReceiver>,
    workload: &dyn Incomplete,
    books: &Books,
    teller: &Sender<News>,
) -> Result<()> {
    let mut reader = Reader { stream, chunk: Bytes::new() };
    let mut preamble = [0; PREAMBLE_BYTES];
    if !reader.fill(&mut preamble, "the beginning of a page stream")? {
        return Ok(());
    }
    StreamPreamble::decode(&preamble, POST_COPY_STREAMS)?;
    let (mut header, mut payload) = ([0; HEADER_BYTES], Vec::new());
    while reader.fill(&mut header, "a page frame's header")? {
        let (frame, mut sum) = Frame::decode(&header)?;
        // At most a megabyte.
        payload.resize(frame.payload_bytes(), 0);
        if !payload.is_empty() && !reader.fill(&mut payload, "a page frame's payload")? {
            let (found, needed) = (0, payload.len() as u64);
            return Err(ProtocolError::Truncated { what: "a page frame's payload", found, needed }.into());
        }
        sum.update(&payload);
        sum.verify()?;
        let Frame::Pages { run, encoding, .. } = frame else {
            return Err(out_of_order("the end of a round".into()));
        };
        workload.layout().check(&run)?;
        if !books.expects(&run) {
            return Err(out_of_order(format!("pages {}+{} that were not missing", run.first, run.count)));
        }
        match encoding {
            Encoding::Raw => workload.place(run, &payload)?,
            Encoding::Zero => workload.place_zeros(run)?,
            // A page that a vCPU waits for is sent as it is; so are those behind it.
            Encoding::Zstd | Encoding::Lz4 | Encoding::Delta | Encoding::Known => {
                return Err(out_of_order(format!("pages {}+{} as {encoding:?}", run.first, run.count)));
            }
        }
        if books.placed(&run) {
            // Whoever listened is gone when everything is there.
            let _ = teller.send(News::Placed);
        }
    }
    Ok(())
}

fn out_of_order(found: String) -> Error {
    Error::Protocol(ProtocolError::OutOfOrder { expected: "pages that were missing", found })
}

struct Reader {
    stream: Box<dyn PageReceiver>,
    /// What has arrived and was not used.
    chunk: Bytes,
}

impl Reader {
    /// Fills a buffer; `false` at the clean end of the stream, if nothing of it was there.
    fn fill(&mut self, buffer: &mut [u8], what: &'static str) -> Result<bool> {
        let mut filled = 0;
        while filled < buffer.len() {
            if self.chunk.is_empty() {
                match self.stream.read()? {
                    Some(chunk) => self.chunk = chunk,
                    None if filled == 0 => return Ok(false),
                    None => {
                        let (found, needed) = (filled as u64, buffer.len() as u64);
                        return Err(ProtocolError::Truncated { what, found, needed }.into());
                    }
                }
                continue;
            }
            let part = self.chunk.split_to(self.chunk.len().min(buffer.len() - filled));
            buffer[filled..filled + part.len()].copy_from_slice(&part);
            filled += part.len();
        }
        Ok(true)
    }
}
