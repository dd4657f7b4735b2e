//! The way from outside to the guest's serial port: standard input, or a socket that one client at a time connects to.

use std::{
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags};

use super::Devices;
use crate::{
    error::{Error, Result},
    server::Socket,
};

/// What is read at once: as much as the port's own buffer holds.
const CHUNK_BYTES: usize = 64;
/// How long to wait for a guest that has no room or does not run. 64 bytes each time are three times what the fastest real serial
/// port carries.
const RETRY: Duration = Duration::from_millis(2);

/// A listening socket for a console. Its client sees what the guest writes from then on.
pub struct ConsoleSocket {
    socket: Socket,
    client: Mutex<Option<UnixStream>>,
}

impl ConsoleSocket {
    /// Listens at a path, as [`Socket::bind`] does: only the owner can connect.
    ///
    /// # Errors
    /// [`Error::Socket`] that says what is in the way.
    pub fn bind(path: &Path) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { socket: Socket::bind(path)?, client: Mutex::default() }))
    }

    /// Where it listens.
    pub(super) fn path(&self) -> &Path {
        self.socket.path()
    }

    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to the client, if there is one. What a slow client has no room for is lost: the guest must not wait for it.
    pub(super) fn write(&self, bytes: &[u8]) {
        let mut client = self.client();
        if let Some(Err(error)) = client.as_mut().map(|stream| stream.write(bytes))
            && error.kind() != ErrorKind::WouldBlock
        {
            *client = None;
        }
    }

    fn accept(&self) -> std::io::Result<()> {
        let (stream, _) = self.socket.listener().accept()?;
        stream.set_nonblocking(true)?;
        // A second client is closed at once; the first sees nothing of it.
        self.client().get_or_insert(stream);
        Ok(())
    }
}

/// Where input comes from.
pub(crate) enum Input {
    /// This process's standard input.
    Stdin,
    /// The client of a socket.
    Socket(Arc<ConsoleSocket>),
}

/// The thread that brings input to the serial port. Dropping it ends it.
pub(crate) struct InputThread {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl InputThread {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::Host`] when the host gives no thread.
    pub(crate) fn start(input: Input, devices: Arc<Devices>) -> Result<Self> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(Error::os("create an event"))?;
        let stop = Arc::new(stop);
        let feeder = Feeder { stop: Arc::clone(&stop), devices };
        let body = move || match input {
            Input::Stdin => feeder.stdin(),
            Input::Socket(socket) => feeder.socket(&socket),
        };
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                if let Err(error) = body() {
                    tracing::warn!(%error, "the serial port gets no more input");
                }
            })
            .map_err(Error::host("start the console's thread"))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for InputThread {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.stop, &1_u64.to_ne_bytes()) {
            tracing::warn!(%error, "the console's thread cannot be told to stop");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the console's thread panicked");
        }
    }
}

struct Feeder {
    stop: Arc<OwnedFd>,
    devices: Arc<Devices>,
}

impl Feeder {
    fn stdin(&self) -> std::io::Result<()> {
        let stdin = std::io::stdin();
        let mut buffer = [0; CHUNK_BYTES];
        while self.wait(&[stdin.as_fd()], None)?.is_some() {
            // Not through std's buffer, whose content poll does not see.
            match rustix::io::read(stdin.as_fd(), &mut buffer)? {
                0 => return Ok(()),
                count if self.give(&buffer[..count])? => {}
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    fn socket(&self, console: &ConsoleSocket) -> std::io::Result<()> {
        let mut buffer = [0; CHUNK_BYTES];
        loop {
            let copy = console.client().as_ref().map(UnixStream::try_clone).transpose()?;
            let listener = console.socket.listener();
            let mut sources = vec![listener.as_fd()];
            sources.extend(copy.as_ref().map(AsFd::as_fd));
            match (self.wait(&sources, None)?, copy) {
                (None, _) => return Ok(()),
                (Some(0), _) => console.accept()?,
                (Some(_), Some(mut stream)) => match stream.read(&mut buffer) {
                    Ok(count) if count > 0 => {
                        if !self.give(&buffer[..count])? {
                            return Ok(());
                        }
                    }
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                    _ => *console.client() = None,
                },
                (Some(_), None) => {}
            }
        }
    }

    /// Gives all of it to the guest, however long that takes. `false`: it is time to stop.
    fn give(&self, mut bytes: &[u8]) -> std::io::Result<bool> {
        loop {
            bytes = &bytes[self.devices.serial_input(bytes)..];
            if bytes.is_empty() {
                return Ok(true);
            }
            if self.wait(&[], Some(RETRY))?.is_none() {
                return Ok(false);
            }
        }
    }

    /// Waits for one of these, and says which, or for a time. `None`: it is time to stop.
    fn wait(&self, sources: &[BorrowedFd<'_>], limit: Option<Duration>) -> std::io::Result<Option<usize>> {
        let limit = limit.and_then(|limit| limit.try_into().ok());
        loop {
            let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
            fds.extend(sources.iter().map(|source| PollFd::from_borrowed_fd(*source, PollFlags::IN)));
            match rustix::event::poll(&mut fds, limit.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                outcome => outcome?,
            };
            let ready = fds.iter().position(|fd| !fd.revents().is_empty());
            return Ok(match ready {
                Some(0) => None,
                Some(source) => Some(source - 1),
                None => Some(0),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{addresses::SERIAL_PORT, device::Interrupt, devices::SerialSink};

    fn read_port(devices: &Devices) -> u8 {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let mut status = [0];
            devices.port_read(SERIAL_PORT + 5, &mut status);
            if status[0] & 1 != 0 {
                devices.port_read(SERIAL_PORT, &mut status);
                return status[0];
            }
            assert!(std::time::Instant::now() < deadline, "no input arrives");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_client_talks_to_the_guest_and_another_may_come_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.sock");
        let sink = SerialSink::Socket(ConsoleSocket::bind(&path).unwrap());
        let input = sink.input().unwrap();
        let devices = Arc::new(Devices::new(sink, Interrupt::none()));
        devices.open(true);
        let thread = InputThread::start(input, devices.clone()).unwrap();
        for text in [&b"first"[..], &[b'x'; 200], b"third"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            client.write_all(text).unwrap();
            let got: Vec<u8> = text.iter().map(|_| read_port(&devices)).collect();
            assert_eq!(got, text);
            devices.port_write(SERIAL_PORT, b"answer");
            let mut answer = [0; 6];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"answer");
            // The client's end is seen before the next one comes: one at a time.
            drop(client);
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(thread);
        devices.port_write(SERIAL_PORT, b"nobody listens");
    }

    #[test]
    fn a_guest_that_stands_still_does_not_keep_the_thread_from_ending() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.sock");
        let sink = SerialSink::Socket(ConsoleSocket::bind(&path).unwrap());
        let input = sink.input().unwrap();
        let devices = Arc::new(Devices::new(sink, Interrupt::none()));
        let thread = InputThread::start(input, devices).unwrap();
        UnixStream::connect(&path).unwrap().write_all(b"nobody reads this").unwrap();
        std::thread::sleep(Duration::from_millis(20));
        drop(thread);
    }
}
