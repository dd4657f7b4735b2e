//! How much may be on its way: Cubic, kept from filling queues.
//!
//! Cubic grows until something is lost. On a path that never loses anything (loopback, a good data centre) it grows
//! until the flow-control window is full, and all of that stands in queues in front of whatever the engine wants to say
//! next: with 8 MiB on its way a control message took 8 ms, with 1 MiB 1.1 ms, at the same rate (loopback, two cores,
//! November 2026). So there is a second bound: twice what the path was seen to carry in one round trip (as BBR's
//! `cwnd_gain`), and 1 MiB at least, so that a host too busy to answer at once does not look like a slow path.
//!
//! The bound does not throttle: while no queue has formed, twice the measured rate is room to double every round trip.

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, CubicConfig};
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many round trips' worth of data may be on its way.
const GAIN: u64 = 2;

/// A rate is measured over a round trip, but over this at least: acknowledgements come in clumps when a host is busy.
const MIN_SAMPLE: Duration = Duration::from_millis(2);

/// Rates that are remembered; the largest of them counts. The same number of rounds as in BBR.
const SAMPLES: usize = 10;

/// Makes [`Bounded`] controllers.
#[derive(Debug, Clone)]
pub(super) struct BoundedConfig {
    /// Bytes that may be on their way whatever was measured; also the first window.
    pub(super) floor_bytes: u64,
}

impl ControllerFactory for BoundedConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(self.floor_bytes);
        Box::new(Bounded {
            inner: Arc::new(cubic).build(now, current_mtu),
            floor_bytes: self.floor_bytes,
            rate: DeliveryRate::new(now),
            bound_bytes: self.floor_bytes,
        })
    }
}

/// Cubic under a bound from the measured delivery rate.
struct Bounded {
    inner: Box<dyn Controller>,
    floor_bytes: u64,
    rate: DeliveryRate,
    bound_bytes: u64,
}

impl Controller for Bounded {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.rate.on_ack(now, bytes, rtt.get().max(MIN_SAMPLE), app_limited);
        self.bound_bytes = self.rate.in_flight(rtt.min()).saturating_mul(GAIN).max(self.floor_bytes);
        // What the bound holds back is not evidence that the path carries a larger window.
        let held_back = app_limited || self.inner.window() > self.bound_bytes;
        self.inner.on_ack(now, sent, bytes, held_back, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.inner.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window().min(self.bound_bytes)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            floor_bytes: self.floor_bytes,
            rate: self.rate.clone(),
            bound_bytes: self.bound_bytes,
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The largest rate of acknowledged bytes seen lately. No clock: time is an argument.
#[derive(Debug, Clone)]
struct DeliveryRate {
    since: Instant,
    acked_bytes: u64,
    app_limited: bool,
    bytes_per_second: [u64; SAMPLES],
    next: usize,
}

impl DeliveryRate {
    fn new(now: Instant) -> Self {
        Self { since: now, acked_bytes: 0, app_limited: false, bytes_per_second: [0; SAMPLES], next: 0 }
    }

    /// Counts acknowledged bytes; takes a sample once `interval` is over.
    fn on_ack(&mut self, now: Instant, bytes: u64, interval: Duration, app_limited: bool) {
        self.acked_bytes = self.acked_bytes.saturating_add(bytes);
        self.app_limited |= app_limited;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < interval {
            return;
        }
        let rate = u128::from(self.acked_bytes).saturating_mul(1_000_000_000) / elapsed.as_nanos().max(1);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        // A pause of the sender says nothing of the path, so it drives no older sample out.
        if !self.app_limited || rate > self.largest() {
            self.bytes_per_second[self.next] = rate;
            self.next = (self.next + 1) % SAMPLES;
        }
        (self.since, self.acked_bytes, self.app_limited) = (now, 0, app_limited);
    }

    fn largest(&self) -> u64 {
        self.bytes_per_second.iter().copied().max().unwrap_or(0)
    }

    /// Bytes on a path of this round-trip time at the largest rate.
    fn in_flight(&self, round_trip: Duration) -> u64 {
        let bytes = u128::from(self.largest()).saturating_mul(round_trip.as_nanos()) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_rate_is_the_largest_of_the_last_ten_samples() {
        let begin = Instant::now();
        let mut rate = DeliveryRate::new(begin);
        // 1 MB in 10 ms, in two acknowledgements.
        rate.on_ack(begin + 5 * MS, 400_000, 10 * MS, false);
        assert_eq!(rate.largest(), 0);
        rate.on_ack(begin + 10 * MS, 600_000, 10 * MS, false);
        assert_eq!(rate.largest(), 100_000_000);
        assert_eq!(rate.in_flight(20 * MS), 2_000_000);
        for step in 2..12 {
            assert_eq!(rate.largest(), 100_000_000, "{step}");
            rate.on_ack(begin + 10 * step * MS, 100_000, 10 * MS, false);
        }
        assert_eq!(rate.largest(), 10_000_000);
    }

    #[test]
    fn a_sender_with_nothing_to_send_does_not_make_the_path_look_slow() {
        let begin = Instant::now();
        let mut rate = DeliveryRate::new(begin);
        rate.on_ack(begin + 10 * MS, 1_000_000, 10 * MS, false);
        for step in 2..40 {
            rate.on_ack(begin + 10 * step * MS, 100, 10 * MS, true);
        }
        assert_eq!(rate.largest(), 100_000_000);
    }

    #[test]
    fn a_long_path_gets_more_than_the_floor_and_a_clock_that_stands_still_is_no_harm() {
        let begin = Instant::now();
        let mut rate = DeliveryRate::new(begin);
        rate.on_ack(begin, u64::MAX / 2, Duration::ZERO, false);
        assert!(rate.in_flight(Duration::MAX) > 0);
        let config = Arc::new(BoundedConfig { floor_bytes: 1 << 20 });
        assert_eq!(config.build(begin, 1200).window(), 1 << 20);
    }
}
