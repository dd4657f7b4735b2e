//! Where things lie in guest-physical memory, and which page number lies where.
//!
//! ```text
//! 0x0000_0000  left to the VMM: start info, command line, memory map, its own tables
//! 0x0010_0000  the image: code, page tables, stack          (at most 1 MiB)
//! 0x0020_0000  the stats block                              (4 KiB)
//! 0x0021_0000  mail and the disk: `model/mail.rs`, `model/disk.rs`
//! 0x0040_0000  the version table, 4 bytes a filled page     (rounded up to 4 KiB)
//! behind it    data pages 0, 1, 2, … over all further RAM, in address order, holes skipped
//! ```

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// Where the image is linked and loaded.
pub const IMAGE_GPA: u64 = 0x0010_0000;

/// Where the stats block lies, one page.
pub const STATS_GPA: u64 = 0x0020_0000;

/// Where the version table begins: a little-endian `u32` for each filled page.
pub const VERSION_TABLE_GPA: u64 = 0x0040_0000;

/// RAM from here on is not used: the image carries page tables for no more.
pub const MAX_RAM_GPA: u64 = 64 << 30;

/// More data than this cannot lie below [`MAX_RAM_GPA`].
pub const MAX_DATA_BYTES: u64 = MAX_RAM_GPA - VERSION_TABLE_GPA;

/// The 2 MiB that hold our VMM's devices, never used as RAM.
pub const MMIO_GPA: u64 = 0xD000_0000;

/// The size of that window in bytes: one large page, mapped uncached.
pub const MMIO_BYTES: u64 = 2 << 20;

/// The UART: the eight byte registers of a 16550, of which only THR (offset 0) is written.
pub const UART_GPA: u64 = MMIO_GPA;

/// The pad: what a guest at CPL 3 has in place of HLT and of a power switch.
pub const PAD_GPA: u64 = MMIO_GPA + 0x1000;

/// Reads of a `u32` at [`PAD_GPA`] give this ("MGR1") where there is a pad.
pub const PAD_ID: u32 = 0x3152_474D;

/// Offset of PARK_NS: a `u64` written here parks the vCPU for at most so many nanoseconds.
pub const PAD_PARK_NS: u64 = 0x08;

/// Offset of POWER_OFF: a `u32` written here ends the VM with that exit code.
pub const PAD_POWER_OFF: u64 = 0x10;

/// Where the virtio devices are, a page each, 13 of them.
pub const SLOTS_GPA: u64 = MMIO_GPA + 0x10_0000;

/// How many there may be.
pub const SLOTS: u64 = 13;

/// How many separate stretches of RAM data pages may lie in.
pub const MAX_RANGES: usize = 8;

/// A stretch of RAM, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Bytes in it.
    pub len: u64,
}

impl Range {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// Up to [`MAX_RANGES`] stretches of RAM in address order, page-aligned, none touching another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    ranges: [Range; MAX_RANGES],
    count: usize,
}

/// Why data cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// RAM has more holes than [`MAX_RANGES`] allows.
    TooManyRanges,
    /// Ranges overlap, are out of order, empty, not page-aligned, or reach beyond [`MAX_RAM_GPA`].
    BadRange,
    /// Pages wanted, pages there.
    NotEnoughRam(u64, u64),
}

impl core::fmt::Display for LayoutError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            LayoutError::TooManyRanges => write!(f, "RAM lies in more than {MAX_RANGES} pieces"),
            LayoutError::BadRange => f.write_str("RAM ranges overlap, are unordered or unaligned"),
            LayoutError::NotEnoughRam(want, have) => {
                write!(f, "fill= wants {want} pages, RAM has room for {have}: make it smaller")
            }
        }
    }
}

impl core::error::Error for LayoutError {}

/// The first address a data page may have when so many pages are filled.
pub fn data_start(fill_pages: u64) -> u64 {
    VERSION_TABLE_GPA + (fill_pages * 4).next_multiple_of(PAGE_SIZE)
}

impl Ranges {
    /// Adds a range as it is; it must lie behind those already there.
    pub fn push(&mut self, range: Range) -> Result<(), LayoutError> {
        let behind = self.as_slice().last().map_or(0, Range::end);
        let aligned = range.start.is_multiple_of(PAGE_SIZE) && range.len.is_multiple_of(PAGE_SIZE);
        if !aligned || range.len == 0 || range.start < behind || range.len > MAX_RAM_GPA {
            return Err(LayoutError::BadRange);
        }
        if range.end() > MAX_RAM_GPA {
            return Err(LayoutError::BadRange);
        }
        let slot = self.ranges.get_mut(self.count).ok_or(LayoutError::TooManyRanges)?;
        *slot = range;
        self.count += 1;
        Ok(())
    }

    /// Where data pages lie when the VMM's memory map is `ram` (in any order, touching or not).
    ///
    /// Everything below [`data_start`], beyond [`MAX_RAM_GPA`] and in the device window is cut off.
    pub fn for_data(ram: &[Range], fill_pages: u64) -> Result<Ranges, LayoutError> {
        let mut ranges = Ranges::default();
        let mut from = data_start(fill_pages);
        loop {
            // The lowest byte of RAM at or behind `from`, and how far RAM goes on from there.
            let next = ram
                .iter()
                .filter(|range| range.end() > from && range.start < MAX_RAM_GPA)
                .map(|range| range.start.max(from))
                .min();
            let Some(start) = next else { break };
            let mut end = start;
            while let Some(longer) =
                ram.iter().filter(|range| range.start <= end && range.end() > end).map(Range::end).max()
            {
                end = longer;
            }
            from = end;
            for (low, high) in [(0, MMIO_GPA), (MMIO_GPA + MMIO_BYTES, MAX_RAM_GPA)] {
                let start = start.max(low).next_multiple_of(PAGE_SIZE);
                let end = end.min(high) & !(PAGE_SIZE - 1);
                if start < end {
                    ranges.push(Range { start, len: end - start })?;
                }
            }
        }
        let have = ranges.pages();
        if have < fill_pages { Err(LayoutError::NotEnoughRam(fill_pages, have)) } else { Ok(ranges) }
    }

    /// The ranges, in address order.
    pub fn as_slice(&self) -> &[Range] {
        &self.ranges[..self.count.min(MAX_RANGES)]
    }

    /// How many pages they hold.
    pub fn pages(&self) -> u64 {
        self.as_slice().iter().map(|range| range.len / PAGE_SIZE).sum()
    }

    /// The guest-physical address of data page `page`.
    pub fn gpa_of(&self, page: u64) -> Option<u64> {
        let mut left = page;
        for range in self.as_slice() {
            let pages = range.len / PAGE_SIZE;
            if left < pages {
                return Some(range.start + left * PAGE_SIZE);
            }
            left -= pages;
        }
        None
    }
}
