//! Behind `Started` of a workload that misses pages: it runs here, and they follow.
//!
//! ```text
//!  faults (one thread) ──▶ main: Want ──▶ the source
//!  pages asked for, all others (a thread each) ──▶ placed ──▶ books ──▶ main: Complete
//! ```
//!
//! # A lost link loses nothing
//!
//! Whoever touches a missing page waits, in the kernel, until it is put in place; the source keeps its memory until it was
//! told `Complete`. So a lost link is only a pause: this end waits for the sender to dial again and ask, for as long as it
//! takes, says `Incomplete` and then what is missing, asks anew for what somebody waits for, and goes on. If this process
//! dies, the VMM keeps the vCPUs waiting and the next receiver takes the workload up.
//!
//! # A peer is not believed
//!
//! A page is put in place only when its whole frame is there and its sum is right: the guest runs, so there is nothing to
//! discard afterwards. And only pages that were missing on this link are taken: a page that the guest has is never touched.

mod books;
mod pages;

use super::Inbound;
use super::settle::{LOADED, Word};
use super::visitor::tell;
use crate::conversation::out_of_order;
use crate::destination::{Destination, Incomplete};
use crate::error::{Error, Result, clean};
use crate::report::{Event, FaultReport, Phase, micros};
use books::Books;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use protocol::MigrationId;
use protocol::control::{Downstream, Outcome, RefuseCode, Upstream};
use protocol::frame::POST_COPY_STREAMS;
use protocol::page::SpaceId;
use protocol::sparse;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a wait goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

/// How often new connections are looked at while the link lives.
const LOOK: Duration = Duration::from_millis(100);

/// How long a sender that asked may take to go on.
const VISIT: Duration = Duration::from_secs(2);

/// Stack of a thread: a frame is on the heap.
const STACK_BYTES: usize = 256 << 10;

/// What the threads tell.
enum News {
    /// Pages were touched that are not there.
    Touched(Vec<(SpaceId, u64)>),
    /// Something was put in place.
    Placed,
    /// A page stream of the link of this number ended, well or not.
    StreamEnded(u64, Result<()>),
    /// The workload cannot be served any more.
    Broken(Error),
}

/// The pages that follow.
struct Following {
    workload: Arc<dyn Incomplete>,
    books: Arc<Books>,
    news: Receiver<News>,
    teller: Sender<News>,
    /// Which link the streams belong to.
    link: u64,
    /// How many of its streams were taken.
    streams: usize,
    threads: Vec<JoinHandle<()>>,
    faults: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Inbound<'_> {
    /// Serves the page faults of a workload that was started here until nothing is missing. It is linked to the sender
    /// when this is called.
    fn follow(&mut self, workload: Arc<dyn Incomplete>, migration: MigrationId) -> Result<()> {
        let begun = Instant::now();
        self.report.workload = workload.name().into();
        let mut following = Following::begin(workload)?;
        let done = self.phase(Phase::PostCopy, |me| me.serve(&mut following, migration));
        if done.is_ok() {
            self.desk.ledger().record(migration, Outcome::Started);
            tell(&mut self.talk, &Upstream::Complete { migration });
        } else if let Err(error) = &done
            && matches!(error.root(), Error::Workload(_))
        {
            // Only then: whoever reads this knows that the workload ended here.
            tell(&mut self.talk, &Upstream::Failed { reason: clean(&error.to_string()) });
        }
        let report = FaultReport { duration_us: micros(begun.elapsed()), ..following.books.report() };
        self.report.post_copy = Some(report);
        if done.is_ok() {
            self.settle(self.options.linger);
        }
        self.talk.hang_up(if done.is_ok() { "done" } else { "the receiver ends while pages are missing" });
        following.end();
        done
    }

    /// Committed: starts a workload that misses pages, and serves it.
    pub(super) fn start_incomplete(
        &mut self,
        destination: Box<dyn Destination>,
        migration: MigrationId,
    ) -> Result<()> {
        match destination.start_incomplete(migration).map_err(|error| error.during(Phase::Commit)) {
            Ok(workload) => {
                tell(&mut self.talk, &Upstream::Started { migration });
                self.follow(workload, migration)
            }
            Err(error) => {
                self.never_starts(migration, &error);
                Err(error)
            }
        }
    }

