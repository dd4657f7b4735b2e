//! A link in memory, for tests: with latency, a bandwidth, windows that fill, and ends that come when a test wants.
//!
//! What a link above it sees is what a reliable transport shows: bytes in order, late or never. So a lost packet is a
//! piece that comes later, by the time of a retransmission. All delays follow from a seed.
//!
//! A [`Cut`] ends the connection at a fixed point: what was written before that point still arrives, what is written
//! behind it does not, and both ends find the link lost. [`Cable::cut`] ends it at once, and what is in flight is lost.

mod network;
mod queue;

use super::{Link, LinkStats, PageReceiver, PageSender};
use crate::error::{Error, Result};
use crate::identity::Fingerprint;
use bytes::Bytes;
pub use network::Network;
use queue::Queue;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How a link behaves.
#[derive(Debug, Clone)]
pub struct Profile {
    /// One way.
    pub latency: Duration,
    /// Bytes a second in each direction; 0 for no limit.
    pub bytes_per_s: u64,
    /// The most bytes on their way on each stream, as a receiver that does not read lets them pile up.
    pub window_bytes: usize,
    /// One of how many pieces is lost and comes a retransmission later; 0 for none.
    pub loss_one_in: u32,
    /// How long a page stream waits for room.
    pub stall: Duration,
    /// What the delays follow from.
    pub seed: u64,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            bytes_per_s: 0,
            window_bytes: 1 << 20,
            loss_one_in: 0,
            stall: Duration::from_secs(10),
            seed: 0,
        }
    }
}

/// From whom to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the sender of pages to their receiver.
    Down,
    /// From the receiver of pages to their sender.
    Up,
}

/// Where a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Behind this many bytes of a direction, on all of its streams together.
    Bytes(Direction, u64),
    /// Right before the control message of this number (from 0) of a direction.
    Before(Direction, u32),
    /// Right behind it.
    After(Direction, u32),
}

/// Both ends of a new connection, and the cable between them: first the one that dialled.
pub fn pair(profile: &Profile, cut: Option<Cut>) -> (Duplex, Duplex, Cable) {
    let wire = Arc::new(Wire {
        profile: profile.clone(),
        state: Mutex::new(State::new(profile.seed, cut)),
        changed: Condvar::new(),
    });
    let end = |direction| Duplex {
        wire: wire.clone(),
        direction,
        peer_key: NOBODY,
        part: Vec::new(),
        closed: false,
    };
    (end(Direction::Down), end(Direction::Up), Cable(wire.clone()))
}

/// The key of whoever does not say who it is: a link in memory authenticates nobody.
pub const NOBODY: Fingerprint = Fingerprint::from_digest([0; 32]);

/// The hand on the cable.
#[derive(Clone)]
pub struct Cable(Arc<Wire>);

impl Cable {
    /// Pulls it: what is in flight is lost, what has arrived can still be read.
    pub fn cut(&self) {
        let now = Instant::now();
        self.0.change(|state| {
            state.lost = true;
            state.queues().for_each(|queue| queue.lose_in_flight(now));
        });
    }
}

/// One end of a connection in memory.
pub struct Duplex {
    wire: Arc<Wire>,
    /// Which way this end writes.
    direction: Direction,
    peer_key: Fingerprint,
    /// What a read that timed out got.
    part: Vec<u8>,
    closed: bool,
}

struct Wire {
    profile: Profile,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    cut: Option<Cut>,
    lost: bool,
    /// Which ends closed, by the direction they write, and why.
    closed: [Option<String>; 2],
    lines: [Line; 2],
    pages: Vec<Queue>,
    accepted: usize,
}

/// One direction of the wire.
struct Line {
    control: Queue,
    messages: u32,
    bytes: u64,
    free_at: Instant,
    random: u64,
}

/// Which queue.
#[derive(Clone, Copy)]
enum Of {
    Control,
    Pages(usize),
}

