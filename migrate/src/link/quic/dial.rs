//! The end that connects.

use super::reason::{Ends, Peer};
use super::settings::Settings;
use super::socket::{Socket, any_like, first_hop_mtu};
use super::{DROPPED, Opened, QuicLink, Side, runtime, tls};
use crate::error::{Error, Result};
use crate::identity::{Identity, TrustStore};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, TokioRuntime, VarInt};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// Between looks at whether the other end has confirmed the handshake. A round trip is the least it takes.
const CONFIRM_POLL: Duration = Duration::from_micros(200);

/// How long a peer must be silent before its kernel's word is believed. A process that lives, even on a busy host,
/// answers sooner.
const SILENCE: Duration = Duration::from_millis(500);

/// Connects to a `migrate receive` at `address`, a `host:port`, and proves to each end who the other is.
///
/// All addresses of a name are tried in turn. If the trust store has hosts called like the `host`, the peer must
/// have one of their keys; any trusted key will do otherwise.
///
/// # Errors
/// `Link` when the name is not known, nothing answers within `limit`, or the peer speaks another version;
/// `Identity` when either end does not trust the other; `Host` when no socket can be had.
pub fn dial(
    address: &str,
    identity: &Identity,
    trust: &TrustStore,
    settings: &Settings,
    limit: Duration,
) -> Result<QuicLink> {
    let deadline = Instant::now() + limit;
    let (host, _) = split(address)?;
    let expected = trust.keys_of(host);
    let runtime = runtime(settings)?;
    let found = runtime.block_on(async { timeout(limit, tokio::net::lookup_host(address)).await });
    let addresses: Vec<SocketAddr> = match found {
        Ok(Ok(found)) => found.collect(),
        Ok(Err(error)) => return Err(unknown_name(address, &error)),
        Err(_) => {
            // The resolver's thread cannot be stopped; nobody waits for it.
            if let Some(runtime) = Arc::into_inner(runtime) {
                runtime.shutdown_background();
            }
            return Err(Error::TimedOut { what: "the name of the destination to resolve", after: limit });
        }
    };
    let mut last = Error::Link(format!("the name {host} has no address: give the address itself"));
    for (index, peer) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - index).unwrap_or(1);
        let attempt = Attempt { peer: *peer, identity, trust, expected: &expected, settings, limit: share };
        let (endpoint, outcome) = {
            let _inside = runtime.enter();
            let endpoint = attempt.endpoint()?;
            let outcome = runtime.block_on(attempt.connect(&endpoint.0, &endpoint.1));
            (endpoint.0, outcome)
        };
        match outcome {
            Ok(opened) => return Ok(opened.into_link(runtime, endpoint)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

struct Attempt<'a> {
    peer: SocketAddr,
    identity: &'a Identity,
    trust: &'a TrustStore,
    expected: &'a [crate::identity::Fingerprint],
    settings: &'a Settings,
    limit: Duration,
}

impl Attempt<'_> {
    fn endpoint(&self) -> Result<(Endpoint, Arc<Socket>)> {
        let local = any_like(self.peer);
        let socket = Socket::bind(local, Some(self.peer), self.settings)?;
        let endpoint = Endpoint::new_with_abstract_socket(
            self.settings.endpoint()?,
            None,
            socket.clone(),
            Arc::new(TokioRuntime),
        )
        .map_err(|error| Error::Host(format!("cannot use a UDP socket: {error}")))?;
        Ok((endpoint, socket))
    }

    async fn connect(&self, endpoint: &Endpoint, socket: &Socket) -> Result<Opened> {
        let peer = self.peer;
        let gate = match self.expected {
            [] => tls::Gate::of_store(self.trust),
            expected => tls::Gate::new(expected.to_vec()),
        };
        let mut ends = Ends::new(peer, self.identity.fingerprint(), self.settings.idle_timeout);
        let mut config = ClientConfig::new(tls::client(self.identity, gate.clone())?);
        config.transport_config(self.settings.transport(first_hop_mtu(peer))?);
        let connecting = endpoint
            .connect_with(config, peer, tls::SERVER_NAME)
            .map_err(|error| Error::Link(format!("cannot connect to {peer}: {error}")))?;
        let refused = socket.refused();
        let confirmed = async {
            let connection = connecting.await?;
            confirm(&connection).await?;
            Ok(connection)
        };
        let connection = tokio::select! {
            outcome = timeout(self.limit, confirmed) => match outcome {
                Ok(Ok(connection)) => connection,
                Ok(Err(error)) => return Err(self.failed(&gate, &ends, &error)),
                Err(_) => return Err(self.nothing_answers("")),
            },
            () = refused.notified() => return Err(self.nothing_answers(" (the host says that the port is closed)")),
        };
        let Some(key) = tls::peer_key(&connection) else {
            return Err(Error::Identity(format!("{peer} showed no key")));
        };
        ends.peer = Peer { address: &peer, name: self.trust.name_of(key), key }.to_string();
        tokio::spawn(watch(connection.clone(), refused, ends.gone.clone()));
        Ok(Opened { connection, ends, key, settings: self.settings.clone(), side: Side::Dialler })
    }

    fn failed(&self, gate: &tls::Gate, ends: &Ends, error: &ConnectionError) -> Error {
        let peer = self.peer;
        match (gate.refused(), error) {
            (Some(key), _) if self.expected.is_empty() => Error::Identity(format!(
                "{peer} is not trusted here: its key is {key}. Compare it with what `migrate keys show` prints there, \
                 then run `migrate keys trust NAME {key}`"
            )),
            (Some(key), _) => Error::Identity(format!(
                "THE KEY OF {peer} IS NOT THE TRUSTED ONE: it is {key}. Somebody may be in between, or that host has a \
                 new key: compare with `migrate keys show` there before you run `migrate keys trust NAME {key}`"
            )),
            (None, ConnectionError::TimedOut) => self.nothing_answers(""),
            (None, error) => ends.lost(error),
        }
    }

    fn nothing_answers(&self, detail: &str) -> Error {
        let peer = self.peer;
        Error::Link(format!(
            "nothing answers at {peer}{detail}: is `migrate receive` running there, and is UDP port {} open?",
            peer.port()
        ))
    }
}

