//! The page streams of a QUIC link, as the synchronous engine sees them.

use super::cut::{self, Fuse};
use super::reason::Ends;
use crate::error::{Error, Result};
use crate::link::{PageReceiver, PageSender};
use bytes::Bytes;
use quinn::{RecvStream, SendStream, VarInt};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;

/// The most bytes handed to the engine in one piece.
const MAX_CHUNK_BYTES: usize = 1 << 20;

type Delivery = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Streams that were finished and whose last bytes the peer may not have yet.
#[derive(Clone, Default)]
pub(super) struct Deliveries(Arc<Mutex<Vec<Delivery>>>);

impl Deliveries {
    /// Finishes a stream and remembers it until [`Deliveries::take`].
    pub(super) fn finish(&self, stream: &mut SendStream) {
        if stream.finish().is_ok() {
            let stopped = stream.stopped();
            let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            list.push(Box::pin(async move {
                let _ = stopped.await;
            }));
        }
    }

    /// What is still to be waited for.
    pub(super) fn take(&self) -> Vec<Delivery> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Writes pages; dropping it ends the stream cleanly.
pub(super) struct Sender {
    pub(super) stream: SendStream,
    pub(super) fuse: Option<Fuse>,
    /// Held, so that the transport outlives the link while an engine thread still has a stream.
    pub(super) runtime: Arc<Runtime>,
    pub(super) ends: Arc<Ends>,
    pub(super) stall_timeout: Duration,
    pub(super) deliveries: Deliveries,
}

impl PageSender for Sender {
    fn write(&mut self, chunks: &mut [Bytes]) -> Result<()> {
        let Self { stream, runtime, ends, stall_timeout, fuse, .. } = self;
        let after = *stall_timeout;
        if let Some(fuse) = fuse {
            if fuse.is_burnt() {
                // It fails only for a closed stream.
                let _ = stream.reset(VarInt::from_u32(cut::CODE));
                return Err(ends.cut());
            }
            fuse.passed(chunks.iter().map(Bytes::len).sum());
        }
        runtime.block_on(async {
            let mut rest = chunks;
            while !rest.is_empty() {
                let written = tokio::time::timeout(after, stream.write_chunks(rest))
                    .await
                    .map_err(|_| Error::TimedOut { what: "the peer to take pages", after })?
                    .map_err(|error| ends.not_written(&error))?;
                rest = &mut rest[written.chunks..];
            }
            Ok(())
        })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.deliveries.finish(&mut self.stream);
    }
}

/// Reads pages.
pub(super) struct Receiver {
    pub(super) stream: RecvStream,
    pub(super) fuse: Option<Fuse>,
    /// Held, so that the transport outlives the link while an engine thread still has a stream.
    pub(super) runtime: Arc<Runtime>,
    pub(super) ends: Arc<Ends>,
}

impl PageReceiver for Receiver {
    fn read(&mut self) -> Result<Option<Bytes>> {
        if self.fuse.as_ref().is_some_and(Fuse::is_burnt) {
            // It fails only for a closed stream.
            let _ = self.stream.stop(VarInt::from_u32(cut::CODE));
            return Err(self.ends.cut());
        }
        let chunk = self
            .runtime
            .block_on(self.stream.read_chunk(MAX_CHUNK_BYTES, true))
            .map_err(|error| self.ends.not_read(&error))?;
        if let (Some(fuse), Some(chunk)) = (&mut self.fuse, &chunk) {
            fuse.passed(chunk.bytes.len());
        }
        Ok(chunk.map(|chunk| chunk.bytes))
    }
}
