//! Real process trees under runc and CRIU move between two hosts, and say themselves that nothing was lost.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::containers::{End, Network, Yard};
use e2e::network::{Street, without_root};
use e2e::says;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");
const TENANT: &str = env!("CARGO_BIN_EXE_tenant");
const COURIER: &str = env!("CARGO_BIN_EXE_courier");
const COUNTER: &str = env!("CARGO_BIN_EXE_counter");
const HOUSEHOLD: &str = env!("CARGO_BIN_EXE_household");
const TRAINER: &str = env!("CARGO_BIN_EXE_trainer");

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// Pages that so many MiB are.
fn pages_of(mib: u64) -> u64 {
    (mib << 20) / 4096
}

/// Pages that were sent in the first round of a move, and while the container stood still.
fn sent_pages(report: &Value) -> (u64, u64) {
    let rounds = report["rounds"].as_array().expect("rounds");
    let pages = |round: Option<&Value>| round.and_then(|round| round["sent_pages"].as_u64()).expect("pages");
    assert!(rounds.len() > 1, "{report:#}");
    (pages(rounds.first()), pages(rounds.last()))
}

#[test]
fn a_busy_process_moves_there_and_back_and_again() {
    if without_root("a_busy_process_moves_there_and_back_and_again") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let first = Yard::name();
    a.yard.start(&first, Path::new(TENANT), "64 2000");
    let mut name = first.clone();
    for round in 0..5 {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let next = Yard::name();
        let report = from.moves(to, &name, &next, &[]);
        // Everything once, and at the end only what was written meanwhile.
        let (first_round, last_round) = sent_pages(&report);
        assert!(first_round > pages_of(64) && last_round < pages_of(64) / 2, "{report:#}");
        a.yard.assert_sound(&first);
        name = next;
    }
}

#[test]
fn a_tree_of_processes_moves() {
    if without_root("a_tree_of_processes_moves") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.start(&id, Path::new(TENANT), "16 500 3");
    a.yard.wait(&id, "writes", |word| word.written > 10);
    assert_eq!(a.yard.words(&id).len(), 4);
    a.moves(&b, &id, &name, &[]);
    a.yard.assert_sound(&id);
}

