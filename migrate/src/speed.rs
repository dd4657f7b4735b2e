//! How fast a guest is while it moves, where the guest says so itself.
//!
//! Nothing outside a guest knows how much work it gets done: time on a CPU is no work when every write faults. A ledger
//! guest counts the bytes it writes in a page of its memory, so before the move and over each round its speed is what it
//! counted by the time. Of any other guest nothing is said.

use crate::memory::GuestMemory;
use crate::report::{Event, GuestSpeed, Observer, Phase, rate};
use ledger::Stats;
use protocol::layout::{Layout, SpaceKind};
use protocol::page::PAGE_SIZE;
use std::time::{Duration, Instant};

/// The shortest time over which a speed means something: the guest works in ticks of a millisecond.
const SHORTEST: Duration = Duration::from_millis(5);

/// The most rounds whose speed is kept.
const MOST_ROUNDS: usize = 2000;

/// A look at a guest's own count.
pub struct Gauge {
    layout: Layout,
    memory: GuestMemory,
}

impl Gauge {
    /// A gauge on the memory of a guest, if one that counts runs in it.
    pub fn on(layout: &Layout, memory: GuestMemory) -> Option<Self> {
        let gauge = Self { layout: layout.clone(), memory };
        gauge.written_bytes().is_some().then_some(gauge)
    }

    /// What it counted so far. The guest may write anything there: it is a figure for people and decides nothing.
    fn written_bytes(&self) -> Option<u64> {
        let read = |gpa: u64, buffer: &mut [u8]| {
            let inside = |first: u64, pages: u64| {
                gpa.checked_sub(first).filter(|offset| *offset < pages.saturating_mul(PAGE_SIZE as u64))
            };
            let found = self
                .layout
                .of_kind(SpaceKind::Memory)
                .find_map(|space| Some((space.id, inside(space.guest_address, space.pages)?)));
            match found {
                Some((space, offset)) => {
                    self.memory.read(space, offset, buffer).map_err(std::io::Error::other)
                }
                None => Err(std::io::ErrorKind::NotFound.into()),
            }
        };
        Stats::read(read).ok().map(|stats| stats.bytes_written)
    }
}

/// An observer that measures the guest where the engine begins and ends something.
pub struct Speedometer<'a> {
    gauge: Option<Gauge>,
    begun: Option<(Instant, u64)>,
    speed: GuestSpeed,
    inner: &'a mut dyn Observer,
}

impl<'a> Speedometer<'a> {
    /// Measures with a gauge, if there is one, and tells everything on.
    pub fn new(gauge: Option<Gauge>, inner: &'a mut dyn Observer) -> Self {
        Self { gauge, begun: None, speed: GuestSpeed::default(), inner }
    }

    /// What was measured, if anything was.
    pub fn finish(self) -> Option<GuestSpeed> {
        self.gauge
            .map(|_| self.speed)
            .filter(|speed| speed.before_bytes_per_s > 0 || !speed.rounds.is_empty())
    }

    fn begin(&mut self) {
        let now = Instant::now();
        self.begun = self.gauge.as_ref().and_then(Gauge::written_bytes).map(|count| (now, count));
    }

    fn end(&mut self) -> Option<u64> {
        let (begun, before) = self.begun.take()?;
        let took = begun.elapsed();
        let written = self.gauge.as_ref()?.written_bytes()?.checked_sub(before)?;
        (took >= SHORTEST).then(|| rate(written, took))
    }
}

impl Observer for Speedometer<'_> {
    fn event(&mut self, event: &Event) {
        match event {
            // Between these two the guest runs as it always does.
            Event::Phase { phase: Phase::Greet } | Event::RoundBegin { .. } => self.begin(),
            Event::Phase { phase: Phase::Track } => {
                self.speed.before_bytes_per_s = self.end().unwrap_or(0);
            }
            Event::RoundEnd(round) => {
                let measured = self.end();
                if let Some(bytes_per_s) = measured.filter(|_| !round.frozen)
                    && self.speed.rounds.len() < MOST_ROUNDS
                {
                    self.speed.rounds.push((round.round, bytes_per_s).into());
                }
            }
            _ => {}
        }
        self.inner.event(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Quiet, RoundReport};

    #[test]
    fn of_a_guest_that_does_not_count_nothing_is_said() {
        let layout = Layout { spaces: Vec::new() };
        assert!(Gauge::on(&layout, GuestMemory::none()).is_none());
        let mut quiet = Quiet;
        let mut meter = Speedometer::new(None, &mut quiet);
        meter.event(&Event::Phase { phase: Phase::Greet });
        meter.event(&Event::RoundEnd(RoundReport::default()));
        assert_eq!(meter.finish(), None);
    }
}
