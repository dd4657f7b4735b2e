//! A running migration is watched, steered and scraped, between real processes with a real guest.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::host::Place;
use e2e::network::{Cable, FAR, NEAR, without_root};
use e2e::process::STEP_LIMIT;
use e2e::{Host, trusting_pair, without_kvm};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// Limits under which no guest that writes converges, so that there is time to look.
const ENDLESS: [&str; 8] =
    ["--downtime", "1us", "--max-downtime", "1us", "--max-rounds", "1000000", "--on-stall", "minimum"];

fn pair() -> (Host, Host) {
    trusting_pair(Path::new(PROGRAM))
}

fn busy_guest(host: &Host) {
    host.run_ledger("v", "128MiB", "fill=64M ws=16M rate=30", &[]);
    host.wait_ledger_running("v");
}

/// The status of a migration as soon as `wanted` says so.
fn wait_status(host: &Host, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let until = Instant::now() + STEP_LIMIT;
    loop {
        let asked = host.run(&["status", name]);
        if let Some(status) = asked.event("status").filter(|status| wanted(status)) {
            return status.clone();
        }
        assert!(Instant::now() < until, "{asked:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until nothing of this name moves.
fn wait_no_status(host: &Host, name: &str) {
    let until = Instant::now() + STEP_LIMIT;
    while host.run(&["status", name]).code != 4 {
        assert!(Instant::now() < until, "{name} still moves");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is served at `http://ADDR/metrics`.
fn scrape(url: &str) -> String {
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).expect("a URL");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(STEP_LIMIT)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{answer}"
    );
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    answer
}

fn metric(page: &str, name: &str) -> f64 {
    let line = page.lines().find(|line| line.split(['{', ' ']).next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("{name} is not there:\n{page}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

#[test]
fn a_move_is_watched_scraped_and_given_other_limits() {
    if without_kvm("a_move_is_watched_scraped_and_given_other_limits") {
        return;
    }
    let (a, b) = pair();
    busy_guest(&a);
    let (mut receiver, address) = b.receive(&["--metrics", "127.0.0.1:0"]);
    let received = receiver.wait_event("metrics")["url"].as_str().unwrap().to_owned();
    let report = a.path("move.html");
    let more = ["--metrics", "127.0.0.1:0", "--report", report.to_str().unwrap()];
    let mut sender = a.start(&[&["send", "v", address.as_str()][..], &ENDLESS, &more].concat());
    let sent = sender.wait_event("metrics")["url"].as_str().unwrap().to_owned();

    let status = wait_status(&a, "v", |status| status["round"].as_u64() >= Some(2));
    assert_eq!((&status["end"], &status["phase"]), (&"send".into(), &"rounds".into()), "{status:#}");
    assert!(status["dirty_bytes_per_s"].as_u64() > Some(1_000_000), "{status:#}");
    assert_eq!(status["limits"]["downtime_us"], 1, "{status:#}");
    assert_eq!(status["cancellable"], true, "{status:#}");
    let arriving = wait_status(&b, "v", |_| true);
    assert_eq!((&arriving["end"], &arriving["migration"]), (&"receive".into(), &status["migration"]));

    let page = scrape(&sent);
    assert_eq!(metric(&page, "migrate_running"), 1.0);
    // Of 64 MiB that were filled some are zero, and some may have been packed.
    assert!(metric(&page, "migrate_sent_bytes_total") > 16e6, "{page}");
    assert!(metric(&page, "migrate_dirty_rate_bytes_per_second") > 1e6, "{page}");
    let page = scrape(&received);
    assert!(metric(&page, "migrate_received_bytes_total") > 1e6, "{page}");

    let refused = a.run(&["set", "v", "--bandwidth", "1kB/s"]);
    assert_eq!(refused.code, 2, "{refused:#?}");
    assert_eq!(b.run(&["set", "v", "--downtime", "5s"]).code, 2, "limits belong to the source");
    let changed = a.run(&["set", "v", "--downtime", "5s"]).success();
    assert_eq!(changed.lines[0]["limits"]["downtime_us"], 5_000_000);
    sender.finish().success();
    receiver.finish().success();
    b.assert_sound("v");
    assert_eq!(a.run(&["status", "v"]).code, 4);
    assert!(a.run(&["status"]).success().lines.is_empty());
    let page = std::fs::read_to_string(report).unwrap();
    for part in ["It moved", "<g class=\"round\">", "<g class=\"speed\">"] {
        assert!(page.contains(part), "{part}\n{page}");
    }
}

#[test]
fn a_move_is_cancelled_from_either_end_and_the_guest_goes_on() {
    if without_kvm("a_move_is_cancelled_from_either_end_and_the_guest_goes_on") {
        return;
    }
    let (a, b) = pair();
    busy_guest(&a);
    let (mut receiver, address) = b.receive(&[]);
    for (host, code) in [(&a, 130), (&b, 7)] {
        let sender = a.start(&[&["send", "v", address.as_str()][..], &ENDLESS].concat());
        wait_status(host, "v", |status| status["moved_bytes"].as_u64() > Some(1 << 20));
        let cancelled = host.run(&["cancel", "v"]).success();
        assert_eq!(cancelled.event("cancelled").unwrap()["name"], "v");
        let sent = sender.finish();
        assert_eq!(sent.code, code, "{sent:#?}");
        assert!(receiver.is_running(), "a cancelled attempt does not end the receiver");
        assert_eq!(a.phase("v").as_deref(), Some("running"));
        a.wait_phase("v", Some("running"));
        // Its end at the receiver may come a moment later, and must not be taken for the next one's.
        wait_no_status(&b, "v");
    }
    a.assert_sound("v");
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
}

#[test]
fn the_socket_of_a_killed_migration_is_found_out_and_removed() {
    if without_kvm("the_socket_of_a_killed_migration_is_found_out_and_removed") {
        return;
    }
    let (a, b) = pair();
    busy_guest(&a);
    let (receiver, address) = b.receive(&["--link-timeout", "2s"]);
    let sender = a.start(&[&["send", "v", address.as_str()][..], &ENDLESS].concat());
    wait_status(&a, "v", |_| true);
    sender.signal(Signal::KILL);
    sender.finish();
    let socket = a.runtime_dir().join("moves/v.sock");
    assert!(socket.exists(), "it was killed");
    assert_eq!(a.run(&["status", "v"]).code, 4);
    assert!(!socket.exists());
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
}

#[test]
fn a_daemon_takes_several_at_a_time_and_ends_when_it_is_told() {
    if without_kvm("a_daemon_takes_several_at_a_time_and_ends_when_it_is_told") {
        return;
    }
    let (a, b) = pair();
    let names = ["v0", "v1", "v2"];
    for name in names {
        a.run_ledger(name, "64MiB", "fill=24M ws=8M rate=10", &[]);
        a.wait_ledger_running(name);
    }
    let (mut daemon, address) =
        b.receive(&["--daemon", "--max-migrations", "3", "--metrics", "127.0.0.1:0", "--grace", "1s"]);
    let url = daemon.wait_event("metrics")["url"].as_str().unwrap().to_owned();
    let senders: Vec<_> = names
        .iter()
        .map(|name| a.start(&[&["send", name, address.as_str()][..], &ENDLESS].concat()))
        .collect();
    for name in names {
        wait_status(&b, name, |status| status["moved_bytes"].as_u64() > Some(1 << 20));
    }
    assert_eq!(metric(&scrape(&url), "migrate_running"), 3.0, "all three arrive at the same time");
    for name in &names[..2] {
        a.run(&["set", name, "--downtime", "5s"]).success();
    }
    let mut senders = senders.into_iter();
    for sender in senders.by_ref().take(2) {
        sender.finish().success();
    }
    for name in &names[..2] {
        b.assert_sound(name);
    }
    let page = scrape(&url);
    assert!(page.contains("migrate_migrations_total{end=\"receive\",outcome=\"moved\"} 2"), "{page}");

    // The third one does not end by itself: it is given its grace, and then stays where it is.
    daemon.signal(Signal::TERM);
    let ended = daemon.finish();
    assert_eq!(ended.code, 0, "{ended:#?}");
    assert_eq!(ended.lines.iter().filter(|line| line["event"] == "arrived").count(), 2, "{ended:#?}");
    let log = &ended.stderr;
    for arrived in ended.lines.iter().filter(|line| line["event"] == "arrived") {
        let migration = arrived["migration"].as_str().unwrap();
        assert!(log.lines().any(|line| line.contains(migration) && line.contains("runs here")), "{log}");
    }
    let sent = senders.next().unwrap().finish();
    assert_eq!(sent.code, 7, "{sent:#?}");
    a.assert_sound("v2");
    for name in &names[..2] {
        b.assert_sound(name);
    }
}

/// The next thing that the service manager is told.
fn told(socket: &std::os::unix::net::UnixDatagram) -> String {
    let mut buffer = [0; 4096];
    let bytes = socket.recv(&mut buffer).expect("the service manager is told in time");
    String::from_utf8_lossy(&buffer[..bytes]).into_owned()
}

#[test]
fn a_daemon_tells_its_service_manager_and_its_journal() {
    let (_, b) = pair();
    let path = b.path("notify.sock");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(STEP_LIMIT)).unwrap();
    let mut command = b.command(&["receive", "--listen", "127.0.0.1:0", "--daemon", "--max-memory", "1GiB"]);
    command.env("NOTIFY_SOCKET", &path);
    let mut daemon = e2e::Running::start(command);
    daemon.wait_event("listening");
    let ready = told(&manager);
    assert!(ready.lines().any(|line| line == "READY=1"), "{ready}");
    daemon.signal(Signal::TERM);
    let stopping = told(&manager);
    assert!(stopping.lines().any(|line| line == "STOPPING=1"), "{stopping}");
    let ended = daemon.finish();
    assert_eq!(ended.code, 0, "{ended:#?}");
    assert!(ended.stderr.contains("ready for VMs") && !ended.stderr.contains('\u{1b}'), "{ended:#?}");
}

#[test]
fn what_a_daemon_does_not_understand_is_refused() {
    let host = Host::new(Path::new(PROGRAM));
    for wrong in [
        &["--daemon", "--once"][..],
        &["--daemon", "--name", "w"],
        &["--max-migrations", "2"],
        &["--daemon", "--max-migrations", "0"],
        &["--daemon", "--max-migrations", "65"],
    ] {
        let args = [&["receive", "--listen", "127.0.0.1:0"][..], wrong].concat();
        assert_eq!(host.run(&args).code, 2, "{wrong:?}");
    }
}

/// A link on which no processor is the limit.
const NARROW_BITS_PER_S: u64 = 100_000_000;

/// How long two flows share it until their shares are taken to be those that they will have, and how long they are measured.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
const MEASURED_FOR: Duration = Duration::from_secs(8);

/// Sends over TCP, with what Linux does by default to share a link, for as long as it may. Counts what arrives.
fn tcp_flow(cable: &Cable, arrived: &AtomicU64, over: &AtomicBool) {
    let listener = cable.at_far_end(|| TcpListener::bind((FAR, 0))).unwrap();
    let to = listener.local_addr().unwrap();
    let mut sending = cable.at_near_end(|| TcpStream::connect_timeout(&to, STEP_LIMIT)).unwrap();
    rustix::net::sockopt::set_tcp_congestion(&sending, "cubic").unwrap();
    sending.set_write_timeout(Some(STEP_LIMIT)).unwrap();
    let (mut receiving, _) = listener.accept().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let count @ 1.. = receiving.read(&mut buffer).unwrap_or(0) {
                arrived.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
        let bytes = vec![0; 64 << 10];
        while !over.load(Ordering::Relaxed) {
            sending.write_all(&bytes).unwrap();
        }
        drop(sending);
    });
}

#[test]
fn beside_a_tcp_connection_a_move_takes_its_share_of_the_link_and_no_more() {
    const TEST: &str = "beside_a_tcp_connection_a_move_takes_its_share_of_the_link_and_no_more";
    if without_kvm(TEST) || without_root(TEST) {
        return;
    }
    let cable = Cable::routed(1500);
    cable.set_rate(Some(NARROW_BITS_PER_S));
    let (a, b) = pair();
    let at = |namespace: &str, ip: &str| Place::Namespace { name: namespace.into(), ip: ip.into() };
    let (a, b) = (a.moved_to(at(cable.near(), NEAR)), b.moved_to(at(cable.far(), FAR)));
    // The first round alone takes as long as all of this, even without a TCP connection beside it.
    a.run_ledger("v", "256MiB", "fill=192M ws=16M rate=1", &[]);
    a.wait_ledger_running("v");
    let (_receiver, address) = b.receive(&[]);
    let (arrived, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (tcp, both) = std::thread::scope(|scope| {
        // However this ends, so does the flow.
        let ends = Ends(&over);
        scope.spawn(|| tcp_flow(&cable, &arrived, &over));
        let until = Instant::now() + STEP_LIMIT;
        while arrived.load(Ordering::Relaxed) < 10 << 20 {
            assert!(Instant::now() < until, "the TCP connection does not get on");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut sender = a.start(&["send", "v", &address]);
        sender.wait_event("progress");
        std::thread::sleep(SETTLED_AFTER);
        let look = || (arrived.load(Ordering::Relaxed), cable.arrived_bytes(), Instant::now());
        let (tcp_before, both_before, begun) = look();
        std::thread::sleep(MEASURED_FOR);
        let (tcp_after, both_after, ended) = look();
        sender.signal(Signal::INT);
        sender.finish();
        drop(ends);
        let seconds = ended.duration_since(begun).as_secs_f64();
        ((tcp_after - tcp_before) as f64 / seconds, (both_after - both_before) as f64 / seconds)
    });
    let (tcp, ours) = (tcp * 8.0 / 1e6, (both - tcp) * 8.0 / 1e6);
    println!("TCP {tcp:.1} Mbit/s, the move {ours:.1} Mbit/s with all headers");
    // Two flows of one kind would have half each. How one probes and the other answers makes more of a difference than that, so: neither starves.
    assert!(tcp >= 25.0, "the move left {tcp:.1} Mbit/s and took {ours:.1}");
    assert!(ours >= 10.0, "the move came to {ours:.1} Mbit/s beside {tcp:.1}");
}

/// Says that something is over when it goes.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