#[test]
fn threads_pipes_sockets_timers_and_locks_move() {
    if without_root("threads_pipes_sockets_timers_and_locks_move") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let id = Yard::name();
    a.yard.run(&id, Path::new(HOUSEHOLD), "", &Network::Own);
    // All of them go on, and nothing is wrong.
    let goes_on = |yard: &Yard, name: &str, from: &[u64]| {
        let until = Instant::now() + LIMIT;
        loop {
            let now: Vec<u64> = yard.record(name).iter().filter_map(|word| word.parse().ok()).collect();
            let [ref counted @ .., wrong] = now[..] else {
                assert!(Instant::now() < until, "waited a minute for its first word");
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            assert_eq!(wrong, 0, "{now:?}");
            if counted.iter().zip(from).all(|(now, before)| *now > before + 20) {
                return now;
            }
            assert!(Instant::now() < until, "waited a minute until it goes on: {now:?} behind {from:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let mut last = goes_on(&a.yard, &id, &[0; 3]);
    let mut name = id;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let next = Yard::name();
        // With its files: where both ends see one file, its lock is the source's until that has ended.
        from.moves(to, &name, &next, &["--copy-rootfs"]);
        last = goes_on(&to.yard, &next, &last);
        name = next;
    }
}

#[test]
fn pages_are_compared_where_the_kernel_does_not_tell() {
    if without_root("pages_are_compared_where_the_kernel_does_not_tell") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let id = Yard::name();
    a.yard.start(&id, Path::new(TENANT), "32 1000 1");
    let mut name = id.clone();
    for (from, to) in [(&a, &b), (&b, &a)] {
        let next = Yard::name();
        let report = from.moves(to, &name, &next, &["--tracking", "digests"]);
        assert_eq!(report["tracking"], "blake3-digests");
        let (first_round, last_round) = sent_pages(&report);
        assert!(first_round > pages_of(64) && last_round < pages_of(64) / 2, "{report:#}");
        a.yard.assert_sound(&id);
        name = next;
    }
}

#[test]
fn what_cannot_arrive_is_refused_and_runs_on() {
    if without_root("what_cannot_arrive_is_refused_and_runs_on") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.start(&id, Path::new(TENANT), "4 100");
    let runs_on = || {
        assert_eq!(a.yard.status(&id).as_deref(), Some("running"));
        assert_eq!(b.yard.status(&name), None);
        assert!(!b.yard.bundles().join(&name).exists(), "nothing is left of it");
        a.yard.assert_sound(&id);
    };
    let own = a.yard.arguments();
    let send =
        |id: &str, address: &str| a.host.run(&End::arguments(&own, &["send", "--container", id, address]));
    says(&send("nobody", "127.0.0.1:1"), 4, &["nobody"]);

    // A host that takes no containers.
    let (receiver, address) = b.host.receive(&["--once"]);
    says(&send(&id, &address), 6, &["--containers"]);
    drop(receiver);
    runs_on();

    // One where its files are not.
    let mut receives = b.receives(&name);
    receives.extend(["--rootfs".into(), "/nowhere".into()]);
    let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    says(&send(&id, &address), 6, &["/nowhere"]);
    drop(receiver);
    runs_on();

    // One where they are others: CRIU finds that out when it has everything, and the container has been promised.
    let empty = b.host.path("empty");
    std::fs::create_dir_all(empty.join("proc")).expect("a directory");
    let mut receives = b.receives(&name);
    receives.extend(["--rootfs".into(), empty.to_string_lossy().into_owned()]);
    let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    let sent = send(&id, &address);
    assert_ne!(sent.code, 0, "{sent:#?}");
    drop(receiver);
    runs_on();

    let (sent, received) = a.send(&b, &id, &name, &[]);
    sent.success();
    received.success();
    a.yard.assert_sound(&id);
}

#[test]
fn a_container_with_a_user_namespace_moves_where_its_memory_can_be_filled() {
    if without_root("a_container_with_a_user_namespace_moves_where_its_memory_can_be_filled") {
        return;
    }
    const OWNER: u32 = 100_000;
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.make(&id, Path::new(TENANT), "8 300", &Network::Own);
    let bundle = a.yard.bundle(&id);
    let path = bundle.join("config.json");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(&path).expect("it is there")).expect("JSON");
    config["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "user"}));
    let mappings = json!([{"containerID": 0, "hostID": OWNER, "size": 65536}]);
    config["linux"]["uidMappings"] = mappings.clone();
    config["linux"]["gidMappings"] = mappings;
    std::fs::write(&path, config.to_string()).expect("it is written");
    // Its own root must be able to come to its files.
    let owner = format!("{OWNER}:{OWNER}");
    let given = Command::new("chown").args(["-R", &owner]).arg(bundle.join("rootfs")).status();
    assert!(given.is_ok_and(|status| status.success()));
    for folder in [bundle.parent().expect("a folder"), &bundle] {
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder, open).expect("it is ours");
    }
    a.yard.go(&id);
    a.yard.wait(&id, "writes", |word| word.written > 10);
    let (receives, own) = (b.receives(&name), a.yard.arguments());
    let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    let sent = a.host.run(&End::arguments(&own, &["send", "--container", &id, &address]));
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").expect("it is there");
    match allowed.trim() {
        "1" => {
            sent.success();
            receiver.finish().success();
        }
        _ => {
            println!("SKIPPED: the move itself: it needs sysctl vm.unprivileged_userfaultfd=1");
            says(&sent, 6, &["vm.unprivileged_userfaultfd=1"]);
            assert_eq!(a.yard.status(&id).as_deref(), Some("running"));
        }
    }
    a.yard.assert_sound(&id);
}

#[test]
fn whoever_is_killed_the_container_is_on_one_side() {
    if without_root("whoever_is_killed_the_container_is_on_one_side") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.start(&id, Path::new(TENANT), "8 300");
    let runs_on = || {
        let until = Instant::now() + LIMIT;
        while a.yard.status(&id).as_deref() != Some("running") {
            assert!(Instant::now() < until, "waited a minute until it goes on: {:?}", a.yard.status(&id));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(b.yard.status(&name), None);
        a.yard.assert_sound(&id);
        assert_eq!(a.host.run(&["recover"]).success().lines.len(), 0, "nothing is in doubt");
    };
    let (own, receives) = (a.yard.arguments(), b.receives(&name));
    let held = |phase: &str| {
        let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
        let words = ["send", "--container", &id, &address];
        let mut sender = a.host.start_held(&End::arguments(&own, &words), phase);
        sender.wait_held();
        (sender, receiver)
    };

    // Two at once cannot have it.
    let (sender, receiver) = held("rounds");
    let words = ["send", "--container", &id, "127.0.0.1:1"];
    says(&a.host.run(&End::arguments(&own, &words)), 4, &["already"]);
    sender.signal(Signal::KILL);
    drop((sender, receiver));
    runs_on();

    // While it stands still, before anything was promised: it goes on by itself.
    for phase in ["rounds", "freeze", "state", "ready"] {
        let (sender, receiver) = held(phase);
        sender.signal(Signal::KILL);
        drop((sender, receiver));
        runs_on();
    }

    // The same, and whoever would have let it go on is killed, too.
    let (sender, receiver) = held("state");
    assert_eq!(a.yard.status(&id).as_deref(), Some("paused"));
    assert!(a.host.kill_keeper(&id));
    sender.signal(Signal::KILL);
    drop((sender, receiver));
    assert_eq!(a.yard.status(&id).as_deref(), Some("paused"));
    let listed = a.host.run(&["recover"]).success().lines;
    assert_eq!(
        (listed[0]["name"].as_str(), listed[0]["phase"].as_str()),
        (Some(id.as_str()), Some("frozen"))
    );
    a.host.run(&["recover", &id]).success();
    runs_on();

    // When it was promised, it stands still until the other end has said that it will never start it.
    let mut receives = b.receives(&name);
    receives.retain(|word| word != "--once");
    let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    let words = ["send", "--container", &id, &address];
    let mut sender = a.host.start_held(&End::arguments(&own, &words), "commit");
    sender.wait_held();
    sender.signal(Signal::KILL);
    drop(sender);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(a.yard.status(&id).as_deref(), Some("paused"));
    says(&a.host.run(&End::arguments(&own, &words)), 4, &["migrate recover"]);
    let settled = a.host.run(&["recover", &id]).success();
    assert_eq!(settled.event("settled").expect("settled")["outcome"], "discarded");
    drop(receiver);
    runs_on();

    // The receiver, when it has everything.
    let (mut receiver, address) = b.host.receive_held(&End::arguments(&b.receives(&name), &[]), "ready");
    let words = ["send", "--container", &id, &address];
    let sender = a.host.start(&End::arguments(&own, &words));
    receiver.wait_held();
    receiver.signal(Signal::KILL);
    drop(receiver);
    assert_ne!(sender.finish().code, 0);
    runs_on();

    let (sent, received) = a.send(&b, &id, &name, &[]);
    sent.success();
    received.success();
    a.yard.assert_sound(&id);
}

#[test]
fn a_series_of_checkpoints_has_what_was_written_and_each_can_be_restored() {
    if without_root("a_series_of_checkpoints_has_what_was_written_and_each_can_be_restored") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let id = Yard::name();
    a.yard.start(&id, Path::new(TENANT), "32 200 1");
    let store = a.host.path("store").to_string_lossy().into_owned();
    let own = a.yard.arguments();
    let words = ["checkpoint", "--container", &id, "--store", &store, "--every", "1s"];
    let mut series = a.host.start(&End::arguments(&own, &words));
    let taken: Vec<Value> = (0..4).map(|_| series.wait_event("checkpoint")).collect();
    series.signal(Signal::INT);
    series.finish();
    a.yard.assert_sound(&id);
    let pages = |taken: &Value| taken["data_pages"].as_u64().expect("pages");
    assert!(taken[0]["parent"].is_null() && pages(&taken[0]) > 2 * (32 << 20) / 4096, "{:#}", taken[0]);
    for delta in &taken[1..] {
        assert!(delta["parent"].is_string() && pages(delta) < pages(&taken[0]) / 4, "{delta:#}");
    }
    a.yard.end(&id);
    for (taken, name) in taken.iter().zip([(); 4].map(|()| Yard::name())) {
        let checkpoint = taken["id"].as_str().expect("its id");
        let (bundles, own) = (b.yard.bundles().to_string_lossy().into_owned(), b.yard.arguments());
        let words = ["restore", "--store", &store, checkpoint, "--name", &name, "--containers", &bundles];
        b.host.run(&End::arguments(&own, &words)).success();
        assert_eq!(b.yard.status(&name).as_deref(), Some("running"));
        a.yard.assert_sound(&id);
        b.yard.end(&name);
    }
}

/// Three containers that talk to each other are written down as a group; one is killed, all are restored. Answers how many messages were wrong then.
fn wrong_messages_of_a_restored_group(more: &[&str]) -> u64 {
    let (a, b) = End::pair(Path::new(PROGRAM));
    // Ports that are free now; nobody but this test asks for them by number.
    let sockets = [(); 3].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").expect("a port"));
    let ports = sockets.each_ref().map(|socket| socket.local_addr().expect("an address").port());
    drop(sockets);
    let ids = [(); 3].map(|()| Yard::name());
    for (at, id) in ids.iter().enumerate() {
        a.yard.run(
            id,
            Path::new(COURIER),
            &format!("{} {} {}", ports[at], ports[(at + 1) % 3], [0, 0, 600][at]),
            &Network::Shared,
        );
    }
    let received =
        |id: &String| a.yard.record(id).get(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    let wait = |least: u64| {
        let until = Instant::now() + LIMIT;
        while ids.iter().any(|id| received(id) < least) {
            assert!(Instant::now() < until, "waited a minute for {least} messages");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait(50);
    let store = a.host.path("store").to_string_lossy().into_owned();
    let own = a.yard.arguments();
    let mut words = vec!["checkpoint", "--container", "--group", "ring", "--store", &store];
    words.extend(ids.iter().map(String::as_str));
    words.extend(more);
    a.host.run(&End::arguments(&own, &words)).success();
    wait(ids.iter().map(received).max().unwrap_or(0) + 20);
    ids.iter().for_each(|id| a.yard.end(id));
    let (bundles, own) = (b.yard.bundles().to_string_lossy().into_owned(), b.yard.arguments());
    let words = ["restore", "--store", &store, "--group", "ring", "--containers", &bundles];
    b.host.run(&End::arguments(&own, &words)).success();
    // What they say now they say of what they did since.
    std::thread::sleep(Duration::from_millis(500));
    wait(ids.iter().map(received).max().unwrap_or(0) + 20);
    let wrong =
        |id: &String| a.yard.record(id).get(2).and_then(|word| word.parse::<u64>().ok()).expect("a record");
    let wrong = ids.iter().map(wrong).sum();
    ids.iter().for_each(|id| b.yard.end(id));
    wrong
}

#[test]
fn containers_of_a_group_agree_on_every_message() {
    if without_root("containers_of_a_group_agree_on_every_message") {
        return;
    }
    assert_eq!(wrong_messages_of_a_restored_group(&[]), 0);
    // It is the barrier that does it: one of them is ready later than the others.
    // Were the others still standing when it is, nothing would be wrong: so it is given several chances.
    assert!((0..4).any(|_| wrong_messages_of_a_restored_group(&["--no-barrier"]) > 0));
}

#[test]
fn a_training_run_that_was_killed_comes_to_the_same_loss() {
    if without_root("a_training_run_that_was_killed_comes_to_the_same_loss") {
        return;
    }
    const STEPS: &str = "3000";
    let (a, b) = End::pair(Path::new(PROGRAM));
    let undisturbed = a.host.path("loss");
    let status = Command::new(TRAINER).arg(&undisturbed).args([STEPS, "0"]).status();
    assert!(status.is_ok_and(|status| status.success()));
    let text = std::fs::read_to_string(&undisturbed).expect("its record");
    let wanted: Vec<&str> = text.split_whitespace().collect();

    let (id, name) = (Yard::name(), Yard::name());
    a.yard.run(&id, Path::new(TRAINER), &format!("{STEPS} 3000"), &Network::Own);
    let steps = || a.yard.record(&id).first().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    let wait = |least: u64| {
        let until = Instant::now() + LIMIT;
        while steps() < least {
            assert!(Instant::now() < until, "waited a minute for step {least}: {}", steps());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait(100);
    let store = a.host.path("store").to_string_lossy().into_owned();
    let own = a.yard.arguments();
    let words = ["checkpoint", "--container", &id, "--store", &store, "--every", "1s"];
    let mut series = a.host.start(&End::arguments(&own, &words));
    let taken: Vec<Value> = (0..3).map(|_| series.wait_event("checkpoint")).collect();
    series.signal(Signal::INT);
    series.finish();
    let pages = |taken: &Value| taken["data_pages"].as_u64().expect("pages");
    // Table and moments are 24 MiB, of which a second changes a part.
    assert!(pages(&taken[0]) > (24 << 20) / 4096, "{:#}", taken[0]);
    assert!(taken[1..].iter().all(|delta| pages(delta) < pages(&taken[0]) / 2), "{:#}", taken[1]);
    a.yard.end(&id);
    let killed_at = steps();
    let (bundles, own) = (b.yard.bundles().to_string_lossy().into_owned(), b.yard.arguments());
    let words = ["restore", "--store", &store, &id, "--name", &name, "--containers", &bundles];
    b.host.run(&End::arguments(&own, &words)).success();
    wait(killed_at + 100);
    wait(STEPS.parse().expect("a number"));
    assert_eq!(a.yard.record(&id), wanted);
}

#[test]
fn a_connection_goes_with_the_container() {
    if without_root("a_connection_goes_with_the_container") {
        return;
    }
    const PORT: u16 = 7000;
    let street = Street::new();
    let [one, other] = street.places();
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.run(&id, Path::new(COUNTER), &PORT.to_string(), &Network::At(one));

    let done = AtomicBool::new(false);
    let (asked, longest) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| street.at_host(|| ask(&done, (Street::CONTAINER, PORT))));
        std::thread::sleep(Duration::from_millis(500));
        let mut receives = b.receives(&name);
        receives.extend(["--netns".into(), other.to_string_lossy().into_owned()]);
        receives.retain(|word| word != "--once");
        let (receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
        let own = a.yard.arguments();
        let send = |more: &[&str]| {
            let words = [&["send", "--container", &id, &address], more].concat();
            a.host.run(&End::arguments(&own, &words))
        };
        // Nobody said that it may lose its connections, or that they can go.
        says(&send(&[]), 4, &["--tcp-established"]);
        assert_eq!(a.yard.status(&id).as_deref(), Some("running"));
        send(&["--tcp-established"]).success();
        receiver.finish().success();
        std::thread::sleep(Duration::from_secs(1));
        done.store(true, Ordering::Relaxed);
        asking.join().expect("every answer was right")
    });
    assert_eq!((a.yard.status(&id), b.yard.status(&name).as_deref()), (None, Some("running")));
    println!("{asked} questions were answered; the longest wait was {} ms", longest.as_millis());
    assert!(asked > 100);
}

/// Asks over one connection until it is enough, and answers how often, and the longest wait for an answer.
///
/// # Panics
/// If the connection ends, or an answer is wrong.
fn ask(done: &AtomicBool, address: (&str, u16)) -> (u64, Duration) {
    let until = Instant::now() + LIMIT;
    let mut connection = loop {
        match std::net::TcpStream::connect(address) {
            Ok(connection) => break connection,
            Err(error) => assert!(Instant::now() < until, "waited a minute for {address:?}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    connection.set_nodelay(true).expect("it is a TCP connection");
    connection.set_read_timeout(Some(LIMIT)).expect("a limit");
    let (mut number, mut longest) = (0_u64, Duration::ZERO);
    while !done.load(Ordering::Relaxed) {
        number += 1;
        let begun = Instant::now();
        connection.write_all(&number.to_le_bytes()).expect("the connection lives");
        let mut answer = [0; 8];
        connection.read_exact(&mut answer).expect("the connection lives");
        assert_eq!(u64::from_le_bytes(answer), number);
        longest = longest.max(begun.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    (number, longest)
}

#[test]
fn a_container_moves_while_a_series_of_checkpoints_watches_it() {
    if without_root("a_container_moves_while_a_series_of_checkpoints_watches_it") {
        return;
    }
    let (a, b) = End::pair(Path::new(PROGRAM));
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.start(&id, Path::new(TENANT), "16 500");
    let store = a.host.path("store").to_string_lossy().into_owned();
    let own = a.yard.arguments();
    let words = ["checkpoint", "--container", &id, "--store", &store, "--every", "3s"];
    let mut series = a.host.start(&End::arguments(&own, &words));
    series.wait_event("checkpoint");
    // Each is told what the other one would have to find, if both asked the kernel.
    let (sent, received) = a.send(&b, &id, &name, &["--tracking", "kernel"]);
    says(&sent, 3, &["watched already"]);
    drop(received);
    series.wait_event("checkpoint");
    let report = a.moves(&b, &id, &name, &[]);
    assert_eq!(report["tracking"], "blake3-digests");
    a.yard.assert_sound(&id);
    series.signal(Signal::INT);
    series.finish();
}
