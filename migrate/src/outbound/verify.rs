//! Digests over all memory, compared by the destination while the workload stands still.
//!
//! They go part by part: the destination hashes one part while the next is hashed here, and each end hears of the other
//! behind every part, so that the limit on silence holds however large the memory is.

use super::Outbound;
use crate::conversation::out_of_order;
use crate::digest::{digests, stripe_of, stripes};
use crate::error::{Error, Result};
use crate::report::micros;
use protocol::control::{Downstream, MAX_VERIFY_STRIPES, Upstream};
use protocol::page::{PageRun, PageSet};
use std::time::{Duration, Instant};

/// The stripes that are hashed to see how fast that is: 32 MiB, which take some milliseconds.
const SAMPLE_STRIPES: usize = 16;

impl Outbound<'_> {
    /// How long comparing will take, from what a sample of the memory takes here. The destination is taken to be as fast.
    ///
    /// # Errors
    /// `NotConverged` when that alone is more downtime than is allowed: no round would change it.
    pub(super) fn forecast_verify(&mut self) -> Result<()> {
        let mut used = Vec::new();
        for space in self.source.workload().layout.spaces.clone() {
            let mut pages = PageSet::full(space.pages);
            self.source.present(space.id, 0, space.pages, &mut pages)?;
            let mut at = 0;
            while let Some(page) = pages.next_set(at) {
                let stripe = stripe_of(&space, page);
                at = stripe.end();
                used.push(stripe);
            }
        }
        // From all over, so that neither zeros nor the first megabytes decide.
        let step = used.len().div_ceil(SAMPLE_STRIPES).max(1);
        let sample: Vec<PageRun> = used.iter().step_by(step).copied().collect();
        let begun = Instant::now();
        digests(self.source.reader()?.as_ref(), &sample)?;
        let all = begun.elapsed().as_secs_f64() * used.len() as f64 / sample.len().max(1) as f64;
        self.verify_cost = Duration::from_secs_f64(all);
        tracing::info!(
            cost_us = micros(self.verify_cost),
            stripes = used.len(),
            "comparing memory was forecast"
        );
        let most = self.options.controls.read(crate::converge::Limits::most_downtime);
        match most {
            Some(most) if self.verify_cost > most => Err(Error::NotConverged(format!(
                "comparing memory (--verify) would take about {} ms in which the workload stands still, and {} ms are \
                 allowed: allow more with --downtime",
                self.verify_cost.as_millis(),
                most.as_millis(),
            ))),
            _ => Ok(()),
        }
    }

    /// Has all memory compared. The last pages may still be on their way.
    pub(super) fn verify(&mut self) -> Result<()> {
        let begun = Instant::now();
        let memory = self.source.reader()?;
        let last_round = self.last_round();
        let stripes = stripes(&self.source.workload().layout);
        let mut first = 0;
        for part in stripes.chunks(MAX_VERIFY_STRIPES) {
            self.cancel.check()?;
            let digests = digests(memory.as_ref(), part)?;
            if first > 0 {
                self.hear_verified(first)?;
            }
            let message = Downstream::Verify { last_round, first };
            self.talk.say(&message, digests.as_flattened(), self.options.stall)?;
            first += part.len() as u64;
        }
        self.hear_verified(first)?;
        self.report.verify_us = micros(begun.elapsed());
        Ok(())
    }

    fn hear_verified(&mut self, expected: u64) -> Result<()> {
        match self.hear("the destination to compare memory", self.options.stall)? {
            Upstream::Verified { stripes } if stripes == expected => Ok(()),
            other => Err(out_of_order("Verified of the stripes that were sent", other.name())),
        }
    }
}
