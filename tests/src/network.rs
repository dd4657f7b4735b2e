//! Two hosts that are network namespaces, joined by a veth pair or through a router. Needs root and iproute2, nothing else.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Names of our namespaces begin so; the process that made one follows.
const PREFIX: &str = "migrate-e2e-";

/// Where `ip netns` keeps names (ip-netns(8)).
const NAMES: &str = "/run/netns";

/// The sender's address.
pub const NEAR: &str = "10.77.0.1";

/// The receiver's address.
pub const FAR: &str = "10.77.0.2";

/// The router's address, towards both.
const BETWEEN: &str = "10.77.0.254";

/// Namespace names and interface names of this process are numbered.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Two network namespaces, `near` for the sender and `far` for the receiver. They go when this is dropped.
#[derive(Debug)]
pub struct Cable {
    near: String,
    far: String,
    /// What routes between them, if anything does.
    router: Option<String>,
}

/// Whether tests that need network namespaces are left out, as [`without_kvm`](crate::without_kvm): the caller returns
/// then. CI never leaves them out.
pub fn without_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        assert!(std::env::var_os("CI").is_none(), "CI never skips the tests that need network namespaces");
        println!("SKIPPED: {test}: it makes network namespaces, which only root may");
    }
    !root
}

impl Cable {
    /// Two new namespaces whose link carries packets of up to `mtu` bytes. What processes that are gone left behind is
    /// removed first.
    ///
    /// # Panics
    /// With what `ip` said, if it does not work.
    pub fn new(mtu: u32) -> Self {
        let cable = Self::namespaces(false);
        wire((&cable.near, "wire"), (&cable.far, "wire"), mtu);
        for (namespace, ip) in [(&cable.near, NEAR), (&cable.far, FAR)] {
            run("ip", &["-n", namespace, "addr", "add", &format!("{ip}/24"), "dev", "wire"]);
        }
        cable
    }

    /// As [`Cable::new`], with a third namespace between the two that routes. A limited rate is limited there, so that what comes from one
    /// host meets in a queue that is not that host's own: in its own, Linux lets a TCP connection have next to nothing (TCP small queues).
    ///
    /// # Panics
    /// With what `ip` said, if it does not work.
    pub fn routed(mtu: u32) -> Self {
        let cable = Self::namespaces(true);
        let router = cable.router.as_deref().expect("it was just made");
        for (namespace, ip, end) in [(&cable.near, NEAR, "near"), (&cable.far, FAR, "far")] {
            wire((namespace, "wire"), (router, end), mtu);
            run("ip", &["-n", namespace, "addr", "add", &format!("{ip}/32"), "dev", "wire"]);
            run("ip", &["-n", namespace, "route", "add", BETWEEN, "dev", "wire"]);
            run("ip", &["-n", namespace, "route", "add", "default", "via", BETWEEN]);
            run("ip", &["-n", router, "addr", "add", &format!("{BETWEEN}/32"), "dev", end]);
            run("ip", &["-n", router, "route", "add", ip, "dev", end]);
        }
        within(router, || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))
            .expect("a namespace may route");
        cable
    }

    /// The namespaces, without anything between them.
    fn namespaces(with_router: bool) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            sweep();
        }
        let name = |end| format!("{PREFIX}{}-{number}{end}", std::process::id());
        let cable = Self { near: name("a"), far: name("b"), router: with_router.then(|| name("r")) };
        for namespace in cable.all() {
            run("ip", &["netns", "add", namespace]);
            run("ip", &["-n", namespace, "link", "set", "lo", "up"]);
        }
        cable
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        [&self.near, &self.far].into_iter().chain(&self.router)
    }

    /// The namespace of the sender.
    pub fn near(&self) -> &str {
        &self.near
    }

    /// The namespace of the receiver.
    pub fn far(&self) -> &str {
        &self.far
    }

    /// Pulls the cable at the near end, so that sending fails there, or plugs it in again.
    ///
    /// # Panics
    /// With what `ip` said, if it does not work.
    pub fn set_up(&self, up: bool) {
        run("ip", &["-n", &self.near, "link", "set", "wire", if up { "up" } else { "down" }]);
        // The kernel tells a link's carrier about once a second; until then nothing passes.
        let until = Instant::now() + Duration::from_secs(10);
        while up && !self.has_carrier() {
            assert!(Instant::now() < until, "the link between the namespaces does not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn has_carrier(&self) -> bool {
        [&self.near, &self.far].into_iter().all(|namespace| {
            let shown = Command::new("ip").args(["-n", namespace, "link", "show", "wire"]).output();
            shown.is_ok_and(|shown| String::from_utf8_lossy(&shown.stdout).contains("state UP"))
        })
    }

    /// Lets no more than this many bits a second pass each way, by a token bucket (tc-tbf(8)) at both ends or in the router; `None` lifts the limit.
    ///
    /// # Panics
    /// With what `tc` said, if it does not work.
    pub fn set_rate(&self, bits_per_s: Option<u64>) {
        let devices = match &self.router {
            Some(router) => [(router, "near"), (router, "far")],
            None => [(&self.near, "wire"), (&self.far, "wire")],
        };
        for (namespace, device) in devices {
            match bits_per_s {
                Some(rate) => {
                    // A bucket must hold what passes between two ticks of the kernel's clock (4 ms), and a whole batch of
                    // segmentation offload.
                    let burst = (rate / 8 / 250).max(128 << 10).to_string();
                    let rate = format!("{rate}bit");
                    let tbf = ["root", "tbf", "rate", &rate, "burst", &burst, "latency", "50ms"];
                    let begin = ["-n", namespace.as_str(), "qdisc", "replace", "dev", device];
                    run("tc", &[&begin[..], &tbf].concat());
                }
                // There may be none, which is what is wanted.
                None => {
                    try_run("tc", &["-n", namespace, "qdisc", "del", "dev", device, "root"]).ok();
                }
            }
        }
    }

    /// Bytes that came in at the receiver's end, with all headers.
    ///
    /// # Panics
    /// With what `ip` said, if it does not work.
    pub fn arrived_bytes(&self) -> u64 {
        let shown = Command::new("ip").args(["-n", &self.far, "-s", "-j", "link", "show", "wire"]).output();
        let shown = shown.expect("iproute2 is there");
        let link: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
        link[0]["stats64"]["rx"]["bytes"].as_u64().unwrap_or_else(|| panic!("no bytes: {link:#}"))
    }

    /// Runs something on a thread in the sender's namespace: sockets that it makes stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered.
    pub fn at_near_end<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        within(&self.near, body)
    }

    /// Runs something on a thread in the receiver's namespace: sockets that it makes stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered.
    pub fn at_far_end<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        within(&self.far, body)
    }
}

