//! The numbers of a QUIC link.

use super::congestion::BoundedConfig;
use super::cut::Cut;
use crate::error::{Error, Result};
use protocol::frame::MAX_PAGE_STREAMS;
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::sync::Arc;
use std::time::Duration;

/// What an operator, a test or a benchmark may turn.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A peer that sent nothing for this long is gone.
    pub idle_timeout: Duration,
    /// How often an idle connection says that it lives; well under the idle timeout.
    pub keep_alive: Duration,
    /// A write to a page stream that moves nothing for this long has failed.
    pub stall_timeout: Duration,
    /// The most bytes on their way in one connection: sent and not acknowledged, or received and not read.
    pub window_bytes: u32,
    /// The kernel's buffers of the UDP socket, each way, in bytes.
    pub socket_buffer_bytes: usize,
    /// The largest UDP payload to try, in bytes, whatever the path's interface would carry. Only loopback carries
    /// more than 9000 or so, and there the largest is the cheapest: see docs/performance.md.
    pub max_payload_bytes: u16,
    /// Bytes in one `sendmsg` call.
    pub max_batch_bytes: usize,
    /// Threads that run the transport.
    pub workers: usize,
    /// How many bytes may be on their way whatever the path was seen to carry; see `congestion`.
    pub in_flight_bytes: u64,
    /// For tests: a stream to cut.
    pub cut: Option<Cut>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(2),
            stall_timeout: Duration::from_secs(30),
            window_bytes: 8 << 20,
            socket_buffer_bytes: 32 << 20,
            max_payload_bytes: MAX_UDP_PAYLOAD_BYTES,
            max_batch_bytes: usize::from(MAX_UDP_PAYLOAD_BYTES),
            workers: 1,
            in_flight_bytes: 1 << 20,
            cut: None,
        }
    }
}

/// The largest payload of a UDP datagram over IPv4: 65535 less 20 bytes of IP and 8 of UDP header (RFC 791, 768).
pub(super) const MAX_UDP_PAYLOAD_BYTES: u16 = 65507;

/// What every QUIC path carries (RFC 9000, section 14).
pub(super) const MIN_UDP_PAYLOAD_BYTES: u16 = 1200;

/// IPv6 and UDP headers (RFC 8200, 768); those of IPv4 are smaller.
const HEADER_BYTES: u32 = 48;

/// From this interface MTU on it is the loopback device, whose MTU is exact and needs no probing (65536 in
/// drivers/net/loopback.c).
const LOOPBACK_MTU: u32 = 65536;

impl Settings {
    /// What both ends tell quinn of a connection whose first hop carries IP packets of `mtu` bytes.
    pub(super) fn transport(&self, mtu: u32) -> Result<Arc<TransportConfig>> {
        let too_large = |_| Error::Usage("a time limit of the link is too large".into());
        let idle = IdleTimeout::try_from(self.idle_timeout).map_err(too_large)?;
        let first_hop = u16::try_from(mtu.saturating_sub(HEADER_BYTES)).unwrap_or(u16::MAX);
        let upper = first_hop.min(self.max_payload_bytes).max(MIN_UDP_PAYLOAD_BYTES);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(upper);
        let congestion = BoundedConfig { floor_bytes: self.in_flight_bytes };
        let mut config = TransportConfig::default();
        config
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(MAX_PAGE_STREAMS.into()))
            .datagram_receive_buffer_size(None)
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.keep_alive))
            .stream_receive_window(VarInt::from_u32(self.window_bytes))
            .receive_window(VarInt::from_u32(self.window_bytes))
            .send_window(self.window_bytes.into())
            .initial_mtu(if mtu >= LOOPBACK_MTU { upper } else { MIN_UDP_PAYLOAD_BYTES })
            .mtu_discovery_config(Some(discovery))
            .congestion_controller_factory(Arc::new(congestion));
        Ok(Arc::new(config))
    }

    /// What an endpoint tells quinn of itself.
    pub(super) fn endpoint(&self) -> Result<EndpointConfig> {
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(MAX_UDP_PAYLOAD_BYTES).map_err(|error| {
            Error::Link(format!("this build of quinn refuses its largest datagram: {error}"))
        })?;
        Ok(config)
    }
}
