//! What an operator may change while a migration runs: its limits and the bandwidth it may use.
//!
//! The engine asks for them at every decision and never keeps a copy across one, so a change holds from the next
//! decision on. Whoever changes them (the migration's own socket) holds the lock for a few instructions only.

use crate::converge::Limits;
use crate::units::show_rate;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The longest that any limit on time may be: a year, far above any sense and far below what overflows a clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The least bandwidth that a migration can be held to, in bytes a second. A piece of 1 MiB must pass long before a
/// peer counts as silent.
pub const LEAST_BANDWIDTH_BYTES_PER_S: u64 = 1_000_000;

/// The limits in force. A clone is another handle on the same ones.
#[derive(Debug, Clone)]
pub struct Controls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Mutex<Limits>,
    /// 0: no cap.
    bandwidth_bytes_per_s: AtomicU64,
}

impl Controls {
    /// These limits, and no cap on the bandwidth.
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner { limits: Mutex::new(limits), bandwidth_bytes_per_s: AtomicU64::new(0) }))
    }

    /// The limits as they are now.
    pub fn limits(&self) -> Limits {
        self.0.limits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the limits, all at once.
    pub fn change(&self, change: impl FnOnce(&mut Limits)) {
        change(&mut self.0.limits.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The most bytes a second that the page streams may carry; `None` is as many as the link takes.
    pub fn bandwidth_bytes_per_s(&self) -> Option<u64> {
        Some(self.0.bandwidth_bytes_per_s.load(Relaxed)).filter(|cap| *cap > 0)
    }

    /// Caps the bandwidth, or (`None`) lifts the cap.
    pub fn cap_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.0.bandwidth_bytes_per_s.store(bytes_per_s.unwrap_or(0), Relaxed);
    }
}

/// Whether limits make sense, before they hold.
///
/// # Errors
/// What is wrong with them, and what would be right.
pub fn check_limits(limits: &Limits) -> Result<(), String> {
    for (what, value) in [("a downtime", limits.downtime), ("a timeout", limits.timeout)] {
        if value.is_zero() || value > LONGEST {
            return Err(format!(
                "{what} of {} s cannot be: more than 0, at most a year",
                value.as_secs_f64()
            ));
        }
    }
    if limits.max_rounds == 0 {
        return Err("0 rounds cannot be: the first one copies all memory".into());
    }
    Ok(())
}

/// Whether a cap on the bandwidth makes sense.
///
/// # Errors
/// What is wrong with it, and what would be right.
pub fn check_bandwidth(bytes_per_s: u64) -> Result<(), String> {
    if bytes_per_s < LEAST_BANDWIDTH_BYTES_PER_S {
        return Err(format!(
            "a bandwidth of {} is too little: at least {}",
            show_rate(bytes_per_s),
            show_rate(LEAST_BANDWIDTH_BYTES_PER_S)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::default()
    }

    #[test]
    fn every_handle_sees_a_change_at_once() {
        let (ours, theirs) = {
            let controls = Controls::new(limits());
            (controls.clone(), controls)
        };
        assert_eq!((theirs.limits(), theirs.bandwidth_bytes_per_s()), (limits(), None));
        ours.change(|limits| limits.downtime = Duration::from_millis(7));
        ours.cap_bandwidth(Some(5_000_000));
        assert_eq!(theirs.limits(), Limits { downtime: Duration::from_millis(7), ..limits() });
        assert_eq!(theirs.bandwidth_bytes_per_s(), Some(5_000_000));
        ours.cap_bandwidth(None);
        assert_eq!(theirs.bandwidth_bytes_per_s(), None);
    }

    #[test]
    fn senseless_limits_are_refused_with_a_reason() {
        assert_eq!(check_limits(&limits()), Ok(()));
        for (limits, word) in [
            (Limits { downtime: Duration::ZERO, ..limits() }, "downtime"),
            (Limits { timeout: Duration::MAX, ..limits() }, "timeout"),
            (Limits { max_rounds: 0, ..limits() }, "rounds"),
        ] {
            assert!(check_limits(&limits).unwrap_err().contains(word));
        }
        assert_eq!(check_bandwidth(LEAST_BANDWIDTH_BYTES_PER_S), Ok(()));
        assert!(check_bandwidth(1000).unwrap_err().contains("too little"));
    }
}
