//! How fast this machine's time-stamp counter runs.
//!
//! Under software emulation a host's counter is this machine's (target/i386 and `cpu_get_host_ticks` in QEMU), but its kernel cannot
//! measure that well: two hosts came out 0.06 % apart, more than KVM takes for the same without TSC scaling
//! (`tsc_tolerance_ppm`, 250), and no guest could have moved. So they are told.

use std::time::{Duration, Instant};

/// The shortest measurement. With 1 us of doubt at either end it is right to 10 ppm.
const SHORTEST: Duration = Duration::from_millis(200);

/// A measurement that began.
pub(super) struct Measurement {
    begun: Instant,
    ticks: u64,
}

impl Measurement {
    pub(super) fn begin() -> Self {
        Self { begun: Instant::now(), ticks: ticks() }
    }

    /// Its result, in kHz.
    pub(super) fn finish(self) -> u64 {
        std::thread::sleep(SHORTEST.saturating_sub(self.begun.elapsed()));
        let (elapsed, ticks) = (self.begun.elapsed(), ticks().saturating_sub(self.ticks));
        let khz = u128::from(ticks) * 1_000_000 / elapsed.as_nanos().max(1);
        u64::try_from(khz).unwrap_or_default()
    }
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets everybody use it (CR4.TSD is clear unless a process asks
    // for the opposite by prctl(2)).
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let [first, second] = [(); 2].map(|()| Measurement::begin().finish());
        assert!((100_000..100_000_000).contains(&first), "{first} kHz");
        assert!(first.abs_diff(second) < first / 1000, "{first} and {second} kHz");
    }
}
