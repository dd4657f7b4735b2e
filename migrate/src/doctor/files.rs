//! Small files of the kernel, read with a bound.

use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// The most that is read of a file, in bytes. /proc/cpuinfo is longer on large hosts; its beginning says enough.
const LIMIT_BYTES: u64 = 64 << 10;

/// The most characters of somebody else's words that are shown.
const SHOWN: usize = 120;

/// The directory below which the kernel's files are.
#[derive(Debug, Clone)]
pub(super) struct Root(PathBuf);

impl Root {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// A path of the host, `dev/kvm` for instance.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// The beginning of a file. What is no text in it is replaced.
    pub(super) fn read(&self, path: &str) -> io::Result<String> {
        read(&self.path(path))
    }

    /// The first line of a file, without what surrounds it, as it can be shown.
    pub(super) fn line(&self, path: &str) -> Option<String> {
        let text = self.read(path).ok()?;
        Some(shown(text.lines().next()?)).filter(|line| !line.is_empty())
    }

    /// A file that holds one number.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.read(path).ok()?.trim().parse().ok()
    }

    /// Whether a driver has registered this device (/sys/class/misc). Opening a node whose driver is not there yet would load its module.
    /// Where that directory is hidden it counts as registered.
    pub(super) fn has_driver(&self, device: &str) -> bool {
        let class = self.path("sys/class/misc");
        !class.is_dir() || class.join(device).exists()
    }

    /// Opens a device for reading and writing, and closes it.
    pub(super) fn may_open(&self, path: &str) -> io::Result<()> {
        open(OpenOptions::new().read(true).write(true), &self.path(path)).map(drop)
    }
}

/// No file makes its reader wait, whatever it is.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0)).open(path)
}

fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    open(OpenOptions::new().read(true), path)?.take(LIMIT_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Somebody else's words, on one line that does nothing to a terminal.
pub(crate) fn shown(words: &str) -> String {
    let words = words.trim();
    let mut line: String =
        words.chars().take(SHOWN).map(|one| if one.is_control() { '?' } else { one }).collect();
    if words.chars().nth(SHOWN).is_some() {
        line.push('…');
    }
    line
}

/// The word in brackets of a file that lists its choices: `always [madvise] never`.
pub(super) fn chosen(choices: &str) -> Option<&str> {
    let (word, _) = choices.split_once('[')?.1.split_once(']')?;
    Some(word).filter(|word| word.chars().all(|one| one.is_ascii_lowercase() || one == '_'))
}

/// Writes a file below a root that stands for a host's.
#[cfg(test)]
pub(super) fn write(root: &Path, path: &str, text: impl AsRef<[u8]>) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_a_bound_and_shown_without_harm() {
        let parent = tempfile::tempdir().unwrap();
        let root = Root::new(parent.path());
        assert!(root.read("none").is_err());
        assert_eq!((root.line("none"), root.number("none")), (None, None));
        std::fs::write(parent.path().join("long"), vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(root.read("long").unwrap().len(), LIMIT_BYTES as usize);
        assert_eq!(root.line("long").unwrap().chars().count(), SHOWN + 1);
        std::fs::write(parent.path().join("odd"), b" \x1b[31m\xff \nsecond").unwrap();
        assert_eq!(root.line("odd").unwrap(), "?[31m\u{fffd}");
        for (text, number) in [("7\n", Some(7)), ("-1", None), ("", None), ("18446744073709551616", None)] {
            std::fs::write(parent.path().join("number"), text).unwrap();
            assert_eq!(root.number("number"), number, "{text:?}");
        }
        assert!(root.read("").is_err(), "a directory");
    }

    #[test]
    fn a_pipe_makes_nobody_wait() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(Root::new(parent.path()).read("pipe").unwrap(), "");
    }

    #[test]
    fn devices_are_there_unless_their_class_says_otherwise() {
        let parent = tempfile::tempdir().unwrap();
        let root = Root::new(parent.path());
        assert!(root.has_driver("kvm"));
        std::fs::create_dir_all(parent.path().join("sys/class/misc/kvm")).unwrap();
        assert!(root.has_driver("kvm") && !root.has_driver("tun"));
    }

    #[test]
    fn the_kernels_words_are_understood_and_others_are_not() {
        assert_eq!(chosen("always within_size [never]"), Some("never"));
        for text in ["", "never", "[", "]never[", "[\x1b]", "[Never]"] {
            assert_eq!(chosen(text), None, "{text:?}");
        }
    }
}