impl State {
    fn new(seed: u64, cut: Option<Cut>) -> Self {
        let line =
            |random| Line { control: Queue::new(), messages: 0, bytes: 0, free_at: Instant::now(), random };
        Self {
            cut,
            lost: false,
            closed: [None, None],
            lines: [line(seed), line(!seed)],
            pages: Vec::new(),
            accepted: 0,
        }
    }

    fn queues(&mut self) -> impl Iterator<Item = &mut Queue> {
        let Self { lines, pages, .. } = self;
        lines.iter_mut().map(|line| &mut line.control).chain(pages)
    }

    fn queue(&mut self, direction: Direction, of: Of) -> &mut Queue {
        match of {
            Of::Control => &mut self.lines[direction as usize].control,
            Of::Pages(stream) => &mut self.pages[stream],
        }
    }

    /// Whether an end that writes in `direction` can still do anything.
    fn alive(&self, direction: Direction) -> Result<()> {
        let peer = 1 - direction as usize;
        let reason = match &self.closed {
            closed if closed[direction as usize].is_some() => "it was closed at this end".to_owned(),
            closed if closed[peer].is_some() => {
                format!("the peer closed it: {}", closed[peer].as_deref().unwrap_or_default())
            }
            _ if self.lost => "it was cut".to_owned(),
            _ => return Ok(()),
        };
        Err(Error::Link(reason))
    }

    /// Puts bytes on the wire, up to the cut.
    fn send(&mut self, profile: &Profile, direction: Direction, of: Of, mut bytes: Bytes) -> Result<()> {
        let line = &mut self.lines[direction as usize];
        let message = line.messages;
        line.messages += u32::from(matches!(of, Of::Control));
        let (keep, cut) = match self.cut {
            Some(Cut::Bytes(way, at)) if way == direction && line.bytes + bytes.len() as u64 > at => {
                ((at - line.bytes) as usize, true)
            }
            Some(Cut::Before(way, number)) if way == direction && message == number => {
                (0, matches!(of, Of::Control))
            }
            Some(Cut::After(way, number)) if way == direction && message == number => {
                (bytes.len(), matches!(of, Of::Control))
            }
            _ => (bytes.len(), false),
        };
        if cut {
            bytes.truncate(keep);
            self.lost = true;
        }
        line.bytes += bytes.len() as u64;
        let at = line.arrival(profile, bytes.len());
        self.queue(direction, of).push(at, bytes);
        if cut { Err(Error::Link("it was cut".into())) } else { Ok(()) }
    }
}

impl Line {
    /// When a piece that is written now arrives.
    fn arrival(&mut self, profile: &Profile, bytes: usize) -> Instant {
        let begin = self.free_at.max(Instant::now());
        self.free_at = match profile.bytes_per_s {
            0 => begin,
            rate => begin + Duration::from_secs_f64(bytes as f64 / rate as f64),
        };
        // Knuth's MMIX generator; the upper bits are the good ones.
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let lost =
            profile.loss_one_in > 0 && (self.random >> 33).is_multiple_of(u64::from(profile.loss_one_in));
        // A retransmission takes another round trip.
        self.free_at + if lost { profile.latency * 3 } else { profile.latency }
    }
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_all();
        changed
    }

    /// Waits until `ready` has an answer; `until` it has, or for ever. `ready` may say when to look again.
    fn wait<T>(
        &self,
        what: &'static str,
        limit: Option<Duration>,
        mut ready: impl FnMut(&mut State) -> Result<std::result::Result<T, Option<Instant>>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            let again = match ready(&mut state)? {
                Ok(answer) => {
                    self.changed.notify_all();
                    return Ok(answer);
                }
                Err(again) => again,
            };
            let now = Instant::now();
            let mut wait = again.map_or(Duration::from_secs(1), |at| at.saturating_duration_since(now));
            if let Some(limit) = limit {
                let left = limit.saturating_sub(begun.elapsed());
                if left.is_zero() {
                    return Err(Error::TimedOut { what, after: limit });
                }
                wait = wait.min(left);
            }
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn write(&self, direction: Direction, of: Of, bytes: &Bytes, limit: Duration) -> Result<()> {
        self.wait("the peer to read", Some(limit), |state| {
            state.alive(direction)?;
            if state.queue(direction, of).bytes() >= self.profile.window_bytes {
                return Ok(Err(None));
            }
            state.send(&self.profile, direction, of, bytes.clone()).map(Ok)
        })
        .inspect_err(|_| self.changed.notify_all())
    }

    /// The next bytes that `reader` gets; `None` at the clean end of a page stream.
    fn read(
        &self,
        reader: Direction,
        of: Of,
        most: usize,
        what: &'static str,
        limit: Option<Duration>,
    ) -> Result<Option<Bytes>> {
        let from = if reader == Direction::Up { Direction::Down } else { Direction::Up };
        self.wait(what, limit, |state| {
            if state.closed[reader as usize].is_some() {
                state.alive(reader)?;
            }
            let queue = state.queue(from, of);
            if let Some(bytes) = queue.pop(Instant::now(), most) {
                return Ok(Ok(Some(bytes)));
            }
            if let Some(at) = queue.next_at() {
                return Ok(Err(Some(at)));
            }
            if queue.finished {
                return Ok(Ok(None));
            }
            state.alive(reader)?;
            Ok(Err(None))
        })
    }

    fn close(&self, direction: Direction, reason: &str) {
        self.change(|state| state.closed[direction as usize].get_or_insert(reason.into()).len());
    }
}

