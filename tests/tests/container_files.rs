//! Real process trees under runc and CRIU move with their files, which they change all the time, and say themselves that nothing was lost.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::containers::{End, Network, Yard};
use e2e::network::without_root;
use e2e::says;
use rustix::fs::{major, minor};
use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");
const ARCHIVIST: &str = env!("CARGO_BIN_EXE_archivist");

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// More than it does while a test runs.
const ALWAYS: &str = "1000000";

/// Pages that so many MiB are.
fn pages_of(mib: u64) -> u64 {
    (mib << 20) / 4096
}

/// Pages that were sent in all rounds of a move, and while the container stood still.
fn sent_pages(report: &Value) -> (u64, u64) {
    let rounds = report["rounds"].as_array().expect("rounds");
    let pages = |round: &Value| round["sent_pages"].as_u64().expect("pages");
    (rounds.iter().map(pages).sum(), rounds.last().map(pages).expect("a round"))
}

/// Waits until an archivist has done so many things.
fn wait_done(yard: &Yard, id: &str, done: u64) {
    yard.wait(id, "does things", |word| word.written >= done && word.looks >= 2);
}

/// Starts an archivist, and waits until it has done some things.
fn start(yard: &Yard, id: &str, mib: u64, rate: u64, limit: &str) {
    yard.run(id, Path::new(ARCHIVIST), &format!("{mib} {rate} {limit}"), &Network::Own);
    wait_done(yard, id, limit.parse::<u64>().expect("a number").min(100));
}

/// Waits until an archivist has compared everything again, and found it as it should be.
fn assert_sound(yard: &Yard, id: &str) {
    let sound = || {
        yard.assert_sound(id);
    };
    if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(sound)) {
        let wrong = std::fs::read_to_string(yard.rootfs(id).join("data/wrong")).unwrap_or_default();
        let wrong: String = wrong.chars().take(2000).collect();
        eprintln!("{id} found: {wrong}");
        std::panic::resume_unwind(panic);
    }
}

/// What is to be the same of a file at both ends.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: String,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    links: u64,
    content: Vec<u8>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

fn attributes(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0; 65_536];
    let bytes = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    let names = list[..bytes].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65_536];
        let bytes = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("its value");
        value[..bytes].to_vec()
    };
    let mut found: Vec<_> = names.map(|name| (name.to_vec(), value(name))).collect();
    found.sort();
    found
}

fn seen(path: &Path, metadata: &Metadata) -> Seen {
    let kind = metadata.file_type();
    let text = |what: &str| what.to_owned();
    let (kind, content) = if kind.is_dir() {
        (text("directory"), Vec::new())
    } else if kind.is_symlink() {
        (format!("link to {:?}", std::fs::read_link(path).expect("its target")), Vec::new())
    } else if kind.is_file() {
        assert!(
            metadata.len() < 1 << 28 || metadata.blocks() * 512 < metadata.len() / 8,
            "it is a hole still"
        );
        let content = match metadata.len() {
            // Too long to be kept; what has it compares it itself.
            bytes if bytes >= 1 << 28 => Vec::new(),
            _ => std::fs::read(path).expect("its content"),
        };
        (format!("file of {} bytes", metadata.len()), content)
    } else {
        let device = (major(metadata.rdev()), minor(metadata.rdev()));
        let is = [kind.is_fifo(), kind.is_socket(), kind.is_char_device(), kind.is_block_device()];
        (format!("{is:?} {device:?}"), Vec::new())
    };
    Seen {
        kind,
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        // That of a directory is counted by some file systems and not by others.
        links: if metadata.is_dir() { 1 } else { metadata.nlink() },
        content,
        attributes: attributes(path),
    }
}

/// Everything below a directory, but for what the archivist goes on to write.
fn tree(top: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut found = BTreeMap::new();
    let mut left = vec![top.to_path_buf()];
    while let Some(path) = left.pop() {
        let metadata = std::fs::symlink_metadata(&path).expect("it is there");
        if metadata.is_dir() {
            left.extend(
                std::fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("an entry").path()),
            );
        }
        let inside = path.strip_prefix(top).expect("it is below").to_path_buf();
        if inside != Path::new("tmp/out") {
            let mut seen = seen(&path, &metadata);
            // CRIU makes a directory in it for a moment when it restores.
            if inside == Path::new("tmp") {
                seen.mtime = (0, 0);
            }
            found.insert(inside, seen);
        }
    }
    found
}

