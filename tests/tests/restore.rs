//! Checkpoints of running guests, restored: with all of their memory, or before it is there.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Finished, Host, without_kvm};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// A host, a guest `v` that writes 40 MB/s to 32 MiB and checks what it wrote, and a chain of checkpoints of it.
struct Scene {
    host: Host,
    store: String,
    ids: Vec<String>,
}

impl Scene {
    fn new(deltas: usize) -> Self {
        let host = Host::new(Path::new(PROGRAM));
        host.run_ledger("v", "256MiB", "fill=96M ws=32M rate=40", &[]);
        host.wait_ledger_running("v");
        let store = host.path("store").to_string_lossy().into_owned();
        let mut scene = Self { host, store, ids: Vec::new() };
        (0..=deltas).for_each(|_| scene.checkpoint());
        scene
    }

    fn checkpoint(&mut self) {
        let done = self.host.run(&["checkpoint", "v", "--store", &self.store]).success();
        let report = done.lines.last().expect("a report");
        self.ids.push(report["id"].as_str().expect("its name").to_owned());
    }

    fn newest(&self) -> &str {
        self.ids.last().expect("a checkpoint")
    }

    fn arguments<'a>(&'a self, id: &'a str, name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut arguments = vec!["restore", "--store", &self.store, id, "--name", name];
        arguments.extend(more);
        arguments
    }

    fn restore(&self, id: &str, name: &str, more: &[&str]) -> Finished {
        self.host.run(&self.arguments(id, name, more))
    }

    /// The files of page data.
    fn segments(&self) -> Vec<PathBuf> {
        let folders = std::fs::read_dir(Path::new(&self.store).join("data")).expect("the data");
        let files = folders.flatten().flat_map(|folder| std::fs::read_dir(folder.path()).expect("objects"));
        let named = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("segment-"))
        };
        files.flatten().map(|file| file.path()).filter(named).collect()
    }
}

fn report(finished: &Finished) -> &Value {
    &finished.event("restored").expect("what was restored")["report"]
}

fn awaiting(host: &Host, name: &str) -> Option<u64> {
    host.vms().iter().find(|vm| vm["name"] == name)?["awaiting_pages"].as_u64()
}

#[test]
fn a_restored_guest_is_sound_and_so_is_a_second_one_at_once() {
    if without_kvm("a_restored_guest_is_sound_and_so_is_a_second_one_at_once") {
        return;
    }
    let scene = Scene::new(1);
    let second = scene.host.start(&scene.arguments(scene.newest(), "w", &["--lazy"]));
    let first = scene.restore(scene.newest(), "u", &[]).success();
    let second = second.finish().success();
    println!("eager: {}\nlazy: {}", report(&first), report(&second));
    assert!(report(&first)["data_pages"].as_u64() > Some(20_000));
    for name in ["u", "v", "w"] {
        scene.host.assert_sound(name);
        assert_eq!(awaiting(&scene.host, name), None);
    }
    // Under its own name, once that is free, and by the full one alone.
    let taken = scene.host.run(&["restore", "--store", &scene.store]);
    assert_eq!(taken.code, 6, "{taken:#?}");
    assert!(taken.stderr.contains("--name"), "{taken:#?}");
    scene.host.run(&["vm", "stop", "v"]).success();
    scene.host.wait_phase("v", None);
    let full = scene.host.run(&["restore", "--store", &scene.store, &scene.ids[0]]).success();
    assert_eq!(report(&full)["links"], 1);
    scene.host.assert_sound("v");
}

#[test]
fn a_chain_of_ten_deltas_is_restored_on_another_host() {
    if without_kvm("a_chain_of_ten_deltas_is_restored_on_another_host") {
        return;
    }
    let scene = Scene::new(10);
    let other = Host::new(Path::new(PROGRAM));
    for lazy in [false, true] {
        let mut arguments = vec!["restore", "--store", &scene.store, "v"];
        arguments.extend(lazy.then_some("--lazy"));
        let restored = other.run(&arguments).success();
        println!("{}", report(&restored));
        assert_eq!(report(&restored)["links"], 11);
        other.assert_sound("v");
        other.run(&["vm", "stop", "v"]).success();
        other.wait_phase("v", None);
    }
}

#[test]
fn what_is_restored_can_be_checkpointed_and_restored_again() {
    if without_kvm("what_is_restored_can_be_checkpointed_and_restored_again") {
        return;
    }
    for lazy in [&["--lazy"][..], &[]] {
        let scene = Scene::new(1);
        let (mut from, mut pages) = (scene.newest().to_owned(), Vec::new());
        for (guest, next) in [("u", "w"), ("w", "x")] {
            if guest == "u" {
                scene.restore(&from, guest, lazy).success();
            }
            // It is tracked from its first instruction on: what it lacks is what it wrote.
            let done = scene.host.run(&["checkpoint", guest, "--store", &scene.store]).success();
            let delta = done.lines.last().expect("a report");
            assert_eq!(delta["parent"].as_str(), Some(from.as_str()), "{delta}");
            pages.push(delta["dirty_pages"].as_u64().expect("what was written"));
            from = delta["id"].as_str().expect("its name").to_owned();
            scene.restore(&from, next, lazy).success();
            scene.host.assert_sound(next);
        }
        println!("lazy {lazy:?}: deltas of {pages:?} pages");
        // The guest has 96 MiB and writes 32 of them.
        assert!(pages.iter().all(|pages| (1..20_000).contains(pages)), "{pages:?}");
        for guest in ["u", "v", "w", "x"] {
            scene.host.assert_sound(guest);
        }
    }
}

