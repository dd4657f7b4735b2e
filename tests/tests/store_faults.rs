//! Stores that are read-only, sealed with another key, of a newer release, or have a link missing, and machines that a host cannot be: said
//! in words, with an exit code, and never a VM that should not run or one that should and does not.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Finished, Host, Running, says, trusting_pair, without_kvm};
use migrate::store::LocalStore;
use migrate::vault::Vault;
use protocol::checkpoint::manifest::Manifest;
use protocol::checkpoint::name::CheckpointId;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::state::Machine;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

const GUEST: &str = "fill=16M ws=4M rate=10 pattern=uniform seed=5";

/// A host, a guest `v` that writes, and the place of a store with checkpoints of it, the newest last.
struct Scene {
    host: Host,
    store: String,
    ids: Vec<String>,
}

impl Scene {
    fn new(checkpoints: usize) -> Self {
        Self::on(Host::new(Path::new(PROGRAM)), checkpoints, &[])
    }

    fn on(host: Host, checkpoints: usize, more: &[&str]) -> Self {
        host.run_ledger("v", "64MiB", GUEST, &[]);
        host.wait_ledger_running("v");
        let store = host.path("store").to_string_lossy().into_owned();
        let take = |_| {
            let words = [&["checkpoint", "v", "--store", &store][..], more].concat();
            let taken = host.run(&words).success();
            taken.event("checkpoint").unwrap()["id"].as_str().unwrap().to_owned()
        };
        let ids = (0..checkpoints).map(take).collect();
        Self { host, store, ids }
    }

    fn run(&self, words: &[&str], more: &[&str]) -> Finished {
        self.host.run(&[words, &["--store", &self.store], more].concat())
    }

    fn file(&self, object: &str) -> PathBuf {
        Path::new(&self.store).join(object)
    }

