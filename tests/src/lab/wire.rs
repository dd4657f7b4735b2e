//! What passes between [`access`](super::access) and [`agent`](super::agent): frames with a kind and a length.

use super::{Context as _, Result};
use std::io::{Read, Write};

/// The longest frame, in bytes: a request has a command line and variables in it, everything else is cut to fit.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Asks for a command, as JSON; the first of a connection.
    Request,
    /// For the command's standard input; an empty one is its end.
    Stdin,
    /// From the command's standard output.
    Stdout,
    /// From its standard error.
    Stderr,
    /// How it ended: four bytes, little-endian, the exit code as a shell tells it; the last of a connection.
    Exit,
}

const KINDS: [Kind; 5] = [Kind::Request, Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Exit];

/// Writes one frame.
pub(super) fn write(mut to: impl Write, kind: Kind, bytes: &[u8]) -> Result<()> {
    let number = KINDS.iter().position(|known| *known == kind).unwrap_or_default();
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= MAX_BYTES);
    let length = length.ok_or_else(|| format!("a frame of {} bytes is too long", bytes.len()))?;
    let mut frame = Vec::with_capacity(5 + bytes.len());
    frame.push(u8::try_from(number).unwrap_or_default());
    frame.extend(length.to_le_bytes());
    frame.extend(bytes);
    to.write_all(&frame).context(|| "the connection broke".into())
}

/// Reads one frame; `None` at the end of the connection.
pub(super) fn read(mut from: impl Read) -> std::io::Result<Option<(Kind, Vec<u8>)>> {
    let mut head = [0; 5];
    if from.read(&mut head[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..])?;
    let [number, a, b, c, d] = head;
    let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let kind = KINDS.get(usize::from(number)).copied().filter(|_| length <= MAX_BYTES);
    let kind = kind.ok_or_else(|| std::io::Error::other("what came is not a frame of the laboratory"))?;
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok(Some((kind, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        for kind in KINDS {
            write(&mut bytes, kind, format!("{kind:?}").as_bytes()).unwrap();
        }
        write(&mut bytes, Kind::Stdin, &[]).unwrap();
        let mut from = bytes.as_slice();
        for kind in KINDS {
            assert_eq!(read(&mut from).unwrap(), Some((kind, format!("{kind:?}").into_bytes())));
        }
        assert_eq!(read(&mut from).unwrap(), Some((Kind::Stdin, Vec::new())));
        assert_eq!(read(&mut from).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_refused_before_anything_is_allocated() {
        assert!(write(Vec::new(), Kind::Stdin, &vec![0; MAX_BYTES + 1]).is_err());
        for bad in [&[9, 0, 0, 0, 0][..], &[1, 255, 255, 255, 255], &[1, 2, 0, 0, 0, 7], &[1, 2]] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
