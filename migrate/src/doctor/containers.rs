//! What moving containers needs. A host can move VMs without any of it, so none of it decides anything.

use super::check::Check;
use super::files::{Root, shown};
use super::memory::{Hierarchy, try_soft_dirty};
use crate::container::Version;
use crate::programs::{Ended, Said, ask, find};
use std::ffi::OsStr;
use std::path::PathBuf;

const GROUP: &str = "containers";

/// The oldest CRIU to try, and the oldest in which nothing is known to be missing.
const OLDEST: Version = Version { major: 3, minor: 15, patch: 0 };
const COMPLETE: Version = Version { major: 3, minor: 17, patch: 0 };

/// From this version on the header in front of pages has 32 bytes, and 24 before; it does not say which (criu/page-xfer.c).
const LONG_HEADER: Version = Version { major: 4, minor: 2, patch: 0 };

/// What was found.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    criu: Option<Program>,
    /// What criu says of this host, each with what was asked; only root can ask.
    criu_says: Option<Vec<(Asked, Said)>>,
    /// The program that runs containers.
    runtime: Option<(&'static str, Program)>,
    hierarchy: Hierarchy,
    nft: bool,
    ip6tables: bool,
    soft_dirty: Result<(), String>,
}

/// A program, and its answer to `--version`.
#[derive(Debug, Clone)]
struct Program {
    path: PathBuf,
    said: Said,
}

/// What criu can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Basics,
    DirtyTracking,
    LazyPages,
}

impl Asked {
    const ALL: [Self; 3] = [Self::Basics, Self::DirtyTracking, Self::LazyPages];

    fn name(self) -> &'static str {
        match self {
            Self::Basics => "criu-check",
            Self::DirtyTracking => "criu-mem-dirty-track",
            Self::LazyPages => "criu-uffd-noncoop",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Basics => &["check"],
            Self::DirtyTracking => &["check", "--feature", "mem_dirty_track"],
            Self::LazyPages => &["check", "--feature", "uffd-noncoop"],
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Basics => {
                "take a newer criu (4.1 or newer for kernels of 2025 and later), or a kernel with CONFIG_CHECKPOINT_RESTORE"
            }
            Self::DirtyTracking => {
                "without CONFIG_MEM_SOFT_DIRTY in the kernel every dump has all of the memory"
            }
            Self::LazyPages => {
                "without CONFIG_USERFAULTFD in the kernel memory cannot follow a container that runs already"
            }
        }
    }
}

/// Looks.
pub(super) fn look(root: &Root, search_path: &OsStr) -> Facts {
    let program = |name| {
        let path = find(name, search_path)?;
        let said = ask(&path, &["--version"]);
        Some(Program { path, said })
    };
    let criu = program("criu");
    // One that does not even tell its version is not asked for more.
    let asks = criu.as_ref().filter(|criu| criu.said.is_good() && rustix::process::geteuid().is_root());
    let says = |criu: &Program| {
        Asked::ALL.into_iter().map(|asked| (asked, ask(&criu.path, asked.arguments()))).collect()
    };
    Facts {
        criu_says: asks.map(says),
        runtime: ["runc", "crun"].into_iter().find_map(|name| Some((name, program(name)?))),
        criu,
        hierarchy: Hierarchy::of(root),
        nft: find("nft", search_path).is_some(),
        ip6tables: find("ip6tables-restore", search_path).is_some(),
        soft_dirty: try_soft_dirty(),
    }
}

/// Judges.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![criu(facts.criu.as_ref())];
    if let Some(criu) = &facts.criu {
        checks.extend(Asked::ALL.into_iter().map(|asked| said(asked, criu, facts.criu_says.as_deref())));
    }
    checks.extend([soft_dirty(&facts.soft_dirty), runtime(facts.runtime.as_ref())]);
    checks.extend([control_groups(facts.hierarchy), network_lock(facts)]);
    checks
}