/// That two trees are the same.
fn assert_same(one: &Path, other: &Path) {
    let (one, mut other) = (tree(one), tree(other));
    assert!(one.len() > 20);
    for (path, seen) in one {
        let there = other.remove(&path).unwrap_or_else(|| panic!("{} did not arrive", path.display()));
        let without = |mut seen: Seen| {
            seen.content.truncate(0);
            seen
        };
        assert!(seen.content == there.content, "the content of {}", path.display());
        assert_eq!(without(seen), without(there), "{}", path.display());
    }
    assert!(other.is_empty(), "{:?}", other.keys());
}

#[test]
fn a_container_that_changes_its_files_moves_there_and_back_with_them() {
    if without_root("a_container_that_changes_its_files_moves_there_and_back_with_them") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, there, back) = (Yard::name(), Yard::name(), Yard::name());
    start(&a.yard, &id, 24, 300, ALWAYS);
    for (from, to, name, next) in [
        (&a, &b, &id, &there),
        (&b, &a, &there, &back),
        // Into the bundle of before, whose container has left.
        (&a, &b, &back, &there),
        (&b, &a, &there, &back),
    ] {
        let report = from.moves(to, name, next, &["--copy-rootfs"]);
        let (all, last) = sent_pages(&report);
        assert!(all > pages_of(24) && last < pages_of(24) / 4, "{report:#}");
        assert!(report["disk_bytes"].as_u64() > Some(24 << 20), "{report:#}");
        assert_sound(&to.yard, next);
        let left = |name: &str| to.yard.bundles().join(next).join(name).exists();
        assert!(!left(".later") && !left(".moved"), "what was needed on the way is gone");
    }
    // Nothing that happened at the end of one move was missed.
    wait_done(&a.yard, &back, 1000);
    assert_sound(&a.yard, &back);
}

#[test]
fn what_is_left_at_the_source_is_what_arrived() {
    if without_root("what_is_left_at_the_source_is_what_arrived") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, there, back) = (Yard::name(), Yard::name(), Yard::name());
    start(&a.yard, &id, 8, 400, "1500");
    wait_done(&a.yard, &id, 1500);
    let rootfs = a.yard.rootfs(&id);
    for (folder, mode) in [("set-user-id", 0o4711), ("set-group-id", 0o2755), ("sticky", 0o1777)] {
        let path = rootfs.join(folder);
        std::fs::write(&path, folder).expect("a file");
        std::os::unix::fs::chown(&path, Some(1234), Some(5678)).expect("an owner");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("a mode");
    }
    let report = a.moves(&b, &id, &there, &["--copy-rootfs"]);
    assert_same(&rootfs, &b.yard.rootfs(&there));
    // It wrote nothing but what it says; the rest is memory.
    let (_, last) = sent_pages(&report);
    assert!(last < pages_of(4), "{report:#}");
    b.moves(&a, &there, &back, &["--copy-rootfs=whole"]);
    assert_same(&rootfs, &a.yard.rootfs(&back));
    assert_sound(&a.yard, &back);
}

/// A container whose root is an overlay. Answers the layer below.
fn start_over(yard: &Yard, id: &str) -> PathBuf {
    yard.make(id, Path::new(ARCHIVIST), &format!("2 200 {ALWAYS}"), &Network::Own);
    let bundle = yard.bundle(id);
    let path = |name: &str| bundle.join(name);
    std::fs::rename(path("rootfs"), path("lower")).expect("a new name");
    for folder in ["rootfs", "upper", "work"] {
        std::fs::create_dir(path(folder)).expect("a directory");
    }
    let mut seed = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    })
    .take(48 << 20)
    .collect();
    std::fs::write(path("lower/ballast"), noise).expect("it is written");
    std::fs::write(path("lower/gone"), "x").expect("it is written");
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| path(name).display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let options = std::ffi::CString::new(options).expect("no zero");
    mount("overlay", path("rootfs"), "overlay", MountFlags::empty(), Some(options.as_c_str()))
        .expect("an overlay");
    yard.go(id);
    wait_done(yard, id, 100);
    std::fs::remove_file(path("rootfs/gone")).expect("it is gone");
    path("lower")
}

