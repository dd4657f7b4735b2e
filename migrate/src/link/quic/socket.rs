//! The UDP socket under an endpoint.
//!
//! quinn's own would do but for three things. A batch of segments must stay under 64 KiB, or the kernel refuses all
//! of it: quinn gathers ten segments of any size, and at 8952 bytes nearly every batch was lost (November 2026). The
//! endpoint's receive buffer is one datagram times 64 segments times 32, 128 MiB for the largest datagrams, although no
//! batch exceeds 64 KiB. And "nobody listens there", which the kernel says of a connected socket, is swallowed.

use super::settings::{MAX_UDP_PAYLOAD_BYTES, MIN_UDP_PAYLOAD_BYTES, Settings};
use crate::error::{Error, Result};
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::sync::Notify;

/// A UDP socket as quinn wants one.
pub(super) struct Socket {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    max_batch_bytes: usize,
    /// The largest segment seen so far: quinn asks how many fit before it says how large they are.
    segment_bytes: AtomicUsize,
    /// Told when the kernel says that nobody listens at the other end.
    refused: Arc<Notify>,
}

impl Socket {
    /// Binds `local`, with large buffers. Call it inside the runtime.
    pub(super) fn bind(
        local: SocketAddr,
        peer: Option<SocketAddr>,
        settings: &Settings,
    ) -> Result<Arc<Self>> {
        let socket = std::net::UdpSocket::bind(local).map_err(|error| cannot_bind(local, &error))?;
        grow_buffers(&socket, settings.socket_buffer_bytes).warn();
        let failed = |error: io::Error| Error::Host(format!("cannot set up the UDP socket {local}: {error}"));
        if let Some(peer) = peer {
            socket.connect(peer).map_err(|error| {
                Error::Link(format!(
                    "there is no way from this host to {peer}: {error}; check address and routes"
                ))
            })?;
        }
        let state = UdpSocketState::new((&socket).into()).map_err(failed)?;
        let io = tokio::net::UdpSocket::from_std(socket).map_err(failed)?;
        Ok(Arc::new(Self {
            io,
            state,
            max_batch_bytes: settings.max_batch_bytes,
            segment_bytes: AtomicUsize::new(MIN_UDP_PAYLOAD_BYTES.into()),
            refused: Arc::new(Notify::new()),
        }))
    }

    /// Waits until the kernel says that nobody listens at the other end (only a connected socket is told).
    pub(super) fn refused(&self) -> Arc<Notify> {
        self.refused.clone()
    }

    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let result = self.io.try_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), transmit));
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(error) => {
                // UDP loses packets, so quinn repeats them: too large a probe, a full queue, a route that comes back.
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    self.refused.notify_one();
                }
                tracing::debug!(%error, bytes = transmit.contents.len(), "a datagram was not sent");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("io", &self.io).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment) = transmit.segment_size else {
            return self.send(transmit);
        };
        self.segment_bytes.fetch_max(segment, Ordering::Relaxed);
        let batch = (self.max_batch_bytes / segment.max(1)).max(1) * segment;
        if transmit.contents.len() <= batch {
            return self.send(transmit);
        }
        // Only the first batch after the path's datagrams grew comes here. When a later part would block, quinn
        // repeats all of it; the peer drops what it has seen.
        for contents in transmit.contents.chunks(batch.max(1)) {
            self.send(&Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size: (contents.len() > segment).then_some(segment),
                src_ip: transmit.src_ip,
            })?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.io.poll_recv_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
            let read = || self.state.recv((&self.io).into(), buffers, meta);
            match self.io.try_io(Interest::READABLE, read) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // An error here would end the endpoint, so nothing that a stranger can cause may be one.
                Err(error) => {
                    if error.kind() == io::ErrorKind::ConnectionRefused {
                        self.refused.notify_one();
                    }
                    tracing::debug!(%error, "the UDP socket reports an error");
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = self.max_batch_bytes / self.segment_bytes.load(Ordering::Relaxed).max(1);
        self.state.max_gso_segments().min(fit).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        // One largest datagram's buffer also holds what the kernel coalesced, which never exceeds 64 KiB.
        1
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

type Waiting = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// Waits for room in the socket; each connection has one of its own, so that none loses its wake-up.
struct Writable {
    socket: Arc<Socket>,
    waiting: Option<Waiting>,
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let waiting = this.waiting.get_or_insert_with(|| {
            let socket = this.socket.clone();
            Box::pin(async move { socket.io.writable().await })
        });
        let result = waiting.as_mut().poll(cx);
        if result.is_ready() {
            this.waiting = None;
        }
        result
    }
}

