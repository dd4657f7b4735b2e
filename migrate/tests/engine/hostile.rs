//! Peers that break the protocol, on purpose or by accident: an error, no panic, no harm.

use crate::harness::{SECOND, World, desk, layout, receiving, sending};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::error::{Error, Result};
use migrate::inbound::{self, Desk, Ledger as _, Limits, MemoryLedger, Notice};
use migrate::link::Link;
use migrate::link::duplex::{Duplex, Network, Profile, pair};
use migrate::outbound::{self, Failed};
use migrate::report::{ArrivalReport, Quiet};
use migrate::source::scripted::{Call, Who, Witness};
use proptest::prelude::*;
use protocol::MigrationId;
use protocol::control::{Downstream, Offer, Outcome, RefuseCode, Upstream, WorkloadKind};
use protocol::envelope;
use protocol::frame::{Frame, StreamPreamble};
use protocol::handshake::{Hello, Preamble};
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use protocol::payload::{Encoding, KnownPage};
use protocol::state::State;
use serde::{Serialize, de::DeserializeOwned};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// How long an honest end waits where the other is silent: no honest step may take as long, on a busy host either.
const SILENCE: Duration = Duration::from_millis(600);

pub(crate) const OURS: MigrationId = MigrationId(77);

/// A peer that can say anything.
pub(crate) struct Peer(pub(crate) Box<dyn Link>);

impl Peer {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        // The honest end may have hung up already, and that is fine.
        let _ = self.0.write(bytes, SECOND);
        self
    }

    pub(crate) fn say(&mut self, message: &impl Serialize, blob: &[u8]) -> &mut Self {
        self.bytes(&envelope::encode(message, blob).unwrap())
    }

    /// Stays on the line until the other end has hung up.
    pub(crate) fn stay(&mut self) {
        let mut byte = [0];
        while !matches!(self.0.read_exact(&mut byte, "the end", SECOND), Err(Error::Link(_))) {}
    }

    fn hang_up(&mut self) {
        self.0 = Box::new(pair(&Profile::default(), None).0);
    }

    /// Has said all.
    fn stop(&mut self) {}

    pub(crate) fn greet(&mut self, hello: &impl Serialize) -> &mut Self {
        self.bytes(&Preamble::OURS.encode()).say(hello, &[])
    }

    pub(crate) fn skip_preamble(&mut self) -> &mut Self {
        let _ = self.0.read_exact(&mut [0; 16], "a preamble", SECOND);
        self
    }

    /// The next message, if one comes.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> Option<T> {
        self.hear_blob().map(|(message, _)| message)
    }

    /// The next message and its blob.
    pub(crate) fn hear_blob<T: DeserializeOwned>(&mut self) -> Option<(T, Vec<u8>)> {
        let mut header = [0; envelope::HEADER_BYTES];
        self.0.read_exact(&mut header, "a header", 2 * SECOND).ok()?;
        let header = envelope::Header::decode(&header, 1 << 20).unwrap();
        let mut body = vec![0; header.body_bytes()];
        self.0.read_exact(&mut body, "a body", 2 * SECOND).ok()?;
        let blob = body.split_off(header.json_bytes as usize);
        Some((envelope::decode("test", &body).unwrap(), blob))
    }

    /// A sender up to `Accept`.
    pub(crate) fn offer(&mut self, offer: Offer) -> &mut Self {
        self.greet(&Downstream::Hello(Hello::ours()))
            .say(&Downstream::Offer(offer), b"machine")
            .skip_preamble();
        assert!(matches!(self.hear(), Some(Upstream::Hello(_))));
        self
    }

    pub(crate) fn accepted(&mut self) -> &mut Self {
        self.offer(offer());
        assert_eq!(self.hear(), Some(Upstream::Accept));
        self
    }

    /// One page stream with these bytes, which then stays open as long as the answer lives.
    pub(crate) fn stream(&mut self, parts: &[&[u8]]) -> Box<dyn migrate::link::PageSender> {
        let mut stream = self.0.open_page_stream().unwrap();
        let _ = stream.write(&mut [parts.concat().into()]);
        stream
    }

    /// A sender up to `Ready`, of a workload of zeros.
    pub(crate) fn ready(&mut self) -> &mut Self {
        self.accepted();
        drop(self.stream(&[&preamble(0), &end(0)]));
        drop(self.stream(&[&preamble(1), &end(0)]));
        self.say(&Downstream::State { last_round: 0 }, &state());
        assert_eq!(self.hear(), Some(Upstream::Ready));
        self
    }
}

