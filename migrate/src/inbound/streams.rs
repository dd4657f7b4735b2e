//! The page streams of the receiver, each with a thread that writes to the destination's memory.

use super::decode::Decoder;
use super::parse::{Item, Parser};
use crate::conversation::MOVED_BYTES;
use crate::destination::PageMemory;
use crate::error::{Error, Result};
use crate::link::{Link, PageReceiver};
use protocol::ProtocolError;
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Stack of a stream's thread: it has a few hundred bytes of locals.
const STACK_BYTES: usize = 256 << 10;

/// How long a wait goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

/// The page streams.
pub(super) struct Streams {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    bytes: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

/// How far the streams are. Bounded by their number, whatever they carry.
#[derive(Default)]
struct State {
    streams: Vec<Stream>,
    failure: Option<Error>,
    /// What arrived whole of the round under way, for a link that is lost and taken up again. Empty where that cannot
    /// be.
    arrived: Vec<PageSet>,
}

#[derive(Default, Clone)]
struct Stream {
    /// A stream of this number exists.
    opened: bool,
    /// Rounds it has ended.
    rounds: u32,
    /// It ended cleanly.
    ended: bool,
}

/// Where the pages of a migration go, whichever link brings them.
pub(super) struct Course {
    pub(super) layout: Arc<Layout>,
    pub(super) memory: Arc<dyn PageMemory>,
    pub(super) page_streams: u16,
    /// Stream *n* is on connection *n* modulo these.
    pub(super) connections: u16,
}

impl Streams {
    /// Before the offer was accepted there are none.
    pub(super) fn none() -> Self {
        Self { threads: Vec::new(), shared: Arc::default() }
    }

    /// Takes the page streams that the sender opens, from `round` on; there are none yet.
    pub(super) fn accept(
        &mut self,
        link: &mut dyn Link,
        course: &Course,
        round: u32,
        keeps: bool,
        limit: Duration,
    ) -> Result<()> {
        let Course { layout, memory, page_streams: count, connections } = course;
        let (count, connections) = (*count, usize::from(*connections));
        {
            let mut state = self.shared.lock();
            state.streams = vec![Stream { rounds: round, ..Stream::default() }; usize::from(count)];
            if keeps {
                state.arrived = layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
            }
        }
        for number in 0..count {
            let stream = link.accept_page_stream(limit)?;
            let (layout, memory, shared) = (layout.clone(), memory.clone(), self.shared.clone());
            let connection = usize::from(number) % connections;
            let thread = std::thread::Builder::new()
                .name(format!("pages-in-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let decoder = Decoder::new(layout.clone(), count);
                    let both = (Parser::new(layout, count).beginning_with(round), decoder);
                    if let Err(error) = run(stream, both, memory.as_ref(), &shared, |number| {
                        number % connections == connection
                    }) {
                        shared.change(|state| {
                            state.failure.get_or_insert(error);
                        });
                    }
                })
                .map_err(|error| Error::Host(format!("could not start a thread: {error}")))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Bytes that arrived on all streams.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Relaxed)
    }

    /// Whether every stream is well.
    ///
    /// # Errors
    /// What the first one failed with, once.
    pub(super) fn check(&self) -> Result<()> {
        self.shared.lock().failure.take().map_or(Ok(()), Err)
    }

    /// What arrived whole of the round under way. Told once; the threads have ended.
    pub(super) fn take_arrived(&mut self) -> Vec<PageSet> {
        std::mem::take(&mut self.shared.lock().arrived)
    }

    /// Waits until every stream has ended `round`; `watch` may end the wait.
    pub(super) fn await_round(
        &self,
        round: u32,
        idle: Duration,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.wait("every page stream to end the round", idle, watch, |stream| {
            if stream.rounds <= round && stream.ended {
                return Err(ended_early(stream.rounds));
            }
            Ok(stream.rounds > round)
        })?;
        // The sender begins the next round only when it hears of this.
        self.shared.lock().arrived.iter_mut().for_each(PageSet::clear);
        Ok(())
    }

