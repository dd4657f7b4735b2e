//! What works on this host, and what to do about what does not.
//!
//! ```text
//! files ────┐
//! devices ──┼─▶ look ─▶ facts ─▶ judge ─▶ checks ─▶ Diagnosis
//! programs ─┘  (touches the host)  (pure)
//! ```
//!
//! Looking changes nothing of the host, needs no privileges, and always ends: what is read has a bound, and a program that is asked has
//! a time limit. What can be tried is tried, because a setting alone says little. Judging is pure, so that hosts that nobody has can be
//! judged in tests. Each group of checks is a file with both.

mod check;
mod files;
mod kvm;
mod memory;
pub(crate) use memory::try_soft_dirty;
mod network;
mod places;
mod containers;

pub use check::{Check, Diagnosis, Verdict};

use crate::paths::RuntimeDir;
use files::Root;
pub(crate) use files::shown;
use std::ffi::OsString;
use std::path::PathBuf;

/// Which host, and as whom.
#[derive(Debug, Clone)]
pub struct Question {
    /// Where the files of the kernel are: `/`, but in tests.
    pub root: PathBuf,
    /// Where sockets and logs of VMs go.
    pub runtime_dir: PathBuf,
    /// Where programs are looked for, as `PATH` has it.
    pub search_path: OsString,
}

impl Question {
    /// About this host, for this process.
    pub fn here(runtime_dir: Option<&std::path::Path>) -> Self {
        Self {
            root: PathBuf::from("/"),
            runtime_dir: RuntimeDir::place(runtime_dir),
            search_path: std::env::var_os("PATH").unwrap_or_default(),
        }
    }
}

/// Looks, and judges.
pub fn examine(question: &Question) -> Diagnosis {
    let root = Root::new(&question.root);
    let mut checks = kvm::judge(&kvm::look(&root));
    checks.extend(memory::judge(&memory::look(&root)));
    checks.extend(network::judge(&network::look(&root)));
    checks.extend(places::judge(&places::look(&question.runtime_dir)));
    checks.extend(containers::judge(&containers::look(&root, &question.search_path)));
    Diagnosis { checks }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn examine_at(root: &std::path::Path) -> Diagnosis {
        let runtime_dir = root.join("run");
        examine(&Question { root: root.to_owned(), runtime_dir, search_path: OsString::new() })
    }

    fn is_consistent(diagnosis: &Diagnosis) {
        let names: HashSet<_> = diagnosis.checks.iter().map(|check| (check.group, check.name)).collect();
        assert_eq!(names.len(), diagnosis.checks.len(), "a name twice");
        for check in &diagnosis.checks {
            assert_eq!(check.verdict == Verdict::Ok, check.advice.is_none(), "{check:?}");
            assert!(!check.found.is_empty() && !check.needed_for.is_empty(), "{check:?}");
            assert!(!check.found.contains(char::is_control), "{check:?}");
            assert!(!check.required || check.group != "containers", "{check:?}");
        }
    }

    #[test]
    fn a_host_whose_files_say_nothing_is_judged() {
        is_consistent(&examine_at(tempfile::tempdir().unwrap().path()));
    }

    #[test]
    fn a_host_whose_files_say_nonsense_is_judged() {
        let root = tempfile::tempdir().unwrap();
        for path in [
            "proc/meminfo",
            "proc/cpuinfo",
            "proc/self/cgroup",
            "proc/sys/net/core/rmem_max",
            "proc/sys/vm/unprivileged_userfaultfd",
            "sys/kernel/mm/transparent_hugepage/enabled",
            "sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            "sys/kernel/mm/hugepages/hugepages-99999999999999999999kB/nr_hugepages",
            "sys/module/kvm_amd/parameters/nested",
            "sys/devices/system/clocksource/clocksource0/current_clocksource",
        ] {
            files::write(
                root.path(),
                path,
                b"\x1b[2J\xff\xfe [[ 0::/../../..\nMemAvailable: -1 kB\nmemory:\n\0\0",
            );
        }
        is_consistent(&examine_at(root.path()));
    }

    #[test]
    fn this_host_is_judged() {
        let parent = tempfile::tempdir().unwrap();
        let runtime_dir = parent.path().join("run");
        let diagnosis = examine(&Question { runtime_dir: runtime_dir.clone(), ..Question::here(None) });
        is_consistent(&diagnosis);
        assert!(!runtime_dir.exists(), "looking makes nothing");
    }
}