pub(crate) fn offer() -> Offer {
    let (kind, name) = (WorkloadKind::Vm, "guest".to_owned());
    Offer { migration: OURS, kind, name, layout: layout(), page_streams: 2, connections: 1, seed: None }
}

pub(crate) fn preamble(stream: u16) -> Vec<u8> {
    StreamPreamble { stream }.encode().to_vec()
}

pub(crate) fn end(round: u32) -> Vec<u8> {
    Frame::RoundEnd { round }.encode(&[]).to_vec()
}

pub(crate) fn page(first: u64, round: u32) -> Vec<u8> {
    let run = PageRun { space: SpaceId(0), first, count: 1 };
    let payload = [1; PAGE_SIZE];
    let header = Frame::Pages { run, encoding: Encoding::Raw, payload_bytes: PAGE_SIZE as u32, round }
        .encode(&payload);
    [header.as_slice(), &payload].concat()
}

/// Two pages that this payload is said to stand for.
fn coded(encoding: Encoding, payload: &[u8]) -> Vec<u8> {
    let run = PageRun { space: SpaceId(0), first: 0, count: 2 };
    let payload_bytes = payload.len() as u32;
    let header = Frame::Pages { run, encoding, payload_bytes, round: 0 }.encode(payload);
    [header.as_slice(), payload].concat()
}

/// Two pages that equal this one, which it does not.
fn known(page: u64) -> Vec<u8> {
    KnownPage { page, digest: [3; 32] }.encode().repeat(2)
}

pub(crate) fn state() -> Vec<u8> {
    let mut state = State::default();
    state.push("scripted", 1, vec![]);
    state.encode().unwrap()
}

/// A desk to which one peer comes, and what it says of it.
fn one_peer(
    link: Duplex,
    patience: Duration,
    ledger: &Arc<MemoryLedger>,
) -> (Desk, mpsc::Receiver<(String, Error)>) {
    let mut link = Some(link);
    let accept = move |limit| match link.take() {
        Some(link) => Ok(Box::new(link) as Box<dyn Link>),
        None => {
            std::thread::park_timeout(limit);
            Err(Error::TimedOut { what: "a connection", after: limit })
        }
    };
    let (send, turned_away) = mpsc::channel();
    let notices = Box::new(move |notice| {
        if let Notice::TurnedAway { peer, error } = notice {
            let _ = send.send((peer, error));
        }
    });
    let limits = Limits::one(1 << 30);
    (Desk::open(Box::new(accept), ledger.clone(), limits, patience, notices).unwrap(), turned_away)
}

/// Runs a receiver against a sender that does as it likes.
pub(crate) fn receive_from(
    patience: Duration,
    sender: impl FnOnce(&mut Peer) + Send,
) -> (Result<ArrivalReport>, Witness) {
    let (here, there, _) = pair(&Profile::default(), None);
    let witness = Witness::default();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer(Box::new(here));
            sender(&mut peer);
            peer.stay();
        });
        let (desk, turned_away) = one_peer(there, patience, &Arc::default());
        loop {
            if let Some(offered) = desk.next_offer(Duration::from_millis(10)).unwrap() {
                let place = place::Scripted::new(witness.clone(), None);
                let options = inbound::Options { idle: patience, linger: SILENCE, ..receiving() };
                return inbound::receive(offered, &desk, place, &options, &CancelFlag::default(), &mut Quiet);
            }
            if let Ok((_, error)) = turned_away.try_recv() {
                return Err(error);
            }
        }
    });
    (result, witness)
}