    /// Takes up what another engine left, for a sender that has just asked about it.
    pub(super) fn go_on_with(&mut self, workload: Arc<dyn Incomplete>, migration: MigrationId) -> Result<()> {
        self.talk.say(&Upstream::Incomplete { migration }, &[], self.options.idle)?;
        self.await_recover(migration)?;
        say_missing(&mut self.talk, workload.missing(), self.options.idle)?;
        self.follow(workload, migration)
    }

    fn serve(&mut self, following: &mut Following, migration: MigrationId) -> Result<()> {
        let _answers = self.cancel.answers();
        let mut interrupted = false;
        let mut looked = Instant::now();
        let mut told = Instant::now();
        loop {
            let left = following.books.left();
            if left == 0 {
                return following.workload.complete();
            }
            if told.elapsed() >= LOOK {
                told = Instant::now();
                self.observer.event(&Event::Following { missing_pages: left });
            }
            if self.cancel.take() {
                if std::mem::replace(&mut interrupted, true) {
                    return Err(Error::Interrupted(format!(
                        "{} runs here and waits for {left} pages whenever it touches them: start migrate receive to go on",
                        following.workload.name()
                    )));
                }
                tracing::warn!(
                    "{} runs here and still needs {left} pages of its source, so this goes on; interrupted once more it \
                     ends, whoever touches a missing page waits, and the next migrate receive goes on",
                    following.workload.name()
                );
            }
            self.take_stream(following);
            match following.news.recv_timeout(SLICE) {
                Ok(news) => self.act(following, news)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Host("no thread is left".into())),
            }
            if looked.elapsed() >= LOOK || self.talk.link().is_err() {
                looked = Instant::now();
                self.look_for_sender(following, migration);
            }
        }
    }

    /// Takes a page stream that the sender opened, if one is still to come.
    fn take_stream(&mut self, following: &mut Following) {
        if following.streams == usize::from(POST_COPY_STREAMS) {
            return;
        }
        let Ok(link) = self.talk.link() else { return };
        match link.accept_page_stream(Duration::from_millis(1)) {
            Ok(stream) => following.read(stream),
            Err(Error::TimedOut { .. }) => {}
            Err(error) => self.lose(&error),
        }
    }

    fn act(&mut self, following: &mut Following, news: News) -> Result<()> {
        match news {
            News::Touched(places) => {
                for (space, page) in places {
                    self.want(space, page);
                }
                Ok(())
            }
            News::Placed => Ok(()),
            News::StreamEnded(link, _) if link != following.link => Ok(()),
            // The other stream may have what is missing; if not, the sender closes or says nothing more.
            News::StreamEnded(_, Ok(())) => Ok(()),
            News::StreamEnded(_, Err(error)) => {
                self.lose(&error);
                Ok(())
            }
            News::Broken(error) => Err(error),
        }
    }

    fn want(&mut self, space: SpaceId, page: u64) {
        if self.talk.link().is_err() {
            // Asked for once there is a link again.
            return;
        }
        let want = Upstream::Want { space: space.0, page };
        if let Err(error) = self.talk.say(&want, &[], self.options.idle) {
            self.lose(&error);
        }
    }

    fn lose(&mut self, error: &Error) {
        if self.talk.link().is_ok() {
            tracing::warn!(%error, "the link to the source was lost: waiting for the sender to come back");
            self.talk.hang_up(&clean(&error.to_string()));
        }
    }

    /// Looks whether somebody dialled; a sender that asks about this migration goes on over its new connection.
    fn look_for_sender(&mut self, following: &mut Following, migration: MigrationId) {
        let wait = if self.talk.link().is_ok() { Duration::ZERO } else { LOOK };
        let Some(visitor) = self.visitors.as_ref().and_then(|visitors| visitors.next(wait)) else { return };
        if !visitor.post_copy {
            // It could not understand the answer, and must not hear a wrong one.
            self.desk.dismiss(visitor);
            return;
        }
        match self.visit(visitor) {
            Some(Word::Said(_)) => {}
            Some(Word::Resumes(visitor)) => return visitor.refuse(RefuseCode::NoSuchMigration, LOADED),
            None => return,
        }
        if let Err(error) = self.go_on(following, migration) {
            self.lose(&error);
        }
    }

    /// The sender asked anew: says what is missing, and asks again for what somebody waits for.
    fn go_on(&mut self, following: &mut Following, migration: MigrationId) -> Result<()> {
        following.relink();
        self.talk.say(&Upstream::Incomplete { migration }, &[], VISIT)?;
        self.await_recover(migration)?;
        let missing = following.books.missing();
        say_missing(&mut self.talk, &missing, self.options.idle)?;
        for (space, page) in following.books.waiting() {
            self.want(space, page);
        }
        Ok(())
    }

    fn await_recover(&mut self, migration: MigrationId) -> Result<()> {
        match self.talk.hear("the sender to go on", VISIT, &mut || Ok(0))?.0 {
            Downstream::Recover { migration: of } if of == migration => Ok(()),
            other => Err(out_of_order("Recover", other.name())),
        }
    }
}

