//! Two hosts that are network namespaces, joined by a veth pair. Needs root and iproute2, nothing else.

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

/// Namespace names and interface names of this process are numbered.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Two network namespaces, `near` for the sender and `far` for the receiver. They go when this is dropped.
#[derive(Debug)]
pub struct Cable {
    near: String,
    far: String,
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
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            sweep();
        }
        let name = |end| format!("{PREFIX}{}-{number}{end}", std::process::id());
        let cable = Self { near: name("a"), far: name("b") };
        run("ip", &["netns", "add", &cable.near]);
        run("ip", &["netns", "add", &cable.far]);
        let (near, far) = (cable.near.as_str(), cable.far.as_str());
        run(
            "ip",
            &["link", "add", "wire", "netns", near, "type", "veth", "peer", "name", "wire", "netns", far],
        );
        for (namespace, ip) in [(near, NEAR), (far, FAR)] {
            run("ip", &["-n", namespace, "addr", "add", &format!("{ip}/24"), "dev", "wire"]);
            run("ip", &["-n", namespace, "link", "set", "wire", "mtu", &mtu.to_string(), "up"]);
            run("ip", &["-n", namespace, "link", "set", "lo", "up"]);
        }
        cable
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

    /// Lets no more than this many bits a second pass each way, by a token bucket (tc-tbf(8)); `None` lifts the limit.
    ///
    /// # Panics
    /// With what `tc` said, if it does not work.
    pub fn set_rate(&self, bits_per_s: Option<u64>) {
        for namespace in [&self.near, &self.far] {
            match bits_per_s {
                Some(rate) => {
                    // A bucket must hold what passes between two ticks of the kernel's clock (4 ms), and a whole batch of
                    // segmentation offload.
                    let burst = (rate / 8 / 250).max(128 << 10).to_string();
                    let rate = format!("{rate}bit");
                    let tbf = ["root", "tbf", "rate", &rate, "burst", &burst, "latency", "50ms"];
                    let begin = ["-n", namespace.as_str(), "qdisc", "replace", "dev", "wire"];
                    run("tc", &[&begin[..], &tbf].concat());
                }
                // There may be none, which is what is wanted.
                None => {
                    try_run("tc", &["-n", namespace, "qdisc", "del", "dev", "wire", "root"]).ok();
                }
            }
        }
    }

    /// Runs something on a thread in the receiver's namespace: sockets that it makes stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered.
    pub fn at_far_end<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let path = PathBuf::from(NAMES).join(&self.far);
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
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in [&self.near, &self.far] {
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
