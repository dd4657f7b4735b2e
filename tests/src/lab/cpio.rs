//! Archives that the kernel unpacks into its first file system: "newc", as Documentation/driver-api/early-userspace/buffer-format.rst
//! of the kernel describes it.

use super::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// File types and permissions as inode(7) has them.
const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

/// An archive that grows.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    known: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory and those above it, once.
    pub(super) fn directory(&mut self, path: &str) {
        if path.is_empty() || self.known.contains(path) {
            return;
        }
        self.parents(path);
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file with these permissions; a second one of the same name is left out.
    pub(super) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        if !self.known.contains(path) {
            self.parents(path);
            self.entry(path, REGULAR | permissions, content);
        }
    }

    /// Adds a file of this machine.
    pub(super) fn copy(&mut self, path: &str, permissions: u32, from: &Path) -> Result<()> {
        let content = std::fs::read(from).context(|| from.display().to_string())?;
        self.file(path, permissions, &content);
        Ok(())
    }

    /// The whole of it, with its end.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        self.known.insert(path.to_owned());
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let (size, name_size) = (content.len(), path.len() + 1);
        // In this order: inode, mode, uid, gid, links, mtime, size, four device numbers, length of the name, checksum.
        let fields = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            self.entries, 0, 0, 0, 0, 0, 0, 0, 0
        );
        self.bytes.extend(fields.as_bytes());
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents end at a multiple of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_directories_come_first() {
        let mut archive = Archive::default();
        archive.file("a/b/c", 0o755, b"hello");
        archive.file("a/b/c", 0o644, b"left out");
        archive.directory("a/d");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let names = ["a\0", "a/b\0", "a/b/c\0", "hello", "a/d\0", "TRAILER!!!\0"];
        let places: Vec<_> = names.iter().map(|name| text.find(name).expect("it is there")).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert!(!text.contains("left out"));
        assert_eq!(text.matches("070701").count(), 5);
    }
}
