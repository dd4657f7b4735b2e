//! The files of a container whose root file system travels: what there is and where, without what is in them.
//!
//! ```text
//! u64 entries
//! entry   u32 parent  u8 kind  u8 name bytes  u16 attributes  u16 mode  u16 zero  u32 uid  u32 gid
//!         u32 ns  i64 s  u32 a  u32 b  u64 c                                                      48 bytes
//!         name  (target of a symbolic link)  attributes
//! attribute   u8 name bytes  u8 zero  u16 zero  u32 value bytes  name  value
//! ```
//!
//! All numbers are little-endian. The first entry is the directory that everything is in: it has no name, and is its own parent. The others
//! are in the order of their parents and, in each, of their names' bytes; so a parent stands before its children, and no name is in a
//! directory twice. What `a`, `b` and `c` are depends on the kind:
//!
//! | kind | | a | b | c |
//! |---|---|---|---|---|
//! | 0 | directory | | | |
//! | 1 | file | its number | | its size in bytes |
//! | 2 | symbolic link | | | bytes of its target |
//! | 3, 4 | character device, block device | major | minor | |
//! | 5, 6 | named pipe, socket | | | |
//! | 7 | one more name of a file, which stands before it: everything else of it is there | its entry | | |
//!
//! What is not used is zero. A file's number tells which pages are its own: they have it in the place of a process in the
//! [placement](super::Placement) of the files' space. No two files have one.

use crate::error::{ProtocolError, Result};
use std::collections::HashSet;

/// The most entries.
pub const MAX_ENTRIES: usize = 1 << 20;

/// The most bytes of a whole listing: half as much again as so many entries with names of the usual length take.
pub const MAX_TREE_BYTES: usize = 128 << 20;

/// The most attributes of an entry.
const MAX_ATTRIBUTES: usize = 256;

/// The longest value of an attribute in bytes: `XATTR_SIZE_MAX` (include/uapi/linux/limits.h).
const MAX_VALUE: usize = 65_536;

/// The longest target of a symbolic link in bytes: `PATH_MAX` (include/uapi/linux/limits.h) without its end.
const MAX_TARGET: usize = 4095;

/// The permission bits of a mode, with those for set-user-ID, set-group-ID and sticky.
const MODE_BITS: u16 = 0o7777;

const HEADER_BYTES: usize = 48;
const ATTRIBUTE_BYTES: usize = 8;
const WHAT: &str = "the listing of a container's files";

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Tells which pages are its own.
        number: u32,
        /// In bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it leads.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
    /// One more name of a file.
    Link {
        /// The entry of its first name.
        to: u32,
    },
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// Its name, with its namespace.
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// When something was changed last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds since the epoch.
    pub s: i64,
    /// Nanoseconds of the next one.
    pub ns: u32,
}

/// What has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The entry of the directory that it is in.
    pub parent: u32,
    /// Its name there.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its permission bits.
    pub mode: u16,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed last.
    pub mtime: Time,
    /// Its extended attributes.
    pub attributes: Vec<Attribute>,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tree {
    /// In the order of parents and names.
    pub entries: Vec<Entry>,
}