pub(crate) fn assert_not_received(
    name: &str,
    patience: Duration,
    sender: impl FnOnce(&mut Peer) + Send,
) -> Error {
    let (result, witness) = receive_from(patience, sender);
    assert!(!witness.is_running(Who::Destination), "{name}");
    match result {
        Ok(arrival) => panic!("{name}: {arrival:?}"),
        Err(error) => error,
    }
}

#[test]
fn a_sender_that_says_all_the_right_things_is_received() {
    let (result, witness) = receive_from(20 * SECOND, |peer| {
        peer.ready().say(&Downstream::Commit { migration: OURS }, &[]);
        assert_eq!(peer.hear(), Some(Upstream::Started { migration: OURS }));
        peer.say(&Downstream::Done { migration: OURS }, &[]);
    });
    assert!(result.is_ok(), "{result:?}");
    assert!(witness.is_running(Who::Destination));
}

#[test]
fn offers_that_cannot_be_are_refused_before_anything_is_made() {
    let changed = |change: &dyn Fn(&mut Offer)| {
        let mut offer = offer();
        change(&mut offer);
        offer
    };
    let named = |name: &str| changed(&|offer| offer.name = name.into());
    use RefuseCode::{BadOffer, Memory};
    let cases = [
        (Memory, changed(&|offer| offer.layout.spaces[1].pages = 1 << 30)),
        (BadOffer, changed(&|offer| offer.layout.spaces[1].pages = u64::MAX)),
        (BadOffer, changed(&|offer| offer.layout.spaces[1].guest_address = 0)),
        (BadOffer, changed(&|offer| offer.layout = Layout::default())),
        (BadOffer, changed(&|offer| offer.page_streams = 0)),
        (BadOffer, changed(&|offer| offer.page_streams = 65)),
        (BadOffer, changed(&|offer| offer.page_streams = u16::MAX)),
        (BadOffer, named("")),
        (BadOffer, named("..")),
        (BadOffer, named("-rf")),
        (BadOffer, named("a/b")),
        (BadOffer, named("a\nb")),
        (BadOffer, named("ä")),
        (BadOffer, named(&"x".repeat(65))),
    ];
    for (expected, offer) in cases {
        let name = format!("{offer:?}");
        // Had it been prepared, the refusal would be of another class: the machine is not one this place knows.
        let error = assert_not_received(&name, 20 * SECOND, |peer| {
            peer.greet(&Downstream::Hello(Hello::ours())).say(&Downstream::Offer(offer), b"strange");
            peer.skip_preamble().hear::<Upstream>();
            assert!(matches!(peer.hear(), Some(Upstream::Refuse { code, .. }) if code == expected));
        });
        assert!(matches!(error.root(), Error::Refused { code, .. } if *code == expected), "{name}: {error}");
    }
}

#[test]
fn a_migration_that_was_here_before_is_refused_and_its_outcome_stands() {
    let (here, there, _) = pair(&Profile::default(), None);
    let ledger = Arc::new(MemoryLedger::default());
    ledger.record(OURS, Outcome::Started);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut peer = Peer(Box::new(here));
            peer.offer(offer());
            assert!(matches!(peer.hear(), Some(Upstream::Refuse { code: RefuseCode::BadOffer, .. })));
        });
        let (desk, _) = one_peer(there, SECOND, &ledger);
        let offered = desk.next_offer(20 * SECOND).unwrap().unwrap();
        let place = place::Scripted::new(Witness::default(), None);
        inbound::receive(offered, &desk, place, &receiving(), &CancelFlag::default(), &mut Quiet).unwrap_err()
    });
    assert!(matches!(error.root(), Error::Refused { .. }), "{error}");
    assert_eq!(ledger.outcome(OURS), Outcome::Started);
}

