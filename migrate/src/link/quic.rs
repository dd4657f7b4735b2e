//! A link over QUIC: one connection, both ends authenticated.
//!
//! ```text
//!  engine threads (synchronous)          the transport's threads (tokio)
//!  write, read_exact ──── control ────▶  one bidirectional stream, first in the queue
//!  PageSender::write ──── pages ──────▶  unidirectional streams          ══▶ socket ══▶ UDP
//!  PageReceiver::read ◀── pages ───────  back-pressure by QUIC's windows
//! ```
//!
//! The control stream goes before the page streams whenever a packet is filled, so that a message written while pages
//! are queued overtakes them. Memory is bounded by [`Settings::window_bytes`] each way, whatever the peer does.
//!
//! Nothing of the engine runs before both ends are authenticated: [`Listener::accept`] and [`dial`] answer only then.

mod congestion;
mod cut;
mod dial;
mod listen;
pub mod pipe;
mod reason;
mod settings;
mod socket;
mod streams;
mod tls;

pub use cut::Cut;
pub use dial::dial;
pub use listen::Listener;
pub use settings::Settings;
#[cfg(test)]
pub(crate) use socket::Buffers;
pub(crate) use socket::{SocketOffers, try_socket};

use crate::error::{Error, Result};
use crate::identity::Fingerprint;
use crate::link::{Link, LinkStats, PageReceiver, PageSender};
use bytes::{Buf as _, BytesMut};
use cut::{Fuse, Stream};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use reason::Ends;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::{Deliveries, Receiver, Sender};
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout, timeout_at};

/// How long the last bytes may take to arrive when a link is closed.
const LINGER: Duration = Duration::from_secs(1);

/// How long to wait for the packet that says "closed": to leave this process, or to be repeated if it was lost.
const FAREWELL: Duration = Duration::from_millis(100);

/// Between looks at whether that packet has left. A timer's resolution is a millisecond.
const FAREWELL_POLL: Duration = Duration::from_millis(1);

/// The control stream goes before page streams, and pages that somebody waits for before all others.
const CONTROL_PRIORITY: i32 = 10;
const URGENT_PRIORITY: i32 = 5;
const PAGE_PRIORITY: i32 = 0;

/// The code in a close frame: a clean end.
const CLEAN: u32 = 0;

/// The code in a close frame: an end without [`Link::close`], in an error or a crash.
const DROPPED: u32 = 1;

/// Which end opens the control stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Dialler,
    Listener,
}

/// A connection whose ends know each other, before the engine has it.
struct Opened {
    connection: Connection,
    ends: Ends,
    key: Fingerprint,
    settings: Settings,
    side: Side,
}

impl Opened {
    fn into_link(self, runtime: Arc<Runtime>, endpoint: Endpoint) -> QuicLink {
        QuicLink {
            connection: self.connection,
            endpoint,
            control: None,
            pending: BytesMut::new(),
            side: self.side,
            ends: Arc::new(self.ends),
            key: self.key,
            control_fuse: Cut::fuse(self.settings.cut, Stream::Control),
            page_streams: 0,
            settings: self.settings,
            deliveries: Deliveries::default(),
            closed: false,
            runtime,
        }
    }
}

/// One end of a QUIC connection. See [`Link`].
pub struct QuicLink {
    connection: Connection,
    endpoint: Endpoint,
    control: Option<(SendStream, RecvStream)>,
    /// Control bytes that were received and not handed out yet.
    pending: BytesMut,
    side: Side,
    ends: Arc<Ends>,
    key: Fingerprint,
    settings: Settings,
    control_fuse: Option<Fuse>,
    /// Opened or taken so far.
    page_streams: u32,
    deliveries: Deliveries,
    closed: bool,
    // Last, so that everything above is dropped while the runtime lives.
    runtime: Arc<Runtime>,
}

impl QuicLink {
    /// The control stream: the dialler opens it, the listener waits for it.
    fn control(&mut self, what: &'static str, after: Duration) -> Result<&mut (SendStream, RecvStream)> {
        if self.control.is_none() {
            let (connection, side) = (&self.connection, self.side);
            let streams = self.runtime.block_on(async {
                let open = async {
                    match side {
                        Side::Dialler => connection.open_bi().await,
                        Side::Listener => connection.accept_bi().await,
                    }
                };
                timeout(after, open).await
            });
            let streams = streams.map_err(|_| Error::TimedOut { what, after })?;
            let streams = streams.map_err(|error| self.ends.lost(&error))?;
            // It fails only for a closed stream, and then the next write tells.
            let _ = streams.0.set_priority(CONTROL_PRIORITY);
            self.control = Some(streams);
        }
        self.control.as_mut().ok_or_else(|| Error::Link("the control stream is not open".into()))
    }