impl Link for Duplex {
    fn peer(&self) -> String {
        "the other end of a duplex link".into()
    }

    fn peer_key(&self) -> Fingerprint {
        self.peer_key
    }

    fn write(&mut self, bytes: &[u8], timeout: Duration) -> Result<()> {
        self.wire.write(self.direction, Of::Control, &Bytes::copy_from_slice(bytes), timeout)
    }

    fn read_exact(&mut self, buffer: &mut [u8], what: &'static str, timeout: Duration) -> Result<()> {
        let begun = Instant::now();
        while self.part.len() < buffer.len() {
            let left = timeout.saturating_sub(begun.elapsed());
            let missing = buffer.len() - self.part.len();
            match self.wire.read(self.direction, Of::Control, missing, what, Some(left))? {
                Some(bytes) => self.part.extend_from_slice(&bytes),
                None => return Err(Error::Link("the control stream ended".into())),
            }
        }
        let rest = self.part.split_off(buffer.len());
        buffer.copy_from_slice(&self.part);
        self.part = rest;
        Ok(())
    }

    fn open_page_stream(&mut self) -> Result<Box<dyn PageSender>> {
        let stream = self.wire.change(|state| {
            state.alive(self.direction)?;
            state.pages.push(Queue::new());
            Ok::<_, Error>(state.pages.len() - 1)
        })?;
        Ok(Box::new(Pages { wire: self.wire.clone(), stream }))
    }

    /// Every stream has a queue of its own here, so none stands behind another.
    fn open_urgent_stream(&mut self) -> Result<Box<dyn PageSender>> {
        self.open_page_stream()
    }

    fn accept_page_stream(&mut self, timeout: Duration) -> Result<Box<dyn PageReceiver>> {
        let stream = self.wire.wait("a page stream", Some(timeout), |state| {
            if state.accepted < state.pages.len() {
                state.accepted += 1;
                return Ok(Ok(state.accepted - 1));
            }
            state.alive(self.direction)?;
            Ok(Err(None))
        })?;
        Ok(Box::new(Arriving { wire: self.wire.clone(), stream }))
    }

    fn stats(&self) -> LinkStats {
        LinkStats {
            rtt_us: (self.wire.profile.latency * 2).as_micros() as u64,
            sent_wire_bytes: self.wire.lock().lines[self.direction as usize].bytes,
            ..LinkStats::default()
        }
    }

    fn close(mut self: Box<Self>, reason: &str) {
        self.closed = true;
        self.wire.close(self.direction, reason);
    }
}

impl Drop for Duplex {
    fn drop(&mut self) {
        if !self.closed {
            self.wire.close(self.direction, "it was dropped");
        }
    }
}

struct Pages {
    wire: Arc<Wire>,
    stream: usize,
}