/// A host with a bridge, at which two namespaces have the same addresses: a container moves from one to the other.
pub struct Street {
    host: String,
    one: String,
    other: String,
}

impl Street {
    /// What the host has.
    pub const HOST: &str = "10.78.0.1";
    /// What the container has, wherever it is.
    pub const CONTAINER: &str = "10.78.0.2";

    /// Three new namespaces. Packets for the container go to the first one, until some come from the second.
    ///
    /// # Panics
    /// With what `ip` said, if it does not work.
    pub fn new() -> Self {
        const MACS: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            sweep();
        }
        let name = |end| format!("{PREFIX}{}-{number}{end}", std::process::id());
        let street = Self { host: name("h"), one: name("1"), other: name("2") };
        let Self { host, one, other } = &street;
        for namespace in [host, one, other] {
            run("ip", &["netns", "add", namespace]);
            run("ip", &["-n", namespace, "link", "set", "lo", "up"]);
            // What it would say by itself would tell the bridge that the container is there.
            within(namespace, || {
                for place in ["all", "default"] {
                    std::fs::write(format!("/proc/sys/net/ipv6/conf/{place}/disable_ipv6"), "1").ok();
                }
            });
        }
        run("ip", &["-n", host, "link", "add", "street", "address", MACS[0], "type", "bridge"]);
        run("ip", &["-n", host, "addr", "add", &format!("{}/24", Self::HOST), "dev", "street"]);
        run("ip", &["-n", host, "link", "set", "street", "up"]);
        for (namespace, port) in [(one, "one"), (other, "other")] {
            wire((namespace, "wire"), (host, port), 1500);
            run("ip", &["-n", namespace, "link", "set", "wire", "address", MACS[1]]);
            run("ip", &["-n", namespace, "addr", "add", &format!("{}/24", Self::CONTAINER), "dev", "wire"]);
            run("ip", &["-n", namespace, "neigh", "add", Self::HOST, "lladdr", MACS[0], "dev", "wire"]);
            run("ip", &["-n", host, "link", "set", port, "master", "street"]);
        }
        run("ip", &["-n", host, "neigh", "add", Self::CONTAINER, "lladdr", MACS[1], "dev", "street"]);
        run("bridge", &["-n", host, "fdb", "replace", MACS[1], "dev", "one", "master", "dynamic"]);
        street
    }

    /// The paths of the container's two namespaces.
    pub fn places(&self) -> [PathBuf; 2] {
        [&self.one, &self.other].map(|name| PathBuf::from(NAMES).join(name))
    }

    /// Runs something on a thread of the host: sockets that it makes stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered.
    pub fn at_host<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        within(&self.host, body)
    }
}

impl Default for Street {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Street {
    fn drop(&mut self) {
        for name in [&self.host, &self.one, &self.other] {
            if let Err(error) = try_run("ip", &["netns", "del", name]) {
                println!("the namespace {name} is left behind: {error}");
            }
        }
    }
}

fn within<T: Send>(namespace: &str, body: impl FnOnce() -> T + Send) -> T {
    let path = PathBuf::from(NAMES).join(namespace);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let namespace = std::fs::File::open(path).expect("the namespace is there");
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(kind))
                .expect("root may enter it");
            body()
        });
        thread.join().expect("the thread ends well")
    })
}

/// Joins two namespaces by a veth pair, each end of which has a name, and lets packets of up to `mtu` bytes pass.
fn wire(one: (&str, &str), other: (&str, &str), mtu: u32) {
    let ((near, near_end), (far, far_end)) = (one, other);
    let peer = ["type", "veth", "peer", "name", far_end, "netns", far];
    run("ip", &[&["link", "add", near_end, "netns", near][..], &peer].concat());
    for (namespace, end) in [one, other] {
        run("ip", &["-n", namespace, "link", "set", end, "mtu", &mtu.to_string(), "up"]);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in self.all() {
            if let Err(error) = try_run("ip", &["netns", "del", name]) {
                println!("the namespace {name} is left behind: {error}");
            }
        }
    }
}

/// A command that runs in a namespace.
pub fn inside(namespace: &str, program: &std::path::Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={NAMES}/{namespace}")).arg("--").arg(program);
    command
}

/// Removes what test processes that are gone left behind: namespaces, directories, VMs. A killed one could not.
pub fn sweep() {
    crate::host::sweep();
    let Ok(entries) = std::fs::read_dir(NAMES) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let Some(pid) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { continue };
        if !std::path::Path::new("/proc").join(pid).exists() {
            eprintln!("removing {name}, which a test process that is gone left behind");
            try_run("ip", &["netns", "del", &name]).ok();
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    if let Err(error) = try_run(program, arguments) {
        panic!("{program} {}: {error}", arguments.join(" "));
    }
}

fn try_run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{error}: install the Debian package iproute2"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}
