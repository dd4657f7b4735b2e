//! An operator looks at a running migration, changes its limits and stops it, over its own socket.

use crate::harness::{SECOND, World, sending};
use migrate::cancel::CancelFlag;
use migrate::error::Error;
use migrate::link::duplex::{Network, Profile};
use migrate::outbound::Options;
use migrate::paths::RuntimeDir;
use migrate::report::{Event, Observer, Phase, Quiet};
use migrate::source::scripted::Who;
use migrate::steer::{Board, Client, Place, Server, Subject, Watched};
use protocol::steer::{End, Limits, Outcome};
use std::io::Write as _;
use std::time::{Duration, Instant};

/// A migration of `web` that can be steered.
struct Steered {
    options: Options,
    cancel: CancelFlag,
    place: Place,
    board: Board,
    directory: tempfile::TempDir,
}

fn steered() -> (Steered, Server) {
    let directory = tempfile::tempdir().unwrap();
    let runtime = RuntimeDir::open(Some(&directory.path().join("run"))).unwrap();
    let place = Place::open(&runtime).unwrap();
    let (options, cancel) = (sending(), CancelFlag::default());
    let subject = Subject {
        end: End::Send,
        migration: options.migration,
        workload: "web".into(),
        peer: "b".into(),
        memory_bytes: 1170 * 4096,
    };
    let board = Board::new(subject, cancel.clone(), Some(options.controls.clone()));
    let server = Server::start(&place, "web", board.clone()).unwrap();
    (Steered { options, cancel, place, board, directory }, server)
}

impl Steered {
    fn client(&self) -> Client {
        Client::connect(&self.place, "web").unwrap().expect("it is under way")
    }
}

fn slow(bytes_per_s: u64) -> Network {
    Network::new(Profile { bytes_per_s, ..Profile::default() }, None)
}

#[test]
fn an_operator_sees_it_changes_its_limits_and_stops_it() {
    let world = World::new(5, 2);
    let (steered, server) = steered();
    let mut watched = Watched { board: steered.board.clone(), inner: &mut Quiet };
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = steered.client();
            let until = Instant::now() + 20 * SECOND;
            let status = loop {
                let status = client.status().unwrap();
                if status.phase == "rounds" && status.moved_bytes > 0 && status.eta_us.is_some() {
                    break status;
                }
                assert!(Instant::now() < until, "{status:?}");
                std::thread::sleep(Duration::from_millis(5));
            };
            assert_eq!((status.workload.as_str(), status.outcome), ("web", None));
            assert!(status.done_pages <= status.dirty_pages && status.rate_bytes_per_s > 0, "{status:?}");

            client.set(&Limits { downtime_us: Some(7_000), ..Limits::default() }).unwrap();
            assert_eq!(client.status().unwrap().limits.downtime_us, Some(7_000));
            let refused = client.set(&Limits { max_rounds: Some(0), ..Limits::default() }).unwrap_err();
            assert!(matches!(&refused, Error::Usage(why) if why.contains("rounds")), "{refused}");

            assert!(client.cancel().unwrap());
            let status = client.status_at_end(20 * SECOND).unwrap();
            assert_eq!(status.outcome, Some(Outcome::Failed));
            assert!(status.reason.is_some_and(|reason| reason.contains("interrupted")));
        });
        let ended = world.attempt(&slow(2_000_000), None, &steered.options, &steered.cancel, &mut watched);
        drop(server);
        ended
    });
    assert!(matches!(ended.error(), Error::Interrupted(_)), "{}", ended.error());
    assert!(Client::connect(&steered.place, "web").unwrap().is_none(), "the socket went with it");
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn other_limits_let_a_migration_converge_that_would_not() {
    let world = World::new(5, 8);
    let (steered, server) = steered();
    steered.options.controls.change(|limits| {
        limits.downtime = Duration::from_nanos(1);
        limits.on_timeout = migrate::converge::OnTimeout::Cancel;
        limits.on_stall = Vec::new();
        limits.max_rounds = u32::MAX;
    });
    let mut watched = Watched { board: steered.board.clone(), inner: &mut Quiet };
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = steered.client();
            while client.status().unwrap().round < 3 {
                std::thread::sleep(Duration::from_millis(2));
            }
            client.set(&Limits { downtime_us: Some(10_000_000), ..Limits::default() }).unwrap();
            assert_eq!(client.status_at_end(20 * SECOND).unwrap().outcome, Some(Outcome::Moved));
        });
        world.attempt(&slow(100_000_000), None, &steered.options, &steered.cancel, &mut watched)
    });
    drop(server);
    world.assert_moved(&ended);
}

/// Cancels over the socket when the engine enters a phase, and notes what it was told.
struct CancelAt<'a>(Phase, &'a Steered, Option<bool>);

impl Observer for CancelAt<'_> {
    fn event(&mut self, event: &Event) {
        self.1.board.note(event);
        if *event == (Event::Phase { phase: self.0 }) {
            self.2 = Some(self.1.client().cancel().unwrap());
        }
    }
}

#[test]
fn a_cancel_is_clean_in_every_phase_before_commit_and_refused_behind_it() {
    use Phase::{Commit, Freeze, Greet, Offer, Pledge, Ready, Rounds, Settle, State, Track};
    for phase in [Greet, Offer, Track, Rounds, Freeze, State, Ready, Pledge, Commit, Settle] {
        let world = World::new(5, 2);
        let (steered, server) = steered();
        let mut canceller = CancelAt(phase, &steered, None);
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, None, &steered.options, &steered.cancel, &mut canceller);
        let possible = canceller.2;
        drop(server);
        assert_eq!(possible, Some(!matches!(phase, Commit | Settle)), "{phase:?}");
        if possible == Some(true) {
            assert!(matches!(ended.error(), Error::Interrupted(_)), "{phase:?}: {}", ended.error());
            world.assert_stayed_and_moves_next(&ended);
            assert!(world.witness.is_running(Who::Destination));
        } else {
            world.assert_moved(&ended);
        }
    }
}

#[test]
fn a_migration_waits_for_no_client() {
    let world = World::new(5, 2);
    let (steered, server) = steered();
    let path = steered.directory.path().join("run/moves/web.sock");
    // Half an order, an order too many, nothing at all: from more clients than there is room for.
    let silent: Vec<_> = (0..20u8)
        .map(|number| {
            let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
            // One that was not admitted is closed already.
            stream.write_all(&[number; 7][..usize::from(number % 8)]).ok();
            stream
        })
        .collect();
    let mut watched = Watched { board: steered.board.clone(), inner: &mut Quiet };
    let network = Network::new(Profile::default(), None);
    let ended = world.attempt(&network, None, &steered.options, &steered.cancel, &mut watched);
    world.assert_moved(&ended);
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    drop(silent);
}