#[test]
fn senders_that_break_the_protocol_are_told_apart_and_start_nothing() {
    type Sender = Box<dyn FnOnce(&mut Peer) + Send>;
    let strange = Hello { required: vec!["teleportation".into()], ..Hello::ours() };
    let other = MigrationId(78);
    let cases: Vec<(&str, Sender)> = vec![
        ("garbage", Box::new(|peer| peer.bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").stop())),
        ("requires the capability", Box::new(|peer| peer.greet(&Downstream::Hello(strange)).stop())),
        (
            "the length of a message is",
            Box::new(|peer| peer.bytes(&Preamble::OURS.encode()).bytes(&[0xff; 8]).stop()),
        ),
        (
            "could not be understood",
            Box::new(|peer| peer.greet(&serde_json::json!({"type": "no-such-message"})).stop()),
        ),
        (
            "Commit arrived where Offer, Ask, Join, Resume or Probe was due",
            Box::new(|peer| {
                peer.greet(&Downstream::Hello(Hello::ours()))
                    .say(&Downstream::Commit { migration: OURS }, &[]);
            }),
        ),
        (
            "RoundSent arrived where RoundSent or State of this round",
            Box::new(|peer| {
                peer.accepted();
                let streams = [0, 1].map(|number| peer.stream(&[&preamble(number)]));
                peer.say(&Downstream::RoundSent { round: 1 }, &[]).hear::<Upstream>();
                drop(streams);
            }),
        ),
        (
            "Offer arrived where",
            Box::new(|peer| {
                peer.accepted();
                let streams = [0, 1].map(|number| peer.stream(&[&preamble(number)]));
                peer.say(&Downstream::Offer(offer()), &[]).hear::<Upstream>();
                drop(streams);
            }),
        ),
        ("second page stream", Box::new(|peer| pages(peer, &[&preamble(0)], &[&preamble(0)]))),
        ("the number of a page stream", Box::new(|peer| pages(peer, &[&preamble(0)], &[&preamble(2)]))),
        ("page-stream mark", Box::new(|peer| pages(peer, &[&[7; 100]], &[&preamble(1)]))),
        (
            "lie outside the layout",
            Box::new(|peer| pages(peer, &[&preamble(0), &page(1100, 0)], &[&preamble(1)])),
        ),
        (
            "belong to this page stream",
            Box::new(|peer| pages(peer, &[&preamble(0), &page(512, 0)], &[&preamble(1)])),
        ),
        (
            "a frame of the round under way",
            Box::new(|peer| pages(peer, &[&preamble(0), &end(0), &page(0, 0)], &[&preamble(1)])),
        ),
        (
            "does not match its checksum",
            Box::new(|peer| {
                let mut damaged = page(0, 0);
                damaged[1000] ^= 1;
                pages(peer, &[&preamble(0), &damaged], &[&preamble(1)]);
            }),
        ),
        (
            "the zstd payload of pages 0+2 of space 0 cannot be decoded",
            Box::new(|peer| {
                pages(peer, &[&preamble(0), &coded(Encoding::Zstd, &[0x28; 90])], &[&preamble(1)]);
            }),
        ),
        (
            "the lz4 payload of pages 0+2 of space 0 cannot be decoded",
            // A literal of one byte, then a match that is longer than all pages.
            Box::new(|peer| {
                let bomb = [&[0x1f, 7, 1, 0][..], &[0xff; 4000], &[0]].concat();
                pages(peer, &[&preamble(0), &coded(Encoding::Lz4, &bomb)], &[&preamble(1)]);
            }),
        ),
        (
            "it stands for 3 bytes",
            Box::new(|peer| {
                pages(peer, &[&preamble(0), &coded(Encoding::Lz4, &[0x30, 1, 2, 3])], &[&preamble(1)]);
            }),
        ),
        (
            "the payload length of a page frame",
            Box::new(|peer| pages(peer, &[&preamble(0), &coded(Encoding::Lz4, &[1; 8192])], &[&preamble(1)])),
        ),
        (
            "these pages are not what they were",
            Box::new(|peer| pages(peer, &[&preamble(0), &coded(Encoding::Delta, &[7; 60])], &[&preamble(1)])),
        ),
        (
            "page 5 is not what it is said to be",
            Box::new(|peer| {
                pages(peer, &[&preamble(0), &coded(Encoding::Known, &known(5))], &[&preamble(1)]);
            }),
        ),
        (
            "pages 4000+1 of space 0 lie outside the layout",
            Box::new(|peer| {
                pages(peer, &[&preamble(0), &coded(Encoding::Known, &known(4000))], &[&preamble(1)]);
            }),
        ),
        (
            "the stream of these pages",
            Box::new(|peer| {
                pages(peer, &[&preamble(0), &coded(Encoding::Known, &known(512))], &[&preamble(1)]);
            }),
        ),
        (
            "a page frame's payload ends",
            Box::new(|peer| {
                peer.accepted();
                drop(peer.stream(&[&preamble(0), &page(0, 0)[..99]]));
                let open = peer.stream(&[&preamble(1), &end(0)]);
                peer.say(&Downstream::RoundSent { round: 0 }, &[]).hear::<Upstream>();
                drop(open);
            }),
        ),
        (
            "the end of a page stream behind 0 rounds",
            Box::new(|peer| {
                peer.accepted();
                drop(peer.stream(&[&preamble(0)]));
                drop(peer.stream(&[&preamble(1), &end(0)]));
                peer.say(&Downstream::State { last_round: 0 }, &state());
            }),
        ),
        (
            "the end of a page stream behind 2 rounds",
            Box::new(|peer| {
                peer.accepted();
                drop(peer.stream(&[&preamble(0), &end(0)]));
                drop(peer.stream(&[&preamble(1), &end(0), &page(512, 1), &end(1)]));
                peer.say(&Downstream::State { last_round: 0 }, &state());
            }),
        ),
        (
            "mark of a workload's state",
            Box::new(|peer| {
                peer.accepted();
                drop([0, 1].map(|number| peer.stream(&[&preamble(number), &end(0)])));
                peer.say(&Downstream::State { last_round: 0 }, &[b'x'; 100]);
            }),
        ),
        (
            "Commit arrived where Commit was due",
            Box::new(move |peer| {
                peer.ready().say(&Downstream::Commit { migration: other }, &[]);
            }),
        ),
        ("could not be understood", Box::new(|peer| peer.ready().say(&"Commit", &[]).stop())),
    ];
    for (expected, sender) in cases {
        let error = assert_not_received(expected, 20 * SECOND, sender).to_string();
        let found = error.contains(expected) || (expected == "garbage" && error.contains("does not speak"));
        assert!(found, "{expected:?} is not in {error:?}");
    }
}

/// A sender that is accepted and opens two page streams with these bytes.
fn pages(peer: &mut Peer, first: &[&[u8]], second: &[&[u8]]) {
    peer.accepted();
    let open = (peer.stream(first), peer.stream(second));
    assert!(matches!(peer.hear(), Some(Upstream::Failed { .. })));
    drop(open);
}

#[test]
fn a_silent_sender_is_given_up_and_what_was_waited_for_is_named() {
    type Sender = Box<dyn FnOnce(&mut Peer) + Send>;
    let cases: [(&str, Sender); 7] = [
        ("the sender's greeting", Box::new(|peer| peer.bytes(&Preamble::OURS.encode()).stop())),
        ("the peer's greeting", Box::new(|peer| peer.bytes(b"MIG").stop())),
        ("the sender's wish", Box::new(|peer| peer.greet(&Downstream::Hello(Hello::ours())).stop())),
        ("a page stream", Box::new(|peer| peer.accepted().stop())),
        (
            "the sender's next round",
            Box::new(|peer| {
                peer.accepted();
                let open = [0, 1].map(|number| peer.stream(&[&preamble(number)]));
                peer.stay();
                drop(open);
            }),
        ),
        (
            "every page stream to end the round",
            Box::new(|peer| {
                peer.accepted();
                let open = [0, 1].map(|number| peer.stream(&[&preamble(number)]));
                peer.say(&Downstream::RoundSent { round: 0 }, &[]);
                peer.stay();
                drop(open);
            }),
        ),
        ("Commit, or a question about it", Box::new(|peer| peer.ready().stop())),
    ];
    for (expected, sender) in cases {
        let error = assert_not_received(expected, SILENCE, sender);
        assert!(
            matches!(error.root(), Error::TimedOut { what, .. } if *what == expected),
            "{expected}: {error}"
        );
    }
}

#[test]
fn while_a_sender_is_waited_for_others_are_answered_or_told_to_come_again() {
    let network = Network::new(Profile::default(), None);
    let witness = Witness::default();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = Peer(network.dial().unwrap());
            first.ready();
            // The link is lost; a stranger comes by before the sender can ask.
            drop(first);
            let mut stranger = Peer(network.dial().unwrap());
            // Of another VM: one of the same from the same sender would say that the first is given up.
            stranger.offer(Offer { migration: MigrationId(1), name: "another".into(), ..offer() });
            assert!(matches!(stranger.hear(), Some(Upstream::Refuse { code: RefuseCode::Busy, .. })));
            let unknown = outbound::ask(network.dial().unwrap(), MigrationId(1), SECOND).unwrap();
            assert_eq!(unknown, outbound::Word::Outcome(Outcome::Unknown));
            Peer(network.dial().unwrap()).bytes(b"nonsense").stop();
            let ours = outbound::ask(network.dial().unwrap(), OURS, SECOND).unwrap();
            assert_eq!(ours, outbound::Word::Outcome(Outcome::Discarded));
        });
        let desk = desk(&network, &Arc::default());
        let offered = desk.next_offer(20 * SECOND).unwrap().unwrap();
        let error = inbound::receive(
            offered,
            &desk,
            place::Scripted::new(witness.clone(), None),
            &inbound::Options { linger: 20 * SECOND, ..receiving() },
            &CancelFlag::default(),
            &mut Quiet,
        )
        .unwrap_err();
        assert!(error.to_string().contains("before Commit arrived"), "{error}");
    });
    assert!(!witness.is_running(Who::Destination));
}