impl PageSender for Pages {
    fn write(&mut self, chunks: &mut [Bytes]) -> Result<()> {
        let stall = self.wire.profile.stall;
        chunks
            .iter()
            .filter(|chunk| !chunk.is_empty())
            .try_for_each(|chunk| self.wire.write(Direction::Down, Of::Pages(self.stream), chunk, stall))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.wire.change(|state| {
            // The end of the connection is never the clean end of a stream.
            let alive = state.alive(Direction::Down).is_ok();
            state.pages[self.stream].finished |= alive;
        });
    }
}

struct Arriving {
    wire: Arc<Wire>,
    stream: usize,
}

impl PageReceiver for Arriving {
    fn read(&mut self) -> Result<Option<Bytes>> {
        self.wire.read(Direction::Up, Of::Pages(self.stream), usize::MAX, "pages", None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn read(end: &mut Duplex, bytes: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0; bytes];
        end.read_exact(&mut buffer, "a test", SOON).map(|()| buffer)
    }

    #[test]
    fn a_read_that_timed_out_continues_where_it_stopped() {
        let (mut left, mut right, _) = pair(&Profile::default(), None);
        left.write(b"ab", SOON).unwrap();
        let mut buffer = [0; 4];
        let early = right.read_exact(&mut buffer, "four bytes", Duration::ZERO);
        assert!(matches!(early, Err(Error::TimedOut { what: "four bytes", .. })));
        left.write(b"cdef", SOON).unwrap();
        assert_eq!(read(&mut right, 4).unwrap(), b"abcd");
        assert_eq!(read(&mut right, 2).unwrap(), b"ef");
    }

    #[test]
    fn a_window_fills_and_a_stream_ends_cleanly() {
        let profile = Profile { window_bytes: 10, stall: Duration::ZERO, ..Profile::default() };
        let (mut left, mut right, _) = pair(&profile, None);
        let mut pages = left.open_page_stream().unwrap();
        pages.write(&mut [Bytes::from_static(&[1; 12])]).unwrap();
        let full = pages.write(&mut [Bytes::from_static(&[2; 1])]);
        assert!(matches!(full, Err(Error::TimedOut { .. })));
        drop(pages);
        let mut pages = right.accept_page_stream(SOON).unwrap();
        assert_eq!(pages.read().unwrap().unwrap(), [1; 12].as_slice());
        assert_eq!(pages.read().unwrap(), None);
    }

    #[test]
    fn a_cut_delivers_what_is_before_it_and_nothing_behind_it() {
        for (cut, arrives) in [
            (Cut::Bytes(Direction::Down, 5), b"abcde".as_slice()),
            (Cut::Before(Direction::Down, 1), b"abc"),
            (Cut::After(Direction::Down, 1), b"abcdef"),
        ] {
            let (mut left, mut right, _) = pair(&Profile::default(), Some(cut));
            left.write(b"abc", SOON).unwrap();
            assert!(matches!(left.write(b"def", SOON), Err(Error::Link(_))), "{cut:?}");
            assert_eq!(read(&mut right, arrives.len()).unwrap(), arrives, "{cut:?}");
            assert!(matches!(read(&mut right, 1), Err(Error::Link(_))), "{cut:?}");
            assert!(matches!(right.write(b"x", SOON), Err(Error::Link(_))), "{cut:?}");
        }
    }

    #[test]
    fn a_pulled_cable_loses_what_is_in_flight_and_a_closed_one_does_not() {
        let profile = Profile { latency: Duration::from_millis(20), ..Profile::default() };
        let (mut left, mut right, cable) = pair(&profile, None);
        left.write(b"abc", SOON).unwrap();
        cable.cut();
        assert!(matches!(read(&mut right, 1), Err(Error::Link(_))));
        let (mut left, mut right, _) = pair(&profile, None);
        left.write(b"abc", SOON).unwrap();
        Box::new(left).close("so it is");
        assert_eq!(read(&mut right, 3).unwrap(), b"abc");
        assert!(read(&mut right, 1).unwrap_err().to_string().contains("so it is"));
    }
}
