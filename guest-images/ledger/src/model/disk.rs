//! What a guest writes to its disk, and the account that it keeps of it in memory: what a move or a checkpoint must not tear apart.
//!
//! Write n (counted from 1) goes to one block, a pure function of the seed and n; some make zeros of it. The guest remembers in a
//! table which write a block had last, and reads a block before it writes it: so memory that is older or newer than the disk, or a
//! write that was lost or came twice, is found by the guest itself, and from outside by whoever reads both while it stands still.
//!
//! The order of the guest's stores: [`at::BEGUN`] = n; the write; its answer; the table; [`at::WRITTEN`] = n. So where `BEGUN` equals
//! `WRITTEN` nothing is in flight, and otherwise exactly that write's block may be as before it or behind it.

use super::pattern::{ROOT_2, ROOT_3, mix};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;

/// Eight-byte words in a block.
pub const BLOCK_WORDS: usize = BLOCK_BYTES / 8;

/// Where the account lies, one page.
pub const ACCOUNT_GPA: u64 = 0x0023_0000;

/// Where the rings and headers of the device lie, one page.
pub const RINGS_GPA: u64 = 0x0024_0000;

/// Where a block lies that is read or written.
pub const DATA_GPA: u64 = 0x0025_0000;

/// Where the table lies: a `u32` for each block, the last write to it, 0 for none.
pub const TABLE_GPA: u64 = 0x0030_0000;

/// The most blocks that are used of a disk: the table ends below the next thing in memory.
pub const MAX_BLOCKS: u64 = 0x10_0000 / 4;

/// "LDGRDISK" in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LDGRDISK");

/// Offsets in the account in bytes; all fields are `u64`.
pub mod at {
    /// [`MAGIC`](super::MAGIC), once there is a disk.
    pub const MAGIC: usize = 0x00;
    /// `seed=`
    pub const SEED: usize = 0x08;
    /// Blocks that are written.
    pub const BLOCKS: usize = 0x10;
    /// Writes begun.
    pub const BEGUN: usize = 0x18;
    /// Writes that were answered.
    pub const WRITTEN: usize = 0x20;
    /// Writes that a flush behind them made safe.
    pub const FLUSHED: usize = 0x28;
    /// Blocks that were not as they should be, and requests that failed.
    pub const ERRORS: usize = 0x30;
}

/// The block of write `n`, below `blocks`.
pub fn block_of(seed: u64, blocks: u64, n: u64) -> u64 {
    ((u128::from(mix(seed ^ ROOT_2, n)) * u128::from(blocks)) >> 64) as u64
}

/// Whether write `n` makes zeros of its block.
pub fn clears(n: u64) -> bool {
    n % 16 == 7
}

/// Word `i` of the block behind write `n`.
pub fn word(seed: u64, block: u64, n: u64, i: usize) -> u64 {
    match i {
        _ if clears(n) => 0,
        0 => n,
        1 => block,
        _ => mix(mix(seed ^ ROOT_3, n), i as u64),
    }
}