/// Sends a machine to a receiver that does as it likes, and cannot be asked.
fn send_to(world: &World, patience: Duration, receiver: impl FnOnce(&mut Peer) + Send) -> Box<Failed> {
    let (here, there, _) = pair(&Profile::default(), None);
    let options = outbound::Options { stall: patience, prepare: patience, ask: SILENCE / 6, ..sending() };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer(Box::new(there));
            receiver(&mut peer);
            peer.stay();
        });
        outbound::send(
            world.machine.attach(),
            Box::new(here),
            &mut || Err(Error::Link("nobody answers".into())),
            &options,
            &CancelFlag::default(),
            &mut Quiet,
        )
        .unwrap_err()
    })
}

/// A receiver up to `Accept`, which takes pages and forgets them.
fn accepting(peer: &mut Peer) -> &mut Peer {
    peer.greet(&Upstream::Hello(Hello::ours())).skip_preamble();
    assert!(matches!(peer.hear(), Some(Downstream::Hello(_))));
    assert!(matches!(peer.hear(), Some(Downstream::Offer(_))));
    peer.say(&Upstream::Accept, &[]);
    for _ in 0..2 {
        let mut stream = peer.0.accept_page_stream(SECOND).unwrap();
        std::thread::spawn(move || while let Ok(Some(_)) = stream.read() {});
    }
    peer
}

