//! The control socket: who may talk, one session at a time, and what becomes of it when it ends.
//!
//! Every connection has a thread. Requests are carried out under one lock, so a query during a session
//! waits at most as long as one request takes.

mod connection;
mod socket;

use std::{
    collections::HashMap,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags};

pub use socket::Socket;

use crate::{
    error::{Error, Result},
    instance::Instance,
};

/// The most connections at once; more are closed without a word.
const MAX_CONNECTIONS: usize = 32;

/// What all connections share.
pub(crate) struct Shared {
    instance: Mutex<Instance>,
    /// Open connections by number, so that they can be closed when the VM ends.
    connections: Mutex<HashMap<u64, UnixStream>>,
}

/// Takes a lock also after a panic in another thread: better a VM with a session lost than no VM.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(instance: Instance) -> Arc<Self> {
        Arc::new(Self { instance: Mutex::new(instance), connections: Mutex::default() })
    }

    pub(crate) fn instance(&self) -> MutexGuard<'_, Instance> {
        lock(&self.instance)
    }
}

/// The running server. Dropping it closes every connection and removes the socket.
pub(crate) struct Server {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves until dropped.
    ///
    /// # Errors
    /// [`Error::Host`] when the host gives no thread.
    pub(crate) fn start(socket: Socket, shared: Arc<Shared>) -> Result<Self> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(Error::os("create an event"))?;
        let stop = Arc::new(stop);
        let wait = Arc::clone(&stop);
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_all(&socket, &wait, &served))
            .map_err(Error::host("start the control thread"))?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.stop, &1_u64.to_ne_bytes()) {
            tracing::warn!(%error, "the control thread cannot be told to stop");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the control thread panicked");
        }
        for (_, stream) in lock(&self.shared.connections).drain() {
            // It may be closed already.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn accept_all(socket: &Socket, stop: &OwnedFd, shared: &Arc<Shared>) {
    for number in 0_u64.. {
        let stream = match accept(socket, stop) {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "a control connection could not be accepted");
                // Out of descriptors, most likely: do not spin.
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
        };
        let mut connections = lock(&shared.connections);
        if connections.len() >= MAX_CONNECTIONS {
            tracing::warn!("more than {MAX_CONNECTIONS} control connections: one was closed");
            continue;
        }
        let Ok(copy) = stream.try_clone() else { continue };
        connections.insert(number, copy);
        drop(connections);
        let theirs = Arc::clone(shared);
        let spawned = std::thread::Builder::new().name(format!("control{number}")).spawn(move || {
            connection::serve(stream, number, &theirs);
            lock(&theirs.connections).remove(&number);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a control connection");
            lock(&shared.connections).remove(&number);
        }
    }
}

/// Waits for a connection. `None`: it is time to stop.
fn accept(socket: &Socket, stop: &OwnedFd) -> std::io::Result<Option<UnixStream>> {
    loop {
        let mut fds = [PollFd::new(socket.listener(), PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(None);
        }
        return socket.listener().accept().map(|(stream, _)| Some(stream));
    }
}