/// Waits until the other end has checked our certificate too.
///
/// In TLS 1.3 the client is done before the server has seen its certificate. Without this wait a refusal would come
/// up in the engine's first read. quinn has no event for it, but counts the frame that says so.
async fn confirm(connection: &Connection) -> std::result::Result<(), ConnectionError> {
    let closed = connection.closed();
    tokio::pin!(closed);
    while connection.stats().frame_rx.handshake_done == 0 {
        tokio::select! {
            error = &mut closed => return Err(error),
            () = sleep(CONFIRM_POLL) => {}
        }
    }
    Ok(())
}

/// Ends a connection whose peer's kernel says that nobody listens there any more, long before the idle timeout.
///
/// Anybody can forge such a message, so one alone ends nothing: it takes two, [`SILENCE`] apart, and not a single
/// packet from the peer between them.
async fn watch(connection: Connection, refused: Arc<Notify>, gone: Arc<AtomicBool>) {
    let closed = connection.closed();
    tokio::pin!(closed);
    let mut first: Option<(Instant, u64)> = None;
    loop {
        tokio::select! {
            _ = &mut closed => return,
            () = refused.notified() => {}
        }
        let heard = connection.stats().udp_rx.datagrams;
        match first {
            Some((since, before)) if before == heard => {
                if since.elapsed() >= SILENCE {
                    gone.store(true, Ordering::Relaxed);
                    connection.close(VarInt::from_u32(DROPPED), b"nobody listens");
                    return;
                }
            }
            _ => first = Some((Instant::now(), heard)),
        }
    }
}

fn split(address: &str) -> Result<(&str, u16)> {
    let parts = address.rsplit_once(':').and_then(|(host, port)| {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Some((host, port.parse::<u16>().ok()?)).filter(|(host, port)| !host.is_empty() && *port != 0)
    });
    parts.ok_or_else(|| {
        let shown = crate::error::clean(address);
        Error::Usage(format!("“{shown}” is no destination: write HOST:PORT, or [ADDRESS]:PORT for IPv6"))
    })
}

fn unknown_name(address: &str, error: &std::io::Error) -> Error {
    let shown = crate::error::clean(address);
    Error::Link(format!("cannot find {shown}: {error}; check the spelling, or give the address itself"))
}
