//! The private network: a switch for Ethernet frames, to which every host is connected by a unix socket.
//!
//! QEMU's `-netdev stream` puts a length of four bytes, big-endian, before each frame.

use super::{Context as _, Result};
use std::collections::HashMap;
use std::io::{BufReader, Read, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

/// The longest frame that is passed on, in bytes: more than the largest that QEMU hands out.
const MAX_FRAME_BYTES: usize = 128 << 10;

/// Frames that may wait for one host; more are lost, as in any switch.
const QUEUE_FRAMES: usize = 4096;

/// A hardware address.
type Mac = [u8; 6];

/// A frame with its length before it, as it came.
type Frame = Arc<[u8]>;

#[derive(Default)]
struct Ports {
    queues: HashMap<usize, SyncSender<Frame>>,
    /// Behind which port an address was seen last.
    places: HashMap<Mac, usize>,
}

impl Ports {
    /// Passes a frame on: to where its receiver is, or to everybody else.
    fn forward(&mut self, from: usize, frame: &Frame) {
        let (Some(to), Some(sender)) = (mac(frame, 4), mac(frame, 10)) else { return };
        self.places.insert(sender, from);
        let known = self.places.get(&to).filter(|_| to[0] & 1 == 0);
        let wanted = |port: usize| known.map_or(port != from, |place| *place == port);
        for (_, queue) in self.queues.iter().filter(|(port, _)| wanted(**port)) {
            queue.try_send(frame.clone()).ok();
        }
    }
}

fn mac(frame: &Frame, at: usize) -> Option<Mac> {
    frame.get(at..at + 6)?.try_into().ok()
}

/// Switches frames between all who connect, on threads of its own, until this process ends.
///
/// # Errors
/// If no socket can be made there.
pub fn start(socket: &Path) -> Result<()> {
    let listener = UnixListener::bind(socket).context(|| socket.display().to_string())?;
    let ports = Arc::new(Mutex::new(Ports::default()));
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().map_while(std::io::Result::ok).enumerate() {
            let Ok(writer) = stream.try_clone() else { continue };
            let (send, queue) = sync_channel(QUEUE_FRAMES);
            lock(&ports).queues.insert(number, send);
            std::thread::spawn(move || write(writer, &queue));
            let ports = ports.clone();
            std::thread::spawn(move || {
                let mut stream = BufReader::with_capacity(2 * MAX_FRAME_BYTES, stream);
                while let Some(frame) = read(&mut stream) {
                    lock(&ports).forward(number, &frame);
                }
                lock(&ports).queues.remove(&number);
            });
        }
    });
    Ok(())
}

/// The next frame; `None` when there is none any more, or what comes is none.
fn read(stream: &mut impl Read) -> Option<Frame> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).ok()?;
    let length =
        usize::try_from(u32::from_be_bytes(head)).ok().filter(|length| *length <= MAX_FRAME_BYTES)?;
    let mut frame = vec![0; 4 + length];
    frame[..4].copy_from_slice(&head);
    stream.read_exact(&mut frame[4..]).ok()?;
    Some(frame.into())
}

/// Writes what comes for one host, until it is gone.
fn write(mut stream: UnixStream, queue: &Receiver<Frame>) {
    while let Ok(frame) = queue.recv() {
        if stream.write_all(&frame).is_err() {
            break;
        }
    }
}

fn lock(ports: &Mutex<Ports>) -> std::sync::MutexGuard<'_, Ports> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A frame from one address to another, with its length before it.
    fn frame(to: Mac, from: Mac, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(12 + payload.len()).unwrap();
        [&length.to_be_bytes()[..], &to, &from, payload].concat()
    }

    fn silent(mut stream: &UnixStream) -> bool {
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        stream.read(&mut [0]).is_err()
    }

    fn hears(mut stream: &UnixStream, wanted: &[u8]) {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut heard = vec![0; wanted.len()];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(heard, wanted);
    }

    #[test]
    fn who_is_known_is_reached_alone_and_everybody_else_by_everybody() {
        const ALL: Mac = [0xff; 6];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("switch");
        start(&path).unwrap();
        let macs: Vec<Mac> = (1..=3).map(|number| [2, 0, 0, 0, 0, number]).collect();
        let mut hosts: Vec<_> = macs.iter().map(|_| UnixStream::connect(&path).unwrap()).collect();
        // Who listens is known when the switch has accepted it, so the first word is said until all hear it.
        let hello = frame(ALL, macs[0], b"hello");
        let heard = |host: &UnixStream| {
            let mut host = host;
            host.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let mut bytes = vec![0; hello.len()];
            host.read_exact(&mut bytes).is_ok() && bytes == hello
        };
        let mut missing = vec![1, 2];
        while !missing.is_empty() {
            hosts[0].write_all(&hello).unwrap();
            missing.retain(|host| !heard(&hosts[*host]));
        }
        for host in &hosts[1..] {
            while heard(host) {}
        }
        let answer = frame(macs[0], macs[1], b"for the first");
        hosts[1].write_all(&answer).unwrap();
        hears(&hosts[0], &answer);
        assert!(silent(&hosts[2]));
        let unknown = frame(macs[2], macs[1], b"nobody knows where");
        hosts[1].write_all(&unknown).unwrap();
        hears(&hosts[0], &unknown);
        hears(&hosts[2], &unknown);
        // Nonsense ends one connection and no other.
        hosts[2].write_all(&[0xff; 64]).unwrap();
        hosts[1].write_all(&answer).unwrap();
        hears(&hosts[0], &answer);
    }
}
