//! The control groups of this process, and what they leave it of memory (cgroups(7)).

use super::super::files::Root;
use std::path::{Component, Path, PathBuf};

/// The most groups, one in the other, that are looked at.
const DEPTH: usize = 64;

/// Where cgroups are mounted.
const MOUNT: &str = "sys/fs/cgroup";

/// Which kind of control groups a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Hierarchy {
    /// One tree for all controllers.
    Unified,
    /// A tree a controller, and one without controllers beside them.
    Hybrid,
    /// A tree a controller.
    Legacy,
    None,
}

impl Hierarchy {
    pub(in super::super) fn of(root: &Root) -> Self {
        let mount = root.path(MOUNT);
        match (mount.join("cgroup.controllers").exists(), mount.join("unified").is_dir()) {
            (true, _) => Self::Unified,
            (false, true) => Self::Hybrid,
            (false, false) if mount.join("memory").is_dir() || mount.join("cpu").is_dir() => Self::Legacy,
            (false, false) => Self::None,
        }
    }
}

/// A limit on memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) limit_bytes: u64,
    pub(super) used_bytes: u64,
}

impl Limit {
    /// What may still be taken.
    pub(super) fn room_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.used_bytes)
    }
}

/// The limit of all groups around this process that leaves it the least.
pub(super) fn limit(root: &Root) -> Option<Limit> {
    let groups = root.read("proc/self/cgroup").ok()?;
    let unified = Hierarchy::of(root) == Hierarchy::Unified;
    let (base, limit, used) = match unified {
        true => (PathBuf::from(MOUNT), "memory.max", "memory.current"),
        false => (Path::new(MOUNT).join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    };
    let path = group(&groups, unified)?;
    // A container may see its own group at the top while /proc names it from outside: what is not there says nothing.
    let read = |group: &Path| {
        let number = |file| root.number(base.join(group).join(file).to_str()?);
        Some(Limit { limit_bytes: number(limit)?, used_bytes: number(used)? })
    };
    path.ancestors().take(DEPTH).filter_map(read).min_by_key(Limit::room_bytes)
}

/// The group of this process in the tree that counts memory, by /proc/self/cgroup; only steps downwards.
fn group(groups: &str, unified: bool) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let counts = match unified {
            true => controllers.is_empty(),
            false => controllers.split(',').any(|one| one == "memory"),
        };
        counts.then_some(path)
    })?;
    Some(Path::new(path).components().filter(|part| matches!(part, Component::Normal(_))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files(tempfile::TempDir);

    impl Files {
        fn new(files: &[(&str, &str)]) -> Self {
            let parent = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = parent.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self(parent)
        }

        fn root(&self) -> Root {
            Root::new(self.0.path())
        }
    }

    #[test]
    fn the_tightest_group_counts() {
        let files = Files::new(&[
            ("proc/self/cgroup", "0::/user.slice/a\n"),
            ("sys/fs/cgroup/cgroup.controllers", "memory\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "1000\n"),
            ("sys/fs/cgroup/user.slice/memory.current", "900\n"),
            ("sys/fs/cgroup/user.slice/a/memory.max", "500\n"),
            ("sys/fs/cgroup/user.slice/a/memory.current", "100\n"),
        ]);
        assert_eq!(Hierarchy::of(&files.root()), Hierarchy::Unified);
        assert_eq!(limit(&files.root()), Some(Limit { limit_bytes: 1000, used_bytes: 900 }));
        let files = Files::new(&[
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/cgroup.controllers", ""),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.current", "100\n"),
        ]);
        assert_eq!(limit(&files.root()), None);
    }

    #[test]
    fn older_hosts_have_a_tree_a_controller() {
        let files = Files::new(&[
            ("proc/self/cgroup", "5:cpu,cpuacct:/c\n4:memory:/host/only\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "7000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "9000\n"),
        ]);
        assert_eq!(Hierarchy::of(&files.root()), Hierarchy::Legacy);
        // The group's own directory is not visible in a container; the one at the top is.
        let found = limit(&files.root()).unwrap();
        assert_eq!((found.limit_bytes, found.room_bytes()), (7000, 0));
        let hybrid = Files::new(&[("sys/fs/cgroup/unified/cgroup.procs", "")]);
        assert_eq!(Hierarchy::of(&hybrid.root()), Hierarchy::Hybrid);
    }

    #[test]
    fn nothing_and_nonsense_are_no_limit() {
        assert_eq!(limit(&Files::new(&[]).root()), None);
        assert_eq!(Hierarchy::of(&Files::new(&[]).root()), Hierarchy::None);
        for text in ["", "memory", "::::", "4:memory", "x\n\n:memory:\0", "4:memory:/../../../../etc"] {
            let files = Files::new(&[("proc/self/cgroup", text)]);
            assert_eq!(limit(&files.root()), None, "{text:?}");
        }
        assert_eq!(group("4:memory:/../../a/./b", false), Some(PathBuf::from("a/b")));
        assert_eq!(group("0::/a", false), None);
        let deep = format!("4:memory:/{}", "a/".repeat(10_000));
        assert_eq!(limit(&Files::new(&[("proc/self/cgroup", &deep)]).root()), None);
    }
}
