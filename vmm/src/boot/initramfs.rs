//! The initramfs: as high in low memory as it may be, so that it is in nobody's way.

use crate::{
    addresses::PAGE_SIZE,
    error::{ImageError, Result},
    memory::GuestMemory,
};

/// Where an initramfs lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initramfs {
    pub(super) address: u64,
    pub(super) bytes: u64,
}

/// Puts it at the end of the first space, above the kernel and at `highest` at most.
///
/// # Errors
/// [`crate::Error::Image`] when there is no room.
pub(super) fn load(memory: &GuestMemory, file: &[u8], kernel_end: u64, highest: u64) -> Result<Initramfs> {
    let ram_end = memory.layout().first().map_or(0, |space| space.base + space.pages * PAGE_SIZE);
    let bytes = file.len() as u64;
    let top = ram_end.min(highest.saturating_add(1));
    let place = top.checked_sub(bytes).map(|address| address / PAGE_SIZE * PAGE_SIZE);
    let Some(address) = place.filter(|address| *address >= kernel_end) else {
        return Err(ImageError::InitramfsTooLarge { bytes, room: top.saturating_sub(kernel_end) }.into());
    };
    memory.write(address, file)?;
    Ok(Initramfs { address, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn it_lies_at_the_end_of_memory_or_of_what_the_kernel_allows() {
        let memory = GuestMemory::create(8 << 20).unwrap();
        let placed = load(&memory, &[7; 5000], 1 << 20, u64::MAX).unwrap();
        assert_eq!(placed, Initramfs { address: (8 << 20) - 2 * PAGE_SIZE, bytes: 5000 });
        let mut byte = [0];
        memory.read(placed.address + 4999, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        let lower = load(&memory, &[7; 5000], 1 << 20, (4 << 20) - 1).unwrap();
        assert_eq!(lower.address, (4 << 20) - 2 * PAGE_SIZE);
    }

    #[test]
    fn one_that_would_lie_over_the_kernel_is_refused() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        for (bytes, kernel_end) in [(3 << 20, 2 << 20), (5 << 20, 0)] {
            let error = load(&memory, &vec![7; bytes], kernel_end, u64::MAX).unwrap_err();
            assert!(matches!(error, Error::Image(ImageError::InitramfsTooLarge { .. })), "{error}");
        }
    }
}
