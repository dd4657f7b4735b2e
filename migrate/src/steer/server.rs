//! The end of the steering socket that belongs to the migration, or to the series of checkpoints.

use super::board::Board;
use super::place::Place;
use crate::error::{Error, Result};
use protocol::envelope::{self, HEADER_BYTES, Header};
use protocol::steer::{Answer, ErrorCode, MAX_AWAIT_MS, Order};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most connections at a time; one more is closed at once.
const MAX_CONNECTIONS: usize = 8;

/// How long a client may take for its next order, and for reading an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a migration that has ended waits for clients that are owed an answer.
const FAREWELL: Duration = Duration::from_millis(500);

/// Stack of a connection's thread: the parser of an order needs little.
const STACK_BYTES: usize = 256 << 10;

/// What can be asked and ordered.
pub trait Steered: std::fmt::Debug + Send + Sync {
    /// Answers an order. To `Await` that may take as long as the order says.
    fn answer(&self, order: &Order) -> Answer;

    /// Whoever made it goes: whoever waits for its end is told.
    fn close(&self);
}

/// Serves a board on a socket until it is dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    socket: Arc<vmm::Socket>,
    acceptor: Option<JoinHandle<()>>,
    /// The socket is removed by a path over this place's descriptor.
    _place: Place,
}

