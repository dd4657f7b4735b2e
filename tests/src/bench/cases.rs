//! The guests that are moved.

/// One guest.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub name: &'static str,
    pub memory_mib: u64,
    pub cmdline: &'static str,
    /// The most runs of it: large guests take long.
    pub most_runs: u64,
}

const fn case(name: &'static str, memory_mib: u64, cmdline: &'static str) -> Case {
    Case { name, memory_mib, cmdline, most_runs: u64::MAX }
}

/// By itself: what a user sees, a guest that parks when it has nothing to do.
pub(super) const ALONE: &[Case] = &[
    case("1GiB-idle", 1024, "fill=768M ws=256M rate=0 tick_us=1000"),
    case("1GiB-50", 1024, "fill=768M ws=256M rate=50"),
    case("1GiB-100", 1024, "fill=768M ws=256M rate=100"),
    case("1GiB-200", 1024, "fill=768M ws=256M rate=200"),
    case("4GiB-50", 4096, "fill=2304M ws=1024M rate=50"),
];

/// Against a peer, which has no pad to park at: the guest spins on both sides, so that it costs the same.
pub(super) const COMPARED: &[Case] = &[
    case("1GiB-idle", 1024, "fill=768M ws=256M rate=0 tick_us=1000 park=spin"),
    case("1GiB-50", 1024, "fill=768M ws=256M rate=50 park=spin"),
    case("1GiB-200", 1024, "fill=768M ws=256M rate=200 park=spin"),
    case("1GiB-800", 1024, "fill=768M ws=256M rate=800 park=spin"),
    case("1GiB-max", 1024, "fill=768M ws=256M rate=max park=spin"),
    case("1GiB-text-50", 1024, "fill=768M ws=256M rate=50 content=text park=spin"),
    Case { most_runs: 3, ..case("4GiB-idle", 4096, "fill=3040M ws=1024M rate=0 tick_us=1000 park=spin") },
    Case { most_runs: 3, ..case("4GiB-200", 4096, "fill=3040M ws=1024M rate=200 park=spin") },
    Case {
        most_runs: 3,
        ..case("4GiB-text-200", 4096, "fill=3040M ws=1024M rate=200 content=text park=spin")
    },
];

/// Whether the benchmark works: small and quick.
pub(super) const QUICK: &[Case] = &[
    case("quick-idle", 128, "fill=64M ws=16M rate=0 tick_us=1000 park=spin"),
    case("quick-50", 128, "fill=64M ws=16M rate=50 park=spin"),
];
