//! Disks go with their guests, over the link and into checkpoints: what the guest has written, memory and disk of one instant.
//!
//! The guest drives its disk itself. It remembers in memory what it wrote where and reads before it writes; `assert_sound` compares both
//! from outside while it stands still (`guest-images/ledger/README.md`, "Disk").
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::relay::{Relay, Way, Weather};
use e2e::{Finished, Host, Running, trusting_pair, without_kvm};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// A guest that writes half a megabyte a second to its disk, and more to its memory.
const GUEST: &str = "fill=24M ws=8M rate=20 disk=1 seed=5";
/// The length of its disk: not a multiple of a page, so that the last one is half.
const DISK_BYTES: u64 = (16 << 20) + 512;
/// What lay on the disk before the guest came, beyond what it writes: a block of data in each megabyte of the part behind.
const OLD: u8 = 0xa7;

fn folder(host: &Host) -> PathBuf {
    let folder = host.path("disks");
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn words(path: &Path) -> String {
    path.to_str().expect("a path of plain text").to_owned()
}

/// A disk that is mostly holes, with something old in it.
fn make_disk(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let file = File::create_new(&path).expect("a new disk");
    file.set_len(DISK_BYTES).expect("room for it");
    file.write_all_at(&[OLD; 8192], 1 << 20).expect("room for that");
    file.write_all_at(&[OLD; 512], DISK_BYTES - 512).expect("room for that");
    path
}

/// Whether somebody has a disk locked.
fn is_locked(path: &Path) -> bool {
    let file = File::options().read(true).write(true).open(path).expect("the disk");
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err()
}

struct Scene {
    a: Host,
    b: Host,
    there: PathBuf,
    image: PathBuf,
}

impl Scene {
    fn new(cmdline: &str) -> Self {
        let (a, b) = trusting_pair(Path::new(PROGRAM));
        let (here, there) = (folder(&a), folder(&b));
        let image = make_disk(&here, "v.img");
        a.run_ledger("v", "64MiB", cmdline, &["--disk", &words(&image)]);
        a.wait_ledger_running("v");
        let scene = Self { a, b, there, image };
        if cmdline.contains("disk=") {
            wait_for_writes(&scene.a, "v", 20);
        }
        scene
    }

    fn receive(&self, more: &[&str]) -> (Running, String) {
        self.b.receive(&[&["--disks", &words(&self.there), "--link-timeout", "2s"][..], more].concat())
    }

    fn send(&self, address: &str, more: &[&str]) -> Finished {
        self.a.run(&send(address, more))
    }

    /// The source runs, and nothing of the disk is left at the destination.
    fn assert_stayed(&self) {
        assert_eq!(self.a.phase("v").as_deref(), Some("running"));
        self.b.wait_phase("v", None);
        assert_eq!(names(&self.there), Vec::<String>::new());
        assert!(is_locked(&self.image), "the disk is not the VM's any more");
        self.a.assert_sound("v");
    }

    /// The next attempt arrives.
    fn next_attempt_is_correct(&self) {
        let (receiver, address) = self.receive(&[]);
        self.send(&address, &[]).success();
        receiver.finish().success();
        self.a.wait_phase("v", None);
        self.b.assert_sound("v");
    }
}

fn send<'a>(address: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["send", "v", address, "--copy-disk", "--link-timeout", "2s", "--ask-timeout", "3s"][..], more].concat()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder");
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn written(host: &Host, name: &str) -> u64 {
    host.ledger(name)["disk"]["written_blocks"].as_u64().expect("what it wrote to its disk")
}

fn wait_for_writes(host: &Host, name: &str, blocks: u64) {
    let until = Instant::now() + e2e::process::STEP_LIMIT;
    while written(host, name) < blocks {
        assert!(Instant::now() < until, "{name} does not write to its disk\n{}", host.log(name));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn report(sent: &Finished) -> &Value {
    sent.event("report").unwrap_or_else(|| panic!("{sent:#?}"))
}

#[test]
fn an_estimate_counts_the_disks_that_would_go_along() {
    if without_kvm("an_estimate_counts_the_disks_that_would_go_along") {
        return;
    }
    let scene = Scene::new(GUEST);
    let estimate = |more: &[&str]| {
        let arguments = ["estimate", "v", "--bandwidth", "1MB/s", "--sample", "300ms"];
        let estimated = scene.a.run(&[&arguments[..], more].concat()).success();
        estimated.event("estimate").unwrap_or_else(|| panic!("{estimated:#?}")).clone()
    };
    let decided = |estimate: &Value| estimate["forecasts"][0]["decision"].clone();
    let (memory, with_disk) =
        (estimate(&["--on-stall", "post-copy"]), estimate(&["--on-stall", "post-copy", "--copy-disk"]));
    let pages = |estimate: &Value| estimate["present_pages"].as_u64().expect("a number");
    // What lay on it, and something of what the guest wrote.
    let disk_pages = pages(&with_disk) - pages(&memory);
    assert!((3..=DISK_BYTES.div_ceil(4096)).contains(&disk_pages), "{memory:#}\n{with_disk:#}");
    let regions = with_disk["regions"].as_array().expect("regions");
    assert!(regions.iter().any(|region| region["space"] == 1), "{with_disk:#}");
    assert_eq!(decided(&memory), "post-copy", "{memory:#}");
    assert_ne!(decided(&with_disk), "post-copy", "{with_disk:#}");
    let unknown = scene.a.run(&["estimate", "v", "--bandwidth", "1MB/s", "--copy-disk=other.img"]);
    assert_eq!(unknown.code, 2, "{unknown:#?}");
    // It was only watched.
    scene.assert_stayed();
}

#[test]
fn a_disk_goes_with_its_guest_and_comes_back() {
    if without_kvm("a_disk_goes_with_its_guest_and_comes_back") {
        return;
    }
    let scene = Scene::new(GUEST);
    let (receiver, address) = scene.receive(&[]);
    let sent = scene.send(&address, &["--verify", "--downtime", "20s"]).success();
    receiver.finish().success();
    scene.a.wait_phase("v", None);
    println!("{}", report(&sent));
    assert_eq!(report(&sent)["disk_bytes"].as_u64(), Some((16 << 20) + 4096));
    let arrived = scene.there.join("v.img");
    let metadata = arrived.metadata().expect("the image that arrived");
    assert_eq!(metadata.len(), DISK_BYTES);
    assert!(is_locked(&arrived));
    // The source's is nobody's, and as it was when the guest left it.
    assert!(!is_locked(&scene.image));
    let before = written(&scene.b, "v");
    wait_for_writes(&scene.b, "v", before + 20);
    scene.b.assert_sound("v");
    // What was there before the guest came, and what never was.
    let file = File::open(&arrived).expect("the image");
    let mut last = [0; 512];
    file.read_exact_at(&mut last, DISK_BYTES - 512).expect("its last sector");
    assert_eq!(last, [OLD; 512]);
    assert!(metadata.blocks() * 512 < DISK_BYTES, "holes are holes");

    // Back, where the old image is in the way until somebody looks at it.
    let here = words(scene.image.parent().expect("a folder"));
    let (receiver, address) = scene.a.receive(&["--disks", &here]);
    let refused = scene.b.run(&send(&address, &[]));
    assert_eq!(refused.code, 6, "{refused:#?}");
    assert!(refused.stderr.contains("v.img") && refused.stderr.contains("there already"), "{refused:#?}");
    scene.b.assert_sound("v");
    std::fs::rename(&scene.image, scene.image.with_extension("old")).expect("it is moved away");
    scene.b.run(&send(&address, &[])).success();
    receiver.finish().success();
    scene.b.wait_phase("v", None);
    let before = written(&scene.a, "v");
    wait_for_writes(&scene.a, "v", before + 20);
    scene.a.assert_sound("v");
}

#[test]
fn a_disk_that_cannot_go_is_named_and_nothing_is_changed() {
    if without_kvm("a_disk_that_cannot_go_is_named_and_nothing_is_changed") {
        return;
    }
    let scene = Scene::new(GUEST);
    let refused = |sent: Finished, code: i32, words: &[&str]| {
        assert_eq!(sent.code, code, "{sent:#?}");
        assert!(words.iter().all(|word| sent.stderr.contains(word)), "{words:?}: {sent:#?}");
        scene.assert_stayed();
    };
    // A receiver that lets no disks in.
    let (_closed, address) = scene.b.receive(&[]);
    refused(scene.send(&address, &[]), 6, &["v.img", "--disks"]);
    let (_open, address) = scene.receive(&[]);
    refused(scene.a.run(&["send", "v", &address, "--copy-disk=w.img"]), 2, &["w.img", "v.img"]);
    refused(scene.send(&address, &["--post-copy"]), 2, &["--post-copy"]);
    // Not copied, and not the same file: the destination has one of that path that nobody has locked.
    let here = words(scene.image.parent().expect("a folder"));
    let (_same, address) = scene.b.receive(&["--disks", &here]);
    let other = scene.image.with_extension("other");
    let running = scene.image.with_extension("running");
    std::fs::copy(&scene.image, &other).expect("a copy");
    std::fs::rename(&scene.image, &running).expect("the guest's goes elsewhere");
    std::fs::rename(&other, &scene.image).expect("the copy takes its place");
    let sent = scene.a.run(&["send", "v", &address]);
    std::fs::rename(&running, &scene.image).expect("the guest's comes back");
    refused(sent, 6, &["v.img", "not the file"]);
    // No space: told before the first page.
    let (small, _mount) = small_folder(&scene.b, 8 << 20);
    File::options()
        .write(true)
        .open(&scene.image)
        .expect("the disk")
        .write_all_at(&[1; 10 << 20], 4 << 20)
        .ok();
    let (_full, address) = scene.b.receive(&["--disks", &words(&small)]);
    let sent = scene.send(&address, &[]);
    assert_eq!(sent.code, 6, "{sent:#?}");
    assert!(sent.stderr.contains("no space"), "{sent:#?}");
    assert_eq!(names(&small), Vec::<String>::new());
}

/// A folder on a file system of so many bytes, and what unmounts it.
fn small_folder(host: &Host, bytes: u64) -> (PathBuf, Mount) {
    let folder = host.path("small");
    std::fs::create_dir_all(&folder).expect("a folder");
    let options = format!("size={bytes}");
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "disks"]).arg(&folder).status();
    assert!(mount.is_ok_and(|status| status.success()), "no small file system could be mounted");
    (folder.clone(), Mount(folder))
}

struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.0).status().ok();
    }
}