    fn open_stream(&mut self, priority: i32) -> Result<Box<dyn PageSender>> {
        let after = self.settings.stall_timeout;
        let stream = self
            .runtime
            .block_on(async { timeout(after, self.connection.open_uni()).await })
            .map_err(|_| Error::TimedOut { what: "the peer to allow another page stream", after })?
            .map_err(|error| self.ends.lost(&error))?;
        // It fails only for a closed stream, and then the first write tells.
        let _ = stream.set_priority(priority);
        let fuse = self.next_fuse();
        Ok(Box::new(Sender {
            stream,
            fuse,
            runtime: self.runtime.clone(),
            ends: self.ends.clone(),
            stall_timeout: after,
            deliveries: self.deliveries.clone(),
        }))
    }

    /// The fuse of the next page stream.
    fn next_fuse(&mut self) -> Option<Fuse> {
        let number = self.page_streams;
        self.page_streams += 1;
        Cut::fuse(self.settings.cut, Stream::Page(number))
    }

    /// Delivers what was written and tells the peer, within [`LINGER`] and [`FAREWELL`].
    ///
    /// A peer that has acknowledged everything has had its last word from us. That this is the end may reach it or not, so
    /// the packet need only leave; to wait until nobody can ask for it again (RFC 9000, section 10.2: three probe
    /// time-outs) took 80 ms of every move.
    fn shut(&mut self, code: u32, reason: &str, linger: Duration) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        if let Some((send, _)) = &mut self.control {
            self.deliveries.finish(send);
        }
        let deliveries = self.deliveries.take();
        self.runtime.block_on(async {
            let until = tokio::time::Instant::now() + linger;
            let mut delivered = code == CLEAN;
            for delivery in deliveries {
                if timeout_at(until, delivery).await.is_err() {
                    delivered = false;
                    break;
                }
            }
            let ended = self.connection.close_reason().is_some();
            let before = self.connection.stats().udp_tx.datagrams;
            self.connection.close(VarInt::from_u32(code), reason.as_bytes());
            let _ = match delivered {
                // It was lost, or the peer was first: nothing is sent any more.
                true if ended => Ok(()),
                true => timeout(FAREWELL, said_closed(&self.connection, before)).await,
                false => timeout(FAREWELL, self.endpoint.wait_idle()).await,
            };
        });
    }
}

impl Link for QuicLink {
    fn peer(&self) -> String {
        self.ends.peer.clone()
    }

    fn peer_key(&self) -> Fingerprint {
        self.key
    }

    fn write(&mut self, bytes: &[u8], after: Duration) -> Result<()> {
        const WHAT: &str = "the peer to take a control message";
        let (runtime, ends) = (self.runtime.clone(), self.ends.clone());
        let burnt = self.control_fuse.as_ref().is_some_and(Fuse::is_burnt);
        if let Some(fuse) = &mut self.control_fuse {
            fuse.passed(bytes.len());
        }
        let (send, _) = self.control(WHAT, after)?;
        if burnt {
            // It fails only for a closed stream.
            let _ = send.reset(VarInt::from_u32(cut::CODE));
            return Err(ends.cut());
        }
        runtime.block_on(async {
            let mut rest = bytes;
            while !rest.is_empty() {
                let written = timeout(after, send.write(rest))
                    .await
                    .map_err(|_| Error::TimedOut { what: WHAT, after })?
                    .map_err(|error| ends.not_written(&error))?;
                rest = &rest[written..];
            }
            Ok(())
        })
    }

