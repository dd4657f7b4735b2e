//! Containers under Debian's own kernel, which is older than the one that `migrate` likes best: it has no `PAGEMAP_SCAN`, and keeps soft-dirty
//! bits. They move between two hosts, with nothing shared but a network.

use super::linux::{Site, Talk};
use super::trip::sh;
use super::{MIGRATE, wait_until};
use e2e::Host;
use e2e::containers::{Network, Tools};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};

const TENANT: &str = env!("CARGO_BIN_EXE_tenant");
const LOAD: &str = env!("CARGO_BIN_EXE_lab-load");

/// What a process has, in MiB, and how many pages it writes a second: an emulated host copies a few MiB a second.
const SIZE: &[&str] = &["/tmp/out", "8", "40"];

/// Where the container's network is, on both hosts, and its address.
const NAMESPACE: &str = "/run/netns/guest";
const ADDRESS: &str = "10.78.0.101";

/// Bytes of what a tenant says of itself.
const RECORD: u64 = 128;

/// A container on its way between two hosts.
struct Way<'a> {
    site: &'a Site,
    hops: u32,
}

impl<'a> Way<'a> {
    /// Starts a container on the first host, with the same files on the second.
    fn begin(site: &'a Site, program: &str, arguments: &[&str], network: &Network) -> Self {
        let tools = Tools::ensure().expect("runc and CRIU");
        let here = Host::new(Path::new(MIGRATE));
        let files = here.path("files");
        tools.pack(&files.join("tools"));
        tools.bundle(&files.join("bundle"), Path::new(program), arguments, network);
        let out = std::fs::File::create(files.join("bundle/rootfs/tmp/out")).expect("a file");
        out.set_len(RECORD).expect("room for its record");
        let way = Self { site, hops: 0 };
        for host in [&site.pair.a, &site.pair.b] {
            let files = here.copy_to(host, "files");
            // An earlier test may have left its containers here, and died.
            let clean = "for id in $(ls /run/runc 2>/dev/null); do runc delete -f $id; done";
            let tools = files.join("tools");
            let tools = tools.display();
            // What is there already is in use.
            let libraries = "[ -e /lib/x86_64-linux-gnu/${file##*/} ] || cp $file /lib/x86_64-linux-gnu/";
            sh(
                host,
                &format!("for file in {tools}/lib/*; do {libraries}; done; cp {tools}/runc /bin/; {clean}"),
            );
        }
        let bundle = site.pair.a.path("files/bundle");
        sh(
            &site.pair.a,
            &format!("runc run --detach --bundle {} c0 </dev/null >/dev/null 2>&1", bundle.display()),
        );
        way
    }

    fn host(&self, hops: u32) -> &'a Host {
        if hops.is_multiple_of(2) { &self.site.pair.a } else { &self.site.pair.b }
    }

    fn here(&self) -> &'a Host {
        self.host(self.hops)
    }

    fn id(&self) -> String {
        format!("c{}", self.hops)
    }

    /// What `migrate` is told about the programs of a host.
    fn programs(host: &Host) -> [String; 2] {
        ["--criu".into(), host.path("files/tools/criu").to_string_lossy().into_owned()]
    }

    /// What a host that takes containers is told.
    fn takes(host: &Host, name: &str) -> Vec<String> {
        let path = |name: &str| host.path(name).to_string_lossy().into_owned();
        let mut words = vec!["--containers".into(), path("containers")];
        words.extend(["--rootfs".into(), path("files/bundle/rootfs"), "--name".into(), name.into()]);
        words.extend(Self::programs(host));
        words
    }

    /// Moves it to the other host, and answers the report.
    fn hop(&mut self, more: &[&str]) -> Value {
        let (from, id) = (self.here(), self.id());
        self.hops += 1;
        let takes = Self::takes(self.here(), &self.id());
        let takes: Vec<&str> = takes.iter().map(String::as_str).collect();
        let (receiver, address) = self.here().receive(&[&["--once"][..], &takes].concat());
        let own = Self::programs(from);
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        let limits =
            ["--downtime", "2s", "--max-downtime", "20s", "--max-rounds", "3", "--on-timeout", "force"];
        let sent = from.run(&[&["send", "--container", &id, &address][..], &limits, &own, more].concat());
        let report = sent.success().event("report").expect("a report").clone();
        receiver.finish().success();
        println!("moved in {} us, down for {} us", report["total_us"], report["downtime_us"]);
        report
    }

    fn out(host: &Host) -> PathBuf {
        host.path("files/bundle/rootfs/tmp/out")
    }

    /// Ticks, longest gap, pages written, looks through all memory, and pages that were wrong.
    fn record(&self) -> Option<[u64; 5]> {
        let text = sh(self.here(), &format!("cat {}", Self::out(self.here()).display()));
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().ok()
    }

    /// Waits until it has looked through all of its memory once more behind this, and found all of it right.
    fn assert_sound(&self) {
        let mut first = None;
        wait_until("the container to look through its memory", || {
            let Some([_, _, _, looks, wrong]) = self.record() else { return false };
            assert_eq!(wrong, 0, "{:?}", self.record());
            looks > *first.get_or_insert(looks) + 1
        });
    }
}

