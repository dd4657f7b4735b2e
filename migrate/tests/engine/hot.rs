//! Pages that wait for the last round: held back, taken without being sent, and never lost.

use crate::harness::{World, sending};
use migrate::cancel::CancelFlag;
use migrate::error::Error;
use migrate::link::duplex::{Network, Profile};
use migrate::outbound::Options;
use migrate::report::Quiet;
use migrate::select::hot::HotRule;
use migrate::source::scripted::Call;
use proptest::prelude::*;
use std::time::Duration;

/// Holds back whatever was dirty twice, habit or not.
const EAGER: HotRule = HotRule { least_pages: 0, others_part: 0.0, falls_below: f64::MAX, habit: 0.0 };

fn eager() -> Options {
    let options = Options { hot: EAGER, ..sending() };
    options.controls.change(|limits| {
        limits.max_rounds = 8;
        limits.downtime = Duration::from_nanos(1);
    });
    options
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_held_back_arrives_with_the_last_round(
        seed in any::<u64>(),
        pages_per_call in 1u64..40,
        page_streams in 1u16..=3,
    ) {
        let world = World::new(seed, pages_per_call);
        let options = Options { page_streams, ..eager() };
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
        world.assert_moved(&ended);
    }

    #[test]
    fn what_is_owed_when_an_attempt_fails_is_dirty_again(
        seed in any::<u64>(),
        pages_per_call in 1u64..40,
        call in prop_oneof![Just(Call::Harvest), Just(Call::Take), Just(Call::Read), Just(Call::Freeze), Just(Call::State)],
        number in 0u32..40,
    ) {
        let world = World::new(seed, pages_per_call);
        world.machine.on_call(move |now, count| {
            if now == call && count >= number {
                return Err(Error::Workload(format!("{call:?} fails, as the script says")));
            }
            Ok(())
        });
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, None, &eager(), &CancelFlag::default(), &mut Quiet);
        if ended.sent.is_ok() {
            world.assert_moved(&ended);
        } else {
            world.assert_stayed_and_moves_next(&ended);
        }
    }
}

#[test]
fn pages_are_held_back_in_these_tests() {
    let world = World::new(9, 30);
    let network = Network::new(Profile::default(), None);
    let ended = world.attempt(&network, None, &eager(), &CancelFlag::default(), &mut Quiet);
    world.assert_moved(&ended);
    let rounds = ended.sent.unwrap().rounds;
    assert!(rounds.iter().any(|round| round.held_pages > 100), "{rounds:#?}");
    let left_out = rounds.windows(2).any(|pair| pair[1].dirty_pages < pair[0].remaining_pages);
    assert!(left_out, "a round sent all that remained: {rounds:#?}");
}