impl Tree {
    /// The bytes.
    ///
    /// # Errors
    /// As [`Tree::decode`]: what could not be read is not written.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut bytes = Vec::with_capacity(8 + self.entries.len() * (HEADER_BYTES + 16));
        bytes.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        for entry in &self.entries {
            let (kind, a, b, c) = entry.kind.numbers();
            bytes.extend_from_slice(&entry.parent.to_le_bytes());
            // Lengths were checked.
            bytes.extend_from_slice(&[kind, entry.name.len() as u8]);
            bytes.extend_from_slice(&(entry.attributes.len() as u16).to_le_bytes());
            bytes.extend_from_slice(&entry.mode.to_le_bytes());
            bytes.extend_from_slice(&[0; 2]);
            for number in [entry.uid, entry.gid, entry.mtime.ns] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&entry.mtime.s.to_le_bytes());
            bytes.extend_from_slice(&a.to_le_bytes());
            bytes.extend_from_slice(&b.to_le_bytes());
            bytes.extend_from_slice(&c.to_le_bytes());
            bytes.extend_from_slice(&entry.name);
            if let Kind::Symlink { target } = &entry.kind {
                bytes.extend_from_slice(target);
            }
            for Attribute { name, value } in &entry.attributes {
                bytes.extend_from_slice(&[name.len() as u8, 0, 0, 0]);
                bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
                bytes.extend_from_slice(name);
                bytes.extend_from_slice(value);
            }
        }
        check_bytes(bytes.len())?;
        Ok(bytes)
    }

    /// Reads a listing from outside; allocates some bytes for each that it was given.
    ///
    /// # Errors
    /// `Truncated`, `TooLarge`, `Value` for numbers that cannot be, or `Tree` for names and places that cannot be.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        check_bytes(bytes.len())?;
        let mut reader = Reader { bytes, at: 0 };
        let found = u64::from_le_bytes(reader.array()?);
        let count = check_count(found)?;
        if bytes.len() < 8 + count * HEADER_BYTES {
            return Err(reader.truncated(8 + count * HEADER_BYTES));
        }
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(reader.entry()?);
        }
        if reader.at != bytes.len() {
            let found = (bytes.len() - reader.at) as u64;
            return Err(ProtocolError::Value { what: "what follows the last of a container's files", found });
        }
        let tree = Self { entries };
        tree.check()?;
        Ok(tree)
    }

    /// The entry of this name in a directory.
    pub fn child(&self, parent: u32, name: &[u8]) -> Option<usize> {
        // The first is in itself, and has no name.
        let rest = self.entries.get(1..)?;
        let found = rest.binary_search_by(|entry| (entry.parent, entry.name.as_slice()).cmp(&(parent, name)));
        found.ok().map(|at| at + 1)
    }

    /// The entry at a path below the first one, whose parts are between slashes.
    pub fn find(&self, path: &[u8]) -> Option<usize> {
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
        parts.into_iter().try_fold(0, |at, part| self.child(u32::try_from(at).ok()?, part))
    }

    /// The path of an entry below the first one, without a slash in front; empty for the first itself.
    pub fn path(&self, index: usize) -> Vec<u8> {
        let mut parts = Vec::new();
        let mut at = index;
        while let Some(entry) = self.entries.get(at).filter(|_| at > 0) {
            parts.push(entry.name.as_slice());
            // It stands before it.
            at = (entry.parent as usize).min(at - 1);
        }
        parts.reverse();
        parts.join(&b'/')
    }

    /// The number of the file that an entry is a name of, if it is one.
    pub fn number(&self, index: usize) -> Option<u32> {
        match self.entries.get(index)?.kind {
            Kind::File { number, .. } => Some(number),
            Kind::Link { to } => match self.entries.get(to as usize)?.kind {
                Kind::File { number, .. } => Some(number),
                _ => None,
            },
            _ => None,
        }
    }

    fn check(&self) -> Result<()> {
        check_count(self.entries.len() as u64)?;
        let mut numbers = HashSet::new();
        for (index, entry) in self.entries.iter().enumerate() {
            let wrong = |why: &str| Err(ProtocolError::Tree { entry: index as u64, why: why.into() });
            let directory = |at: u32| self.entries.get(at as usize).map(|entry| &entry.kind);
            match index.checked_sub(1).and_then(|before| self.entries.get(before)) {
                None if entry.parent != 0 || !entry.name.is_empty() || entry.kind != Kind::Directory => {
                    return wrong("the first is not the directory that everything is in");
                }
                None => {}
                Some(_) if entry.parent as usize >= index => return wrong("it stands before its directory"),
                Some(_) if directory(entry.parent) != Some(&Kind::Directory) => {
                    return wrong("what it is in is no directory");
                }
                Some(before) => {
                    check_part(&entry.name).or_else(wrong)?;
                    if index > 1
                        && (before.parent, before.name.as_slice()) >= (entry.parent, entry.name.as_slice())
                    {
                        return wrong("it is not behind the one before it, or is there twice");
                    }
                }
            }
            if entry.mode & !MODE_BITS != 0 {
                return wrong("its mode has bits that are no permissions");
            }
            if entry.mtime.ns >= 1_000_000_000 {
                return wrong("its time has more nanoseconds than a second");
            }
            match &entry.kind {
                Kind::File { size, .. } if i64::try_from(*size).is_err() => return wrong("it is too large"),
                Kind::File { number, .. } if !numbers.insert(*number) => {
                    return wrong("it has the number of another file");
                }
                Kind::Symlink { target }
                    if target.is_empty() || target.len() > MAX_TARGET || has_nul(target) =>
                {
                    return wrong("it leads nowhere");
                }
                Kind::Link { to } => {
                    let first = self.entries.get(*to as usize).filter(|_| (*to as usize) < index);
                    if !matches!(first, Some(Entry { kind: Kind::File { .. }, .. })) {
                        return wrong("what it is a further name of is no file before it");
                    }
                    let is_bare = entry.mode == 0
                        && (entry.uid, entry.gid, entry.mtime) == (0, 0, Time::default())
                        && entry.attributes.is_empty();
                    if !is_bare {
                        return wrong("it says something that its first name has to say");
                    }
                }
                _ => {}
            }
            if entry.attributes.len() > MAX_ATTRIBUTES {
                return wrong("it has too many attributes");
            }
            let mut names = HashSet::new();
            for Attribute { name, value } in &entry.attributes {
                if !(1..=255).contains(&name.len()) || has_nul(name) || value.len() > MAX_VALUE {
                    return wrong("an attribute's name or value has a length that cannot be");
                }
                if !names.insert(name.as_slice()) {
                    return wrong("it has an attribute twice");
                }
            }
        }
        Ok(())
    }
}

