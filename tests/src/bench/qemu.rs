//! One move or one file by QEMU: two processes on this machine, driven over their monitors.

use super::account::{Before, SETTLE, await_tick, micros, stats, undisturbed, wait_running};
use super::cases::Case;
use super::memory::touch;
use super::ours::merge;
use super::turns::Vcpu;
use super::{certificates, peer};
use crate::guest::Window;
use crate::network::{self, Cable, FAR};
use crate::qmp::Monitor;
use serde_json::{Value, json};
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How QEMU is to move a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// As the tables call it.
    pub name: &'static str,
    pub tls: bool,
    /// Connections of multifd.
    pub channels: Option<u8>,
    /// `downtime-limit`, in milliseconds.
    pub downtime_ms: u64,
}

/// Connections of multifd: as many as there are cores here.
const CHANNELS: u8 = 2;

/// QEMU's own `downtime-limit`.
pub(super) const DOWNTIME_MS: u64 = 300;

const fn way(name: &'static str) -> Way {
    Way { name, tls: false, channels: None, downtime_ms: DOWNTIME_MS }
}

/// Its ways that are compared with ours, which is always encrypted and aims at 50 ms.
pub(super) const WAYS: &[Way] = &[
    way("qemu"),
    Way { channels: Some(CHANNELS), ..way("qemu-multifd") },
    Way { tls: true, ..way("qemu-tls") },
    Way { tls: true, channels: Some(CHANNELS), ..way("qemu-multifd-tls") },
    Way { downtime_ms: 50, ..way("qemu-50ms") },
];

/// No limit on the bandwidth, in bytes per second.
const UNLIMITED: u64 = 1 << 40;

/// How often the source is asked how far it is. Each question takes a lock of QEMU's, so not too often.
const LOOK: Duration = Duration::from_millis(5);

/// A QEMU process; killed when dropped.
struct Process {
    child: Child,
    monitor: Monitor,
}

/// A guest in QEMU that runs and may be moved.
pub(super) struct Qemu<'a> {
    dir: tempfile::TempDir,
    source: Process,
    window: Window,
    before: Before,
    arguments: Vec<String>,
    cable: Option<&'a Cable>,
    way: Way,
}

