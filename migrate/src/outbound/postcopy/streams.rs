//! The two page streams of a post-copy, and the threads that fill them.

use super::shelf::{Shelf, Why};
use crate::conversation::Sender;
use crate::error::{Error, Result};
use crate::link::PageSender;
use crate::report::PostCopyReport;
use crate::source::Donor;
use bytes::Bytes;
use protocol::frame::{Frame, HEADER_BYTES, StreamPreamble};
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use protocol::payload::{Encoding, is_zero};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;

/// The stream of the push, and that of the pages that were asked for.
const PUSH: u16 = 0;
const ASKED: u16 = 1;

/// How long a wait for something to do goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

/// What the main thread and the two that write share.
pub(super) struct Streams {
    state: Mutex<State>,
    changed: Condvar,
    /// Until they are filled, by their numbers.
    streams: Mutex<Vec<(u16, Box<dyn PageSender>)>>,
}

struct State {
    shelf: Shelf,
    report: PostCopyReport,
    failure: Option<Error>,
    stopped: bool,
}

impl Streams {
    /// Opens both.
    pub(super) fn open(talk: &mut Sender, missing: Vec<PageSet>) -> Result<Self> {
        let push = talk.link()?.open_page_stream()?;
        let asked = talk.link()?.open_urgent_stream()?;
        let state = State {
            shelf: Shelf::new(missing),
            report: PostCopyReport::default(),
            failure: None,
            stopped: false,
        };
        Ok(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            streams: Mutex::new(vec![(PUSH, push), (ASKED, asked)]),
        })
    }

    /// Begins to fill them. They end when there is nothing more for them, with the link, or with [`Streams::stop`].
    pub(super) fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, donor: &'scope dyn Donor) {
        let streams = std::mem::take(&mut *self.streams.lock().unwrap_or_else(PoisonError::into_inner));
        for (number, stream) in streams {
            let run = move || {
                if let Err(error) = self.fill(number, stream, donor) {
                    self.lock().failure.get_or_insert(error);
                }
            };
            let name = if number == PUSH { "pages-pushed" } else { "pages-asked" };
            if let Err(error) = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, run) {
                let error = Error::Host(format!("could not start a thread: {error}"));
                self.lock().failure.get_or_insert(error);
            }
        }
    }

    /// Lets both end.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// A page that somebody waits for.
    pub(super) fn want(&self, space: SpaceId, page: u64) {
        self.lock().shelf.want(space, page);
        self.changed.notify_all();
    }

    /// Pages that were not sent yet.
    pub(super) fn left_pages(&self) -> u64 {
        self.lock().shelf.left_pages()
    }

    /// What was sent.
    pub(super) fn report(&self) -> PostCopyReport {
        self.lock().report
    }

    /// Whether both are well.
    ///
    /// # Errors
    /// What the first one failed with, once.
    pub(super) fn check(&self) -> Result<()> {
        self.lock().failure.take().map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, number: u16, mut stream: Box<dyn PageSender>, donor: &dyn Donor) -> Result<()> {
        stream.write(&mut [Bytes::copy_from_slice(&StreamPreamble { stream: number }.encode())])?;
        while let Some(run) = self.next(number) {
            let mut bytes = vec![0; run.bytes()];
            donor.read(run, &mut bytes)?;
            let mut chunks = frames(run, &bytes.into());
            let sent: usize = chunks.iter().map(Bytes::len).sum();
            stream.write(&mut chunks)?;
            self.lock().report.sent_bytes += sent as u64;
        }
        Ok(())
    }

    /// What to send next; `None` at the end. The push ends when nothing is left, the other one goes on, because what was
    /// asked for is told to it alone.
    fn next(&self, number: u16) -> Option<PageRun> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            let State { shelf, report, .. } = &mut *state;
            if number == PUSH {
                let run = shelf.next_pushed()?;
                report.pushed_pages += u64::from(run.count);
                return Some(run);
            }
            if let Some((run, why)) = shelf.next_asked() {
                let counter = match why {
                    Why::Asked => &mut report.asked_pages,
                    Why::Neighbour => &mut report.prefetched_pages,
                };
                *counter += u64::from(run.count);
                return Some(run);
            }
            state = self.changed.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The frames for a run: pages of nothing but zeros cost a header.
fn frames(run: PageRun, bytes: &Bytes) -> Vec<Bytes> {
    let zeros: Vec<bool> = bytes.chunks(PAGE_SIZE).map(is_zero).collect();
    let (mut chunks, mut at) = (Vec::new(), 0);
    for same in zeros.chunk_by(|left, right| left == right) {
        let part = PageRun { first: run.first + at as u64, count: same.len() as u32, ..run };
        let zero = same.first() == Some(&true);
        let payload =
            if zero { Bytes::new() } else { bytes.slice(at * PAGE_SIZE..(at + same.len()) * PAGE_SIZE) };
        let encoding = if zero { Encoding::Zero } else { Encoding::Raw };
        // At most a megabyte.
        let payload_bytes = payload.len() as u32;
        let frame = Frame::Pages { run: part, encoding, payload_bytes, round: 0 };
        let header: [u8; HEADER_BYTES] = frame.encode(&payload);
        chunks.push(Bytes::copy_from_slice(&header));
        if !payload.is_empty() {
            chunks.push(payload);
        }
        at += same.len();
    }
    chunks
}
