//! The state that belongs to no single vCPU: interrupt controllers, timer, clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::vcpu::Moment;
use crate::error::{Error, Result};

/// The parts of a VM inside KVM that are not vCPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// Nanoseconds since 1970 at the save, by the source host's clock.
    pub saved_at_unix_ns: u64,
    /// KVM's clock, which kvmclock guests read.
    pub clock: kvm_clock_data,
    /// Master PIC, slave PIC, IOAPIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// The interval timer.
    pub pit: kvm_pit_state2,
}

/// The chips of a state, in its order.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

pub(super) fn unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl VmState {
    /// Saves; all vCPUs must be paused.
    ///
    /// # Errors
    /// [`Error::Host`] when KVM refuses.
    pub(crate) fn save(vm: &VmFd) -> Result<Self> {
        let mut irqchips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(Error::kvm("read an interrupt controller"))?;
            irqchips.push(chip);
        }
        let clock = vm.get_clock().map_err(Error::kvm("read the VM's clock"))?;
        Ok(Self {
            // Of the moment that the clock is of, if KVM knows it.
            saved_at_unix_ns: moment_of(&clock).map_or_else(unix_ns, |moment| moment.unix_ns),
            clock,
            irqchips,
            pit: vm.get_pit2().map_err(Error::kvm("read the PIT"))?,
        })
    }

    /// The host's TSC at the moment that the state is of.
    pub(crate) fn host_tsc(&self) -> Option<u64> {
        moment_of(&self.clock).map(|moment| moment.host_tsc)
    }

    /// The real time that passed since the save; nothing if this host's clock is behind the source's.
    pub(crate) fn elapsed(&self) -> Duration {
        Duration::from_nanos(unix_ns().saturating_sub(self.saved_at_unix_ns))
    }

    /// Checks what can be checked without a VM.
    ///
    /// # Errors
    /// [`Error::State`].
    pub(crate) fn check(&self) -> Result<()> {
        let chips: Vec<u32> = self.irqchips.iter().map(|chip| chip.chip_id).collect();
        if chips != CHIPS {
            return Err(Error::State(format!("the interrupt controllers are {chips:?}, not {CHIPS:?}")));
        }
        Ok(())
    }

    /// Loads into a VM whose vCPUs are paused. `realtime`: KVM here catches up with the clock itself.
    ///
    /// # Errors
    /// [`Error::State`] or [`Error::Host`].
    pub(crate) fn load(&self, vm: &VmFd, elapsed: Duration, realtime: bool) -> Result<()> {
        self.check()?;
        vm.set_clock(&caught_up(&self.clock, elapsed, realtime))
            .map_err(Error::kvm("take the VM's clock"))?;
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(Error::kvm("take an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(Error::kvm("take the PIT"))
    }
}

/// This host's clocks at one moment, behind [`VmState::load`].
pub(crate) fn moment(vm: &VmFd) -> Option<Moment> {
    vm.get_clock().ok().as_ref().and_then(moment_of)
}

fn moment_of(clock: &kvm_clock_data) -> Option<Moment> {
    const BOTH: u32 = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    (clock.flags & BOTH == BOTH).then_some(Moment { unix_ns: clock.realtime, host_tsc: clock.host_tsc })
}

/// The clock to set so that the guest's time did not stand still.
fn caught_up(saved: &kvm_clock_data, elapsed: Duration, realtime: bool) -> kvm_clock_data {
    if realtime && saved.flags & KVM_CLOCK_REALTIME != 0 {
        // KVM adds what passed between `realtime` and now, closer than we could.
        return kvm_clock_data {
            clock: saved.clock,
            flags: KVM_CLOCK_REALTIME,
            realtime: saved.realtime,
            ..Default::default()
        };
    }
    let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(0);
    kvm_clock_data { clock: saved.clock.saturating_add(elapsed_ns), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_catches_up_by_hand_or_by_kvm() {
        let saved =
            kvm_clock_data { clock: 100, flags: KVM_CLOCK_REALTIME, realtime: 7, ..Default::default() };
        let by_hand = caught_up(&saved, Duration::from_nanos(5), false);
        assert_eq!((by_hand.clock, by_hand.flags), (105, 0));
        let by_kvm = caught_up(&saved, Duration::from_nanos(5), true);
        assert_eq!((by_kvm.clock, by_kvm.flags, by_kvm.realtime), (100, KVM_CLOCK_REALTIME, 7));
        let without = kvm_clock_data { clock: u64::MAX, ..Default::default() };
        assert_eq!(caught_up(&without, Duration::from_nanos(5), true).clock, u64::MAX);
    }

    #[test]
    fn wrong_chips_are_refused() {
        let state = VmState {
            saved_at_unix_ns: 0,
            clock: kvm_clock_data::default(),
            irqchips: vec![kvm_irqchip::default(); 3],
            pit: kvm_pit_state2::default(),
        };
        assert!(state.check().is_err());
    }
}