#[test]
fn a_destination_that_runs_out_of_space_on_the_way_leaves_the_source_running() {
    if without_kvm("a_destination_that_runs_out_of_space_on_the_way_leaves_the_source_running") {
        return;
    }
    let scene = Scene::new("fill=24M ws=8M rate=20 seed=5");
    let (small, _mount) = small_folder(&scene.b, 4 << 20);
    let (mut receiver, address) = scene.b.receive(&["--disks", &words(&small)]);
    let mut sender = scene.a.start_held(&send(&address, &[]), "track");
    sender.wait_held();
    // There was room for what was there when it was offered.
    let file = File::options().write(true).open(&scene.image).expect("the disk");
    file.write_all_at(&[1; 8 << 20], 4 << 20).expect("room at the source");
    sender.signal(Signal::CONT);
    let sent = sender.finish();
    assert_ne!(sent.code, 0, "{sent:#?}");
    assert!(sent.stderr.contains("v.img") && sent.stderr.contains("space"), "{sent:#?}");
    scene.assert_stayed();
    assert_eq!(names(&small), Vec::<String>::new());
    assert!(receiver.is_running());
    scene.next_attempt_is_correct();
}

#[test]
fn whoever_dies_on_the_way_the_disk_is_whole_at_one_end() {
    if without_kvm("whoever_dies_on_the_way_the_disk_is_whole_at_one_end") {
        return;
    }
    for (phase, victim) in [
        ("rounds", "receiver"),
        ("state", "receiver"),
        ("rounds", "sender"),
        ("state", "sender"),
        ("ready", "destination's VMM"),
    ] {
        println!("the {victim} is killed when the sender enters {phase}");
        let scene = Scene::new(GUEST);
        let (receiver, address) = scene.receive(&[]);
        let mut sender = scene.a.start_held(&send(&address, &[]), phase);
        sender.wait_held();
        match victim {
            "receiver" => receiver.signal(Signal::KILL),
            "sender" => sender.signal(Signal::KILL),
            _ => {
                let pid = rustix::process::Pid::from_raw(scene.b.vm_pid("v")).expect("a pid");
                rustix::process::kill_process(pid, Signal::KILL).expect("the victim is there");
            }
        }
        sender.signal(Signal::CONT);
        assert_ne!(sender.finish().code, 0);
        scene.a.wait_phase("v", Some("running"));
        scene.assert_stayed();
        drop(receiver);
        scene.next_attempt_is_correct();
    }
}