#[derive(Debug)]
struct Shared {
    board: Box<dyn Steered>,
    stopping: AtomicBool,
    clients: Mutex<Clients>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Clients {
    next: u64,
    connected: BTreeMap<u64, UnixStream>,
    /// How many of them wait for an answer about the end, or are about to ask for it.
    owed: usize,
}

impl Server {
    /// Listens under the workload's name.
    ///
    /// # Errors
    /// `Host`.
    pub fn start(place: &Place, name: &str, board: impl Steered + 'static) -> Result<Self> {
        let socket = Arc::new(place.bind(name)?);
        let shared = Arc::new(Shared {
            board: Box::new(board),
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
            changed: Condvar::new(),
        });
        let acceptor = std::thread::Builder::new()
            .name("steer".into())
            .stack_size(STACK_BYTES)
            .spawn({
                let (socket, shared) = (Arc::clone(&socket), Arc::clone(&shared));
                move || accept(&socket, &shared)
            })
            .map_err(|error| Error::Host(format!("could not start a thread: {error}")))?;
        Ok(Self { shared, socket, acceptor: Some(acceptor), _place: place.clone() })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.board.close();
        self.shared.stopping.store(true, Ordering::Release);
        // Wakes the thread that accepts (unix_accept of net/unix/af_unix.c gives EINVAL then).
        if let Err(error) = rustix::net::shutdown(self.socket.listener(), rustix::net::Shutdown::Both) {
            tracing::debug!(%error, "the steering socket could not be shut");
        }
        let until = Instant::now() + FAREWELL;
        let mut clients = self.shared.clients();
        while clients.owed > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            clients =
                self.shared.changed.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        for client in clients.connected.values() {
            // It may be gone already.
            client.shutdown(Shutdown::Both).ok();
        }
        drop(clients);
        if let Some(acceptor) = self.acceptor.take() {
            // It ends by the shutdown above, and has nothing to say.
            acceptor.join().ok();
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owe(&self) {
        self.clients().owed += 1;
    }

    fn paid(&self) {
        let mut clients = self.clients();
        clients.owed = clients.owed.saturating_sub(1);
        self.changed.notify_all();
    }
}

fn accept(socket: &vmm::Socket, shared: &Arc<Shared>) {
    while !shared.stopping.load(Ordering::Acquire) {
        let stream = match socket.listener().accept() {
            Ok((stream, _)) => stream,
            Err(_) if shared.stopping.load(Ordering::Acquire) => return,
            Err(error) => {
                // Out of descriptors, say: steering can wait, the migration goes on.
                tracing::debug!(%error, "a steering connection could not be taken");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(number) = admit(shared, &stream) else { continue };
        let serving =
            std::thread::Builder::new().name("steer-client".into()).stack_size(STACK_BYTES).spawn({
                let shared = Arc::clone(shared);
                move || {
                    if let Err(error) = serve(&shared, stream) {
                        tracing::debug!(%error, "a steering connection ended");
                    }
                    shared.clients().connected.remove(&number);
                }
            });
        if let Err(error) = serving {
            tracing::debug!(%error, "no thread for a steering connection");
            shared.clients().connected.remove(&number);
        }
    }
}

/// A number for a new connection, unless there are too many.
fn admit(shared: &Shared, stream: &UnixStream) -> Option<u64> {
    let copy = stream.try_clone().ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    let mut clients = shared.clients();
    if clients.connected.len() >= MAX_CONNECTIONS {
        return None;
    }
    clients.next += 1;
    let number = clients.next;
    clients.connected.insert(number, copy);
    Some(number)
}

/// One connection, from its first order to its last.
fn serve(shared: &Shared, mut stream: UnixStream) -> std::io::Result<()> {
    // Whoever cancelled asks for the outcome next.
    let mut cancelled = false;
    let result = loop {
        let order = match read_order(&mut stream) {
            Ok(Some(order)) => order,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        let awaits = matches!(order, Ok(Order::Await { .. }));
        let cancels = matches!(order, Ok(Order::Cancel));
        if awaits {
            shared.owe();
        }
        let answer = match order {
            Ok(order) => shared.board.answer(&order),
            Err(message) => Answer::Error { code: ErrorCode::BadRequest, message },
        };
        if cancels && answer == Answer::Done && !std::mem::replace(&mut cancelled, true) {
            shared.owe();
        }
        let written = write_answer(&mut stream, &answer);
        if awaits {
            shared.paid();
        }
        if let Err(error) = written {
            break Err(error);
        }
        if awaits && cancelled {
            cancelled = false;
            shared.paid();
        }
    };
    if cancelled {
        shared.paid();
    }
    result
}

impl Steered for Board {
    fn answer(&self, order: &Order) -> Answer {
        match order {
            Order::Status => Answer::Status(Box::new(self.status())),
            Order::Await { limit_ms } => {
                let limit = Duration::from_millis((*limit_ms).min(MAX_AWAIT_MS));
                Answer::Status(Box::new(self.status_at_end(limit)))
            }
            Order::Cancel => {
                if self.status().outcome.is_some() || !self.cancel().set() {
                    return Answer::Error {
                        code: ErrorCode::TooLate,
                        message: "the migration is behind its commit: it will be finished".into(),
                    };
                }
                tracing::info!("an operator cancels the migration");
                Answer::Done
            }
            Order::Set(limits) => {
                let Some(controls) = self.controls() else {
                    let message =
                        "limits are set where the VM comes from: use migrate set on that host".into();
                    return Answer::Error { code: ErrorCode::BadValue, message };
                };
                if self.status().outcome.is_some() {
                    return Answer::Error {
                        code: ErrorCode::TooLate,
                        message: "the migration is over".into(),
                    };
                }
                match controls.set(limits) {
                    Ok(()) => {
                        tracing::info!(?limits, "an operator changes the limits");
                        Answer::Done
                    }
                    Err(message) => Answer::Error { code: ErrorCode::BadValue, message },
                }
            }
        }
    }

    fn close(&self) {
        Self::close(self);
    }
}

/// The next order; `None` at the clean end. An order that is none is the inner error, an envelope that is none the outer.
fn read_order(stream: &mut UnixStream) -> std::io::Result<Option<std::result::Result<Order, String>>> {
    let until = Instant::now() + PATIENCE;
    let mut header = [0; HEADER_BYTES];
    if !fill(stream, &mut header, until)? {
        return Ok(None);
    }
    let header = Header::decode(&header, 0).map_err(std::io::Error::other)?;
    let mut json = vec![0; header.body_bytes()];
    if !fill(stream, &mut json, until)? {
        return Ok(None);
    }
    Ok(Some(envelope::decode("steering", &json).map_err(|error| error.to_string())))
}

/// Fills a buffer by a moment; `false` at the end of the stream.
fn fill(stream: &mut UnixStream, mut buffer: &mut [u8], until: Instant) -> std::io::Result<bool> {
    while !buffer.is_empty() {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left))?;
        match stream.read(buffer) {
            Ok(0) => return Ok(false),
            Ok(bytes) => buffer = buffer.split_at_mut(bytes).1,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= until && !buffer.is_empty() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
    }
    Ok(true)
}

fn write_answer(stream: &mut UnixStream, answer: &Answer) -> std::io::Result<()> {
    stream.write_all(&envelope::encode(answer, &[]).map_err(std::io::Error::other)?)
}
