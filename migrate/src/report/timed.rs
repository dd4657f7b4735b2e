//! One phase of a run, wherever it runs: timed, logged, and named in its error.

use super::{Phase, PhaseTime, micros};
use crate::error::Result;
use std::time::Instant;

/// A phase under way.
pub(crate) struct Timed {
    phase: Phase,
    begun: Instant,
}

impl Timed {
    pub(crate) fn begin(phase: Phase) -> Self {
        Self { phase, begun: Instant::now() }
    }

    /// It ended so: notes how long it took, and puts its name into the error.
    pub(crate) fn end<T>(self, result: Result<T>, phases: &mut Vec<PhaseTime>) -> Result<T> {
        let Self { phase, begun } = self;
        let duration_us = micros(begun.elapsed());
        phases.push(PhaseTime { phase, duration_us });
        let result = result.map_err(|error| error.during(phase));
        match &result {
            Ok(_) => tracing::debug!(phase = phase.name(), duration_us, "phase done"),
            Err(error) => tracing::debug!(phase = phase.name(), duration_us, %error, "phase failed"),
        }
        result
    }
}