impl Kind {
    /// Its own number, and `a`, `b` and `c`.
    fn numbers(&self) -> (u8, u32, u32, u64) {
        match self {
            Self::Directory => (0, 0, 0, 0),
            Self::File { number, size } => (1, *number, 0, *size),
            Self::Symlink { target } => (2, 0, 0, target.len() as u64),
            Self::CharDevice { major, minor } => (3, *major, *minor, 0),
            Self::BlockDevice { major, minor } => (4, *major, *minor, 0),
            Self::Fifo => (5, 0, 0, 0),
            Self::Socket => (6, 0, 0, 0),
            Self::Link { to } => (7, *to, 0, 0),
        }
    }
}

fn has_nul(bytes: &[u8]) -> bool {
    bytes.contains(&0)
}

/// What can stand between two slashes, and leads nowhere else.
fn check_part(name: &[u8]) -> std::result::Result<(), &'static str> {
    let fits = (1..=255).contains(&name.len()) && !name.contains(&b'/') && !has_nul(name);
    match fits && name != b"." && name != b".." {
        true => Ok(()),
        false => Err("its name is none that a file can have"),
    }
}

fn check_count(found: u64) -> Result<usize> {
    let limit = MAX_ENTRIES as u64;
    match usize::try_from(found).ok().filter(|count| *count <= MAX_ENTRIES) {
        Some(0) => Err(ProtocolError::Value { what: "the number of a container's files", found }),
        Some(count) => Ok(count),
        None => Err(ProtocolError::TooLarge { what: "the number of a container's files", found, limit }),
    }
}