    /// That a checkpoint runs, and is what it was.
    fn restores(&self, id: &str, more: &[&str]) {
        self.run(&["restore", id, "--name", "r"], more).success();
        self.host.assert_sound("r");
        self.host.run(&["vm", "stop", "r"]).success();
        self.host.wait_phase("r", None);
        // Its socket is gone before its process is, which gives its memory back first.
        let until = Instant::now() + self.host.step_limit();
        while let Some(pid) = self.host.find_vm_pid("r") {
            assert!(Instant::now() < until, "process {pid} of the stopped VM is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// That a restore ends with this code and these words, and that nothing runs then.
    fn refuses(&self, id: &str, more: &[&str], code: i32, words: &[&str]) {
        for lazy in [&[][..], &["--lazy"]] {
            says(&self.run(&["restore", id, "--name", "r"], &[more, lazy].concat()), code, words);
            assert_eq!((self.host.phase("r"), self.host.find_vm_pid("r")), (None, None));
        }
    }
}

/// Names of the checkpoints that a list shows as whole, and of those that it does not.
fn listed(finished: Finished) -> (Vec<String>, Vec<String>) {
    let lines = finished.success().lines;
    let (wrong, good): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| line["wrong"].is_string());
    let ids = |lines: Vec<serde_json::Value>| {
        let mut ids: Vec<_> = lines.iter().map(|line| line["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    (ids(good), ids(wrong))
}

#[test]
fn a_read_only_store_takes_no_checkpoint_and_gives_all_it_has() {
    if without_kvm("a_read_only_store_takes_no_checkpoint_and_gives_all_it_has") {
        return;
    }
    let scene = Scene::new(1);
    // In a mount namespace of its own: nobody else's store becomes read-only, and nothing is left behind.
    let read_only = |words: &[&str], more: &[&str]| {
        const MOUNT: &str = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
        let inner = scene.host.command(&[words, &["--store", &scene.store], more].concat());
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", MOUNT, &scene.store])
            .arg(inner.get_program())
            .args(inner.get_args());
        Running::start(command).finish()
    };
    let taken = read_only(&["checkpoint", "v"], &[]);
    says(&taken, 12, &[&scene.store, "ead-only", "another store"]);
    let series = read_only(&["checkpoint", "v"], &["--every", "1s"]);
    says(&series, 12, &[&scene.store, "ead-only"]);
    scene.host.assert_sound("v");
    for verb in [&["store", "gc"][..], &["store", "prune", "--keep-last", "1"], &["store", "compact", "v"]] {
        says(&read_only(verb, &[]), 12, &[&scene.store, "ead-only"]);
    }
    assert_eq!(listed(read_only(&["store", "list"], &[])).0, scene.ids);
    read_only(&["store", "verify"], &[]).success();
    read_only(&["store", "gc"], &["--dry-run"]).success();
    for lazy in [&[][..], &["--lazy"]] {
        read_only(&["restore", &scene.ids[0], "--name", "r"], lazy).success();
        scene.host.assert_sound("r");
        scene.host.run(&["vm", "stop", "r"]).success();
        scene.host.wait_phase("r", None);
    }
    // The next one misses nothing.
    scene.run(&["checkpoint", "v"], &[]).success();
    scene.restores("v", &[]);
}

#[test]
fn a_missing_link_and_newer_releases_are_named_and_the_rest_is_there() {
    if without_kvm("a_missing_link_and_newer_releases_are_named_and_the_rest_is_there") {
        return;
    }
    let scene = Scene::new(3);
    let [full, delta, newest] = [0, 1, 2].map(|number| scene.ids[number].as_str());
    let newer = |object: &str| {
        let path = scene.file(object);
        let old = std::fs::read(&path).unwrap();
        let mut bytes = old.clone();
        bytes[8] = 2;
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        move || std::fs::write(path, old).unwrap()
    };
    let manifest = |id: &str| format!("checkpoints/{id}");

    let parent = scene.file(&manifest(delta));
    let away = scene.host.path("away");
    std::fs::rename(&parent, &away).unwrap();
    scene.refuses(newest, &[], 12, &[newest, delta]);
    let verified = scene.run(&["store", "verify"], &[]);
    assert_eq!(verified.code, 12, "{verified:#?}");
    assert_eq!(verified.event("verified").unwrap()["lost"], serde_json::json!([newest]), "{verified:#?}");
    let (good, wrong) = listed(scene.run(&["store", "list"], &[]));
    assert_eq!((good, wrong), (vec![full.to_owned()], vec![newest.to_owned()]));
    scene.restores(full, &[]);
    // What its baseline stands on is gone: the running guest's next one says so, and stands alone.
    let next = scene.run(&["checkpoint", "v"], &[]).success();
    assert!(next.event("checkpoint").unwrap()["parent"].is_null(), "{next:#?}");
    std::fs::rename(&away, &parent).unwrap();
    scene.restores(newest, &[]);

    let mend = newer(&manifest(delta));
    scene.refuses(delta, &[], 12, &[delta, "version 2"]);
    scene.refuses(newest, &[], 12, &[newest, delta]);
    let verified = scene.run(&["store", "verify"], &[]);
    assert_eq!(verified.code, 12, "{verified:#?}");
    let (good, wrong) = listed(scene.run(&["store", "list"], &[]));
    assert!(good.contains(&full.to_owned()) && wrong.contains(&delta.to_owned()), "{good:?} {wrong:?}");
    mend();

    let mend = newer("store.json");
    scene.refuses(full, &[], 12, &["store.json", "version 2"]);
    for words in [&["checkpoint", "v"][..], &["store", "list"], &["store", "verify"], &["store", "gc"]] {
        says(&scene.run(words, &[]), 12, &["store.json", "version 2"]);
    }
    scene.host.assert_sound("v");
    mend();
    scene.run(&["store", "verify"], &[]).success();
}

#[test]
fn a_sealed_store_opens_to_its_key_alone() {
    if without_kvm("a_sealed_store_opens_to_its_key_alone") {
        return;
    }
    let host = Host::new(Path::new(PROGRAM));
    let path = |name: &str| host.path(name).to_string_lossy().into_owned();
    let (key, other, plain) = (path("key"), path("other-key"), path("plain"));
    for key in [&key, &other] {
        host.run(&["store", "key", key]).success();
    }
    let scene = Scene::on(host, 2, &["--encrypt", &key]);
    let newest = scene.ids[1].as_str();
    for (more, words) in
        [(&[][..], "--encrypt"), (&["--encrypt", &other], "another key"), (&["--encrypt", &plain], "plain")]
    {
        scene.refuses(newest, more, if words == "plain" { 5 } else { 2 }, &[words]);
        for verb in [&["checkpoint", "v"][..], &["store", "list"], &["store", "verify"]] {
            let refused = scene.run(verb, more);
            says(&refused, if words == "plain" { 5 } else { 2 }, &[words]);
        }
    }
    scene.host.assert_sound("v");
    scene.restores(newest, &["--encrypt", &key]);
    scene.run(&["store", "verify", "--encrypt", &key], &[]).success();
    scene.host.run(&["checkpoint", "v", "--store", &plain]).success();
    let refused = scene.host.run(&["restore", "--store", &plain, "v", "--name", "r", "--encrypt", &key]);
    says(&refused, 2, &["not sealed", "--encrypt"]);
    assert_eq!(scene.host.phase("r"), None);
}

#[test]
fn a_move_counts_from_a_sealed_checkpoint_with_its_key_and_sends_everything_without() {
    if without_kvm("a_move_counts_from_a_sealed_checkpoint_with_its_key_and_sends_everything_without") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    let (key, other) = (a.path("key"), a.path("other-key"));
    let (key, other) = (key.to_string_lossy(), other.to_string_lossy());
    for key in [&key, &other] {
        a.run(&["store", "key", key]).success();
    }
    let scene = Scene::on(a, 1, &["--encrypt", &key]);
    let seed = ["--seed-from", &scene.store, "--seed-key"];
    let refused = b.run(&[&["receive", "--listen", "127.0.0.1:0"], &seed[..], &[&other]].concat());
    says(&refused, 2, &["another key"]);
    for (with, seeded) in [(&other, false), (&key, true)] {
        let (receiver, address) = b.receive(&[&seed[..], &[&key]].concat());
        let sent = scene.host.run(&[&["send", "v", &address], &seed[..], &[with]].concat()).success();
        receiver.finish().success();
        let pages = sent.event("report").unwrap()["seeded_pages"].as_u64().unwrap();
        assert_eq!(pages > 1000, seeded, "{pages} pages: {sent:#?}");
        assert_eq!(sent.stderr.contains("another key"), !seeded, "{sent:#?}");
        b.assert_sound("v");
        b.run(&["vm", "stop", "v"]).success();
        b.wait_phase("v", None);
        if !seeded {
            scene.run(&["restore", &scene.ids[0], "--encrypt", &key], &[]).success();
            scene.host.wait_ledger_running("v");
        }
    }
}

#[test]
fn a_guest_is_not_started_where_the_processor_lacks_what_it_uses() {
    if without_kvm("a_guest_is_not_started_where_the_processor_lacks_what_it_uses") {
        return;
    }
    let scene = Scene::new(1);
    // A checkpoint of the same guest on a host with every feature that CPUID has a bit for in this word.
    let vault = Vault::open(Arc::new(LocalStore::new(Path::new(&scene.store))), None).unwrap();
    let old = vault.manifest(scene.ids[0].parse().unwrap()).unwrap().manifest;
    let (machine, state) = vault.state(&old).unwrap();
    let (mut machine, devices) = Machine::decode(&machine).unwrap();
    let word = machine.cpuid.iter_mut().find(|leaf| leaf.function == 7 && leaf.index == 0).unwrap();
    word.ebx = u32::MAX;
    let id = CheckpointId::new(old.id.unix_s(), 0x00c0_ffee);
    let index = vault.put_index(id, &vault.index(&old).unwrap()).unwrap();
    let state = vault.put_state(id, &machine.encode(&devices).unwrap(), &state).unwrap();
    let lease = vault.store().lock("a test").unwrap();
    vault.commit(&*lease, Manifest { id, index, state, ..old }).unwrap();
    drop(lease);
    let id = id.to_string();
    scene.refuses(&id, &[], 6, &[&id, "CPU", "lacks"]);
    scene.run(&["store", "verify"], &[]).success();
    scene.restores(&scene.ids[0], &[]);
}