#[test]
fn a_killed_lazy_restore_is_taken_up() {
    if without_kvm("a_killed_lazy_restore_is_taken_up") {
        return;
    }
    let scene = Scene::new(1);
    let mut lazy = scene.host.start_held(&scene.arguments(scene.newest(), "u", &["--lazy"]), "stream");
    lazy.wait_held();
    assert!(awaiting(&scene.host, "u") > Some(10_000), "{:?}", scene.host.vms());
    let early = scene.host.run(&["restore", "--store", &scene.store, scene.newest(), "--resume", "u"]);
    assert_eq!(early.code, 4, "one that is held by another: {early:#?}");
    lazy.signal(Signal::KILL);
    lazy.finish();
    let wrong = scene.host.run(&["restore", "--store", &scene.store, &scene.ids[0], "--resume", "u"]);
    assert_eq!(wrong.code, 4, "{wrong:#?}");
    assert!(wrong.stderr.contains("was not restored from checkpoint"), "{wrong:#?}");
    scene.host.run(&["restore", "--store", &scene.store, scene.newest(), "--resume", "u"]).success();
    assert_eq!(awaiting(&scene.host, "u"), None);
    scene.host.assert_sound("u");
    let again = scene.host.run(&["restore", "--store", &scene.store, scene.newest(), "--resume", "u"]);
    assert_eq!(again.code, 4, "{again:#?}");
}

#[test]
fn a_store_that_fails_under_a_running_guest_is_waited_for() {
    if without_kvm("a_store_that_fails_under_a_running_guest_is_waited_for") {
        return;
    }
    let scene = Scene::new(0);
    let mut lazy = scene.host.start_held(&scene.arguments(scene.newest(), "u", &["--lazy"]), "stream");
    lazy.wait_held();
    // The files that are open already are cut, the others gone.
    let away = Path::new(&scene.store).join("away");
    std::fs::create_dir(&away).expect("a directory");
    let kept: Vec<_> = scene
        .segments()
        .into_iter()
        .zip(0..)
        .map(|(path, number)| {
            let copy = away.join(format!("{number}"));
            std::fs::copy(&path, &copy).expect("a copy");
            std::fs::File::options()
                .write(true)
                .open(&path)
                .and_then(|file| file.set_len(1000))
                .expect("a cut file");
            (path, copy)
        })
        .collect();
    lazy.signal(Signal::CONT);
    let trouble = lazy.wait_event("store-trouble");
    let reason = trouble["reason"].as_str().expect("a reason");
    assert!(reason.contains(scene.newest()) && reason.contains("segment-"), "{trouble}");
    assert!(awaiting(&scene.host, "u") > Some(0));
    for (path, copy) in kept {
        std::fs::remove_file(&path).expect("the cut file goes");
        std::fs::rename(copy, path).expect("the whole file is back");
    }
    let restored = lazy.finish().success();
    assert!(report(&restored)["lazily"]["failed_reads"].as_u64() > Some(0));
    scene.host.assert_sound("u");
}

#[test]
fn damage_and_want_of_memory_start_nothing() {
    if without_kvm("damage_and_want_of_memory_start_nothing") {
        return;
    }
    let scene = Scene::new(0);
    let small = scene.restore(scene.newest(), "u", &["--max-memory", "255MiB"]);
    assert_eq!(small.code, 6, "{small:#?}");
    assert!(small.stderr.contains(scene.newest()), "{small:#?}");
    let path = scene.segments().remove(0);
    let mut bytes = std::fs::read(&path).expect("a segment");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::remove_file(&path).and_then(|()| std::fs::write(&path, bytes)).expect("a damaged segment");
    let damaged = scene.restore(scene.newest(), "u", &[]);
    assert_eq!(damaged.code, 12, "{damaged:#?}");
    assert!(damaged.stderr.contains(scene.newest()) && damaged.stderr.contains("segment-"), "{damaged:#?}");
    std::fs::remove_file(&path).expect("a missing segment");
    for lazy in [&["--lazy"][..], &[]] {
        let missing = scene.restore(scene.newest(), "u", lazy);
        assert_eq!(missing.code, 12, "{missing:#?}");
        assert!(missing.stderr.contains(scene.newest()), "{missing:#?}");
    }
    assert_eq!(scene.host.phase("u"), None);
    assert_eq!(scene.host.find_vm_pid("u"), None);
}