fn check_bytes(found: usize) -> Result<()> {
    if found <= MAX_TREE_BYTES {
        return Ok(());
    }
    Err(ProtocolError::TooLarge {
        what: "the listing of a container's files in bytes",
        found: found as u64,
        limit: MAX_TREE_BYTES as u64,
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn truncated(&self, needed: usize) -> ProtocolError {
        ProtocolError::Truncated { what: WHAT, found: self.bytes.len() as u64, needed: needed as u64 }
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let end = self.at.saturating_add(count);
        let taken = self.bytes.get(self.at..end).ok_or_else(|| self.truncated(end))?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let truncated = self.truncated(self.at.saturating_add(N));
        self.take(N)?.first_chunk().copied().ok_or(truncated)
    }

    fn entry(&mut self) -> Result<Entry> {
        let header: [u8; HEADER_BYTES] = self.array()?;
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
        let (kind, a, b, c) = (header[4], word(32), word(36), long(40));
        if half(10) != 0 {
            return Err(ProtocolError::Value {
                what: "a zero of a container's file",
                found: half(10).into(),
            });
        }
        let name = self.take(header[5].into())?.to_vec();
        let what = match kind {
            0 => Kind::Directory,
            1 => Kind::File { number: a, size: c },
            2 => match usize::try_from(c).ok().filter(|bytes| *bytes <= MAX_TARGET) {
                Some(bytes) => Kind::Symlink { target: self.take(bytes)?.to_vec() },
                None => {
                    let (what, limit) = ("the target of a symbolic link in bytes", MAX_TARGET as u64);
                    return Err(ProtocolError::TooLarge { what, found: c, limit });
                }
            },
            3 => Kind::CharDevice { major: a, minor: b },
            4 => Kind::BlockDevice { major: a, minor: b },
            5 => Kind::Fifo,
            6 => Kind::Socket,
            7 => Kind::Link { to: a },
            found => {
                return Err(ProtocolError::Value {
                    what: "the kind of a container's file",
                    found: found.into(),
                });
            }
        };
        if what.numbers() != (kind, a, b, c) {
            return Err(ProtocolError::Value { what: "what a container's file does not have", found: c });
        }
        let count = usize::from(half(6));
        if count > MAX_ATTRIBUTES {
            let (found, limit) = (count as u64, MAX_ATTRIBUTES as u64);
            return Err(ProtocolError::TooLarge { what: "the number of a file's attributes", found, limit });
        }
        let mut attributes = Vec::new();
        for _ in 0..count {
            let header: [u8; ATTRIBUTE_BYTES] = self.array()?;
            let bytes = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
            if header[1..4] != [0; 3] {
                let found = header[1].into();
                return Err(ProtocolError::Value { what: "a zero of a file's attribute", found });
            }
            let name = self.take(header[0].into())?.to_vec();
            let length = usize::try_from(bytes).ok().filter(|bytes| *bytes <= MAX_VALUE).ok_or(
                ProtocolError::TooLarge {
                    what: "an attribute of a file in bytes",
                    found: bytes.into(),
                    limit: MAX_VALUE as u64,
                },
            )?;
            attributes.push(Attribute { name, value: self.take(length)?.to_vec() });
        }
        Ok(Entry {
            parent: word(0),
            name,
            kind: what,
            mode: half(8),
            uid: word(12),
            gid: word(16),
            mtime: Time { ns: word(20), s: i64::from_le_bytes(long(24).to_le_bytes()) },
            attributes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(parent: u32, name: &str, kind: Kind) -> Entry {
        let (mode, time) = (0o755, Time { s: -7, ns: 8 });
        let attributes = vec![Attribute { name: b"user.a".to_vec(), value: b"1\x002".to_vec() }];
        let all = Entry { parent, name: name.into(), kind, mode, uid: 1, gid: 2, mtime: time, attributes };
        match all.kind {
            Kind::Link { .. } => {
                Entry { mode: 0, uid: 0, gid: 0, mtime: Time::default(), attributes: Vec::new(), ..all }
            }
            _ => all,
        }
    }

    fn file(parent: u32, name: &str, number: u32) -> Entry {
        entry(parent, name, Kind::File { number, size: 5 })
    }

    fn tree(more: &[Entry]) -> Tree {
        let first = [entry(0, "", Kind::Directory), entry(0, "a", Kind::Directory), file(0, "b", 7)];
        Tree { entries: [&first, more].concat() }
    }

    #[test]
    fn everything_is_found_by_its_name() {
        let link = |target: &str| Kind::Symlink { target: target.into() };
        let tree = tree(&[
            entry(0, "c", link("../../etc")),
            entry(0, "d", Kind::CharDevice { major: 0, minor: 0 }),
            entry(1, "b", Kind::Link { to: 2 }),
            entry(1, "x y\n", Kind::Fifo),
        ]);
        assert_eq!(Tree::decode(&tree.encode().unwrap()).unwrap(), tree);
        assert_eq!((tree.find(b""), tree.find(b"/a//b"), tree.find(b"a/c")), (Some(0), Some(5), None));
        assert_eq!((tree.path(0), tree.path(6)), (b"".to_vec(), b"a/x y\n".to_vec()));
        assert_eq!((tree.number(2), tree.number(5), tree.number(3)), (Some(7), Some(7), None));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let long = "x".repeat(256);
        for name in ["", ".", "..", "a/b", "x\0", &long] {
            tree(&[file(1, name, 1)]).encode().unwrap_err();
        }
        for bad in [
            vec![file(0, "b", 8)],
            vec![file(0, "aa", 8)],
            vec![file(2, "x", 8)],
            vec![file(3, "x", 8)],
            vec![file(1, "x", 7)],
            vec![entry(1, "x", Kind::Link { to: 1 })],
            vec![entry(1, "x", Kind::Link { to: 3 })],
            vec![Entry { mode: 1, ..entry(1, "x", Kind::Link { to: 2 }) }],
            vec![Entry { mode: 0o10_000, ..file(1, "x", 1) }],
            vec![Entry { mtime: Time { s: 0, ns: 1_000_000_000 }, ..file(1, "x", 1) }],
            vec![entry(1, "x", Kind::File { number: 1, size: u64::MAX })],
            vec![entry(1, "x", Kind::Symlink { target: Vec::new() })],
            vec![entry(1, "x", Kind::Symlink { target: b"a\0b".to_vec() })],
            vec![entry(1, "x", Kind::Symlink { target: vec![b'a'; 4096] })],
            vec![Entry { attributes: vec![file(0, "", 0).attributes[0].clone(); 2], ..file(1, "x", 1) }],
        ] {
            let error = tree(&bad).encode().unwrap_err();
            assert!(matches!(error, ProtocolError::Tree { .. }), "{bad:?}: {error}");
        }
        Tree::default().encode().unwrap_err();
        Tree { entries: vec![file(0, "", 1)] }.encode().unwrap_err();
        let bytes = tree(&[entry(1, "x", Kind::Fifo)]).encode().unwrap();
        (0..bytes.len()).for_each(|cut| drop(Tree::decode(&bytes[..cut]).unwrap_err()));
        let mut many = bytes;
        many[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
        assert!(matches!(Tree::decode(&many), Err(ProtocolError::TooLarge { .. })));
    }

    fn kinds() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Directory),
            any::<u32>().prop_map(|size| Kind::File { number: 0, size: size.into() }),
            prop::collection::vec(1_u8.., 1..20).prop_map(|target| Kind::Symlink { target }),
            any::<(u32, u32)>().prop_map(|(major, minor)| Kind::CharDevice { major, minor }),
            any::<(u32, u32)>().prop_map(|(major, minor)| Kind::BlockDevice { major, minor }),
            Just(Kind::Fifo),
            Just(Kind::Socket),
        ]
    }

    proptest! {
        #[test]
        fn a_tree_is_read_as_it_was_written(
            found in prop::collection::vec((any::<u32>(), "[a-z]{1,8}", kinds(), 0_u16..0o10_000), 0..40),
        ) {
            let mut tree = Tree { entries: vec![entry(0, "", Kind::Directory)] };
            let mut names = HashSet::new();
            let mut wanted: Vec<_> = found.into_iter().collect();
            // Directories are filled in the order in which they stand.
            let mut at = 0;
            while at < tree.entries.len() {
                if tree.entries[at].kind == Kind::Directory {
                    let (mut here, rest): (Vec<_>, Vec<_>) =
                        wanted.into_iter().partition(|(which, ..)| at + 1 == 7 || which % 3 == 0);
                    wanted = rest.into_iter().map(|(which, name, kind, mode)| (which / 3, name, kind, mode)).collect();
                    here.sort_by(|one, other| one.1.cmp(&other.1));
                    for (_, name, mut kind, mode) in here {
                        let number = tree.entries.len() as u32;
                        if let Kind::File { number: own, .. } = &mut kind {
                            *own = number;
                        }
                        if names.insert((at, name.clone())) {
                            tree.entries.push(Entry { mode, ..entry(at as u32, &name, kind) });
                        }
                    }
                }
                at += 1;
            }
            let read = Tree::decode(&tree.encode().unwrap()).unwrap();
            prop_assert_eq!(&read, &tree);
            for index in 0..tree.entries.len() {
                prop_assert_eq!(read.find(&read.path(index)), Some(index));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), whole in any::<bool>()) {
            let mut bytes = bytes;
            if let Some(count) = bytes.get_mut(..8).filter(|_| whole) {
                count.copy_from_slice(&2_u64.to_le_bytes());
            }
            let _ = Tree::decode(&bytes);
        }
    }
}
