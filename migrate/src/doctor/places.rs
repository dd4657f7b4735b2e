//! Where sockets and logs go, and how many files a process may have open.

use super::check::Check;
use super::files::shown;
use crate::units::show_bytes;
use protocol::control::MAX_NAME_BYTES;
use rustix::fs::Access;
use rustix::process::{Resource, getrlimit};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

const GROUP: &str = "host";

/// The longest path of a unix socket, in bytes (unix(7)), and what stands around a VM's name in that of its control socket: a slash and `.sock`.
const SOCKET_PATH_BYTES: usize = 107;
const AROUND_NAME_BYTES: usize = 6;

/// Free bytes under which sockets and logs will soon not fit.
const FREE_BYTES: u64 = 1 << 20;

/// Open files that the largest VM needs: one for each of 254 vCPUs, up to four for each of 13 devices, and the rest.
const ENOUGH_FILES: u64 = 512;

/// What was found.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    path: PathBuf,
    directory: Directory,
    /// The file system that it is on, and what is free there in bytes, if it has a size.
    file_system: Option<(String, Option<u64>)>,
    /// The most files of a process; `None` is any number.
    files: Option<u64>,
}

/// How the runtime directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Directory {
    /// It is there and can be written to; its permissions.
    There { mode: u32 },
    /// It is made when it is needed.
    CanBeMade,
    /// It is something else.
    FileThere,
    /// Nothing can be made here, for this reason.
    Closed { at: PathBuf, why: String },
}

/// Looks. The directory is not made.
pub(super) fn look(runtime_dir: &Path) -> Facts {
    let (directory, nearest) = directory(runtime_dir);
    Facts {
        path: runtime_dir.to_owned(),
        directory,
        file_system: nearest.and_then(file_system),
        files: getrlimit(Resource::Nofile).current,
    }
}

/// How it is, and the nearest thing on its path that is there.
fn directory(path: &Path) -> (Directory, Option<&Path>) {
    let open = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    for nearest in path.ancestors() {
        // A relative path ends with an empty one: the working directory.
        let nearest = if nearest == Path::new("") { Path::new(".") } else { nearest };
        let metadata = match nearest.metadata() {
            Ok(metadata) => metadata,
            // A link that leads nowhere is in the way, too.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !nearest.is_symlink() => continue,
            Err(error) => return (Directory::Closed { at: nearest.into(), why: error.to_string() }, None),
        };
        let found = match rustix::fs::access(nearest, open) {
            _ if !metadata.is_dir() => Directory::FileThere,
            Err(error) => Directory::Closed { at: nearest.into(), why: error.to_string() },
            Ok(()) if nearest == path => Directory::There { mode: metadata.permissions().mode() & 0o7777 },
            Ok(()) => Directory::CanBeMade,
        };
        return (found, Some(nearest));
    }
    (Directory::Closed { at: path.into(), why: "nothing of this path is there".into() }, None)
}

fn file_system(path: &Path) -> Option<(String, Option<u64>)> {
    let stat = rustix::fs::statfs(path).ok()?;
    let free = stat.f_bavail.saturating_mul(u64::try_from(stat.f_bsize).ok()?);
    let free = (stat.f_blocks > 0).then_some(free);
    Some((file_system_name(u64::try_from(stat.f_type).ok()?), free))
}

/// By its number (include/uapi/linux/magic.h, and for the last three their own sources).
fn file_system_name(magic: u64) -> String {
    match magic {
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0xef53 => "ext4",
        0x9123_683e => "btrfs",
        0x794c_7630 => "overlayfs",
        0x6969 => "nfs",
        0x0102_1997 => "9p",
        0x6573_5546 => "fuse",
        0x5846_5342 => "xfs",
        0x2fc1_2fc1 => "zfs",
        0xff53_4d42 => "cifs",
        _ => return format!("a file system of type {magic:#x}"),
    }
    .to_owned()
}

/// Judges.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    vec![runtime_directory(facts), open_files(facts.files)]
}

