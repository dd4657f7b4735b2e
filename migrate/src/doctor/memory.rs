//! Memory: how much there is, and what the kernel lets a process know of it and do with it.

mod cgroup;
mod tracking;

pub(super) use cgroup::Hierarchy;
pub(crate) use tracking::try_soft_dirty;

use super::check::Check;
use super::files::{Root, chosen, shown};
use crate::units::{meminfo_bytes, show_bytes};
use cgroup::Limit;

const GROUP: &str = "memory";

/// The memory of a VM of which nothing else is said (`migrate vm run --memory`), in bytes.
const SMALL_BYTES: u64 = 256 << 20;

/// Sizes of huge pages that are looked at; x86-64 has two.
const HUGE_SIZES: usize = 8;

/// What was found.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    total_bytes: Option<u64>,
    available_bytes: Option<u64>,
    /// The tightest limit that this process has by a control group.
    limit: Option<Limit>,
    /// What huge pages the kernel gives: to private memory, and to shared memory, which a VM's is.
    huge: Option<String>,
    shared_huge: Option<String>,
    /// Memory that is kept for huge pages on demand.
    reserved_bytes: u64,
    page_faults: PageFaults,
    /// The sysctl `vm.unprivileged_userfaultfd`.
    unprivileged: Option<u64>,
    /// Whether writes of this process are told, or why not.
    write_tracking: Result<(), String>,
}

/// Whether somebody who touches missing memory can be made to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PageFaults {
    Work,
    /// Not for this user, or not at all.
    Forbidden(String),
    /// Yes, but not as a post-copy needs it: the error says why.
    Fails(String),
}

/// Looks.
pub(super) fn look(root: &Root) -> Facts {
    let meminfo = root.read("proc/meminfo").unwrap_or_default();
    let choice = |name: &str| {
        let text = root.read(&format!("sys/kernel/mm/transparent_hugepage/{name}")).ok()?;
        chosen(&text).map(str::to_owned)
    };
    let total_bytes = meminfo_bytes(&meminfo, "MemTotal");
    Facts {
        total_bytes,
        available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
        limit: cgroup::limit(root).filter(|limit| total_bytes.is_none_or(|total| limit.limit_bytes < total)),
        huge: choice("enabled"),
        shared_huge: choice("shmem_enabled"),
        reserved_bytes: reserved_bytes(root),
        page_faults: match vmm::host::try_page_faults() {
            Ok(()) => PageFaults::Work,
            Err(vmm::Error::NoPageFaults(error)) => PageFaults::Forbidden(error.to_string()),
            Err(error) => PageFaults::Fails(error.to_string()),
        },
        unprivileged: root.number("proc/sys/vm/unprivileged_userfaultfd"),
        write_tracking: tracking::try_writes(),
    }
}

/// By the directories `hugepages-2048kB` and so on.
fn reserved_bytes(root: &Root) -> u64 {
    let directory = "sys/kernel/mm/hugepages";
    let Ok(entries) = std::fs::read_dir(root.path(directory)) else { return 0 };
    let bytes = |name: &str| {
        let size_kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let pages = root.number(&format!("{directory}/{name}/nr_hugepages"))?;
        Some(size_kib.saturating_mul(1024).saturating_mul(pages))
    };
    entries
        .take(HUGE_SIZES)
        .filter_map(|entry| bytes(entry.ok()?.file_name().to_str()?))
        .fold(0, u64::saturating_add)
}

/// Judges.
pub(super) fn judge(facts: &Facts) -> Vec<Check> {
    vec![available(facts), huge_pages(facts), reserved(facts), page_faults(facts), write_tracking(facts)]
}

