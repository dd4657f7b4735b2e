//! Time is the TSC.

/// The TSC now.
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has it, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What the TSC is taken to run at when the command line does not say.
const ASSUMED_KHZ: u64 = 1_000_000;

/// The TSC's frequency.
#[derive(Clone, Copy)]
pub struct Rate {
    khz: u64,
}

impl Rate {
    pub fn new(tsc_khz: u64) -> Rate {
        Rate { khz: if tsc_khz == 0 { ASSUMED_KHZ } else { tsc_khz } }
    }

    pub fn cycles(self, us: u64) -> u64 {
        (u128::from(us) * u128::from(self.khz) / 1000) as u64
    }

    pub fn us(self, cycles: u64) -> u64 {
        (u128::from(cycles) * 1000 / u128::from(self.khz)) as u64
    }

    /// Cycles for one page at `mb_s` (10^6 bytes a second), in 1/256 cycle.
    fn page_interval(self, mb_s: u64) -> u64 {
        (u128::from(self.khz) * 1000 * 4096 * 256 / (u128::from(mb_s) * 1_000_000)) as u64
    }
}

/// Spreads work evenly over time: one unit each interval.
///
/// Time lost is made up only up to `cap`: after a long gap (a migration) there is no burst that would hide
/// what the gap cost.
pub struct Pace {
    /// In 1/256 cycle; `None` is never, 0 always.
    interval: Option<u64>,
    cap: u64,
    /// All three in 1/256 cycle since the start.
    due: u64,
    origin: u64,
}

/// How far a pace may lag before the rest is forgotten, in ticks. Ten, because a host that shares its cores
/// takes the vCPU away for several milliseconds at a time, which should not lower the rate.
const CATCH_UP_TICKS: u64 = 10;

impl Pace {
    pub fn never() -> Pace {
        Pace { interval: None, cap: 0, due: 0, origin: 0 }
    }

    pub fn always() -> Pace {
        Pace { interval: Some(0), cap: 0, due: 0, origin: 0 }
    }

    pub fn at(mb_s: u64, rate: Rate, tick_cycles: u64, now: u64) -> Pace {
        if mb_s == 0 {
            return Pace::never();
        }
        let cap = tick_cycles.saturating_mul(256 * CATCH_UP_TICKS);
        Pace { interval: Some(rate.page_interval(mb_s)), cap, due: 0, origin: now }
    }

    fn since_origin(&self, now: u64) -> u64 {
        now.wrapping_sub(self.origin).wrapping_mul(256)
    }

    /// Takes one unit, if one is due.
    pub fn take(&mut self, now: u64) -> bool {
        let Some(interval) = self.interval else { return false };
        if interval == 0 {
            return true;
        }
        let now = self.since_origin(now);
        if now < self.due {
            return false;
        }
        self.due = self.due.max(now.saturating_sub(self.cap)) + interval;
        true
    }

    /// Cycles until the next unit is due.
    pub fn wait(&self, now: u64) -> u64 {
        match self.interval {
            None => u64::MAX,
            Some(0) => 0,
            Some(_) => self.due.saturating_sub(self.since_origin(now)) / 256,
        }
    }

    /// The TSC was set back: what was due then means nothing now.
    pub fn restart(&mut self, now: u64) {
        self.origin = now;
        self.due = 0;
    }
}