#[test]
fn of_an_overlay_only_what_changed_is_sent() {
    if without_root("of_an_overlay_only_what_changed_is_sent") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, there, whole, back) = (Yard::name(), Yard::name(), Yard::name(), Yard::name());
    let lower = start_over(&a.yard, &id);
    let own = a.yard.arguments();
    let refused = |more: &[&str], words: &[&str]| {
        let mut receives = b.receives(&there);
        receives.extend(more.iter().map(|word| (*word).to_owned()));
        let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
        let sent = ["send", "--container", &id, &address, "--copy-rootfs"];
        says(&a.host.run(&End::arguments(&own, &sent)), 6, words);
        assert!(!b.yard.bundles().join(&there).exists(), "nothing is left of it");
        drop(receiver);
        assert_sound(&a.yard, &id);
    };
    refused(&["--lower", "/nowhere/lower"], &["/nowhere/lower", "--lower"]);
    refused(&["--lower", "/tmp", "--lower", "/tmp"], &["1 lower", "--lower names 2"]);
    refused(&["--rootfs", "/tmp"], &["--rootfs"]);

    // It cannot be made anew there, which is known when everything has arrived.
    let mut receives = b.receives(&there);
    receives.extend(["--netns".into(), "/nowhere/netns".into()]);
    let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    let words = ["send", "--container", &id, &address, "--copy-rootfs"];
    assert_ne!(a.host.run(&End::arguments(&own, &words)).code, 0);
    assert_ne!(receiver.finish().code, 0);
    assert!(!b.yard.bundles().join(&there).exists(), "its overlay would be mounted there");
    assert_sound(&a.yard, &id);

    // The layer is at another place there.
    let elsewhere = b.host.path("lower");
    std::fs::rename(&lower, &elsewhere).expect("a new name");
    refused(&[], &[&lower.display().to_string(), "--lower"]);
    let mut receives = b.receives(&there);
    receives.extend(["--lower".into(), elsewhere.display().to_string()]);
    let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    let words = ["send", "--container", &id, &address, "--copy-rootfs"];
    let sent = a.host.run(&End::arguments(&own, &words)).success();
    receiver.finish().success();
    let report = sent.event("report").expect("a report");
    assert!(sent_pages(report).0 < pages_of(32), "the layer below was sent: {report:#}");
    let rootfs = b.yard.rootfs(&there);
    let has = |name: &str| rootfs.join(name).exists();
    assert!(has("ballast") && !has("gone") && elsewhere.join("gone").exists());
    assert!(!b.yard.bundles().join(&there).join("upper/ballast").exists());
    assert_sound(&b.yard, &there);

    // It moves on from there as it came, and all of it where there is no such layer.
    b.moves(&a, &there, &back, &["--copy-rootfs"]);
    assert_sound(&a.yard, &back);
    let report = a.moves(&b, &back, &whole, &["--copy-rootfs=whole"]);
    assert!(sent_pages(&report).0 > pages_of(48), "{report:#}");
    assert_sound(&b.yard, &whole);
    let bundle = b.yard.bundles().join(&whole);
    assert!(!bundle.join("upper").exists() && bundle.join("rootfs/ballast").exists());
}

#[test]
fn files_that_have_no_room_are_refused_and_their_container_runs_on() {
    if without_root("files_that_have_no_room_are_refused_and_their_container_runs_on") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    start(&a.yard, &id, 24, 100, ALWAYS);
    let bundles = b.yard.bundles();
    std::fs::create_dir_all(&bundles).expect("a directory");
    mount("tmpfs", &bundles, "tmpfs", MountFlags::empty(), Some(c"size=16m")).expect("a small disk");
    let (sent, _) = a.send(&b, &id, &name, &["--copy-rootfs"]);
    says(&sent, 6, &["MiB", "has room for 1", "--containers"]);
    assert_eq!(std::fs::read_dir(&bundles).expect("a directory").count(), 0);
    assert_eq!(a.yard.status(&id).as_deref(), Some("running"));
    assert_sound(&a.yard, &id);
}