#[test]
fn a_container_moves_there_and_back_five_times() {
    let Some(site) = &Site::new("a_container_moves_there_and_back_five_times") else { return };
    let mut way = Way::begin(site, TENANT, SIZE, &Network::Own);
    way.assert_sound();
    for hop in 0..10 {
        // The last two by comparing everything.
        let (more, tracking): (&[&str], _) = match hop {
            0..8 => (&[], "soft-dirty"),
            _ => (&["--tracking", "digests"], "blake3-digests"),
        };
        let report = way.hop(more);
        assert_eq!(report["tracking"], tracking);
        let rounds = report["rounds"].as_array().expect("rounds");
        let sent = |round: &Value| round["sent_pages"].as_u64().expect("pages");
        assert!(sent(&rounds[0]) > (8 << 20) / 4096, "{report:#}");
        assert!(rounds[1..].iter().all(|round| sent(round) < sent(&rounds[0]) / 2), "{report:#}");
        way.assert_sound();
    }
}

#[test]
fn a_containers_checkpoints_can_each_be_restored() {
    let Some(site) = &Site::new("a_containers_checkpoints_can_each_be_restored") else { return };
    let way = Way::begin(site, TENANT, SIZE, &Network::Own);
    way.assert_sound();
    let host = way.here();
    let store = host.path("store").to_string_lossy().into_owned();
    let own = Way::programs(host);
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let words = ["checkpoint", "--container", "c0", "--store", &store, "--every", "3s"];
    let mut series = host.start(&[&words[..], &own].concat());
    let taken: Vec<Value> = (0..4).map(|_| series.wait_event("checkpoint")).collect();
    series.signal(Signal::INT);
    series.finish();
    let pages = |taken: &Value| taken["data_pages"].as_u64().expect("pages");
    // A series begins anew where its deltas have become as large as what they are for.
    let mut deltas = taken[1..].iter().filter(|taken| taken["parent"].is_string()).peekable();
    assert!(deltas.peek().is_some(), "{taken:#?}");
    assert!(deltas.all(|delta| pages(delta) < pages(&taken[0]) * 3 / 4), "{taken:#?}");
    way.assert_sound();
    sh(host, "runc delete -f c0");
    for (number, taken) in taken.iter().enumerate() {
        let name = format!("r{number}");
        let takes = Way::takes(host, &name);
        let takes: Vec<&str> = takes.iter().map(String::as_str).collect();
        let checkpoint = taken["id"].as_str().expect("its id");
        host.run(&[&["restore", "--store", &store, checkpoint][..], &takes].concat()).success();
        way.assert_sound();
        sh(host, &format!("runc delete -f {name}"));
    }
}

#[test]
fn a_containers_connection_outlives_moves() {
    let Some(site) = &Site::new("a_containers_connection_outlives_moves") else { return };
    for host in [&site.pair.a, &site.pair.b] {
        // The same card on both, of which only one is connected at a time.
        sh(
            host,
            &format!(
                "/bin/ip netns del guest 2>/dev/null; /bin/ip netns add guest && /bin/ip link add to-guest type veth peer name eth0 netns guest && \
                 /bin/ip -n guest link set eth0 address 02:00:00:00:02:00 && /bin/ip -n guest addr add {ADDRESS}/24 dev eth0 && \
                 /bin/ip -n guest link set lo up && /bin/ip -n guest link set eth0 up && brctl addif br0 to-guest && ip link set to-guest down"
            ),
        );
    }
    let connect = |host: &Host, state: &str| sh(host, &format!("ip link set to-guest {state}"));
    connect(&site.pair.a, "up");
    let mut way = Way::begin(site, LOAD, &["serve", "5000"], &Network::At(NAMESPACE.into()));
    let asking = Talk::start(site.on_client("lab-load", &["ask", &format!("{ADDRESS}:5000"), "11"]));
    std::thread::sleep(std::time::Duration::from_secs(3));
    for _ in 0..4 {
        way.hop(&["--tcp-established"]);
        // Where it was its card was set down with it, and stays so until the wire is out.
        sh(way.host(way.hops + 1), "ip link set to-guest down; /bin/ip -n guest link set eth0 up");
        connect(way.here(), "up");
        std::thread::sleep(std::time::Duration::from_secs(2));
    }
    let said = asking.finish(false);
    println!("{said:?}");
    assert!(said.last().is_some_and(|line| line.starts_with("asked ")), "{said:?}");
}