/// A receiver up to the state.
fn loaded(peer: &mut Peer) -> &mut Peer {
    accepting(peer);
    loop {
        match peer.hear() {
            Some(Downstream::RoundSent { round }) => peer.say(&Upstream::RoundDone { round }, &[]).stop(),
            Some(Downstream::State { .. }) => return peer,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn receivers_that_break_the_protocol_leave_the_workload_where_it_is() {
    type Receiver = Box<dyn FnOnce(&mut Peer) + Send>;
    let greeted = |message: Upstream| -> Receiver {
        Box::new(move |peer| peer.greet(&Upstream::Hello(Hello::ours())).say(&message, &[]).stop())
    };
    let failed = Upstream::Failed { reason: "no\x1b[2J more\nspace".into() };
    let refused = Upstream::Refuse { code: RefuseCode::NameTaken, reason: "guest runs here".into() };
    let cases: Vec<(&str, Receiver)> = vec![
        ("waited 0.6 s for the peer's greeting", Box::new(|_| {})),
        ("does not begin with", Box::new(|peer| peer.bytes(b"SSH-2.0-OpenSSH_9.2p1 Debian-2").stop())),
        ("Accept arrived where Hello was due", Box::new(|peer| peer.greet(&Upstream::Accept).stop())),
        (
            "waited 0.6 s for the destination to make room",
            Box::new(|peer| peer.greet(&Upstream::Hello(Hello::ours())).stop()),
        ),
        ("Hello arrived where Accept was due", greeted(Upstream::Hello(Hello::ours()))),
        ("guest runs here", greeted(refused)),
        ("no [2J more space", greeted(failed.clone())),
        ("Ready arrived where Accept was due", greeted(Upstream::Ready)),
        (
            "blob is 1, the limit is 0",
            Box::new(|peer| peer.greet(&Upstream::Hello(Hello::ours())).say(&Upstream::Accept, b"x").stop()),
        ),
        ("waited 0.6 s for the destination to have a round", Box::new(|peer| accepting(peer).stop())),
        (
            "RoundDone arrived where",
            Box::new(|peer| accepting(peer).say(&Upstream::RoundDone { round: 7 }, &[]).stop()),
        ),
        (
            "Started arrived where",
            Box::new(|peer| accepting(peer).say(&Upstream::Started { migration: OURS }, &[]).stop()),
        ),
        ("no [2J more space", Box::new(move |peer| accepting(peer).say(&failed, &[]).stop())),
        ("waited 0.6 s for the destination to load", Box::new(|peer| loaded(peer).stop())),
        ("Accept arrived where Ready", Box::new(|peer| loaded(peer).say(&Upstream::Accept, &[]).stop())),
        (
            "could not be understood",
            Box::new(|peer| loaded(peer).say(&serde_json::json!({"type": "readyish"}), &[]).stop()),
        ),
    ];
    for (expected, receiver) in cases {
        let world = World::new(3, 1);
        let patience = if expected.contains("waited") { SILENCE } else { 20 * SECOND };
        let failed = send_to(&world, patience, receiver);
        let error = failed.error.to_string();
        assert!(
            error.contains(expected) || (expected == "does not begin with" && error.contains("do not begin")),
            "{expected:?} is not in {error:?}"
        );
        let migrate::report::Outcome::Failed { reason } = &failed.report.outcome else {
            panic!("{failed:?}")
        };
        assert_eq!(*reason, error);
        assert!(world.witness.is_running(Who::Source), "{error}");
        assert_eq!(world.machine.missing_pages(), 0, "{error}");
        world.assert_moved(&world.move_it());
    }
}

#[test]
fn a_peers_own_word_explains_more_than_a_broken_link() {
    let world = World::new(3, 1);
    let (here, there, _) = pair(&Profile::default(), None);
    let (gone, is_gone) = mpsc::channel();
    // The sender goes on only once the receiver is gone, so that whatever it does next finds the link closed.
    world.machine.on_call(move |call, _| {
        if call == Call::Track {
            is_gone.recv().unwrap();
        }
        Ok(())
    });
    let failed = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer(Box::new(there));
            accepting(&mut peer).say(&Upstream::Failed { reason: "out of memory".into() }, &[]);
            peer.0.close("giving up");
            gone.send(()).unwrap();
        });
        outbound::send(
            world.machine.attach(),
            Box::new(here),
            &mut || Err(Error::Link("nobody answers".into())),
            &sending(),
            &CancelFlag::default(),
            &mut Quiet,
        )
        .unwrap_err()
    });
    assert!(
        matches!(failed.error.root(), Error::PeerFailed { reason } if reason == "out of memory"),
        "{failed}"
    );
    assert!(world.witness.is_running(Who::Source));
}

