//! What an operator may change while a migration runs: its limits and the bandwidth it may use.
//!
//! The engine asks for them at every decision and never keeps a copy across one, so a change holds from the next
//! decision on. Whoever changes them (the migration's own socket) holds the lock for a few instructions only.

use crate::cap::Cap;
use crate::converge::Limits;
use crate::units::show_rate;
use protocol::steer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest that any limit on time may be: a year, far above any sense and far below what overflows a clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The least bandwidth that a migration can be held to, in bytes a second. A piece of 1 MiB must pass long before a
/// peer counts as silent.
pub const LEAST_BANDWIDTH_BYTES_PER_S: u64 = 1_000_000;

/// The most that a workload may be slowed down, in percent: at 100 it would stand still.
const MOST_THROTTLE_PERCENT: u8 = 99;

/// The limits in force. A clone is another handle on the same ones.
#[derive(Debug, Clone)]
pub struct Controls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Mutex<Limits>,
    bandwidth: Cap,
}

impl Controls {
    /// These limits, and no cap on the bandwidth.
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner { limits: Mutex::new(limits), bandwidth: Cap::default() }))
    }

    /// The limits as they are now.
    pub fn limits(&self) -> Limits {
        self.lock().clone()
    }

    /// Looks at the limits as they are now.
    pub fn read<T>(&self, look: impl FnOnce(&Limits) -> T) -> T {
        look(&self.lock())
    }

    /// Changes the limits, all at once.
    pub fn change(&self, change: impl FnOnce(&mut Limits)) {
        change(&mut self.lock());
    }

    /// The most bytes a second that the page streams may carry; `None` is as many as the link takes.
    pub fn bandwidth_bytes_per_s(&self) -> Option<u64> {
        Some(self.0.bandwidth.get()).filter(|cap| *cap > 0)
    }

    /// The same as a handle, for whoever sends.
    pub fn bandwidth(&self) -> Cap {
        self.0.bandwidth.clone()
    }

    /// Caps the bandwidth, or (`None`) lifts the cap.
    pub fn cap_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.0.bandwidth.set(bytes_per_s.unwrap_or(0));
    }

    /// What is in force, as the steering socket says it.
    pub fn in_force(&self) -> steer::Limits {
        let limits = self.limits();
        steer::Limits {
            downtime_us: Some(micros(limits.downtime)),
            max_downtime_us: Some(micros(limits.max_downtime)),
            max_rounds: Some(limits.max_rounds),
            timeout_us: Some(micros(limits.timeout)),
            on_timeout: word(&limits.on_timeout),
            on_stall: Some(limits.on_stall.iter().filter_map(word).collect()),
            max_throttle_percent: Some(limits.max_throttle_percent),
            post_copy_after: limits.post_copy_after,
            bandwidth_bytes_per_s: self.bandwidth_bytes_per_s(),
        }
    }

    /// Changes what is named, if all of it makes sense, and nothing otherwise.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn set(&self, wanted: &steer::Limits) -> Result<(), String> {
        if let Some(cap) = wanted.bandwidth_bytes_per_s.filter(|cap| *cap > 0) {
            check_bandwidth(cap)?;
        }
        let mut now = self.lock();
        let limits = Limits {
            downtime: wanted.downtime_us.map_or(now.downtime, Duration::from_micros),
            max_downtime: wanted.max_downtime_us.map_or(now.max_downtime, Duration::from_micros),
            max_rounds: wanted.max_rounds.unwrap_or(now.max_rounds),
            timeout: wanted.timeout_us.map_or(now.timeout, Duration::from_micros),
            on_timeout: match &wanted.on_timeout {
                Some(text) => meaning("--on-timeout", text)?,
                None => now.on_timeout,
            },
            on_stall: match &wanted.on_stall {
                Some(texts) => {
                    texts.iter().map(|text| meaning("--on-stall", text)).collect::<Result<_, _>>()?
                }
                None => now.on_stall.clone(),
            },
            max_throttle_percent: wanted.max_throttle_percent.unwrap_or(now.max_throttle_percent),
            post_copy_after: wanted.post_copy_after.or(now.post_copy_after),
        };
        check_limits(&limits)?;
        *now = limits;
        drop(now);
        if let Some(cap) = wanted.bandwidth_bytes_per_s {
            self.cap_bandwidth(Some(cap));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Limits> {
        self.0.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether limits make sense, before they hold.
///
/// # Errors
/// What is wrong with them, and what would be right.
pub fn check_limits(limits: &Limits) -> Result<(), String> {
    for (what, value) in [
        ("a downtime", limits.downtime),
        ("a longest downtime", limits.max_downtime),
        ("a timeout", limits.timeout),
    ] {
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
    if limits.max_throttle_percent > MOST_THROTTLE_PERCENT {
        let percent = limits.max_throttle_percent;
        return Err(format!("a throttle of {percent} % cannot be: at most {MOST_THROTTLE_PERCENT} %"));
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

fn micros(duration: Duration) -> u64 {
    crate::report::micros(duration)
}

/// A policy as one word, as the command line has it.
fn word<T: Serialize>(value: &T) -> Option<String> {
    serde_json::to_value(value).ok()?.as_str().map(str::to_owned)
}

/// The policy that a word stands for.
fn meaning<T: DeserializeOwned>(option: &str, word: &str) -> Result<T, String> {
    // The parser's words list the choices.
    serde_json::from_value(Value::String(word.chars().take(64).collect()))
        .map_err(|error| format!("{option}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::converge::{OnStall, OnTimeout};

    #[test]
    fn every_handle_sees_a_change_at_once() {
        let theirs = Controls::new(Limits::default());
        let ours = theirs.clone();
        assert_eq!((theirs.limits(), theirs.bandwidth_bytes_per_s()), (Limits::default(), None));
        ours.change(|limits| limits.downtime = Duration::from_millis(7));
        ours.cap_bandwidth(Some(5_000_000));
        assert_eq!(theirs.read(|limits| limits.downtime), Duration::from_millis(7));
        assert_eq!(theirs.bandwidth_bytes_per_s(), Some(5_000_000));
        ours.cap_bandwidth(None);
        assert_eq!(theirs.bandwidth_bytes_per_s(), None);
    }

    #[test]
    fn an_order_changes_what_it_names_and_nothing_else() {
        let controls = Controls::new(Limits::default());
        controls
            .set(&steer::Limits {
                downtime_us: Some(7000),
                on_timeout: Some("force".into()),
                on_stall: Some(vec!["cancel".into()]),
                bandwidth_bytes_per_s: Some(2_000_000),
                ..steer::Limits::default()
            })
            .unwrap();
        let expected = Limits {
            downtime: Duration::from_millis(7),
            on_timeout: OnTimeout::Force,
            on_stall: vec![OnStall::Cancel],
            ..Limits::default()
        };
        assert_eq!(controls.limits(), expected);
        assert_eq!(controls.in_force().bandwidth_bytes_per_s, Some(2_000_000));
        // What is in force can be ordered again.
        controls.set(&controls.in_force()).unwrap();
        assert_eq!(controls.limits(), expected);
        controls.set(&steer::Limits { bandwidth_bytes_per_s: Some(0), ..steer::Limits::default() }).unwrap();
        assert_eq!(controls.bandwidth_bytes_per_s(), None);
    }

    #[test]
    fn a_senseless_order_changes_nothing_and_says_why() {
        let controls = Controls::new(Limits::default());
        let good = steer::Limits { max_rounds: Some(3), ..steer::Limits::default() };
        for (wanted, why) in [
            (steer::Limits { downtime_us: Some(0), ..good.clone() }, "downtime"),
            (steer::Limits { timeout_us: Some(u64::MAX), ..good.clone() }, "timeout"),
            (steer::Limits { max_rounds: Some(0), ..good.clone() }, "rounds"),
            (steer::Limits { max_throttle_percent: Some(100), ..good.clone() }, "throttle"),
            (steer::Limits { on_timeout: Some("explode".into()), ..good.clone() }, "--on-timeout"),
            (steer::Limits { on_stall: Some(vec!["pray".into()]), ..good.clone() }, "--on-stall"),
            (steer::Limits { bandwidth_bytes_per_s: Some(1000), ..good }, "too little"),
        ] {
            let error = controls.set(&wanted).unwrap_err();
            assert!(error.contains(why), "{error}");
            assert_eq!(controls.limits(), Limits::default());
        }
    }
}