impl<'a> Qemu<'a> {
    /// Starts the guest and lets it run undisturbed for a while.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub(super) fn start(
        case: &Case,
        seed: u64,
        tsc_khz: u64,
        way: Way,
        cable: Option<&'a Cable>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::Builder::new().prefix("migrate-bench-").tempdir()?;
        std::fs::write(dir.path().join("ledger.elf"), ledger::IMAGE)?;
        if way.tls {
            certificates::write(dir.path())?;
        }
        let (mib, kernel) = (case.memory_mib, dir.path().join("ledger.elf"));
        let line = format!("{} seed={seed} report_ms=0 serial=none tsc_khz={tsc_khz}", case.cmdline);
        let ram = format!("memory-backend-memfd,id=ram,size={mib}M,share=on");
        let mut arguments: Vec<String> = Vec::new();
        for argument in ["-accel", "kvm", "-machine", "microvm,memory-backend=ram", "-object", &ram] {
            arguments.push(argument.into());
        }
        for argument in
            ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "null"]
        {
            arguments.push(argument.into());
        }
        arguments.extend(["-m".into(), mib.to_string(), "-append".into(), line]);
        arguments.extend(["-kernel".into(), kernel.display().to_string()]);
        let source = Process::start(dir.path(), "source", &arguments, way, cable.map(Cable::near))?;
        let window = Window::open(source.pid()).ok_or("QEMU has no memory file")?;
        wait_running(&window);
        let before = undisturbed(&window);
        Ok(Self { dir, source, window, before, arguments, cable, way })
    }

    /// Moves it; `Ok(Err)` when it does not arrive in time.
    ///
    /// # Errors
    /// What QEMU says.
    pub(super) fn measure(
        mut self,
        memory_mib: u64,
        limit: Duration,
    ) -> Result<Result<Value, String>, Box<dyn std::error::Error>> {
        touch(memory_mib);
        let mut arguments = self.arguments.clone();
        arguments.extend(["-incoming".into(), "defer".into()]);
        let namespace = self.cable.map(Cable::far);
        let mut destination =
            Process::start(self.dir.path(), "destination", &arguments, self.way, namespace)?;
        let ip = if self.cable.is_some() { FAR } else { "127.0.0.1" };
        self.way.set(&mut self.source.monitor, true)?;
        self.way.set(&mut destination.monitor, false)?;
        destination.monitor.ask("migrate-incoming", &json!({"uri": format!("tcp:{ip}:0")}))?;
        let listening = destination.monitor.ask("query-migrate", &json!({}))?;
        let port =
            listening["socket-address"][0]["port"].as_str().ok_or("QEMU does not say where it listens")?;
        let uri = format!("tcp:{ip}:{port}");
        let vcpu = Vcpu::of(self.source.pid()).ok_or("QEMU has no threads")?;
        self.before.begin(&self.window);
        let turns = vcpu.turns();
        let begun = Instant::now();
        self.source.monitor.ask("migrate", &json!({"uri": uri}))?;
        let told = match self.source.completed(begun, limit)? {
            Ok(told) => told,
            Err(why) => return Ok(Err(why)),
        };
        let wall_us = begun.elapsed().as_micros();
        // The source stands still for good now.
        let frozen_tsc = stats(&self.window).tsc_last;
        let turns = vcpu.turns().since(turns);
        let arrived = Window::open(destination.pid()).ok_or("QEMU has no memory file")?;
        let mut sample = self.before.end(&arrived, frozen_tsc);
        destination.monitor.ask("stop", &json!({}))?;
        arrived.verify().map_err(|why| format!("{}: the guest is BROKEN: {why}", self.way.name))?;
        let more = json!({
            "vcpu_ran_us": turns.ran_us,
            "vcpu_waited_us": turns.waited_us,
            "total_us": told["total-time"].as_u64().ok_or("QEMU tells no total time")? * 1000,
            "wall_us": wall_us,
            "downtime_engine_us": told["downtime"].as_u64().unwrap_or(0) * 1000,
            "rounds": told["ram"]["dirty-sync-count"],
            "sent_bytes": told["ram"]["transferred"],
        });
        merge(&mut sample, &more);
        Ok(Ok(sample))
    }

    /// Writes it into a file while it runs, lets it go on, and starts another one from that file.
    ///
    /// # Errors
    /// What QEMU says, or that the guest is not sound.
    pub(super) fn snapshot(
        mut self,
        memory_mib: u64,
        file: &Path,
        limit: Duration,
    ) -> Result<Value, Box<dyn std::error::Error>> {
        self.way.set(&mut self.source.monitor, true)?;
        touch(memory_mib);
        self.before.begin(&self.window);
        let begun = Instant::now();
        self.source.monitor.ask("migrate", &json!({"uri": format!("exec:cat > {}", file.display())}))?;
        self.source.completed(begun, limit)??;
        let wall_us = micros(begun);
        self.source.monitor.ask("cont", &json!({}))?;
        std::thread::sleep(SETTLE);
        let later = stats(&self.window);
        let gap = later.longest_gap_since(self.before.at.tsc_last).and_then(|gap| later.us(gap.cycles));
        self.source.monitor.ask("stop", &json!({}))?;
        touch(memory_mib);
        let mut arguments = self.arguments.clone();
        arguments.extend(["-incoming".into(), format!("exec:cat {}", file.display())]);
        let begun = Instant::now();
        let mut restored = Process::start(self.dir.path(), "restored", &arguments, self.way, None)?;
        while restored.monitor.ask("query-status", &json!({}))?["running"] != true {
            if begun.elapsed() > limit {
                return Err("QEMU does not come up from its file".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let runs_wall_us = micros(begun);
        let window = Window::open(restored.pid()).ok_or("QEMU has no memory file")?;
        await_tick(&window);
        let tick_wall_us = micros(begun);
        restored.monitor.ask("stop", &json!({}))?;
        window.verify().map_err(|why| format!("the guest is BROKEN: {why}"))?;
        Ok(json!({
            "full_pause_us": gap,
            "full_wall_us": wall_us,
            "restore_runs_wall_us": runs_wall_us,
            "restore_tick_wall_us": tick_wall_us,
        }))
    }
}

impl Way {
    fn set(self, monitor: &mut Monitor, source: bool) -> std::io::Result<()> {
        if let Some(channels) = self.channels {
            let on = json!({"capabilities": [{"capability": "multifd", "state": true}]});
            monitor.ask("migrate-set-capabilities", &on)?;
            monitor.ask("migrate-set-parameters", &json!({"multifd-channels": channels}))?;
        }
        if source {
            let limits = json!({"downtime-limit": self.downtime_ms, "max-bandwidth": UNLIMITED});
            monitor.ask("migrate-set-parameters", &limits)?;
        }
        if self.tls {
            let tls =
                json!({"tls-creds": "tls", "tls-hostname": if source { certificates::SERVER } else { "" }});
            monitor.ask("migrate-set-parameters", &tls)?;
        }
        Ok(())
    }
}

impl Process {
    fn start(
        dir: &Path,
        name: &str,
        arguments: &[String],
        way: Way,
        namespace: Option<&str>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let socket = dir.join(format!("{name}.qmp"));
        // So that it ends with the benchmark, even when that is killed (util-linux).
        let (keeper, keep) = ("setpriv", ["--pdeathsig", "KILL", "--", peer::QEMU]);
        let mut command = match namespace {
            Some(namespace) => network::inside(namespace, Path::new(keeper)),
            None => Command::new(keeper),
        };
        command.args(keep);
        command.args(arguments).arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        if way.tls {
            let endpoint = if name == "source" { "client" } else { "server" };
            let creds =
                format!("tls-creds-x509,id=tls,endpoint={endpoint},verify-peer=on,dir={}", dir.display());
            command.arg("-object").arg(creds);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        match Monitor::connect(&socket) {
            Ok(monitor) => Ok(Self { child, monitor }),
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                let mut said = String::new();
                child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said));
                Err(format!("QEMU does not start: {error}: {said}").into())
            }
        }
    }

    /// Waits until its migration has ended, and gives its last word; `Ok(Err)` when it does not arrive in time.
    fn completed(&mut self, begun: Instant, limit: Duration) -> std::io::Result<Result<Value, String>> {
        loop {
            let told = self.monitor.ask("query-migrate", &json!({}))?;
            match told["status"].as_str() {
                Some("completed") => return Ok(Ok(told)),
                Some("failed" | "cancelled") => return Ok(Err(format!("QEMU's migration failed: {told}"))),
                _ if begun.elapsed() > limit => return Ok(Err(format!("not within {limit:?}: {told}"))),
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is an i32")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