#[test]
fn a_link_that_comes_back_goes_on_with_the_disk_too() {
    if without_kvm("a_link_that_comes_back_goes_on_with_the_disk_too") {
        return;
    }
    for phase in ["rounds", "freeze", "state"] {
        println!("the link is cut when the sender enters {phase}");
        let scene = Scene::new(GUEST);
        let (receiver, address) = scene.receive(&["--keep", "60s"]);
        let relay = Relay::start(&address, Weather::default(), 1);
        let mut sender = scene.a.start_held(&send(&relay.address(), &["--retry-for", "50s"]), phase);
        sender.wait_held();
        relay.cut(Way::Both);
        sender.signal(Signal::CONT);
        std::thread::sleep(Duration::from_secs(3));
        relay.mend();
        let sent = sender.finish();
        let sent = sent.success();
        assert_eq!(report(&sent)["resumes"], 1, "{phase}");
        receiver.finish().success();
        scene.a.wait_phase("v", None);
        scene.b.assert_sound("v");
    }
}

#[test]
fn memory_and_disk_of_a_checkpoint_are_of_one_instant() {
    if without_kvm("memory_and_disk_of_a_checkpoint_are_of_one_instant") {
        return;
    }
    let scene = Scene::new(GUEST);
    let store = words(&scene.a.path("store"));
    let mut ids = Vec::new();
    for _ in 0..3 {
        let done = scene.a.run(&["checkpoint", "v", "--store", &store]).success();
        let report = done.lines.last().expect("a report").clone();
        println!("{report}");
        ids.push(report["id"].as_str().expect("its name").to_owned());
        let before = written(&scene.a, "v");
        wait_for_writes(&scene.a, "v", before + 30);
    }
    scene.a.run(&["store", "verify", "--store", &store]).success();
    let restore = |id: &str, name: &str, more: &[&str]| {
        let folder = folder(&scene.b).join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let disks = words(&folder);
        let all = [&["restore", "--store", &store, id, "--name", name, "--disks", &disks][..], more].concat();
        scene.b.run(&all).success();
        scene.b.assert_sound(name);
        let before = written(&scene.b, name);
        wait_for_writes(&scene.b, name, before + 20);
        scene.b.assert_sound(name);
        folder.join("v.img")
    };
    let image = restore(&ids[2], "eager", &[]);
    assert!(is_locked(&image));
    assert!(image.metadata().expect("it").blocks() * 512 < DISK_BYTES, "holes are holes");
    restore(&ids[2], "lazy", &["--lazy"]);
    restore(&ids[0], "old", &[]);
    // Without a place for the disk, or with one that is taken, nothing is started.
    let taken = words(image.parent().expect("a folder"));
    for (more, word) in [(&[][..], "--disks"), (&["--disks", &taken][..], "there already")] {
        let refused = scene.b.run(&[&["restore", "--store", &store, "v", "--name", "no"][..], more].concat());
        assert_eq!(refused.code, 6, "{refused:#?}");
        assert!(refused.stderr.contains("v.img") && refused.stderr.contains(word), "{refused:#?}");
        assert_eq!(scene.b.phase("no"), None);
    }
    // What was restored is written down as a delta on what it came from, and a merged chain is as good.
    let again = scene.b.run(&["checkpoint", "eager", "--store", &store]).success();
    println!("{}", again.lines.last().expect("a report"));
    restore(again.lines.last().expect("a report")["id"].as_str().expect("its name"), "again", &[]);
    scene.a.run(&["store", "compact", "--store", &store, &ids[2]]).success();
    scene.a.run(&["store", "verify", "--store", &store]).success();
    restore("v@latest", "compacted", &[]);
    // The source goes on as if nothing had been, and its disk alone can be had as a file.
    scene.a.assert_sound("v");
    let out = scene.a.path("out");
    std::fs::create_dir_all(&out).expect("a folder");
    scene.a.run(&["store", "export", "--store", &store, "v@latest", "--disks", &words(&out)]).success();
    let exported = out.join("v.img").metadata().expect("the exported disk");
    assert!(exported.len() == DISK_BYTES && exported.blocks() * 512 < DISK_BYTES);
    scene
        .a
        .run(&["store", "export", "--store", &store, "v@latest", "--raw", &words(&out.join("v.raw"))])
        .success();
    assert_eq!(out.join("v.raw").metadata().expect("its memory").len(), 64 << 20);
}

#[test]
fn a_killed_lazy_restore_with_a_disk_is_taken_up() {
    if without_kvm("a_killed_lazy_restore_with_a_disk_is_taken_up") {
        return;
    }
    let scene = Scene::new(GUEST);
    let store = words(&scene.a.path("store"));
    scene.a.run(&["checkpoint", "v", "--store", &store]).success();
    let disks = words(&scene.there);
    let arguments = ["restore", "--store", &store, "v", "--disks", &disks, "--lazy"];
    let mut lazy = scene.b.start_held(&arguments, "stream");
    lazy.wait_held();
    // The disk is whole already, memory is not.
    assert_eq!(names(&scene.there), ["v.img"]);
    assert!(scene.b.vms()[0]["awaiting_pages"].as_u64() > Some(1000), "{:?}", scene.b.vms());
    lazy.signal(Signal::KILL);
    lazy.finish();
    scene.b.run(&["restore", "--store", &store, "v", "--resume", "v"]).success();
    scene.b.assert_sound("v");
    let before = written(&scene.b, "v");
    wait_for_writes(&scene.b, "v", before + 20);
    scene.b.assert_sound("v");
}
