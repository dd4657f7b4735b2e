//! One host: a QEMU process.

use super::{Context as _, Result};
use crate::qmp::Monitor;
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The control network is QEMU's own user-mode network; a host has this address in it and sees nothing else there.
pub(super) const CONTROL_IP: &str = "10.0.2.15";

/// The port of the agent in a host.
pub(super) const AGENT_PORT: u16 = 7;

/// How long QEMU may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a host is made of.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// Virtual CPUs, which are threads of this machine.
    pub vcpus: u32,
    /// Memory, in MiB. It is taken from this machine when it is touched.
    pub memory_mib: u32,
    /// The largest packet of the private network, in bytes.
    pub mtu: u32,
}

impl Default for Hardware {
    fn default() -> Self {
        Self { vcpus: 2, memory_mib: 2048, mtu: 9000 }
    }
}

/// Files that a host is started with.
pub(super) struct Files<'a> {
    pub kernel: &'a Path,
    pub image: &'a Path,
    pub switch: &'a Path,
    /// For its console's and QEMU's words.
    pub logs: &'a Path,
    /// For the monitor's socket.
    pub folder: &'a Path,
    /// How fast its time-stamp counter runs.
    pub tsc_khz: u64,
}

/// A running host, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Machine {
    pub name: String,
    /// The address in the private network.
    pub ip: String,
    /// Where the agent listens, on this machine's loopback.
    pub port: u16,
    qemu: Child,
    console: PathBuf,
}

impl Machine {
    /// Starts the host of this number, from 1 on. It must be called on a thread that stays: the kernel ends QEMU together with
    /// the thread that started it (`PR_SET_PDEATHSIG` in prctl(2)), which holds even when that is killed.
    pub(super) fn start(number: usize, hardware: &Hardware, files: &Files<'_>) -> Result<Self> {
        let name = format!("host{number}");
        let (console, said) =
            (files.logs.join(format!("{name}.console")), files.logs.join(format!("{name}.qemu")));
        let monitor = files.folder.join(format!("{name}.qmp"));
        let said = File::create(&said).context(|| said.display().to_string())?;
        let mac = |network: u8| format!("52:54:00:78:{network:02x}:{number:02x}");
        let Hardware { vcpus, memory_mib, mtu } = hardware;
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ]);
        command.args(["-display", "none", "-name", &name, "-machine", "q35"]);
        // A larger translation cache than this one was no quicker.
        command.args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,+svm"]);
        command.args(["-smp", &vcpus.to_string(), "-m", &memory_mib.to_string()]);
        command.arg("-kernel").arg(files.kernel).arg("-initrd").arg(files.image);
        command.args(["-append", &kernel_arguments(number, files.tsc_khz)]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        // Port 0 lets the kernel choose one; `restrict` keeps the host from everything but the forwarded port.
        let forward = format!("hostfwd=tcp:127.0.0.1:0-:{AGENT_PORT}");
        command.args(["-netdev", &format!("user,id=control,ipv6=off,restrict=on,{forward}")]);
        command.args(["-device", &format!("virtio-net-pci,netdev=control,mac={},romfile=", mac(0))]);
        let switch = files.switch.display();
        command.args(["-netdev", &format!("stream,id=private,server=off,addr.type=unix,addr.path={switch}")]);
        let card = format!("virtio-net-pci,netdev=private,mac={},host_mtu={mtu},romfile=", mac(1));
        command.args(["-device", &card]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let qemu = command.spawn().context(|| "setpriv (Debian's util-linux) cannot be started".into())?;
        let mut machine = Self { name, ip: format!("10.78.0.{number}"), port: 0, qemu, console };
        machine.port = machine.forwarded_port(&monitor, files.logs)?;
        Ok(machine)
    }

    fn forwarded_port(&mut self, monitor: &Path, logs: &Path) -> Result<u16> {
        while !monitor.exists() {
            self.check(logs)?;
            std::thread::sleep(Duration::from_millis(5));
        }
        let failed = || format!("{}'s monitor", self.name);
        let mut monitor = Monitor::connect(monitor).context(failed)?;
        let asked = json!({"command-line": "info usernet"});
        let table = monitor.ask("human-monitor-command", &asked).context(failed)?;
        // Protocol, file descriptor, source address, source port, and so on.
        let row = table.as_str().unwrap_or_default().lines().find(|line| line.contains("HOST_FORWARD"));
        let port = row.and_then(|row| row.split_whitespace().nth(3)?.parse().ok());
        port.ok_or_else(|| format!("{} forwards no port: {table}", self.name))
    }

    /// Whether it still runs; if not, why.
    pub(super) fn check(&mut self, logs: &Path) -> Result<()> {
        let Ok(Some(status)) = self.qemu.try_wait() else { return Ok(()) };
        let said = std::fs::read_to_string(logs.join(format!("{}.qemu", self.name))).unwrap_or_default();
        Err(format!("{} ended ({status})\n{said}{}", self.name, self.last_words()))
    }

    /// The end of what its console said.
    pub(super) fn last_words(&self) -> String {
        let console = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&console[console.len().saturating_sub(4000)..]).into_owned()
    }
}

/// The command line of a host's kernel. Debian's would take the counter of an AMD processor with several cores for
/// unsynchronised and measure time by slower means; `reliable` says that it is not so, and without the two other clocks the
/// kernel cannot correct the frequency that it is told (arch/x86/kernel/tsc.c). `no_timer_check` is what a kernel in a VM that says so
/// does by itself: a busy machine delivers the first ticks late, and the check of them would be a panic.
fn kernel_arguments(number: usize, tsc_khz: u64) -> String {
    format!(
        "console=ttyS0 quiet nokaslr mitigations=off panic=-1 lab.host={number} \
         tsc_early_khz={tsc_khz} tsc=reliable hpet=disable pmtmr=0 no_timer_check"
    )
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.qemu.id()).ok().and_then(rustix::process::Pid::from_raw)
            && matches!(self.qemu.try_wait(), Ok(None))
        {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        }
        let until = Instant::now() + PATIENCE;
        while matches!(self.qemu.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}