fn available(facts: &Facts) -> Check {
    let check =
        |found: String| Check::new(GROUP, "available", "the memory of VMs that run here or arrive", found);
    let Some(free) = facts.available_bytes else {
        return check("/proc/meminfo does not tell it".into())
            .limited("say --max-memory to receive and restore: they cannot find out how much they may take");
    };
    let mut found = show_bytes(free);
    if let Some(total) = facts.total_bytes {
        found.push_str(&format!(" of {}", show_bytes(total)));
    }
    let mut room = free;
    if let Some(limit) = &facts.limit {
        room = room.min(limit.room_bytes());
        let (limit, used) = (show_bytes(limit.limit_bytes), show_bytes(limit.used_bytes));
        found.push_str(&format!("; the control group allows {limit}, of which {used} are used"));
    }
    let held = facts.limit.as_ref().is_some_and(|limit| limit.room_bytes() < free);
    let advice = match (room < SMALL_BYTES, held) {
        (true, true) => "raise the memory limit of the control group, or run migrate outside of it",
        (true, false) => "end what takes memory: there is less than the smallest usual VM has",
        (false, _) => {
            "VMs that need more than that end when they use it: raise the memory limit of the control group, or say --max-memory"
        }
    };
    let check = check(found)
        .figure("available_bytes", free)
        .figure("total_bytes", facts.total_bytes)
        .figure("limit_bytes", facts.limit.as_ref().map(|limit| limit.limit_bytes))
        .figure("limit_used_bytes", facts.limit.as_ref().map(|limit| limit.used_bytes));
    check.limited_if(room < SMALL_BYTES || held, advice)
}

/// Settings that give VMs huge pages. Whether those can be split again was tried with the page faults: the settings do not say it.
const HUGE: [&str; 4] = ["always", "within_size", "advise", "force"];

fn huge_pages(facts: &Facts) -> Check {
    let word = |choice: &Option<String>| choice.clone().unwrap_or_else(|| "unknown".into());
    let (huge, shared) = (word(&facts.huge), word(&facts.shared_huge));
    let found = format!("for VMs {shared}, for private memory {huge}");
    let check =
        Check::new(GROUP, "huge-pages", "VMs whose memory can be taken away page by page (post-copy)", found)
            .figure("shmem_enabled", shared)
            .figure("enabled", huge);
    let fails = matches!(facts.page_faults, PageFaults::Fails(_));
    check.limited_if(
        fails && facts.shared_huge.as_deref().is_some_and(|word| HUGE.contains(&word)),
        "as root, write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled, or move without post-copy",
    )
}

fn reserved(facts: &Facts) -> Check {
    let bytes = facts.reserved_bytes;
    let found = match bytes {
        0 => "none".into(),
        _ => format!("{} are kept for others", show_bytes(bytes)),
    };
    Check::new(
        GROUP,
        "reserved-huge-pages",
        "nothing: VMs here do not use them, and so cannot have that memory",
        found,
    )
    .figure("reserved_bytes", bytes)
    .limited_if(bytes > 0, "if nothing else needs them, give them back, as root: sysctl vm.nr_hugepages=0")
}

fn page_faults(facts: &Facts) -> Check {
    const ADVICE: &str = "run the receiver as root, give its user access to /dev/userfaultfd, or set the sysctl \
        vm.unprivileged_userfaultfd to 1";
    let check = |found: String| {
        Check::new(GROUP, "page-faults", "receiving by post-copy, and restore --lazy", found)
            .figure("unprivileged_userfaultfd", facts.unprivileged)
    };
    match &facts.page_faults {
        PageFaults::Work => check("who touches missing memory can be made to wait".into()),
        PageFaults::Forbidden(why) => {
            check(format!("this user may not handle page faults of VMs: {}", shown(why))).missing(ADVICE)
        }
        PageFaults::Fails(why) => {
            check(shown(why)).missing("move without post-copy; where VMs have huge pages, see huge-pages")
        }
    }
}

