//! The most bytes a second that a migration may send: a token bucket over all page streams together.
//!
//! ```text
//! operator ─▶ Cap ◀─ lanes take bytes from it before they write them
//! ```
//!
//! A [`Cap`] is a handle: what is set through one holds for all, at once, also for who waits already.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How far ahead of its rate a migration may be: what a short pause did not use may be caught up with.
const BURST: Duration = Duration::from_millis(20);

/// The least a burst may be, in bytes: a packet of 64 KiB.
const MIN_BURST_BYTES: u64 = 64 << 10;

/// How long a wait goes on before it looks at the rate again.
const SLICE: Duration = Duration::from_millis(50);

/// A limit in bytes a second, shared by whoever sends and whoever changes it. 0 is no limit.
#[derive(Debug, Clone, Default)]
pub struct Cap(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    bytes_per_s: AtomicU64,
    bucket: Mutex<Option<Bucket>>,
}

impl Cap {
    /// A limit of so many bytes a second; 0 is none.
    pub fn new(bytes_per_s: u64) -> Self {
        let cap = Self::default();
        cap.set(bytes_per_s);
        cap
    }

    /// Changes it, for every handle.
    pub fn set(&self, bytes_per_s: u64) {
        self.0.bytes_per_s.store(bytes_per_s, Relaxed);
    }

    /// The limit in bytes a second; 0 is none.
    pub fn get(&self) -> u64 {
        self.0.bytes_per_s.load(Relaxed)
    }

    /// The most that should be taken at once; `None` without a limit.
    pub(crate) fn portion_bytes(&self) -> Option<usize> {
        match self.get() {
            0 => None,
            rate => Some(usize::try_from(burst_bytes(rate)).unwrap_or(usize::MAX)),
        }
    }

    /// Waits until `bytes` may be sent. Whoever waits keeps the others waiting, so that all get their turn.
    pub(crate) fn take(&self, bytes: usize) {
        let mut bucket = self.0.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (rate, now) = (self.get(), Instant::now());
            if rate == 0 {
                *bucket = None;
                return;
            }
            let bucket = bucket.get_or_insert(Bucket { debt_bytes: 0, at: now });
            match bucket.take(now, bytes as u64, rate) {
                None => return,
                Some(wait) => std::thread::sleep(wait.min(SLICE)),
            }
        }
    }
}

fn burst_bytes(rate: u64) -> u64 {
    (u128::from(rate) * BURST.as_millis() / 1000).min(u128::from(u32::MAX)).max(u128::from(MIN_BURST_BYTES))
        as u64
}

/// What was sent and not yet paid for by time. No clock: time is an argument.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    debt_bytes: u64,
    at: Instant,
}

impl Bucket {
    /// Takes `bytes` at `rate` bytes a second, which is not 0; or answers how long to wait before the next try.
    fn take(&mut self, now: Instant, bytes: u64, rate: u64) -> Option<Duration> {
        let elapsed = now.saturating_duration_since(self.at);
        let paid = u64::try_from(u128::from(rate).saturating_mul(elapsed.as_nanos()) / 1_000_000_000);
        let paid = paid.unwrap_or(u64::MAX);
        // Time that pays for less than a byte is kept for the next call.
        if paid > 0 || elapsed.is_zero() {
            self.debt_bytes = self.debt_bytes.saturating_sub(paid);
            self.at = now;
        }
        let burst = burst_bytes(rate);
        if self.debt_bytes <= burst {
            self.debt_bytes = self.debt_bytes.saturating_add(bytes);
            return None;
        }
        let nanos = u128::from(self.debt_bytes - burst) * 1_000_000_000 / u128::from(rate);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).max(Duration::from_micros(50)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes that get through in `time`, taken in pieces as fast as the bucket lets them.
    fn carried(rate: u64, piece: u64, time: Duration) -> u64 {
        let begin = Instant::now();
        let (mut now, mut bucket) = (begin, Bucket { debt_bytes: 0, at: begin });
        let mut sent = 0;
        while now < begin + time {
            match bucket.take(now, piece, rate) {
                None => sent += piece,
                Some(wait) => now += wait,
            }
        }
        sent
    }

    proptest! {
        #[test]
        fn what_gets_through_is_the_rate(rate in 200_000u64..10_000_000_000, piece in 1000u64..100_000) {
            let sent = carried(rate, piece, Duration::from_secs(5)) as f64;
            let allowed = rate as f64 * 5.0;
            let slack = (burst_bytes(rate) + piece) as f64;
            prop_assert!(sent >= allowed * 0.98 - slack, "{sent} of {allowed}");
            prop_assert!(sent <= allowed * 1.02 + slack, "{sent} of {allowed}");
        }
    }

    #[test]
    fn a_pause_is_not_saved_up() {
        let begin = Instant::now();
        let mut bucket = Bucket { debt_bytes: 0, at: begin };
        let later = begin + Duration::from_secs(100);
        let mut sent = 0;
        while bucket.take(later, 10_000, 1_000_000).is_none() {
            sent += 10_000;
        }
        assert!(sent <= 80_000, "{sent}");
    }

    #[test]
    fn every_handle_sees_the_limit_and_none_ends_a_wait() {
        let cap = Cap::new(1_000_000);
        let other = cap.clone();
        cap.take(500_000);
        let waiting = std::thread::spawn(move || {
            let begun = Instant::now();
            other.take(1);
            begun.elapsed()
        });
        std::thread::sleep(Duration::from_millis(20));
        cap.set(0);
        assert!(waiting.join().unwrap() < Duration::from_millis(400), "of nearly half a second");
        assert_eq!(cap.portion_bytes(), None);
        cap.take(usize::MAX);
    }
}
