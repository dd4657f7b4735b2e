//! Two hosts, a guest on the first, and a migration between them that has come to the moment of its case.

use super::case::{Case, Fault, Mode, Moment, Process, Side};
use crate::cgroup::Larder;
use crate::guest::Window;
use crate::host::{HOLD, Place, RESET};
use crate::network::{Cable, FAR, NEAR};
use crate::process::STEP_LIMIT;
use crate::random::Random;
use crate::relay::{Relay, Weather};
use crate::{Host, Running, trusting_pair};
use std::path::Path;
use std::time::{Duration, Instant};

/// The name of the VM in every case.
pub(super) const VM: &str = "v";

/// The disk of a host whose disk will be full, in bytes: sockets and logs of a case need far less.
const SMALL_DISK_BYTES: u64 = 1 << 20;

/// The guest's memory. It must be enough for its fill, its version table and its image.
const MEMORY: &str = "48MiB";

/// What a worker keeps between its cases: two namespaces with a cable, and keys that trust each other.
pub(super) struct Workshop {
    pub cable: Cable,
    keys: (Host, Host),
}

impl Workshop {
    pub(super) fn new(program: &Path, mtu: u32) -> Self {
        Self { cable: Cable::new(mtu), keys: trusting_pair(program) }
    }
}

/// A migration under way.
pub(super) struct Scene<'a> {
    pub a: Host,
    pub b: Host,
    pub cable: &'a Cable,
    /// In front of the receiver, seen from the sender; in the namespace of the receiver.
    pub relay: Relay,
    /// Where the receiver listens, past the relay.
    pub address: String,
    pub receiver: Running,
    pub sender: Running,
    /// A look into the guest's memory at the source, which stays when its VMM is gone.
    pub source: Window,
    pub source_pid: i32,
    pub held: Option<Side>,
    /// What limits the receiver's memory, until the fault is over.
    pub larder: Option<Larder>,
}

impl<'a> Scene<'a> {
    /// Everything up to the moment of the case. A fault of [`Moment::Before`] is in place when the sender starts.
    ///
    /// Timeouts are short, and a loaded machine may stand still for longer: then the attempt fails before the moment
    /// comes, and the scene is set anew with more patience.
    ///
    /// # Panics
    /// If the guest does not come up or the moment never comes.
    pub(super) fn set(case: &Case, workshop: &'a Workshop) -> Self {
        for patience in [1, 2, 4, 8] {
            if let Some(scene) = Self::try_set(case, workshop, patience) {
                return scene;
            }
        }
        panic!("the moment of the case never comes: the attempt fails before it");
    }

