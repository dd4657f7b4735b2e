//! The end that waits for others.

use super::reason::{Ends, Peer};
use super::settings::Settings;
use super::socket::{Socket, first_hop_mtu};
use super::{Opened, QuicLink, runtime, tls};
use crate::error::{Error, Result};
use crate::identity::{Identity, TrustStore};
use quinn::{Endpoint, Incoming, ServerConfig, TokioRuntime, VarInt};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc};

/// Handshakes under way at once; more are turned away until one ends. A handshake costs about 1 ms of CPU and
/// some 100 KiB.
const MAX_HANDSHAKES: usize = 16;

/// How long a handshake may take: some round trips around the world, and repeats of lost packets.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Authenticated peers that wait for [`Listener::accept`].
const MAX_WAITING: usize = 4;

/// Bytes kept of one peer, and of all, before their handshake begins.
const INCOMING_BYTES: u64 = 64 << 10;

/// The listening end: a UDP port and this host's key.
///
/// Handshakes go on behind the scenes, so nobody who stalls or fails can hold up another.
pub struct Listener {
    runtime: Arc<Runtime>,
    endpoint: Endpoint,
    accepted: mpsc::Receiver<Opened>,
    local: SocketAddr,
}

/// What a handshake needs.
struct Door {
    identity: Identity,
    keys: PathBuf,
    settings: Settings,
    admitted: mpsc::Sender<Opened>,
}

impl Listener {
    /// Listens at `addr` with the key in the directory `keys`. Whom to trust is read there for each connection anew,
    /// so what is revoked has no access from then on.
    ///
    /// # Errors
    /// `Identity` when this host has no usable key, `Host` when the port cannot be had.
    pub fn bind(addr: SocketAddr, keys: &Path, settings: Settings) -> Result<Self> {
        let identity = Identity::load(keys)?;
        // Read once now, so that a broken file is told to whoever starts us, and not to the first peer.
        let trust = TrustStore::load(keys)?;
        if trust.list().is_empty() {
            tracing::warn!("no host is trusted here yet: run `migrate keys trust NAME FINGERPRINT` first");
        }
        let runtime = runtime(&settings)?;
        let (admitted, accepted) = mpsc::channel(MAX_WAITING);
        let inside = runtime.enter();
        let socket = Socket::bind(addr, None, &settings)?;
        // Only to be there: each connection gets one of its own, with the trust store of its time.
        let config = server_config(&identity, tls::Gate::of_store(&trust), addr, &settings)?;
        let failed = |error: std::io::Error| Error::Host(format!("cannot listen at UDP {addr}: {error}"));
        let endpoint = Endpoint::new_with_abstract_socket(
            settings.endpoint()?,
            Some(config),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(failed)?;
        let local = endpoint.local_addr().map_err(failed)?;
        let door = Door { identity, keys: keys.to_owned(), settings, admitted };
        runtime.spawn(keep_door(endpoint.clone(), Arc::new(door)));
        drop(inside);
        Ok(Self { runtime, endpoint, accepted, local })
    }

    /// The address it listens at, with the port the system chose if none was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Waits for the next peer that proves to be trusted. Whoever does not is logged and forgotten.
    ///
    /// # Errors
    /// `TimedOut`; `Link` when the socket is gone.
    pub fn accept(&mut self, timeout: Duration) -> Result<QuicLink> {
        let accepted = &mut self.accepted;
        let opened = self.runtime.block_on(async { tokio::time::timeout(timeout, accepted.recv()).await });
        match opened {
            Ok(Some(opened)) => Ok(opened.into_link(self.runtime.clone(), self.endpoint.clone())),
            Ok(None) => Err(Error::Link(format!("the UDP socket {} is gone", self.local))),
            Err(_) => Err(Error::TimedOut { what: "a connection from a trusted host", after: timeout }),
        }
    }
}

/// Connections that were accepted live on; nobody new gets in.
impl Drop for Listener {
    fn drop(&mut self) {
        self.endpoint.set_server_config(None);
        self.accepted.close();
        while let Ok(opened) = self.accepted.try_recv() {
            opened.connection.close(VarInt::from_u32(1), b"the receiver ends");
        }
    }
}

fn server_config(
    identity: &Identity,
    gate: Arc<tls::Gate>,
    peer: SocketAddr,
    settings: &Settings,
) -> Result<ServerConfig> {
    let mut config = ServerConfig::with_crypto(tls::server(identity, gate)?);
    config
        .transport_config(settings.transport(first_hop_mtu(peer))?)
        .migration(false)
        .max_incoming(MAX_HANDSHAKES)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES * MAX_HANDSHAKES as u64);
    Ok(config)
}

async fn keep_door(endpoint: Endpoint, door: Arc<Door>) {
    let room = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        if door.admitted.is_closed() {
            incoming.refuse();
            return;
        }
        // Who wants more than one packet from us proves first that it is where it says it is.
        if !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(peer = %incoming.remote_address(), "turned away: too many connections are being set up");
            incoming.refuse();
            continue;
        };
        let door = door.clone();
        tokio::spawn(async move {
            let address = incoming.remote_address();
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, admit(incoming, &door)).await {
                Ok(Ok(opened)) => {
                    if let Err(error) = door.admitted.try_send(opened) {
                        tracing::warn!(peer = %address, "turned away: {MAX_WAITING} others wait already");
                        let (mpsc::error::TrySendError::Full(opened)
                        | mpsc::error::TrySendError::Closed(opened)) = error;
                        opened
                            .connection
                            .close(VarInt::from_u32(1), b"too many wait here already; try again");
                    }
                }
                Ok(Err(error)) => tracing::warn!("refused a connection from {address}: {error}"),
                Err(_) => tracing::warn!(
                    "refused a connection from {address}: its handshake took longer than {} s",
                    HANDSHAKE_TIMEOUT.as_secs()
                ),
            }
            drop(permit);
        });
    }
}

async fn admit(incoming: Incoming, door: &Door) -> Result<Opened> {
    let address = incoming.remote_address();
    let mut ends = Ends::new(address, door.identity.fingerprint(), door.settings.idle_timeout);
    let trust = TrustStore::load(&door.keys)?;
    let gate = tls::Gate::of_store(&trust);
    let config = server_config(&door.identity, gate.clone(), address, &door.settings)?;
    let connecting = incoming.accept_with(Arc::new(config)).map_err(|error| ends.lost(&error))?;
    let connection = connecting.await.map_err(|error| match gate.refused() {
        Some(key) => Error::Identity(format!(
            "its key {key} is not trusted here; if you know it, run `migrate keys trust NAME {key}`"
        )),
        None => ends.lost(&error),
    })?;
    let Some(key) = tls::peer_key(&connection) else {
        return Err(Error::Identity("it showed no key".into()));
    };
    ends.peer = Peer { address: &address, name: trust.name_of(key), key }.to_string();
    Ok(Opened { connection, ends, key, settings: door.settings.clone(), side: super::Side::Listener })
}