fn runtime_directory(facts: &Facts) -> Check {
    let path = shown(&facts.path.display().to_string());
    let how = match &facts.directory {
        Directory::There { mode } => format!("is there, mode {mode:04o}"),
        Directory::CanBeMade => "can be made".into(),
        Directory::FileThere => "cannot be made: a file is in the way".into(),
        Directory::Closed { at, why } => {
            format!("cannot be used: {}: {}", shown(&at.display().to_string()), shown(why))
        }
    };
    let mut found = format!("{path} {how}");
    if let Some((name, free)) = &facts.file_system {
        found.push_str(&format!("; {name}"));
        if let Some(free) = free {
            found.push_str(&format!(", {} free", show_bytes(*free)));
        }
    }
    let (name, free) = facts.file_system.clone().unzip();
    let free = free.flatten();
    let check = Check::new(GROUP, "runtime-directory", "control sockets and logs of VMs", found)
        .required()
        .figure("path", path.clone())
        .figure("file_system", name)
        .figure("free_bytes", free);
    let room = SOCKET_PATH_BYTES.saturating_sub(facts.path.as_os_str().as_bytes().len() + AROUND_NAME_BYTES);
    match &facts.directory {
        Directory::There { mode } if mode & 0o077 != 0 => {
            check.missing(format!("other users can reach it: run chmod 700 {path}, or name another with --runtime-dir"))
        }
        Directory::FileThere | Directory::Closed { .. } => check.missing("name another with --runtime-dir"),
        _ if room == 0 => check.missing("the path is too long for sockets: name a shorter one with --runtime-dir"),
        _ if room < MAX_NAME_BYTES => check.limited(format!(
            "names of VMs may have {room} bytes here, because paths of sockets are short: name a shorter one with --runtime-dir"
        )),
        _ if free.is_some_and(|free| free < FREE_BYTES) => {
            check.limited("it is full, and no VM can start or log there: free some space, or name another with --runtime-dir")
        }
        Directory::There { .. } | Directory::CanBeMade => check,
    }
}

fn open_files(files: Option<u64>) -> Check {
    let found = files.map_or("any number".into(), |files| format!("up to {files} in a process"));
    Check::new(GROUP, "open-files", "VMs with many vCPUs and devices, and receivers of many VMs", found)
        .figure("limit", files)
        .limited_if(
            files.is_some_and(|files| files < ENOUGH_FILES),
            "raise it: ulimit -n 1024 in a shell, LimitNOFILE=1024 in a unit of systemd",
        )
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;

    fn facts(directory: Directory) -> Facts {
        Facts {
            path: "/run/migrate".into(),
            directory,
            file_system: Some(("tmpfs".into(), Some(1 << 30))),
            files: Some(1024),
        }
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_in_the_way() {
        let there = |mode| Directory::There { mode };
        let closed = || Directory::Closed { at: "/run".into(), why: "Permission denied".into() };
        for (directory, verdict) in [
            (there(0o700), Verdict::Ok),
            (there(0o750), Verdict::Missing),
            (there(0o701), Verdict::Missing),
            (Directory::CanBeMade, Verdict::Ok),
            (Directory::FileThere, Verdict::Missing),
            (closed(), Verdict::Missing),
        ] {
            let check = runtime_directory(&facts(directory));
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.required && check.found.starts_with("/run/migrate "), "{check:?}");
        }
        for (free, verdict) in [(None, Verdict::Ok), (Some(0), Verdict::Limited)] {
            let file_system = Some(("tmpfs".into(), free));
            let check = runtime_directory(&Facts { file_system, ..facts(Directory::CanBeMade) });
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
        for (bytes, verdict) in
            [(37, Verdict::Ok), (38, Verdict::Limited), (100, Verdict::Limited), (101, Verdict::Missing)]
        {
            let path = format!("/{}", "x".repeat(bytes - 1)).into();
            let check = runtime_directory(&Facts { path, ..facts(Directory::CanBeMade) });
            assert_eq!(check.verdict, verdict, "{bytes} bytes: {check:?}");
        }
    }

    #[test]
    fn a_directory_is_looked_at_and_not_made() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        let how = |path: &Path| directory(path).0;
        assert_eq!(how(&at("a/b/c")), Directory::CanBeMade);
        assert!(!at("a").exists());
        std::fs::create_dir(at("a")).unwrap();
        std::fs::set_permissions(at("a"), std::fs::Permissions::from_mode(0o711)).unwrap();
        assert_eq!(how(&at("a")), Directory::There { mode: 0o711 });
        std::fs::write(at("file"), "").unwrap();
        assert_eq!(how(&at("file")), Directory::FileThere);
        assert!(matches!(how(&at("file/run")), Directory::Closed { .. }));
        std::os::unix::fs::symlink("/nowhere", at("link")).unwrap();
        assert!(matches!(how(&at("link")), Directory::Closed { .. }));
        assert!(matches!(how(Path::new("nowhere/run")), Directory::CanBeMade | Directory::Closed { .. }));
        let facts = look(&at("a/b"));
        assert!(facts.file_system.is_some_and(|(name, _)| !name.is_empty()));
    }

    #[test]
    fn few_files_limit() {
        for (files, verdict) in [
            (None, Verdict::Ok),
            (Some(1024), Verdict::Ok),
            (Some(511), Verdict::Limited),
            (Some(0), Verdict::Limited),
        ] {
            assert_eq!(open_files(files).verdict, verdict, "{files:?}");
        }
    }

    #[test]
    fn a_file_system_has_a_name() {
        assert_eq!(file_system_name(0x0102_1994), "tmpfs");
        assert!(file_system_name(0x1234).contains("0x1234"));
    }
}