#[test]
fn nonsense_behind_commit_leaves_the_workload_in_doubt_and_a_plain_no_does_not() {
    let committed = |peer: &mut Peer| {
        loaded(peer).say(&Upstream::Ready, &[]);
        assert!(matches!(peer.hear(), Some(Downstream::Commit { .. })));
    };
    let answers: [Option<Upstream>; 4] = [
        None,
        Some(Upstream::Ready),
        Some(Upstream::Started { migration: OURS }),
        Some(Upstream::Outcome { migration: OURS, outcome: Outcome::Discarded }),
    ];
    for answer in answers {
        let world = World::new(3, 1);
        let name = format!("{answer:?}");
        let patience = if answer.is_none() { SILENCE } else { 20 * SECOND };
        let failed = send_to(&world, patience, move |peer| {
            committed(peer);
            if let Some(answer) = answer {
                peer.say(&answer, &[]);
            }
        });
        assert!(matches!(failed.error, Error::InDoubt(_)), "{name}: {failed}");
        assert!(world.machine.is_pledged() && !world.witness.is_running(Who::Source), "{name}");
    }
    let world = World::new(3, 1);
    let failed = send_to(&world, 20 * SECOND, |peer| {
        committed(peer);
        peer.say(&Upstream::Failed { reason: "no vCPU".into() }, &[]);
        assert!(matches!(peer.hear(), Some(Downstream::Done { .. })));
    });
    assert!(failed.error.to_string().contains("no vCPU"), "{failed}");
    assert!(world.witness.is_running(Who::Source));
    assert_eq!(world.machine.missing_pages(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn random_words_never_start_a_workload(
        words in proptest::collection::vec((0u8..9, any::<u8>(), proptest::collection::vec(any::<u8>(), 0..60)), 0..8),
    ) {
        let error = assert_not_received("random words", 20 * SECOND, move |peer| {
            peer.accepted();
            let mut open = [0, 1].map(|number| peer.stream(&[&preamble(number)]));
            for (kind, number, bytes) in words {
                let round = u32::from(number % 3);
                match kind {
                    0 => peer.bytes(&bytes).stop(),
                    1 => peer.say(&Downstream::RoundSent { round }, &bytes).stop(),
                    2 => peer.say(&Downstream::State { last_round: round }, &bytes).stop(),
                    3 => peer.say(&Downstream::Commit { migration: OURS }, &bytes).stop(),
                    4 => drop(open[usize::from(number) % 2].write(&mut [bytes.into()])),
                    5 => drop(open[usize::from(number) % 2].write(&mut [end(round).into()])),
                    6 => drop(open[usize::from(number) % 2].write(&mut [page(u64::from(number) * 9, round).into()])),
                    7 => peer.say(&Downstream::Verify { last_round: round, first: 0 }, &bytes).stop(),
                    _ => peer.say(&Downstream::Done { migration: OURS }, &bytes).stop(),
                }
            }
            peer.hang_up();
        });
        prop_assert!(!error.to_string().is_empty());
    }
}