fn check(name: &'static str, found: impl Into<String>) -> Check {
    let needed_for = match name {
        "criu-mem-dirty-track" => "pre-dumps by CRIU, which migrate does without: see write-tracking",
        "soft-dirty" => "tracking what containers write where write-tracking is missing",
        "criu-uffd-noncoop" => "making containers anew: their memory is filled through it",
        "runtime" => "starting and stopping containers",
        "control-groups" => "freezing containers",
        "network-lock" => "connections that outlive the move of a container",
        _ => "dumping and restoring containers",
    };
    Check::new(GROUP, name, needed_for, found)
}

fn criu(criu: Option<&Program>) -> Check {
    let Some(criu) = criu else {
        return check("criu", "no criu in PATH")
            .missing("install criu, 4.1 or newer, or add its directory to PATH (often /usr/sbin)");
    };
    let path = shown(&criu.path.display().to_string());
    let version = match criu.said.is_good() {
        true => Version::of_criu(&criu.said.text),
        false => None,
    };
    let Some(version) = version else {
        return check("criu", format!("{path} does not tell its version: {}", criu.said.last_word()))
            .figure("path", path)
            .missing("install criu anew: criu --version should say it");
    };
    let header_bytes = if version >= LONG_HEADER { 32 } else { 24 };
    let found = format!("{path}, version {version}, {header_bytes} bytes in front of pages");
    let check = check("criu", found)
        .figure("path", path)
        .figure("version", version.to_string())
        .figure("page_header_bytes", header_bytes);
    if version < OLDEST {
        check.missing(format!("{OLDEST} is the oldest that may do; 4.1 or newer is better"))
    } else {
        check.limited_if(version < COMPLETE, "take a newer one: 4.1 or newer")
    }
}

fn said(asked: Asked, criu: &Program, says: Option<&[(Asked, Said)]>) -> Check {
    let Some(says) = says else {
        return match criu.said.is_good() {
            true => check(asked.name(), "only root can let criu look").limited("run migrate doctor as root"),
            false => check(asked.name(), "criu was not asked").limited("see criu"),
        };
    };
    match says.iter().find(|(one, _)| *one == asked) {
        Some((_, said)) => {
            let check = check(asked.name(), said.last_word());
            match said.ended {
                Ended::Code(0) => check,
                Ended::Code(_) => check.missing(asked.advice()),
                _ => check.missing(format!("see by hand what it does: criu {}", asked.arguments().join(" "))),
            }
        }
        None => check(asked.name(), "criu was not asked").limited("see criu"),
    }
}

fn soft_dirty(tried: &Result<(), String>) -> Check {
    match tried {
        Ok(()) => check("soft-dirty", "the kernel marks pages that are written"),
        Err(why) => {
            check("soft-dirty", format!("the kernel does not mark pages that are written: {}", shown(why)))
                .missing("boot a kernel with CONFIG_MEM_SOFT_DIRTY, as most distributions have it")
        }
    }
}