    /// Waits until every stream has ended `last_round` and then itself: behind this nothing is written to memory.
    pub(super) fn await_end(
        &mut self,
        last_round: u32,
        idle: Duration,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.wait("every page stream to end", idle, watch, |stream| {
            if stream.ended && stream.rounds != last_round.saturating_add(1) {
                return Err(ended_early(stream.rounds));
            }
            Ok(stream.ended)
        })?;
        self.join();
        Ok(())
    }

    /// Waits for the threads, which end with their streams or with the link.
    pub(super) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A thread that panicked has not ended its stream, and that was noticed.
            let _ = thread.join();
        }
    }

    /// Waits until `done` says so of every stream, as long as bytes arrive.
    fn wait(
        &self,
        what: &'static str,
        idle: Duration,
        watch: &mut dyn FnMut() -> Result<()>,
        done: impl Fn(&Stream) -> Result<bool>,
    ) -> Result<()> {
        let (mut still_since, mut moved) = (Instant::now(), self.bytes());
        loop {
            // Without the lock, because it may look at the streams itself; and before the look below, because between that
            // and the wait the lock is held: what changes then would not be noticed until the slice is over.
            watch()?;
            let mut state = self.shared.lock();
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            let mut all = true;
            for stream in &state.streams {
                all &= done(stream)?;
            }
            if all {
                return Ok(());
            }
            let now = self.bytes();
            if now >= moved + MOVED_BYTES {
                (still_since, moved) = (Instant::now(), now);
            } else if still_since.elapsed() >= idle {
                return Err(Error::TimedOut { what, after: idle });
            }
            drop(self.shared.changed.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner).0);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run is in memory whole.
    fn arrived(&self, run: PageRun) {
        if let Some(set) = self.lock().arrived.get_mut(usize::from(run.space.0)) {
            set.insert(run.first, u64::from(run.count));
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_all();
        changed
    }
}

fn ended_early(rounds: u32) -> Error {
    let found = format!("the end of a page stream behind {rounds} rounds");
    Error::Protocol(ProtocolError::OutOfOrder { expected: "the last round's pages", found })
}

/// One stream, from its first byte to its clean end. `belongs` says which numbers its connection may carry.
fn run(
    mut stream: Box<dyn PageReceiver>,
    (mut parser, mut decoder): (Parser, Decoder),
    memory: &dyn PageMemory,
    shared: &Shared,
    belongs: impl Fn(usize) -> bool,
) -> Result<()> {
    let mut number = 0;
    while let Some(bytes) = stream.read()? {
        shared.bytes.fetch_add(bytes.len() as u64, Relaxed);
        let mut chunk = bytes.as_ref();
        while let Some(item) = parser.next(&mut chunk)? {
            match item {
                Item::Stream(stream) => {
                    number = usize::from(stream);
                    decoder.stream = stream;
                    if !belongs(number) {
                        return Err(Error::Protocol(ProtocolError::Value {
                            what: "the number of a page stream of another connection",
                            found: stream.into(),
                        }));
                    }
                    shared.change(|state| claim(state, number))?;
                }
                Item::Bytes { space, offset, bytes } => {
                    memory.write(space, offset, bytes)?;
                    if let Some(run) = parser.completed() {
                        shared.arrived(run);
                    }
                }
                Item::Zeros(run) => {
                    memory.zero(run)?;
                    shared.arrived(run);
                }
                Item::Coded(run, encoding) => {
                    decoder.write(memory, run, encoding, parser.payload())?;
                    shared.arrived(run);
                }
                Item::RoundEnd(round) => {
                    memory.settle()?;
                    shared.change(|state| state.streams[number].rounds = round + 1);
                }
            }
        }
    }
    parser.end()?;
    shared.change(|state| state.streams[number].ended = true);
    Ok(())
}

/// A stream says its number, which must be free.
fn claim(state: &mut State, number: usize) -> Result<()> {
    match state.streams.get_mut(number) {
        Some(stream) if !stream.opened => {
            stream.opened = true;
            Ok(())
        }
        _ => Err(Error::Protocol(ProtocolError::Value {
            what: "the number of a second page stream",
            found: number as u64,
        })),
    }
}
