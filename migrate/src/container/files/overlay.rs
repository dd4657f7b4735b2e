//! Overlays: what a directory of this host is one of, and one that is made anew.

use crate::error::{Error, Result};
use protocol::container::Overlay;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// The longest data of mount(2): a page, with its end (do_mount in fs/namespace.c).
const MAX_DATA: usize = 4095;

/// An overlay that is mounted on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// Its layers below, and what is to be known of them.
    pub(crate) overlay: Overlay,
    /// Its upper layer.
    pub(crate) upper: PathBuf,
}

impl Mounted {
    /// The overlay whose root a directory is, if it is one.
    ///
    /// # Errors
    /// `Host` when the mounts of this host cannot be read, `Workload` when it is an overlay whose layers cannot be told.
    pub(crate) fn at(path: &Path) -> Result<Option<Self>> {
        let path = path.canonicalize().map_err(|error| {
            Error::Host(format!("the directory {} cannot be found: {error}", path.display()))
        })?;
        let text = mountinfo()?;
        // The last one lies above those before it.
        let line = text
            .split(|byte| *byte == b'\n')
            .rfind(|line| point(line).is_some_and(|point| point == path.as_os_str().as_bytes()));
        line.filter(|line| field(line, true, 0) == Some(b"overlay"))
            .map(|line| overlay(line, &path))
            .transpose()
    }

    /// Mounts one: `upper` and `work` are on one file system.
    ///
    /// # Errors
    /// `Host` with what the kernel says.
    pub(crate) fn mount(
        overlay: &Overlay,
        lower: &[PathBuf],
        upper: &Path,
        work: &Path,
        at: &Path,
    ) -> Result<()> {
        let lower: Vec<Vec<u8>> = lower.iter().map(|path| escape(path, b"\\:,")).collect();
        let mut data = [b"lowerdir=".as_slice(), &lower.join(&b':')].concat();
        for (name, path) in [("upperdir", upper), ("workdir", work)] {
            data.extend_from_slice(format!(",{name}=").as_bytes());
            data.extend_from_slice(&escape(path, b"\\,"));
        }
        for option in &overlay.options {
            data.extend_from_slice(format!(",{option}").as_bytes());
        }
        let failed = |why: String| {
            Error::Host(format!(
                "the overlay of the container's files cannot be mounted at {}: {why}; --copy-rootfs=whole at the sender sends files that need none",
                at.display()
            ))
        };
        if data.len() > MAX_DATA {
            return Err(failed(format!("the paths of its layers have more than {MAX_DATA} bytes together")));
        }
        let data = CString::new(data).map_err(|error| failed(error.to_string()))?;
        mount("overlay", at, "overlay", MountFlags::empty(), Some(data.as_c_str()))
            .map_err(|error| failed(error.to_string()))
    }
}

/// Takes away what is mounted at a path, as often as something is.
///
/// # Errors
/// The kernel's.
pub(crate) fn unmount_all(path: &Path) -> std::io::Result<()> {
    while mount_points(path)?.iter().any(|point| point == path) {
        unmount(path, UnmountFlags::empty())?;
    }
    Ok(())
}

/// Where something is mounted in a directory, or at it.
///
/// # Errors
/// That the mounts of this host cannot be read.
pub(crate) fn mount_points(below: &Path) -> std::io::Result<Vec<PathBuf>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    let points = text.split(|byte| *byte == b'\n').filter_map(point);
    Ok(points
        .map(|point| PathBuf::from(OsStr::from_bytes(&point)))
        .filter(|point| point.starts_with(below))
        .collect())
}

fn mountinfo() -> Result<Vec<u8>> {
    std::fs::read("/proc/self/mountinfo")
        .map_err(|error| Error::Host(format!("the mounts of this host cannot be read: {error}")))
}

/// A field in a line of proc_pid_mountinfo(5), before or behind the separator: there stand the type, the source and the options.
fn field(line: &[u8], behind: bool, index: usize) -> Option<&[u8]> {
    let mut words = line.split(|byte| *byte == b' ');
    if behind {
        words.find(|word| *word == b"-")?;
    }
    words.nth(index)
}

fn point(line: &[u8]) -> Option<Vec<u8>> {
    field(line, false, 4).map(unescape)
}

