//! How the bytes of a run are written.

use crate::error::{ProtocolError, Result};
use crate::page::PAGE_SIZE;

/// How the payload of a page frame stands for its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// Every byte of every page is zero; there is no payload.
    Zero = 0,
    /// The payload is the pages, one behind the other.
    Raw = 1,
}

impl Encoding {
    /// The encoding with this number on the wire.
    ///
    /// # Errors
    /// `Value` for a number that this release does not know.
    pub fn from_wire(number: u8) -> Result<Self> {
        match number {
            0 => Ok(Self::Zero),
            1 => Ok(Self::Raw),
            other => {
                Err(ProtocolError::Value { what: "the encoding of a page frame", found: u64::from(other) })
            }
        }
    }

    /// Checks the payload length that came with a run of `count` pages.
    ///
    /// # Errors
    /// `Value` when it is not what the encoding says it must be.
    pub fn check_payload(self, count: u32, payload_bytes: u32) -> Result<()> {
        let needed = match self {
            Self::Zero => 0,
            Self::Raw => u64::from(count) * PAGE_SIZE as u64,
        };
        if u64::from(payload_bytes) == needed {
            return Ok(());
        }
        Err(ProtocolError::Value {
            what: "the payload length of a page frame",
            found: u64::from(payload_bytes),
        })
    }
}

/// Whether every byte is zero: the test that decides for [`Encoding::Zero`].
pub fn is_zero(bytes: &[u8]) -> bool {
    // Compares in blocks that the compiler turns into vector code, and gives up at the first that differs.
    const BLOCK: usize = 256;
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = vec![0; PAGE_SIZE + 3];
        assert!(is_zero(&page));
        for at in 0..page.len() {
            page[at] = 0x10;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