fn say_missing(
    talk: &mut crate::conversation::Receiver,
    missing: &[protocol::page::PageSet],
    limit: Duration,
) -> Result<()> {
    let pages = missing.iter().map(protocol::page::PageSet::count).sum();
    talk.say(&Upstream::Missing { pages }, &sparse::encode(missing), limit)
}

impl Following {
    fn begin(workload: Arc<dyn Incomplete>) -> Result<Self> {
        let (teller, news) = unbounded();
        let books = Arc::new(Books::new(workload.missing().to_vec()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (workload, books, teller, stop) =
                (workload.clone(), books.clone(), teller.clone(), stop.clone());
            spawn("page-faults", move || watch(workload.as_ref(), &books, &teller, &stop))?
        };
        Ok(Self {
            workload,
            books,
            news,
            teller,
            link: 0,
            streams: 0,
            threads: Vec::new(),
            faults: Some(thread),
            stop,
        })
    }

    /// Reads a page stream of the link there is now.
    fn read(&mut self, stream: Box<dyn crate::link::PageReceiver>) {
        self.streams += 1;
        let (workload, books, teller, link) =
            (self.workload.clone(), self.books.clone(), self.teller.clone(), self.link);
        let read = move || {
            let ended = pages::run(stream, workload.as_ref(), &books, &teller);
            // Nobody listens any more when everything is there.
            let _ = teller.send(match ended {
                Err(error @ (Error::Workload(_) | Error::Host(_))) => News::Broken(error),
                ended => News::StreamEnded(link, ended),
            });
        };
        match spawn("pages-in", read) {
            Ok(thread) => self.threads.push(thread),
            Err(error) => {
                let _ = self.teller.send(News::StreamEnded(self.link, Err(error)));
            }
        }
    }

    /// The streams of the link before do not count any more.
    fn relink(&mut self) {
        self.link += 1;
        self.streams = 0;
        self.books.links();
        self.threads.retain(|thread| !thread.is_finished());
    }

    fn end(mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.faults.take().into_iter().chain(self.threads.drain(..)) {
            // A thread that panicked told nothing, and its pages were missed.
            let _ = thread.join();
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_BYTES)
        .spawn(body)
        .map_err(|error| Error::Host(format!("could not start a thread: {error}")))
}

/// Takes the faults: pages that are missing are told, pages that were never used become zeros at once.
fn watch(workload: &dyn Incomplete, books: &Books, teller: &Sender<News>, stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        let touched = workload.touched(SLICE).and_then(|places| {
            let wanted = books.touched(&places);
            for place in places.iter().filter(|place| !books.misses(**place)) {
                let run = protocol::page::PageRun { space: place.0, first: place.1, count: 1 };
                workload.place_zeros(run)?;
            }
            Ok(wanted)
        });
        let news = match touched {
            Ok(wanted) if wanted.is_empty() => continue,
            Ok(wanted) => News::Touched(wanted),
            Err(error) => News::Broken(error),
        };
        let broken = matches!(news, News::Broken(_));
        if teller.send(news).is_err() || broken {
            return;
        }
    }
}
