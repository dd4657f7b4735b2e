//! Moves that nothing disturbs.

use crate::harness::{World, sending};
use migrate::cancel::CancelFlag;
use migrate::link::duplex::{Network, Profile};
use migrate::outbound::Packs;
use migrate::report::{Event, Observer, Outcome, Phase};
use proptest::prelude::*;
use std::time::Duration;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_destination_has_the_bytes_that_the_source_froze_with(
        seed in any::<u64>(),
        page_streams in 1u16..=4,
        pages_per_call in 0u64..4,
        latency_us in 0u64..500,
        window_bytes in prop_oneof![Just(16usize << 10), Just(1 << 20)],
        bytes_per_s in prop_oneof![Just(0u64), Just(200_000_000)],
        loss_one_in in prop_oneof![Just(0u32), Just(20)],
        packs in prop_oneof![
            2 => Just(Packs::Measured), 1 => Just(Packs::Never), 1 => Just(Packs::Lz4), 1 => Just(Packs::Zstd),
            3 => Just(Packs::All)
        ],
    ) {
        let world = World::new(seed, pages_per_call);
        let latency = Duration::from_micros(latency_us);
        let profile = Profile { latency, window_bytes, bytes_per_s, loss_one_in, seed, ..Profile::default() };
        let options = migrate::outbound::Options { page_streams, packs, ..sending() };
        let network = Network::new(profile, None);
        let ended =
            world.attempt(&network, None, &options, &CancelFlag::default(), &mut migrate::report::Quiet);
        world.assert_moved(&ended);
    }
}

#[derive(Default)]
struct Diary(Vec<Event>);

impl Observer for Diary {
    fn event(&mut self, event: &Event) {
        self.0.push(event.clone());
    }
}

#[test]
fn a_report_adds_up() {
    let world = World::new(7, 3);
    let mut diary = Diary::default();
    let network = Network::new(Profile::default(), None);
    let ended = world.attempt(&network, None, &sending(), &CancelFlag::default(), &mut diary);
    world.assert_moved(&ended);
    let report = ended.sent.as_ref().unwrap();
    assert_eq!(report.outcome, Outcome::Moved);
    let phases: Vec<Phase> = report.phases.iter().map(|time| time.phase).collect();
    use Phase::{Commit, Freeze, Greet, Offer, Pledge, Ready, Rounds, Settle, State, Track};
    assert_eq!(phases, [Greet, Offer, Track, Rounds, Freeze, State, Ready, Pledge, Commit, Settle]);

    let rounds = &report.rounds;
    assert!(rounds.len() >= 2);
    assert!(rounds.iter().zip(0..).all(|(round, number)| round.round == number));
    assert!(rounds.iter().rev().skip(1).all(|round| !round.frozen) && rounds[rounds.len() - 1].frozen);
    for round in rounds {
        assert_eq!(round.sent_pages + round.zero_pages + round.skipped_pages, round.dirty_pages, "{round:?}");
    }
    assert_eq!(rounds[0].dirty_pages, 1170);
    assert!(rounds[0].skipped_pages > 300, "half of the memory was never touched: {:?}", rounds[0]);
    assert!(rounds[1..].iter().all(|round| round.skipped_pages == 0));
    assert_eq!(rounds.iter().map(|round| round.sent_bytes).sum::<u64>(), report.sent_bytes);
    assert_eq!(rounds.iter().map(|round| round.sent_pages).sum::<u64>(), report.sent_pages);
    assert!(report.downtime_us > 0 && report.downtime_us < report.total_us);

    let told: Vec<u32> = diary
        .0
        .iter()
        .filter_map(|event| match event {
            Event::RoundEnd(round) => Some(round.round),
            _ => None,
        })
        .collect();
    assert_eq!(told, (0..rounds.len() as u32).collect::<Vec<_>>());
    assert_eq!(diary.0.last(), Some(&Event::Done(Box::new(report.clone()))));

    let [Ok(arrival)] = &ended.received[..] else { panic!("{:?}", ended.received) };
    assert_eq!(arrival.rounds as usize, rounds.len());
    assert_eq!(arrival.received_bytes, report.sent_bytes + 16 * u64::from(report.page_streams));
}

#[test]
fn an_idle_workload_needs_one_round_and_then_nothing() {
    let world = World::new(1, 0);
    let ended = world.move_it();
    world.assert_moved(&ended);
    let rounds: Vec<u64> = ended.sent.unwrap().rounds.iter().map(|round| round.dirty_pages).collect();
    assert_eq!(rounds, [1170, 0]);
}

#[test]
fn pages_are_sent_as_less_than_they_are_and_arrive_as_they_were() {
    let bytes = [Packs::Never, Packs::Lz4, Packs::Zstd, Packs::All].map(|packs| {
        let world = World::new(3, 3);
        let options = migrate::outbound::Options { packs, ..sending() };
        let network = Network::new(Profile::default(), None);
        let ended =
            world.attempt(&network, None, &options, &CancelFlag::default(), &mut migrate::report::Quiet);
        world.assert_moved(&ended);
        let report = ended.sent.unwrap();
        assert_eq!(report.packed_pages > 0, packs != Packs::Never);
        (report.sent_bytes as f64, report.sent_pages)
    });
    let [(raw, pages), (lz4, _), (zstd, _), (all, _)] = bytes;
    assert!(raw > pages as f64 * 4096.0);
    assert!(lz4 < raw / 3.0 && zstd < raw / 3.0 && all < raw / 3.0, "{bytes:?}");
}

/// The rate of the first round, in bytes a second.
fn rate_under(bandwidth: Option<u64>) -> f64 {
    let world = World::new(3, 0);
    let options = migrate::outbound::Options { packs: Packs::Never, ..sending() };
    options.controls.cap_bandwidth(bandwidth);
    let network = Network::new(Profile::default(), None);
    let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut migrate::report::Quiet);
    world.assert_moved(&ended);
    ended.sent.unwrap().rounds[0].rate_bytes_per_s as f64
}

#[test]
fn the_page_streams_together_send_no_faster_than_the_bandwidth() {
    let limit = 1_500_000;
    let rate = rate_under(Some(limit)) / limit as f64;
    assert!((0.9..=1.1).contains(&rate), "{rate} of the limit");
    assert!(rate_under(None) > 2.0 * limit as f64);
}