/// Any address of the peer's family, any port.
pub(super) fn any_like(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// The MTU in bytes of the interface that leads to `peer`, as the kernel's routes have it; 1500 when it does not
/// say. Nothing is sent.
pub(super) fn first_hop_mtu(peer: SocketAddr) -> u32 {
    let ask = || {
        let socket = std::net::UdpSocket::bind(any_like(peer)).ok()?;
        socket.connect(peer).ok()?;
        match peer {
            SocketAddr::V4(_) => rustix::net::sockopt::ip_mtu(&socket).ok(),
            SocketAddr::V6(_) => rustix::net::sockopt::ipv6_mtu(&socket).ok(),
        }
    };
    ask().unwrap_or(1500)
}

fn cannot_bind(local: SocketAddr, error: &io::Error) -> Error {
    let what = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "the port is in use: `ss -lunp` shows by whom; choose another with --listen"
        }
        io::ErrorKind::PermissionDenied => {
            "no permission: ports under 1024 are for root; choose a higher one"
        }
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this host has that address: `ip address` shows them"
        }
        _ => return Error::Host(format!("cannot listen at UDP {local}: {error}")),
    };
    Error::Host(format!("cannot listen at UDP {local}: {what}"))
}

/// Buffers, as the kernel reports them, from which on nothing was lost with 1 MiB on its way: 8 MiB were enough, of
/// 416 KiB (the usual limit of 208 KiB, doubled) every tenth packet was lost, if at no great cost (loopback, November 2026).
const ENOUGH_BYTES: usize = 4 << 20;

/// The buffers of a UDP socket, as far as the kernel gave them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Buffers {
    /// What was asked for, each way, in bytes.
    pub(crate) asked_bytes: usize,
    /// What they are, as the kernel reports them: twice what was asked for, as it counts its own overhead (socket(7)).
    pub(crate) receive_bytes: usize,
    pub(crate) send_bytes: usize,
    /// The settings of the kernel that were in the way.
    pub(crate) held_by: Vec<&'static str>,
}

impl Buffers {
    /// Whether fast transfers will lose packets.
    pub(crate) fn are_small(&self) -> bool {
        let got = self.receive_bytes.min(self.send_bytes);
        !self.held_by.is_empty() && got < self.asked_bytes.min(ENOUGH_BYTES)
    }

    /// What root can do about it.
    pub(crate) fn remedy(&self) -> String {
        let settings: Vec<String> =
            self.held_by.iter().map(|name| format!("{name}={}", self.asked_bytes)).collect();
        format!("run `sysctl -w {}`, or run as root", settings.join(" "))
    }

    fn warn(&self) {
        if self.are_small() {
            tracing::warn!(
                "the UDP socket's buffers are small ({} bytes) and fast transfers will lose packets: {}",
                self.receive_bytes.min(self.send_bytes),
                self.remedy()
            );
        }
    }
}

/// Asks for large buffers with root's right to exceed the host's limit, else up to the limit.
fn grow_buffers(socket: &std::net::UdpSocket, bytes: usize) -> Buffers {
    use rustix::net::sockopt;
    let mut held_by = Vec::new();
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, bytes);
        held_by.push("net.core.rmem_max");
    }
    if sockopt::set_socket_send_buffer_size_force(socket, bytes).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, bytes);
        held_by.push("net.core.wmem_max");
    }
    Buffers {
        asked_bytes: bytes,
        receive_bytes: sockopt::socket_recv_buffer_size(socket).unwrap_or(0),
        send_bytes: sockopt::socket_send_buffer_size(socket).unwrap_or(0),
        held_by,
    }
}

/// What a socket of a link gets on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SocketOffers {
    pub(crate) buffers: Buffers,
    /// Segments of one size that the kernel takes in one call, and that it hands over in one: 1 is none at all.
    pub(crate) send_segments: usize,
    pub(crate) receive_segments: usize,
}

/// Makes a socket on the loopback interface as a link makes one, and lets go of it.
///
/// # Errors
/// `Host`.
pub(crate) fn try_socket(settings: &Settings) -> Result<SocketOffers> {
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let failed = |error: io::Error| Error::Host(format!("a UDP socket cannot be made: {error}"));
    let socket = std::net::UdpSocket::bind(local).map_err(failed)?;
    let buffers = grow_buffers(&socket, settings.socket_buffer_bytes);
    let state = UdpSocketState::new((&socket).into()).map_err(failed)?;
    Ok(SocketOffers {
        buffers,
        send_segments: state.max_gso_segments(),
        receive_segments: state.gro_segments(),
    })
}

const _: () = assert!(MAX_UDP_PAYLOAD_BYTES as usize <= 64 * 1024);
