//! sync_file_range(2): setting the disk to work without waiting for it.

use std::fs::File;
use std::os::fd::AsRawFd as _;

/// Starts writing what is in the page cache of a part of a file. A hint: what comes of it is told by fdatasync(2).
pub(crate) fn start(file: &File, offset: u64, bytes: u64) {
    let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else { return };
    // SAFETY: the call takes numbers only, and the descriptor is open as long as `file` is.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
}
