//! A guest's disk, as a host reads it: the account in memory, and the image.

use std::collections::HashMap;
use std::fmt;

use crate::model::disk::{ACCOUNT_GPA, BLOCK_BYTES, MAGIC, MAX_BLOCKS, at, block_of, word};

/// The most faults that are kept.
const MAX_FAULTS: usize = 16;

/// What the guest says of its disk. Read it while the guest stands still; of a running one the fields may be of different moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskAccount {
    /// `seed=`
    pub seed: u64,
    /// Blocks that it writes.
    pub blocks: u64,
    /// Writes begun.
    pub begun: u64,
    /// Writes that were answered.
    pub written: u64,
    /// Writes that were made safe.
    pub flushed: u64,
    /// Blocks that were not as they should be, and requests that failed.
    pub errors: u64,
}

/// A block that is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFault {
    /// The block.
    pub block: u64,
    /// The last write to it.
    pub expected: u64,
    /// The write that it says it is of.
    pub found: u64,
}

impl fmt::Display for DiskFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "disk block {}: not as write {} left it (it says {})",
            self.block, self.expected, self.found
        )
    }
}

impl DiskAccount {
    /// Reads it from guest-physical memory. `None` when the guest has no disk, or what stands there cannot be an account.
    ///
    /// # Errors
    /// As `read`.
    pub fn read<E>(mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>) -> Result<Option<Self>, E> {
        let mut page = [0; 64];
        read(ACCOUNT_GPA, &mut page)?;
        let field =
            |offset: usize| page[offset..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let account = Self {
            seed: field(at::SEED),
            blocks: field(at::BLOCKS),
            begun: field(at::BEGUN),
            written: field(at::WRITTEN),
            flushed: field(at::FLUSHED),
            errors: field(at::ERRORS),
        };
        let possible = field(at::MAGIC) == MAGIC && (1..=MAX_BLOCKS).contains(&account.blocks);
        Ok(Some(account).filter(|_| possible))
    }

    /// Compares the image with what the writes must have left, and tells the first blocks that differ. `read` gives bytes of the
    /// image from an offset on.
    ///
    /// # Errors
    /// As `read`.
    pub fn verify<E>(
        &self,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Vec<DiskFault>, E> {
        let mut last = HashMap::new();
        // A guest that claims more writes than it can have made is not waited for.
        for n in 1..=self.written.min(u64::from(u32::MAX)) {
            last.insert(block_of(self.seed, self.blocks, n), n);
        }
        if self.begun != self.written {
            last.remove(&block_of(self.seed, self.blocks, self.begun));
        }
        let mut faults = Vec::new();
        let mut bytes = vec![0; BLOCK_BYTES];
        for (&block, &expected) in &last {
            read(block * BLOCK_BYTES as u64, &mut bytes)?;
            let words = bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
            if !words.enumerate().all(|(i, found)| found == word(self.seed, block, expected, i)) {
                let found = bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                faults.push(DiskFault { block, expected, found });
                if faults.len() >= MAX_FAULTS {
                    break;
                }
            }
        }
        Ok(faults)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::disk::clears;

    fn image(account: &DiskAccount, upto: u64) -> Vec<u8> {
        let mut image = vec![0xee; account.blocks as usize * BLOCK_BYTES];
        for n in 1..=upto {
            let block = block_of(account.seed, account.blocks, n);
            let bytes = image[block as usize * BLOCK_BYTES..].first_chunk_mut::<BLOCK_BYTES>().unwrap();
            for (i, chunk) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                *chunk = word(account.seed, block, n, i).to_le_bytes();
            }
        }
        image
    }

    fn faults(account: &DiskAccount, image: &[u8]) -> Vec<DiskFault> {
        let read = |at: u64, bytes: &mut [u8]| {
            bytes.copy_from_slice(&image[at as usize..][..bytes.len()]);
            Ok::<(), ()>(())
        };
        account.verify(read).unwrap()
    }

    #[test]
    fn an_image_that_is_older_newer_or_torn_is_found() {
        let account = DiskAccount { seed: 3, blocks: 50, begun: 200, written: 200, flushed: 200, errors: 0 };
        let mut right = image(&account, 200);
        assert_eq!(faults(&account, &right), []);
        assert!(!faults(&account, &image(&account, 199)).is_empty());
        assert!(!faults(&account, &image(&account, 201)).is_empty());
        // What is in flight may be either.
        let begun = DiskAccount { written: 199, ..account };
        assert_eq!(faults(&begun, &right), []);
        assert_eq!(faults(&begun, &image(&account, 199)), []);
        let at = (1..=200).rev().find(|n| !clears(*n)).map(|n| block_of(3, 50, n)).unwrap();
        right[at as usize * BLOCK_BYTES + 4000] ^= 1;
        assert_eq!(faults(&account, &right).len(), 1);
    }
}