    fn read_exact(&mut self, buffer: &mut [u8], what: &'static str, after: Duration) -> Result<()> {
        let (runtime, ends) = (self.runtime.clone(), self.ends.clone());
        let deadline = Instant::now() + after;
        self.control(what, after)?;
        let Some((_, receive)) = &mut self.control else {
            return Err(Error::Link("the control stream is not open".into()));
        };
        let pending = &mut self.pending;
        let wanted = buffer.len();
        runtime.block_on(async {
            while pending.len() < wanted {
                // Reading a chunk is cancel-safe: a time-out loses no byte, and `pending` keeps what came before.
                let chunk = timeout_at(deadline.into(), receive.read_chunk(wanted - pending.len(), true))
                    .await
                    .map_err(|_| Error::TimedOut { what, after })?
                    .map_err(|error| ends.not_read(&error))?;
                match chunk {
                    Some(chunk) => pending.extend_from_slice(&chunk.bytes),
                    None => {
                        return Err(Error::Link(format!(
                            "{} ended its side while {what} was due",
                            ends.peer
                        )));
                    }
                }
            }
            Ok(())
        })?;
        pending.split_to(wanted).copy_to_slice(buffer);
        Ok(())
    }

    fn open_page_stream(&mut self) -> Result<Box<dyn PageSender>> {
        self.open_stream(PAGE_PRIORITY)
    }

    fn open_urgent_stream(&mut self) -> Result<Box<dyn PageSender>> {
        self.open_stream(URGENT_PRIORITY)
    }

    fn accept_page_stream(&mut self, after: Duration) -> Result<Box<dyn PageReceiver>> {
        let stream = self
            .runtime
            .block_on(async { timeout(after, self.connection.accept_uni()).await })
            .map_err(|_| Error::TimedOut { what: "the peer to open a page stream", after })?
            .map_err(|error| self.ends.lost(&error))?;
        let (runtime, ends, fuse) = (self.runtime.clone(), self.ends.clone(), self.next_fuse());
        Ok(Box::new(Receiver { stream, runtime, ends, fuse }))
    }

    fn stats(&self) -> LinkStats {
        let stats = self.connection.stats();
        LinkStats {
            rtt_us: u64::try_from(stats.path.rtt.as_micros()).unwrap_or(u64::MAX),
            sent_wire_bytes: stats.udp_tx.bytes,
            lost_packets: stats.path.lost_packets,
            mtu_bytes: stats.path.current_mtu,
        }
    }

    fn close(mut self: Box<Self>, reason: &str) {
        self.shut(CLEAN, reason, LINGER);
    }
}

/// Waits until the packet that says "closed" was handed to the kernel, or the peer's has come. `before` are the datagrams that
/// had left until then: a closed connection sends nothing else. quinn counts them under the lock under which it sends.
async fn said_closed(connection: &Connection, before: u64) {
    loop {
        sleep(FAREWELL_POLL).await;
        let stats = connection.stats();
        if stats.udp_tx.datagrams > before || stats.frame_rx.connection_close > 0 {
            return;
        }
    }
}

/// A link that is dropped has failed: what is on its way is not waited for, but the peer is told at once.
impl Drop for QuicLink {
    fn drop(&mut self) {
        self.shut(DROPPED, "it gave up without a word; its log says why", Duration::ZERO);
    }
}

static KEEP_FREED_MEMORY: std::sync::Once = std::sync::Once::new();

/// Keeps the C library from giving freed memory back to the kernel in small pieces.
///
/// Every received packet is a buffer that one thread allocates and another frees. glibc returns the top of a heap once
/// 128 KiB of it are free, so those pages were faulted in and zeroed again and again: 225,000 faults and 1.1 s of CPU
/// for 1 GiB instead of 2,900 and 0.5 s, and 0.8 GB/s instead of 1.25 (November 2026). glibc's own rule adapts it
/// (mallopt(3), `M_MMAP_THRESHOLD`): after a block of 16 MiB was freed it keeps up to twice that. The block is never
/// touched, so it costs no memory, and where the allocator is another one it does nothing.
fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(16 << 20)));
}

/// What the kernel calls the threads that run the transport.
pub(crate) const THREAD_NAME: &str = "quic";

/// The threads that run the transport of one endpoint.
fn runtime(settings: &Settings) -> Result<Arc<Runtime>> {
    KEEP_FREED_MEMORY.call_once(keep_freed_memory);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.workers.max(1))
        .thread_name(THREAD_NAME)
        .enable_all()
        .build()
        .map(Arc::new)
        .map_err(|error| Error::Host(format!("cannot start the transport's threads: {error}")))
}

#[cfg(test)]
mod tests;
