//! Buffers that memory is read into, used again: a fresh one costs its clearing and the faults of its pages.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a buffer: the longest piece, 1 MiB.
const BUFFER_BYTES: usize = 1 << 20;

/// Shorter pieces get a buffer of their own: a link keeps what it sends until it is acknowledged, and should not keep a
/// megabyte for them.
const LEAST_BYTES: usize = BUFFER_BYTES / 2;

/// The most buffers that are kept for the next piece: what is read ahead, and the link's window.
const MOST_KEPT: usize = 24;

/// Buffers that are free. A clone is another handle.
#[derive(Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Box<[u8]>>>>);

impl Buffers {
    /// The bytes that `fill` makes of a buffer of this length. What was in it before is of no meaning.
    pub(super) fn filled<E>(
        &self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Bytes, E> {
        if !(LEAST_BYTES..=BUFFER_BYTES).contains(&length) {
            let mut bytes = vec![0; length];
            fill(&mut bytes)?;
            return Ok(bytes.into());
        }
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = free.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice());
        let mut buffer = Buffer { bytes, length, home: self.clone() };
        fill(&mut buffer.bytes[..length])?;
        Ok(Bytes::from_owner(buffer))
    }
}

/// One that is in use; it goes back when the last of it is dropped.
struct Buffer {
    bytes: Box<[u8]>,
    length: usize,
    home: Buffers,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < MOST_KEPT {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn filled(buffers: &Buffers, length: usize, fill: u8) -> Bytes {
        let bytes = buffers.filled::<Infallible>(length, |bytes| {
            bytes.fill(fill);
            Ok(())
        });
        bytes.unwrap()
    }

    #[test]
    fn a_buffer_is_used_again_once_the_last_of_it_is_gone() {
        let buffers = Buffers::default();
        let first = filled(&buffers, BUFFER_BYTES, 1);
        let (at, part) = (first.as_ptr(), first.slice(5..9));
        drop(first);
        let second = filled(&buffers, BUFFER_BYTES, 2);
        assert_ne!(second.as_ptr(), at, "a part of the first is in use");
        assert_eq!(&part[..], [1; 4]);
        drop(part);
        let third = filled(&buffers, LEAST_BYTES, 3);
        assert_eq!((third.as_ptr(), third.len()), (at, LEAST_BYTES));
        assert!(third.iter().all(|byte| *byte == 3));
    }

    #[test]
    fn short_pieces_are_not_kept_and_a_failed_read_loses_no_buffer() {
        let buffers = Buffers::default();
        drop(filled(&buffers, 4096, 1));
        assert_eq!(buffers.0.lock().unwrap().len(), 0);
        assert_eq!(buffers.filled(BUFFER_BYTES, |_| Err("no")), Err("no"));
        assert_eq!(buffers.0.lock().unwrap().len(), 1);
        let many: Vec<Bytes> = (0..2 * MOST_KEPT).map(|_| filled(&buffers, BUFFER_BYTES, 7)).collect();
        drop(many);
        assert_eq!(buffers.0.lock().unwrap().len(), MOST_KEPT);
    }
}