fn runtime(runtime: Option<&(&'static str, Program)>) -> Check {
    let Some((name, program)) = runtime else {
        return check("runtime", "neither runc nor crun in PATH")
            .missing("install runc, or add its directory to PATH");
    };
    let path = shown(&program.path.display().to_string());
    let first = program.said.text.lines().map(shown).find(|line| !line.is_empty());
    match first.filter(|_| program.said.is_good()) {
        Some(line) => check("runtime", format!("{path}: {line}"))
            .limited_if(*name != "runc", "install runc: containers under another runtime are not moved")
            .figure("name", *name)
            .figure("path", path)
            .figure("version", line.split_ascii_whitespace().next_back().unwrap_or_default()),
        None => check("runtime", format!("{path} does not tell its version: {}", program.said.last_word()))
            .figure("name", *name)
            .figure("path", path)
            .missing("install it anew: its --version should say it"),
    }
}

fn control_groups(hierarchy: Hierarchy) -> Check {
    let (version, found) = match hierarchy {
        Hierarchy::Unified => ("2", "version 2"),
        Hierarchy::Hybrid => ("hybrid", "version 1, with version 2 beside it and no controllers in it"),
        Hierarchy::Legacy => ("1", "version 1"),
        Hierarchy::None => ("none", "none are mounted at /sys/fs/cgroup"),
    };
    let check = check("control-groups", found).figure("version", version);
    match hierarchy {
        Hierarchy::None => check.missing("mount them: mount -t cgroup2 none /sys/fs/cgroup"),
        _ => check,
    }
}

/// What keeps packets away while a container is between two hosts. criu takes iptables unless it is told otherwise, and fails where only
/// one of its two programs is there; so it is told to take nftables then, by its library.
fn network_lock(facts: &Facts) -> Check {
    let found = match (facts.ip6tables, facts.nft) {
        (true, true) => "ip6tables and nftables",
        (true, false) => "ip6tables",
        (false, true) => "nftables, which criu is told to take",
        (false, false) => "no program; criu is told to take nftables, for which it needs none",
    };
    check("network-lock", found).figure("ip6tables", facts.ip6tables).figure("nftables", facts.nft)
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;
    use std::process::Command;

    fn says(text: &str) -> Said {
        Said { ended: Ended::Code(0), text: text.into() }
    }

    fn program(text: &str) -> Program {
        Program { path: "/usr/sbin/criu".into(), said: says(text) }
    }

    fn host() -> Facts {
        Facts {
            criu: Some(program("Version: 4.1.1\nGitID: v4.1.1\n")),
            criu_says: Some(Asked::ALL.map(|asked| (asked, says("Looks good.\n"))).to_vec()),
            runtime: Some(("runc", program("runc version 1.1.5+ds1\ncommit: x\n"))),
            hierarchy: Hierarchy::Unified,
            nft: true,
            ip6tables: true,
            soft_dirty: Ok(()),
        }
    }

    fn found(facts: &Facts, name: &str) -> Check {
        judge(facts).into_iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn a_host_that_has_everything_is_well() {
        let checks = judge(&host());
        assert_eq!(checks.len(), 8);
        for check in &checks {
            assert_eq!((check.verdict, &check.advice), (Verdict::Ok, &None), "{check:?}");
            assert!(!check.required, "{check:?}");
        }
        assert_eq!(found(&host(), "runtime").figures["version"], "1.1.5+ds1");
    }

    #[test]
    fn versions_are_read_and_nonsense_is_not() {
        for (text, version) in [
            ("Version: 3.17.1\nGitID: 3.17.1\n", Some("3.17.1")),
            ("warning\n  Version: 4.2\n", Some("4.2")),
            ("Version: 4.1.1-dev", Some("4.1.1")),
            ("Version: 4.0-rc1", Some("4.0")),
            ("Version: 4.1.x", Some("4.1")),
            ("Version: 4", None),
            ("Version: .1", None),
            ("Version: 99999999999.1", None),
            ("Version: -4.1", None),
            ("Version:", None),
            ("criu 4.1", None),
            ("", None),
        ] {
            assert_eq!(
                Version::of_criu(text).map(|version| version.to_string()).as_deref(),
                version,
                "{text:?}"
            );
        }
    }

    #[test]
    fn criu_is_judged_by_its_version() {
        for (version, verdict, header_bytes) in [
            ("3.14", Verdict::Missing, 24),
            ("3.15", Verdict::Limited, 24),
            ("3.16.1", Verdict::Limited, 24),
            ("3.17.1", Verdict::Ok, 24),
            ("4.1.1", Verdict::Ok, 24),
            ("4.2", Verdict::Ok, 32),
            ("10.0", Verdict::Ok, 32),
        ] {
            let check = criu(Some(&program(&format!("Version: {version}\n"))));
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert_eq!(check.figures["page_header_bytes"], header_bytes, "{version}");
        }
        assert_eq!(criu(None).verdict, Verdict::Missing);
        assert_eq!(criu(Some(&program("\x1b[31m"))).verdict, Verdict::Missing);
        let failing = Said { ended: Ended::Code(1), text: "Version: 4.1\n".into() };
        assert_eq!(criu(Some(&Program { said: failing, ..program("") })).verdict, Verdict::Missing);
    }

    #[test]
    fn what_criu_says_is_told_and_who_could_not_ask_is_told_so() {
        let mut facts = host();
        let said = |ended, text: &str| Said { ended, text: text.into() };
        facts.criu_says = Some(vec![
            (Asked::Basics, said(Ended::Code(1), "Warn\nError (criu/vdso.c): \x07bad\n")),
            (Asked::DirtyTracking, said(Ended::TimedOut(crate::programs::ANSWER_LIMIT), "")),
        ]);
        let check = found(&facts, "criu-check");
        assert_eq!((check.verdict, &*check.found), (Verdict::Missing, "Error (criu/vdso.c): ?bad"));
        let check = found(&facts, "criu-mem-dirty-track");
        assert!(check.found.contains("10 s"), "{check:?}");
        assert!(check.advice.unwrap().ends_with("criu check --feature mem_dirty_track"));
        assert_eq!(found(&facts, "criu-uffd-noncoop").verdict, Verdict::Limited);
        facts.criu_says = None;
        assert!(found(&facts, "criu-check").advice.unwrap().contains("as root"));
        facts.criu = None;
        assert!(
            judge(&facts).iter().all(|check| check.name != "criu-check"),
            "without criu there is nobody to ask"
        );
    }

    #[test]
    fn the_rest_is_judged() {
        let facts =
            Facts { soft_dirty: Err("no".into()), runtime: None, hierarchy: Hierarchy::None, ..host() };
        for name in ["soft-dirty", "runtime", "control-groups"] {
            assert_eq!(found(&facts, name).verdict, Verdict::Missing, "{name}");
        }
        let mute = Program { said: Said { ended: Ended::Killed, text: String::new() }, ..program("") };
        let facts = Facts { runtime: Some(("crun", mute)), hierarchy: Hierarchy::Legacy, ..host() };
        assert_eq!(found(&facts, "runtime").verdict, Verdict::Missing);
        assert_eq!(found(&facts, "control-groups").figures["version"], "1");
        for (ip6tables, nft, word) in
            [(true, false, "ip6tables"), (false, true, "told"), (false, false, "needs none")]
        {
            let check = network_lock(&Facts { ip6tables, nft, ..host() });
            assert!(check.verdict == Verdict::Ok && check.found.contains(word), "{check:?}");
        }
    }

    #[test]
    fn programs_of_the_search_path_are_asked() {
        let parent = tempfile::tempdir().unwrap();
        let root = Root::new(parent.path());
        // By another process: a file that is open for writing, also in what another test starts right now, cannot be executed.
        let write = |name: &str, script: &str| {
            let script = format!("#!/bin/sh\n{script}\n");
            let make = ["-c", "printf %s \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh"];
            let made = Command::new("/bin/sh")
                .args(make)
                .arg(script)
                .arg(parent.path().join(name))
                .status()
                .unwrap();
            assert!(made.success());
        };
        write("criu", "case $1 in --version) echo Version: 4.2.1;; check) echo \"asked $*\"; exit 3;; esac");
        write("crun", "echo crun version 1.8.1; echo commit: f");
        let facts = look(&root, parent.path().as_os_str());
        assert!(found(&facts, "criu").found.contains("version 4.2.1, 32 bytes"), "{facts:?}");
        assert_eq!(found(&facts, "runtime").figures["version"], "1.8.1");
        if rustix::process::geteuid().is_root() {
            assert_eq!(found(&facts, "criu-mem-dirty-track").found, "asked check --feature mem_dirty_track");
        } else {
            println!("SKIPPED: only root lets criu look");
        }
        let nothing = look(&root, OsStr::new(""));
        assert!(nothing.criu.is_none() && nothing.runtime.is_none() && nothing.criu_says.is_none());
    }
}
