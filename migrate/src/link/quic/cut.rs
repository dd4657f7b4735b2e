//! A test hook, documented in docs/scripting.md: cuts one stream of a connection that lives on, as no network can.
//!
//! The end that writes resets the stream, the end that reads stops it; the other end is told by QUIC, and the rest of the
//! connection goes on. A process does it once, so that a link made anew is whole.

use crate::error::{Error, Result};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

/// The code in the frame that cuts the stream.
pub(super) const CODE: u32 = 2;

/// The environment variable that asks for it.
const VARIABLE: &str = "MIGRATE_TEST_RESET";

/// Which stream is cut, and behind how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    stream: Stream,
    behind_bytes: u64,
}

/// A stream of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// The one that both ends write.
    Control,
    /// The pages' streams, in the order in which this end opened or took them.
    Page(u32),
}

impl Cut {
    /// What the environment asks for: `control@BYTES` or `page-N@BYTES`.
    ///
    /// # Errors
    /// `Usage` when it is anything else.
    pub fn of_environment() -> Result<Option<Self>> {
        match std::env::var(VARIABLE) {
            Ok(text) if !text.is_empty() => text.parse().map(Some),
            _ => Ok(None),
        }
    }

    /// The fuse of this stream, if it is the one.
    pub(super) fn fuse(cut: Option<Self>, stream: Stream) -> Option<Fuse> {
        cut.filter(|cut| cut.stream == stream).map(|cut| Fuse { left_bytes: cut.behind_bytes })
    }
}

impl FromStr for Cut {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let cut = || {
            let (stream, bytes) = text.split_once('@')?;
            let stream = match stream.strip_prefix("page-") {
                Some(number) => Stream::Page(number.parse().ok()?),
                None if stream == "control" => Stream::Control,
                None => return None,
            };
            Some(Self { stream, behind_bytes: bytes.parse().ok()? })
        };
        cut().ok_or_else(|| {
            Error::Usage(format!("{VARIABLE} takes control@BYTES or page-N@BYTES, and not {text:?}"))
        })
    }
}

/// What burns down as bytes pass.
#[derive(Debug)]
pub(super) struct Fuse {
    left_bytes: u64,
}

/// Whether this process has cut its stream.
static BURNT: AtomicBool = AtomicBool::new(false);

impl Fuse {
    /// So many bytes passed.
    pub(super) fn passed(&mut self, bytes: usize) {
        self.left_bytes = self.left_bytes.saturating_sub(bytes as u64);
    }

    /// Whether the stream is to be cut now.
    pub(super) fn is_burnt(&self) -> bool {
        self.left_bytes == 0 && !BURNT.swap(true, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_and_its_bytes_are_read_and_nothing_else() {
        let cut = |text: &str| text.parse::<Cut>().ok();
        assert_eq!(cut("page-1@100"), Some(Cut { stream: Stream::Page(1), behind_bytes: 100 }));
        assert_eq!(cut("control@0"), Some(Cut { stream: Stream::Control, behind_bytes: 0 }));
        for wrong in ["", "page-1", "page-@1", "page-x@1", "control@", "control@-1", "urgent@1", "page-1@1@1"]
        {
            assert_eq!(cut(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_the_stream_that_was_named_burns_and_only_behind_its_bytes() {
        let cut = Some("page-1@100".parse().unwrap());
        assert!(Cut::fuse(cut, Stream::Page(0)).is_none() && Cut::fuse(cut, Stream::Control).is_none());
        assert!(Cut::fuse(None, Stream::Page(1)).is_none());
        let mut fuse = Cut::fuse(cut, Stream::Page(1)).unwrap();
        fuse.passed(99);
        assert!(!fuse.is_burnt());
        fuse.passed(7);
        assert!(fuse.is_burnt() && !fuse.is_burnt(), "a process does it once");
    }
}
