//! Which files the processes of a container could be writing to at this moment.
//!
//! A file's times tell that it was written to when a call begins to write, or a page is written through a mapping for the first time; a call that
//! takes long, and what follows through the mapping, is not told of. So files that somebody holds for writing are looked at again.

use crate::container::Process;
use rustix::fs::{FileType, OFlags};
use std::collections::HashSet;
use std::os::unix::ffi::OsStringExt as _;

/// They, by inode and by path: over an overlay one of them is not that of the layer below.
#[derive(Debug, Default)]
pub(crate) struct Held {
    inodes: HashSet<u64>,
    paths: HashSet<Vec<u8>>,
}

impl Held {
    /// What these processes hold: files that are open for writing, and those that are mapped as shared memory, which can be made writable at
    /// any time. A process that ends meanwhile holds nothing.
    pub(crate) fn by(processes: &[Process]) -> Self {
        let mut held = Self::default();
        for process in processes {
            held.add_open(process.pid);
            held.add_mapped(process.pid);
        }
        held
    }

    /// Whether a file is among them: more may be said to be than are.
    pub(crate) fn has_inode(&self, inode: u64) -> bool {
        self.inodes.contains(&inode)
    }

    /// The paths of them, as their processes see them.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &[u8]> {
        self.paths.iter().map(Vec::as_slice)
    }

    fn add_open(&mut self, pid: i32) {
        let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return };
        for entry in open.flatten() {
            let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
            let flags = std::fs::read_to_string(info).ok().and_then(|text| flags(&text));
            if flags.is_some_and(|flags| flags & (OFlags::WRONLY | OFlags::RDWR).bits() == 0) {
                continue;
            }
            let Ok(stat) = rustix::fs::stat(entry.path()) else { continue };
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                continue;
            }
            self.inodes.insert(stat.st_ino);
            if let Ok(path) = std::fs::read_link(entry.path()) {
                self.paths.insert(path.into_os_string().into_vec());
            }
        }
    }

    fn add_mapped(&mut self, pid: i32) {
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        for (inode, path) in maps.split(|byte| *byte == b'\n').filter_map(shared) {
            self.inodes.insert(inode);
            self.paths.insert(path);
        }
    }
}

/// How a file was opened, by proc_pid_fdinfo(5).
fn flags(info: &str) -> Option<u32> {
    let octal = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(octal.trim(), 8).ok()
}

/// The file in a line of proc_pid_maps(5), if it is mapped as shared memory: `start-end perms offset dev inode  path`.
fn shared(line: &[u8]) -> Option<(u64, Vec<u8>)> {
    let mut rest = line;
    let mut word = || {
        let begin = rest.iter().position(|byte| *byte != b' ')?;
        let end = rest[begin..].iter().position(|byte| *byte == b' ').map_or(rest.len(), |end| begin + end);
        let (word, behind) = (&rest[begin..end], &rest[end..]);
        rest = behind;
        Some(word)
    };
    let (_, permissions) = (word()?, word()?);
    let (_, _, inode) = (word()?, word()?, word()?);
    let inode: u64 = str::from_utf8(inode).ok()?.parse().ok()?;
    let path = rest.get(rest.iter().position(|byte| *byte != b' ')?..)?;
    let path = super::overlay::unescape(path);
    (permissions.ends_with(b"s") && inode != 0).then_some((inode, path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Tree;
    use std::io::Read as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_process_could_write_to_is_held() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["read", "written", "let alone"] {
            std::fs::write(path(name), "x").unwrap();
        }
        let mut child = Command::new("sh")
            .args(["-c", "exec 3<read 4<>written; echo; read line"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let held = Held::by(&Tree::of(child.id() as i32).unwrap().processes);
        let inode = |name: &str| path(name).metadata().unwrap().ino();
        assert!(held.has_inode(inode("written")) && !held.has_inode(inode("read")));
        assert!(!held.has_inode(inode("let alone")));
        assert!(held.paths().any(|path| path.ends_with(b"/written")));
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn lines_of_the_kernel_are_understood() {
        assert_eq!(flags("pos:\t0\nflags:\t0100002\nmnt_id:\t29\n"), Some(0o100_002));
        assert_eq!(flags("pos:\t0\n"), None);
        let line = "7f00-7f01 rw-s 00001000 08:01 77                     /tmp/a b\\012c";
        assert_eq!(shared(line.as_bytes()), Some((77, b"/tmp/a b\nc".to_vec())));
        for other in ["", "7f00-7f01 rw-p 00001000 08:01 77 /tmp/a", "7f00-7f01 rw-s 0 00:00 0"] {
            assert_eq!(shared(other.as_bytes()), None, "{other}");
        }
    }
}
