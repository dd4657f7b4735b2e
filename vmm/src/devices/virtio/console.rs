//! The console device (virtio 1.2, 5.3), one port: a channel between a program of the guest (`/dev/hvc0`) and one of this host.
//!
//! What the guest writes is taken when the other end has room for it, so a slow reader slows the writer down and nothing is lost; without
//! a reader it is dropped. No byte is kept in the device: a buffer is answered when all of it was written, and what comes
//! in is read when the guest has room. So a saved state is complete, and a move is for the other end the end of a connection: the
//! next reader is given the buffer that was being written from its beginning.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::{
    Backend, Broken, Ring, failed,
    ring::{Chain, gather, scatter, split_front},
};
use crate::{
    error::{Error, Result},
    server::Socket,
};

const KIND: u32 = 3;
/// What is copied at once.
const CHUNK: usize = 4096;
/// Buffers in one direction before the other gets its turn.
const BATCH: usize = 64;
/// Bytes of the configuration space (virtio 1.2, 5.3.4). No feature is offered that gives one of them a meaning.
const CONFIG_BYTES: usize = 12;

/// The other end of a console as its operator says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// Whoever connects to this socket, one at a time.
    Socket(PathBuf),
    /// The end of a file.
    File(PathBuf),
}

impl FromStr for ConsoleConfig {
    type Err = String;

    /// Reads `socket:PATH`, or the path of a file.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("socket:") {
            Some("") => Err("a console needs a path: socket:PATH, or a file".into()),
            Some(path) => Ok(Self::Socket(path.into())),
            None if text.is_empty() => Err("a console is socket:PATH, or a file".into()),
            None => Ok(Self::File(text.into())),
        }
    }
}

impl std::fmt::Display for ConsoleConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "socket:{}", path.display()),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The other end while the VM runs.
#[derive(Debug)]
enum Outside {
    /// Nobody: what the guest writes is dropped.
    None,
    File(File),
    Socket(Listening),
}

#[derive(Debug)]
struct Listening {
    socket: Socket,
    client: Option<UnixStream>,
    /// Who connects, and what the client does as far as it matters now.
    epoll: OwnedFd,
    watched: EventFlags,
}