fn write_tracking(facts: &Facts) -> Check {
    let check = |found: String| {
        let what = "checkpoints of programs (migrate::program) without comparing all of their memory";
        Check::new(GROUP, "write-tracking", what, found)
    };
    match &facts.write_tracking {
        Ok(()) => check("the kernel tells which pages a program wrote (userfaultfd, PAGEMAP_SCAN)".into()),
        Err(why) => check(format!("the kernel does not tell which pages a program wrote: {}", shown(why)))
            .limited("Linux 6.7 or newer tells it; until then pages are compared by their digests"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::super::files;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host() -> Facts {
        Facts {
            total_bytes: Some(24 * GIB),
            available_bytes: Some(20 * GIB),
            limit: None,
            huge: Some("madvise".into()),
            shared_huge: Some("never".into()),
            reserved_bytes: 0,
            page_faults: PageFaults::Work,
            unprivileged: Some(0),
            write_tracking: Ok(()),
        }
    }

    fn limited_to(limit_bytes: u64, used_bytes: u64) -> Facts {
        Facts { limit: Some(Limit { limit_bytes, used_bytes }), ..host() }
    }

    #[test]
    fn a_host_that_has_everything_is_well() {
        for check in judge(&host()) {
            assert_eq!((check.verdict, check.advice), (Verdict::Ok, None), "{}", check.name);
        }
    }

    #[test]
    fn each_thing_that_is_missing_is_said_once_and_with_advice() {
        for (facts, name, verdict, advice) in [
            (Facts { available_bytes: None, ..host() }, "available", Verdict::Limited, "--max-memory"),
            (Facts { available_bytes: Some(0), ..host() }, "available", Verdict::Limited, "end what takes"),
            (limited_to(GIB, GIB / 2), "available", Verdict::Limited, "or say --max-memory"),
            (limited_to(GIB, GIB), "available", Verdict::Limited, "raise the memory limit"),
            (limited_to(GIB, 2 * GIB), "available", Verdict::Limited, "raise the memory limit"),
            (
                Facts { reserved_bytes: u64::MAX, ..host() },
                "reserved-huge-pages",
                Verdict::Limited,
                "nr_hugepages=0",
            ),
            (
                Facts { page_faults: PageFaults::Forbidden("EPERM".into()), ..host() },
                "page-faults",
                Verdict::Missing,
                "/dev/userfaultfd",
            ),
            (
                Facts { write_tracking: Err("EINVAL".into()), ..host() },
                "write-tracking",
                Verdict::Limited,
                "6.7",
            ),
        ] {
            for check in judge(&facts) {
                if check.name == name {
                    assert_eq!(check.verdict, verdict, "{check:?}");
                    assert!(check.advice.as_ref().unwrap().contains(advice), "{check:?}");
                } else {
                    assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
                }
                assert!(!check.required, "a VM can be moved without {}", check.name);
            }
        }
        // A limit that leaves more than the host has is none.
        assert_eq!(judge(&limited_to(23 * GIB, GIB))[0].verdict, Verdict::Ok);
    }

    #[test]
    fn huge_pages_are_named_where_they_may_be_the_reason() {
        for (shared, verdict) in
            [(Some("never"), Verdict::Ok), (None, Verdict::Ok), (Some("advise"), Verdict::Limited)]
        {
            let page_faults = PageFaults::Fails("they cannot be split".into());
            let facts = Facts { page_faults, shared_huge: shared.map(str::to_owned), ..host() };
            assert_eq!(huge_pages(&facts).verdict, verdict, "{shared:?}");
            assert_eq!(super::page_faults(&facts).verdict, Verdict::Missing);
        }
        let facts = Facts { shared_huge: Some("always".into()), ..host() };
        assert_eq!(huge_pages(&facts).verdict, Verdict::Ok, "they can be split");
    }

    #[test]
    fn the_files_of_another_host_are_read() {
        let parent = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| files::write(parent.path(), path, text);
        write("proc/meminfo", "MemTotal: 2048 kB\nMemAvailable: 1024 kB\n");
        write(
            "sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "always within_size [advise] never deny force\n",
        );
        write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "3\n");
        write("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "1\n");
        write("sys/kernel/mm/hugepages/hugepages-kB/nr_hugepages", "1\n");
        write("proc/sys/vm/unprivileged_userfaultfd", "1\n");
        let facts = look(&Root::new(parent.path()));
        assert_eq!((facts.total_bytes, facts.available_bytes), (Some(2 << 20), Some(1 << 20)));
        assert_eq!((facts.huge, facts.shared_huge.as_deref()), (None, Some("advise")));
        assert_eq!(facts.reserved_bytes, GIB + (6 << 20));
        assert_eq!(facts.unprivileged, Some(1));
    }
}
