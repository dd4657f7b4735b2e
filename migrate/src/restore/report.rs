//! What a restore did, in numbers, and what it says while it does it.

use crate::report::micros;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use serde::Serialize;
use std::time::{Duration, Instant};

/// A step of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Its manifest is read.
    Chain,
    /// The state and the machine description are read.
    State,
    /// The VMM is made, while the manifests that it stands on and all indexes are read, and merged.
    Prepare,
    /// What was not merged by then.
    Indexes,
    /// Pages go from the store to memory.
    Read,
    /// The state is loaded.
    Load,
    /// The VMM watches for touches of missing pages.
    Expect,
    /// The workload is let go.
    Start,
    /// It runs, and its pages follow.
    Stream,
}

impl Step {
    /// The step as one word, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chain => "chain",
            Self::State => "state",
            Self::Prepare => "prepare",
            Self::Indexes => "indexes",
            Self::Read => "read",
            Self::Load => "load",
            Self::Expect => "expect",
            Self::Start => "start",
            Self::Stream => "stream",
        }
    }
}

/// How long a step took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StepTime {
    /// Which.
    pub step: Step,
    /// How long, in microseconds.
    pub duration_us: u64,
}

/// What one restore did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Which checkpoint.
    pub checkpoint: CheckpointId,
    /// The name of this restore: what the VMM says brought the workload.
    pub migration: MigrationId,
    /// The workload's name here.
    pub name: String,
    /// Links of the chain.
    pub links: u64,
    /// Those whose indexes were read: older ones had nothing to say.
    pub merged_links: u64,
    /// The workload's memory in bytes.
    pub memory_bytes: u64,
    /// Pages that came from the store; all others are zeros.
    pub data_pages: u64,
    /// Bytes of the extents in which they lie.
    pub stored_bytes: u64,
    /// What took how long, in its order.
    pub steps: Vec<StepTime>,
    /// From the beginning until the workload ran, in microseconds.
    pub running_us: u64,
    /// From the beginning to the last page, in microseconds.
    pub total_us: u64,
    /// How a workload that was started early was served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazily: Option<Lazily>,
}

/// How a workload was served that misses pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Lazily {
    /// Extents that came because earlier restores touched them first, or might have.
    pub recorded_extents: u64,
    /// Touches of missing pages that were heard of.
    pub touches: u64,
    /// Extents that came because somebody waited for them.
    pub asked_extents: u64,
    /// From the beginning until the first page that somebody waited for was there, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_page_us: Option<u64>,
    /// From hearing of a touch to the page's being there, in microseconds: the longest.
    pub wait_max_us: u64,
    /// The sum of all of them.
    pub wait_sum_us: u64,
    /// Times the store did not give what it should.
    pub failed_reads: u64,
}

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A step begins.
    Step {
        /// Which.
        step: Step,
    },
    /// Pages come in; at most ten times a second.
    Reading {
        /// Pages that are in memory.
        done_pages: u64,
        /// Pages that are not.
        remaining_pages: u64,
    },
    /// The workload runs; a lazy one misses pages.
    Running {
        /// Its name.
        name: String,
        /// The name of this restore.
        migration: MigrationId,
        /// From the beginning until then, in microseconds.
        running_us: u64,
        /// Pages that it misses.
        missing_pages: u64,
    },
    /// The store does not give what a running workload needs; it is asked again and again.
    StoreTrouble {
        /// What is wrong, with checkpoint and object.
        reason: String,
        /// Pages that are still to come.
        missing_pages: u64,
    },
}

/// The steps of a restore, timed and told.
pub(super) struct Clock<'a> {
    begun: Instant,
    steps: Vec<StepTime>,
    observer: &'a mut dyn FnMut(&Event),
}

impl<'a> Clock<'a> {
    pub(super) fn start(observer: &'a mut dyn FnMut(&Event)) -> Self {
        Self { begun: Instant::now(), steps: Vec::new(), observer }
    }

    /// Does one step.
    pub(super) fn time<T>(&mut self, step: Step, body: impl FnOnce(&mut dyn FnMut(&Event)) -> T) -> T {
        self.tell(&Event::Step { step });
        let begun = Instant::now();
        let done = body(self.observer);
        self.note(step, begun.elapsed());
        done
    }

    /// A step that was timed elsewhere.
    pub(super) fn note(&mut self, step: Step, took: Duration) {
        self.steps.push(StepTime { step, duration_us: micros(took) });
    }

    /// Says what happened.
    pub(super) fn tell(&mut self, event: &Event) {
        (self.observer)(event);
    }

    /// When it began.
    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    /// Microseconds since the beginning.
    pub(super) fn elapsed_us(&self) -> u64 {
        micros(self.begun.elapsed())
    }

    /// What took how long so far.
    pub(super) fn steps(&self) -> &[StepTime] {
        &self.steps
    }
}