#[test]
fn whoever_is_killed_nothing_is_left_of_the_files() {
    if without_root("whoever_is_killed_nothing_is_left_of_the_files") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name, other) = (Yard::name(), Yard::name(), Yard::name());
    start(&a.yard, &id, 4, 200, ALWAYS);
    let own = a.yard.arguments();
    let bundles = || {
        let entries = std::fs::read_dir(b.yard.bundles()).map(|entries| entries.flatten().collect());
        entries.unwrap_or_else(|_| Vec::new())
    };
    let runs_on = || {
        let until = Instant::now() + LIMIT;
        while a.yard.status(&id).as_deref() != Some("running") {
            assert!(Instant::now() < until, "waited a minute until it goes on: {:?}", a.yard.status(&id));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(b.yard.status(&name), None);
        assert_sound(&a.yard, &id);
    };
    for phase in ["rounds", "state"] {
        let receives = b.receives(&name);
        let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
        let words = ["send", "--container", &id, &address, "--copy-rootfs"];
        let mut sender = a.host.start_held(&End::arguments(&own, &words), phase);
        sender.wait_held();
        sender.signal(Signal::KILL);
        drop(sender);
        runs_on();
        assert_eq!(bundles().len(), 1, "it would go on over another link");
        receiver.signal(Signal::INT);
        receiver.finish();
        assert_eq!(bundles().len(), 0, "{phase}");
    }
    // Whoever is killed cannot tidy up; the next one does.
    let receives = b.receives(&name);
    let (mut receiver, address) = b.host.receive_held(&End::arguments(&receives, &[]), "ready");
    let words = ["send", "--container", &id, &address, "--copy-rootfs"];
    let sender = a.host.start(&End::arguments(&own, &words));
    receiver.wait_held();
    receiver.signal(Signal::KILL);
    drop(receiver);
    assert_ne!(sender.finish().code, 0);
    runs_on();
    assert_eq!(bundles().len(), 1);
    a.moves(&b, &id, &other, &["--copy-rootfs"]);
    assert_sound(&b.yard, &other);
    assert_eq!(bundles().len(), 1);
}

#[test]
fn what_is_written_through_a_mapping_moves_to_memory_and_back() {
    if without_root("what_is_written_through_a_mapping_moves_to_memory_and_back") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, there, back) = (Yard::name(), Yard::name(), Yard::name());
    // Nothing that is made safe there makes anything safe here, behind which times would tell again of writing through a mapping. And on the way
    // back nothing tells of it.
    let bundles = b.yard.bundles();
    std::fs::create_dir_all(&bundles).expect("a directory");
    mount("tmpfs", &bundles, "tmpfs", MountFlags::empty(), None).expect("a disk in memory");
    let probe = bundles.join("probe");
    std::fs::write(&probe, "").expect("a file");
    if let Err(error) = rustix::fs::setxattr(&probe, "user.a", b"", rustix::fs::XattrFlags::empty()) {
        println!(
            "SKIPPED: what_is_written_through_a_mapping_moves_to_memory_and_back: a tmpfs has attributes from Linux 6.6 on: {error}"
        );
        return;
    }
    start(&a.yard, &id, 2, 400, ALWAYS);
    a.moves(&b, &id, &there, &["--copy-rootfs"]);
    assert_sound(&b.yard, &there);
    b.moves(&a, &there, &back, &["--copy-rootfs"]);
    assert_sound(&a.yard, &back);
}

#[test]
fn each_checkpoint_of_a_series_has_the_files_of_its_moment() {
    if without_root("each_checkpoint_of_a_series_has_the_files_of_its_moment") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let id = Yard::name();
    start(&a.yard, &id, 32, 100, ALWAYS);
    // On another file system: one that is made safe tells again of what is written through mappings.
    let memory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let store = memory.path().join("store").to_string_lossy().into_owned();
    let own = a.yard.arguments();
    let words = ["checkpoint", "--container", &id, "--store", &store, "--every", "1s", "--copy-rootfs"];
    let mut series = a.host.start(&End::arguments(&own, &words));
    let taken: Vec<Value> = (0..4).map(|_| series.wait_event("checkpoint")).collect();
    series.signal(Signal::INT);
    let said = series.finish();
    assert_sound(&a.yard, &id);
    let pages = |taken: &Value| taken["data_pages"].as_u64().expect("pages");
    assert!(taken[0]["parent"].is_null() && pages(&taken[0]) > pages_of(32), "{:#}", taken[0]);
    for delta in &taken[1..] {
        assert!(delta["parent"].is_string() && pages(delta) < pages_of(32) / 4, "{delta:#} of {said:#?}");
    }
    a.yard.end(&id);
    for taken in &taken {
        let (checkpoint, name) = (taken["id"].as_str().expect("its id"), Yard::name());
        let (bundles, own) = (b.yard.bundles().to_string_lossy().into_owned(), b.yard.arguments());
        let words = ["restore", "--store", &store, checkpoint, "--name", &name, "--containers", &bundles];
        b.host.run(&End::arguments(&own, &words)).success();
        assert_eq!(b.yard.status(&name).as_deref(), Some("running"));
        assert_sound(&b.yard, &name);
        b.yard.end(&name);
    }
}
