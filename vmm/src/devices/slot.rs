//! Slots: places on the bus, each a page of registers and an interrupt line, for devices that are described to the guest
//! by ACPI.

use crate::addresses::{PAGE_SIZE, SLOT_GSIS, SLOT_MMIO};

/// One slot. Its interrupts are edges, active high.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    index: u8,
}

impl Slot {
    /// How many there are.
    pub const COUNT: usize = SLOT_GSIS.len();
    /// Bytes of registers.
    pub const BYTES: u64 = PAGE_SIZE;

    /// The slot with this number, from 0 to [`Slot::COUNT`] - 1.
    pub fn new(index: usize) -> Option<Self> {
        u8::try_from(index).ok().filter(|_| index < Self::COUNT).map(|index| Self { index })
    }

    /// Its number.
    pub fn index(self) -> u8 {
        self.index
    }

    /// Guest-physical address of its registers.
    pub fn base(self) -> u64 {
        SLOT_MMIO + u64::from(self.index) * Self::BYTES
    }

    /// The number of its interrupt line.
    pub fn gsi(self) -> u32 {
        // A slot's index is below the array's length by construction.
        SLOT_GSIS.get(usize::from(self.index)).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::{HOLE_END, PAD_LEN, PAD_MMIO, SERIAL_IRQ};

    #[test]
    fn slots_share_nothing_with_each_other_or_the_serial_port() {
        let slots: Vec<Slot> = (0..Slot::COUNT).filter_map(Slot::new).collect();
        assert_eq!(slots.len(), Slot::COUNT);
        assert!(Slot::new(Slot::COUNT).is_none());
        for (at, slot) in slots.iter().enumerate() {
            assert!(slot.base() >= PAD_MMIO + PAD_LEN && slot.base() + Slot::BYTES <= HOLE_END);
            assert!(slot.gsi() != SERIAL_IRQ && (3..24).contains(&slot.gsi()));
            assert!(slots[..at].iter().all(|other| other.base() != slot.base() && other.gsi() != slot.gsi()));
        }
    }
}
