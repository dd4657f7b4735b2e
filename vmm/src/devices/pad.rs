//! The pad: three registers for guests that can use neither HLT nor ports.
//!
//! | offset | access | register |
//! |---|---|---|
//! | 0x00 | read, 4 bytes | `0x3152474d`, "MGR1": the pad is there |
//! | 0x08 | write, 8 bytes | PARK_NS: sleep at most that many nanoseconds, one second at most |
//! | 0x10 | write, 4 bytes | POWER_OFF: end the VM with this code |

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    device::{Device, Effect},
    error::{Error, Result},
};

/// "MGR1", little-endian.
pub const MAGIC: u32 = 0x3152_474d;
/// Offset of the magic.
pub const REG_MAGIC: u64 = 0x00;
/// Offset of the register that parks.
pub const REG_PARK_NS: u64 = 0x08;
/// Offset of the register that powers off.
pub const REG_POWER_OFF: u64 = 0x10;
/// The longest a vCPU sleeps for one write.
pub const PARK_MAX: Duration = Duration::from_secs(1);

const STATE_VERSION: u16 = 1;

/// The pad.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pad {
    /// How often a vCPU was parked, since the guest was first started.
    parks: u64,
}

impl Device for Pad {
    fn name(&self) -> &str {
        "pad"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset == REG_MAGIC && data.len() == 4 {
            data.copy_from_slice(&MAGIC.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data.len()) {
            (REG_PARK_NS, 8) => {
                self.parks = self.parks.wrapping_add(1);
                let nanoseconds = data.try_into().map_or(0, u64::from_le_bytes);
                Effect::Park(Duration::from_nanos(nanoseconds).min(PARK_MAX))
            }
            (REG_POWER_OFF, 4) => Effect::PowerOff(data.try_into().map_or(0, u32::from_le_bytes)),
            _ => Effect::None,
        }
    }

    fn state_version(&self) -> u16 {
        STATE_VERSION
    }

    fn save(&self) -> Result<Vec<u8>> {
        postcard::to_allocvec(self).map_err(|error| Error::State(format!("pad: {error}")))
    }

    fn restore(&mut self, version: u16, bytes: &[u8]) -> Result<()> {
        if version != STATE_VERSION {
            return Err(Error::State(format!("pad: version {version} is not {STATE_VERSION}")));
        }
        *self = postcard::from_bytes(bytes).map_err(|error| Error::State(format!("pad: {error}")))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_magic_reads_mgr1_and_the_rest_all_ones() {
        let mut data = [0; 4];
        Pad::default().read(0, &mut data);
        assert_eq!(&data, b"MGR1");
        for (offset, length) in [(0, 8), (1, 4), (8, 8), (u64::MAX, 1)] {
            let mut data = vec![0; length];
            Pad::default().read(offset, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{offset}");
        }
    }

    #[test]
    fn parking_is_bounded() {
        let mut pad = Pad::default();
        assert_eq!(pad.write(8, &5_u64.to_le_bytes()), Effect::Park(Duration::from_nanos(5)));
        assert_eq!(pad.write(8, &u64::MAX.to_le_bytes()), Effect::Park(PARK_MAX));
        assert_eq!(pad.write(8, &[1; 4]), Effect::None);
        assert_eq!(pad.write(0x10, &7_u32.to_le_bytes()), Effect::PowerOff(7));
        assert_eq!(pad.write(0x10, &[1]), Effect::None);
    }

    #[test]
    fn the_state_survives_and_bad_state_is_refused() {
        let mut pad = Pad::default();
        pad.write(8, &[0; 8]);
        let saved = pad.save().unwrap();
        let mut other = Pad::default();
        other.restore(1, &saved).unwrap();
        assert_eq!(other, pad);
        assert!(other.restore(2, &saved).is_err());
        assert!(other.restore(1, &[0xff; 40]).is_err());
    }
}