fn overlay(line: &[u8], path: &Path) -> Result<Mounted> {
    let options = field(line, true, 2).unwrap_or_default();
    let (mut upper, mut lower, mut known) = (None, Vec::new(), Vec::new());
    for option in options.split(|byte| *byte == b',') {
        let (name, value) = match option.iter().position(|byte| *byte == b'=') {
            Some(at) => (&option[..at], unescape(&option[at + 1..])),
            None => (option, Vec::new()),
        };
        match name {
            b"upperdir" => upper = Some(PathBuf::from(OsStr::from_bytes(&without_backslashes(&value)))),
            b"lowerdir" => lower.extend(layers(&value)),
            b"lowerdir+" => lower.push(value),
            b"datadir+" => lower.clear(),
            _ => {
                let text = String::from_utf8_lossy(option);
                known.extend(Some(text.into_owned()).filter(|option| Overlay::is_option(option)));
            }
        }
    }
    let text = |path: Vec<u8>| String::from_utf8(path).ok().filter(|path| path.starts_with('/'));
    let lower: Option<Vec<String>> = lower.into_iter().map(text).collect();
    match (upper, lower) {
        (Some(upper), Some(lower)) if upper.is_absolute() && !lower.is_empty() => {
            Ok(Mounted { overlay: Overlay { lower, options: known }, upper })
        }
        _ => Err(Error::Workload(format!(
            "{} is an overlay whose layers are not told by absolute paths, or which has no upper one: send all of it with --copy-rootfs=whole",
            path.display()
        ))),
    }
}

/// Lower directories, which colons separate; backslashes stand before those that do not.
fn layers(value: &[u8]) -> Vec<Vec<u8>> {
    let mut found = vec![Vec::new()];
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        match (byte, found.last_mut()) {
            (b':', _) => found.push(Vec::new()),
            (b'\\', Some(last)) => last.extend(bytes.next()),
            (byte, Some(last)) => last.push(*byte),
            (_, None) => {}
        }
    }
    found
}

fn without_backslashes(value: &[u8]) -> Vec<u8> {
    let mut bytes = value.iter();
    let mut found = Vec::new();
    while let Some(byte) = bytes.next() {
        found.extend(if *byte == b'\\' { bytes.next() } else { Some(byte) });
    }
    found
}

/// Puts backslashes before these bytes.
fn escape(path: &Path, special: &[u8]) -> Vec<u8> {
    let byte = |byte: &u8| if special.contains(byte) { vec![b'\\', *byte] } else { vec![*byte] };
    path.as_os_str().as_bytes().iter().flat_map(byte).collect()
}

/// Undoes what the kernel writes instead of spaces and the like: a backslash and three octal digits (seq_escape in fs/seq_file.c).
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut found = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        let digits = text.get(at + 1..at + 4).and_then(|digits| str::from_utf8(digits).ok());
        let octal = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal.filter(|_| *byte == b'\\') {
            Some(octal) => {
                found.push(octal);
                at += 4;
            }
            None => {
                found.push(*byte);
                at += 1;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_is_told_by_its_mount() {
        let line = b"36 35 98:0 / /srv/web\\040one rw,noatime shared:1 - overlay overlay rw,lowerdir=/l/a\\134:b:/l/c\\054d,upperdir=/u\\040p,\
            workdir=/w,redirect_dir=on,xino=off,metacopy=on,volatile";
        assert_eq!(point(line).as_deref(), Some(b"/srv/web one".as_slice()));
        let found = overlay(line, Path::new("/x")).unwrap();
        assert_eq!(found.upper, Path::new("/u p"));
        assert_eq!(found.overlay.lower, ["/l/a:b", "/l/c,d"]);
        assert_eq!(found.overlay.options, ["redirect_dir=on", "metacopy=on"]);
        let added =
            b"36 35 98:0 / /m rw - overlay overlay rw,lowerdir+=/l/a,lowerdir+=/l/b:c,upperdir=/u,workdir=/w";
        assert_eq!(overlay(added, Path::new("/x")).unwrap().overlay.lower, ["/l/a", "/l/b:c"]);
        for bad in ["lowerdir=/l", "lowerdir=l,upperdir=/u", "lowerdir=/l,upperdir=u", "upperdir=/u"] {
            let line = format!("36 35 98:0 / /m rw - overlay overlay rw,{bad}");
            let error = overlay(line.as_bytes(), Path::new("/srv/web")).unwrap_err().to_string();
            assert!(error.contains("/srv/web") && error.contains("whole"), "{error}");
        }
        assert_eq!(escape(Path::new("/a:b,c\\d"), b"\\:,"), b"/a\\:b\\,c\\\\d");
        assert_eq!(Mounted::at(Path::new("/proc/self")).unwrap(), None);
    }
}