    fn try_set(case: &Case, workshop: &'a Workshop, patience: u64) -> Option<Self> {
        let cable = &workshop.cable;
        cable.set_up(true);
        cable.set_rate(None);
        let host = |keys: &Host, namespace: &str, ip: &str, side| {
            let host = keys.anew_at(Place::Namespace { name: namespace.into(), ip: ip.into() });
            let small = case.fault == Fault::DiskFull(side);
            if small { host.with_small_disk(SMALL_DISK_BYTES) } else { host }
        };
        let a = host(&workshop.keys.0, cable.near(), NEAR, Side::Send);
        let b = host(&workshop.keys.1, cable.far(), FAR, Side::Receive);
        a.run_ledger(VM, MEMORY, &guest(case), &[]);
        a.wait_ledger_running(VM);
        let source_pid = a.vm_pid(VM);
        let source = Window::open(source_pid).expect("the guest's memory");

        let link_timeout = format!("{}ms", patience * case.link_timeout_ms());
        let held = match case.moment {
            Moment::Entering(side, phase) => Some((side, phase)),
            _ => None,
        };
        let hold = |side| held.filter(|(held, _)| *held == side).map_or("", |(_, phase)| phase);
        let reset = |side| match case.reset() {
            Some((at, stream, bytes)) if at == side => format!("{stream}@{bytes}"),
            _ => String::new(),
        };
        let mut arguments = vec!["--link-timeout", &link_timeout, "--ask-timeout", "2500ms"];
        if case.retries() {
            arguments.extend(["--keep", "30s"]);
        }
        let report = b.runtime_dir().join("report.json").display().to_string();
        if case.fault == Fault::DiskFull(Side::Receive) {
            arguments.extend(["--report", &report]);
        }
        if case.fault == Fault::TooLarge {
            arguments.extend(["--max-memory", "32MiB"]);
        }
        if case.moment == Moment::Before && case.fault == Fault::DiskFull(Side::Receive) {
            // The receiver itself needs its directory; what fails is everything that it makes there later.
            std::fs::create_dir_all(b.runtime_dir()).ok();
        }
        let variables = [(HOLD, hold(Side::Receive)), (RESET, &reset(Side::Receive))];
        let (receiver, address) = b.receive_with(&arguments, &variables);
        let larder = match case.fault {
            Fault::Starve(mib) => Some(Larder::around(receiver.pid(), mib << 20)),
            _ => None,
        };
        let weather = match case.fault {
            Fault::Weather(weather) if case.moment == Moment::Before => weather,
            _ => Weather::default(),
        };
        let relay = cable.at_far_end(|| Relay::start_at(FAR, &address, weather, case.seed));
        let to = relay.address();
        let mut arguments = vec![
            "send",
            VM,
            &to,
            "--link-timeout",
            &link_timeout,
            "--ask-timeout",
            "1500ms",
            "--timeout",
            "20s",
        ];
        arguments.extend(match case.mode {
            // More than one round, so that there is a round 1 to fail in, and an end on a slow machine, too.
            Mode::PreCopy | Mode::Resume | Mode::Verify => {
                ["--downtime", "1ms", "--max-rounds", "5", "--on-timeout", "force"]
            }
            Mode::PostCopy => {
                ["--downtime", "1us", "--max-rounds", "5", "--post-copy=1", "--on-timeout=post-copy"]
            }
        });
        if case.mode == Mode::Verify {
            arguments.push("--verify");
        }
        if case.retries() {
            arguments.extend(["--retry-for", if case.heals() { "20s" } else { "2s" }]);
        }
        let (trace, report) = (a.runtime_dir().join("trace"), a.runtime_dir().join("report.json"));
        let (trace, report) = (trace.display().to_string(), report.display().to_string());
        if case.fault == Fault::DiskFull(Side::Send) {
            arguments.extend(["--trace", &trace, "--report", &report]);
        }
        if case.moment == Moment::Before {
            super::fault::before(case, cable, &a, &b);
        }
        let variables = [(HOLD, hold(Side::Send)), (RESET, &reset(Side::Send))];
        let sender = a.start_with(&arguments, &variables);
        let mut scene =
            Self { a, b, cable, relay, address, receiver, sender, source, source_pid, held: None, larder };
        match case.moment {
            // Too slow a machine to dial: no stream can be cut then.
            Moment::Before if case.is_taken_up() => {
                let begun = |line: &serde_json::Value| line["event"] == "phase" && line["phase"] == "rounds";
                if !scene.sender.saw(STEP_LIMIT, begun) {
                    return None;
                }
            }
            Moment::Before => {}
            Moment::Entering(side, _) => {
                if !scene.is_held(side) {
                    return None;
                }
                scene.held = Some(side);
            }
            Moment::Into(phase, us) => {
                let come = |line: &serde_json::Value| line["event"] == "phase" && line["phase"] == phase;
                if !scene.sender.saw(STEP_LIMIT, come) && phase == "post-copy" {
                    return None;
                }
                std::thread::sleep(Duration::from_micros(us));
            }
        }
        Some(scene)
    }

    /// Whether this end comes to its moment; not if the sender gives up before.
    fn is_held(&mut self, side: Side) -> bool {
        let until = Instant::now() + STEP_LIMIT;
        while Instant::now() < until {
            if self.end(side).is_held_within(Duration::from_millis(20)) {
                return true;
            }
            if !self.sender.is_running() {
                // The receiver may have come to its moment right before the sender gave up.
                return self.end(side).is_held_within(Duration::ZERO);
            }
        }
        false
    }

    /// The program at this end.
    pub(super) fn end(&mut self, side: Side) -> &mut Running {
        match side {
            Side::Send => &mut self.sender,
            Side::Receive => &mut self.receiver,
        }
    }

    /// The process id, if this process is there.
    pub(super) fn pid(&self, process: Process) -> Option<i32> {
        match process {
            Process::Sender => Some(self.sender.pid()),
            Process::Receiver => Some(self.receiver.pid()),
            Process::SourceVmm => Some(self.source_pid),
            Process::DestinationVmm => self.b.find_vm_pid(VM),
        }
    }
}

/// A guest that differs from seed to seed: small, so that a case is quick, and busy, so that a lost page shows; where pages are
/// to be missing at the destination, busier.
fn guest(case: &Case) -> String {
    let mut random = Random::new(case.seed);
    let (ws_mib, rate) = match case.mode {
        Mode::PreCopy | Mode::Resume | Mode::Verify => (2 + random.below(6), 20 + random.below(60)),
        Mode::PostCopy => (6 + random.below(2), 60 + random.below(60)),
    };
    format!(
        "fill={}M ws={ws_mib}M rate={rate} pattern={} content={} seed={} report_ms=0",
        8 + random.below(16),
        random.pick(&["seq", "uniform", "hot"]),
        random.pick(&["random", "random", "text", "zero"]),
        random.below(1 << 32),
    )
}
