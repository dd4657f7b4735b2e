//! What checkpoints of one kind cost, on average.

use super::Taken;

/// How much the newest number counts: about the last six make the mean.
const NEWEST: f64 = 0.3;

/// A mean to which the newest numbers contribute most.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Mean(Option<f64>);

impl Mean {
    pub(super) fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + NEWEST * (value - mean)));
    }
}

/// Means over checkpoints of one kind. What grows with the number of pages is kept per byte of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Learned {
    page_bytes: Mean,
    pause_s: Mean,
    slowed_s_per_byte: Mean,
    stored_per_byte: Mean,
    fixed_s: Mean,
    s_per_stored_byte: Mean,
}

impl Learned {
    pub(super) fn add(&mut self, taken: &Taken) {
        let (page_bytes, stored_bytes) = (taken.page_bytes as f64, taken.stored_bytes as f64);
        self.page_bytes.add(page_bytes);
        self.pause_s.add(taken.pause.as_secs_f64());
        if page_bytes > 0.0 {
            self.slowed_s_per_byte.add(taken.slowed.as_secs_f64() / page_bytes);
            self.stored_per_byte.add(stored_bytes / page_bytes);
        }
        // The pause is no writing, and all that a checkpoint without pages takes has nothing to do with bytes.
        let (took_s, pause_s) = (taken.took.as_secs_f64(), taken.pause.as_secs_f64());
        if stored_bytes > 0.0 {
            self.s_per_stored_byte.add((took_s - pause_s).max(0.0) / stored_bytes);
        }
        self.fixed_s.add(if stored_bytes > 0.0 { pause_s.min(took_s) } else { took_s });
    }

    pub(super) fn page_bytes(&self) -> Option<f64> {
        self.page_bytes.0
    }

    pub(super) fn pause_s(&self) -> Option<f64> {
        self.pause_s.0
    }

    pub(super) fn slowed_s_per_byte(&self) -> Option<f64> {
        self.slowed_s_per_byte.0
    }

    pub(super) fn stored_per_byte(&self) -> Option<f64> {
        self.stored_per_byte.0
    }

    pub(super) fn fixed_s(&self) -> Option<f64> {
        self.fixed_s.0
    }

    pub(super) fn s_per_stored_byte(&self) -> Option<f64> {
        self.s_per_stored_byte.0
    }
}
