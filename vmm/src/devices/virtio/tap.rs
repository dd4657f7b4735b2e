//! The host's end of a network device: a tap interface that somebody made before.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use rustix::fs::OFlags;

use crate::{
    error::{Error, Result},
    sys,
};

/// Bytes in front of every frame: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub(super) const HEADER: usize = 12;
/// The longest name, in bytes, without its NUL (IFNAMSIZ of net/if.h).
const MAX_NAME: usize = 15;

/// What the host leaves to the guest (TUN_F_* of linux/if_tun.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Offloads(pub(super) u32);

impl Offloads {
    /// Frames may come without their checksum.
    pub(super) const CHECKSUM: u32 = 1;
    /// Frames of TCP over IPv4 may be too large for the wire.
    pub(super) const TSO4: u32 = 2;
    /// The same over IPv6.
    pub(super) const TSO6: u32 = 4;
    /// The same with congestion notification.
    pub(super) const ECN: u32 = 8;
}

/// Checks that a tap of this name exists, without taking it.
///
/// # Errors
/// [`Error::Config`] that names it.
pub(super) fn check(name: &str) -> Result<()> {
    let wrong = |why: &str| Error::Config(format!("tap {name:?}: {why}"));
    let plain = |byte: u8| byte.is_ascii_graphic() && !b"/%:".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) || [".", ".."].contains(&name) {
        return Err(wrong("that is no name of a network interface"));
    }
    let interface = Path::new("/sys/class/net").join(name);
    if !interface.exists() {
        return Err(wrong("it does not exist: make it with ip tuntap add NAME mode tap"));
    }
    if !interface.join("tun_flags").exists() {
        return Err(wrong("that interface is no tap"));
    }
    Ok(())
}

/// A tap that is ours. Frames have a header that says what is left to do with them.
#[derive(Debug)]
pub(super) struct Tap(File);

impl Tap {
    /// Takes a tap.
    ///
    /// # Errors
    /// [`Error::Config`] that names it, and says whether somebody else has it.
    pub(super) fn open(name: &str) -> Result<Self> {
        check(name)?;
        let wrong = |why: String| Error::Config(format!("tap {name:?}: {why}"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0))
            .open("/dev/net/tun")
            .map_err(|error| wrong(format!("/dev/net/tun cannot be opened: {error}")))?;
        sys::attach_tap(&file, name, HEADER).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => wrong("it is in use: another VM or program has it".into()),
            io::ErrorKind::PermissionDenied => wrong(
                "it belongs to another user: run as root, or give it to this one (ip tuntap … user NAME)"
                    .into(),
            ),
            _ => wrong(error.to_string()),
        })?;
        Ok(Self(file))
    }

    /// Says what the guest takes upon itself.
    pub(super) fn set_offloads(&self, Offloads(offloads): Offloads) -> io::Result<()> {
        sys::set_tap_offloads(&self.0, offloads)
    }

    /// The next frame, if there is one.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.0).read(buffer) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a frame.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