impl Listening {
    fn open(path: &std::path::Path) -> Result<Self> {
        let socket = Socket::bind(path)?;
        let wrong = Error::host("wait for a console's clients");
        socket.listener().set_nonblocking(true).map_err(&wrong)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|errno| wrong(errno.into()))?;
        epoll::add(&epoll, socket.listener(), EventData::new_u64(0), EventFlags::IN)
            .map_err(|errno| wrong(errno.into()))?;
        Ok(Self { socket, client: None, epoll, watched: EventFlags::empty() })
    }

    /// Takes who connects. A second client is closed at once; the first sees nothing of it.
    fn accept(&mut self) -> std::io::Result<()> {
        loop {
            match self.socket.listener().accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    self.client.get_or_insert(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn hang_up(&mut self) {
        // What is closed is not watched any more (epoll(7)).
        self.client = None;
        self.watched = EventFlags::empty();
    }

    /// Watches the client for this. With nothing to wait for it is left alone: its end would be told again and again.
    fn watch(&mut self, wanted: EventFlags) -> rustix::io::Result<()> {
        let Some(client) = self.client.as_ref().filter(|_| wanted != self.watched) else { return Ok(()) };
        let data = EventData::new_u64(0);
        match (self.watched.is_empty(), wanted.is_empty()) {
            (true, _) => epoll::add(&self.epoll, client, data, wanted),
            (_, true) => epoll::delete(&self.epoll, client),
            _ => epoll::modify(&self.epoll, client, data, wanted),
        }?;
        self.watched = wanted;
        Ok(())
    }
}

/// The console device.
#[derive(Debug)]
pub(crate) struct Console {
    name: String,
    config: Option<ConsoleConfig>,
    outside: Outside,
    /// How much of the first buffer in the ring the other end has already.
    written: usize,
    /// The other end has no room.
    blocked: bool,
    /// The guest has no room: input is left where it is until it says that it has.
    starved: bool,
}

impl Console {
    /// A device whose other end is opened later; `None`: it has none.
    pub(super) fn new(name: String, config: Option<ConsoleConfig>) -> Self {
        Self { name, config, outside: Outside::None, written: 0, blocked: false, starved: false }
    }

    /// Gives the other end what the guest wrote, at most a batch. Whether there may be more.
    fn transmit(&mut self, ring: &mut Ring, halt: &AtomicBool) -> Result<bool, Broken> {
        ring.begin()?;
        for _ in 0..BATCH {
            if halt.load(Ordering::SeqCst) {
                return Ok(false);
            }
            let Some(chain) = ring.pop()? else { return ring.end() };
            let head = chain.head;
            if !self.write_all(ring, chain, halt) {
                ring.put_back();
                return Ok(false);
            }
            self.written = 0;
            ring.complete(head, 0)?;
        }
        Ok(true)
    }

    /// Writes a buffer, or goes on with it. `false`: there is something left of it.
    fn write_all(&mut self, ring: &Ring, mut chain: Chain, halt: &AtomicBool) -> bool {
        split_front(&mut chain.readable, self.written);
        let mut buffer = [0; CHUNK];
        while !chain.readable.is_empty() {
            // A buffer can have gigabytes, of which a pause does not wait for the end.
            if halt.load(Ordering::SeqCst) {
                return false;
            }
            let piece = split_front(&mut chain.readable, CHUNK);
            let bytes = gather(ring.memory(), &piece, &mut buffer);
            let done = self.write(&buffer[..bytes]);
            self.written += done;
            if done < bytes {
                self.blocked = true;
                return false;
            }
        }
        true
    }

    /// Writes what there is room for.
    fn write(&mut self, bytes: &[u8]) -> usize {
        match &mut self.outside {
            Outside::None => bytes.len(),
            Outside::File(file) => {
                // A full disk is no reason to stop the guest.
                if let Err(error) = file.write_all(bytes) {
                    failed(&self.name, "write the console's file", &error);
                }
                bytes.len()
            }
            Outside::Socket(listening) => {
                let Some(client) = &mut listening.client else { return bytes.len() };
                match client.write(bytes) {
                    Ok(done) => done,
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
                    Err(_) => {
                        listening.hang_up();
                        bytes.len()
                    }
                }
            }
        }
    }

    /// Gives the guest what the other end wrote, at most a batch. Whether there may be more.
    fn receive(&mut self, ring: &mut Ring, halt: &AtomicBool) -> Result<bool, Broken> {
        let Outside::Socket(listening) = &mut self.outside else { return Ok(false) };
        ring.begin()?;
        let mut buffer = [0; CHUNK];
        for _ in 0..BATCH {
            let Some(client) = listening.client.as_mut().filter(|_| !halt.load(Ordering::SeqCst)) else {
                return Ok(false);
            };
            let Some(mut chain) = ring.pop()? else {
                if ring.end()? {
                    continue;
                }
                self.starved = true;
                return Ok(false);
            };
            let room = split_front(&mut chain.writable, CHUNK);
            let bytes = room.iter().map(|segment| segment.bytes).sum::<usize>();
            if bytes == 0 {
                ring.complete(chain.head, 0)?;
                continue;
            }
            match client.read(&mut buffer[..bytes]) {
                Ok(count) if count > 0 => {
                    let written = scatter(ring.memory(), &room, &buffer[..count]);
                    ring.complete(chain.head, written)?;
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    ring.put_back();
                    return Ok(false);
                }
                _ => {
                    ring.put_back();
                    listening.hang_up();
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn watch(&mut self) {
        let Outside::Socket(listening) = &mut self.outside else { return };
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, !self.starved);
        wanted.set(EventFlags::OUT, self.blocked);
        if let Err(error) = listening.watch(wanted) {
            failed(&self.name, "wait for the console's client", &error.into());
            listening.hang_up();
        }
    }
}

impl Backend for Console {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    /// Receive, then transmit.
    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64]
    }

    fn config(&self) -> Vec<u8> {
        vec![0; CONFIG_BYTES]
    }

    fn activate(&mut self, _features: u64) {
        self.written = 0;
    }

    fn serve(&mut self, rings: &mut [Ring], halt: &AtomicBool) -> Result<(), Broken> {
        let [receive, transmit] = rings else { return Ok(()) };
        (self.starved, self.blocked) = (false, false);
        if let Outside::Socket(listening) = &mut self.outside
            && let Err(error) = listening.accept()
        {
            failed(&self.name, "take a client of the console", &error);
        }
        loop {
            let sent_more = !self.blocked && self.transmit(transmit, halt)?;
            let got_more = !self.starved && self.receive(receive, halt)?;
            if halt.load(Ordering::SeqCst) || !sent_more && !got_more {
                break;
            }
        }
        self.watch();
        Ok(())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        match &self.outside {
            Outside::Socket(listening) => Some(listening.epoll.as_fd()),
            _ => None,
        }
    }

    fn acquire(&mut self) -> Result<()> {
        if !matches!(self.outside, Outside::None) {
            return Ok(());
        }
        self.outside = match &self.config {
            None => Outside::None,
            Some(ConsoleConfig::Socket(path)) => Outside::Socket(Listening::open(path)?),
            Some(ConsoleConfig::File(path)) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                Outside::File(file.map_err(|error| {
                    Error::Config(format!("console {}: it cannot be written: {error}", path.display()))
                })?)
            }
        };
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        self.outside = Outside::None;
        self.written = 0;
        Ok(())
    }
}
