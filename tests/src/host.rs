//! A host that is a directory.

use crate::network;
use crate::process::{Finished, Running, STEP_LIMIT};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Directories of hosts begin so; the process that made one follows.
const DIR_PREFIX: &str = "migrate-e2e-";

/// The variable that says where a program stops itself: see docs/scripting.md.
pub const HOLD: &str = "MIGRATE_TEST_HOLD";

/// The variable that says which stream it cuts.
pub const RESET: &str = "MIGRATE_TEST_RESET";

/// The longest that a single step of a test may take on a machine of a laboratory. Moves that take two seconds there took 24 with eight other programs on its two cores
/// (November 2026).
pub const EMULATED_STEP_LIMIT: Duration = Duration::from_secs(300);

/// One host's worth of sockets, logs and keys, in a temporary directory.
pub struct Host {
    dir: tempfile::TempDir,
    program: PathBuf,
    keys: PathBuf,
    place: Option<Place>,
    mounted: bool,
}

/// Where a host is.
#[derive(Debug, Clone)]
pub enum Place {
    /// In a network namespace of this machine.
    Namespace {
        /// Its name.
        name: String,
        /// The address it listens at.
        ip: String,
    },
    /// In a machine of a laboratory, in which `migrate` is in the search path. Its directory has the same name there.
    Machine(Bench),
}

/// A machine of a laboratory, reached by the laboratory's program.
#[derive(Debug, Clone)]
pub struct Bench {
    /// That program.
    pub program: PathBuf,
    /// The laboratory's folder.
    pub folder: PathBuf,
    /// The machine's name.
    pub machine: String,
    /// The address it listens at.
    pub ip: String,
}

impl Place {
    fn ip(&self) -> &str {
        match self {
            Self::Namespace { ip, .. } | Self::Machine(Bench { ip, .. }) => ip,
        }
    }
}

impl Bench {
    /// The laboratory's program, with this verb.
    fn verb(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--folder").arg(&self.folder).args([verb, &self.machine]);
        command
    }

    /// A command in the machine. It ends there when it is ended here.
    fn inside(&self, program: &Path) -> Command {
        let mut command = self.verb("run");
        command.arg("--").arg(program);
        command
    }
}

impl Host {
    /// A host without keys that runs this `migrate` program.
    ///
    /// # Panics
    /// If no temporary directory can be made.
    pub fn new(program: &Path) -> Self {
        let prefix = format!("{DIR_PREFIX}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        Self { keys: dir.path().join("keys"), dir, program: program.to_owned(), place: None, mounted: false }
    }

    /// A host with the keys of this one and nothing else in common, at a place of its own on the network.
    pub fn anew_at(&self, place: Place) -> Self {
        let mut host = Self::new(&self.program);
        host.keys.clone_from(&self.keys);
        host.place = Some(place);
        host
    }

    /// Puts this host, before anything runs on it, at a place on the network.
    pub fn moved_to(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// Gives this host, before anything runs on it, a runtime directory on a disk of this size.
    ///
    /// # Panics
    /// If it cannot be mounted, which needs root.
    pub fn with_small_disk(mut self, bytes: u64) -> Self {
        let at = self.runtime_dir();
        std::fs::create_dir(&at).expect("a directory");
        let options = format!("size={bytes},nr_inodes=256,mode=0700");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "migrate-e2e"]).arg(&at).status();
        assert!(mount.is_ok_and(|status| status.success()), "no small disk could be mounted");
        self.mounted = true;
        self
    }

    /// The directory of this host's sockets and logs.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The directory of this host's keys.
    pub fn keys_dir(&self) -> PathBuf {
        self.keys.clone()
    }

    /// A file of this host's, for what a test wants to keep until its end.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `migrate ARGS` on this host, with `--json`.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = match &self.place {
            Some(Place::Machine(bench)) => bench.inside(Path::new("migrate")),
            _ => self.there(&self.program),
        };
        command.args(args).arg("--json");
        // Most tests are about what a lost link means without another one; those of taking it up say how long.
        for (verb, option) in [("send", "--retry-for"), ("receive", "--keep")] {
            if args.first() == Some(&verb) && !args.contains(&option) {
                command.args([option, "0s"]);
            }
        }
        command.arg("--runtime-dir").arg(self.runtime_dir()).arg("--keys").arg(self.keys_dir());
        // What a host remembers is on its small disk, if it has one.
        let state = if self.mounted { self.runtime_dir().join("state") } else { self.path("state") };
        command.arg("--state-dir").arg(state);
        for name in ["MIGRATE_STATE", "MIGRATE_RUNTIME_DIR", "MIGRATE_KEYS", HOLD, RESET, "RUST_LOG"] {
            command.env_remove(name);
        }
        command
    }

    /// Any program, where this host is.
    pub fn there(&self, program: &Path) -> Command {
        match &self.place {
            Some(Place::Machine(bench)) => bench.inside(program),
            Some(Place::Namespace { name, .. }) => network::inside(name, program),
            None => Command::new(program),
        }
    }

    /// Starts `migrate ARGS`.
    pub fn start(&self, args: &[&str]) -> Running {
        self.running(self.command(args))
    }

    fn running(&self, command: Command) -> Running {
        let mut running = Running::start(command);
        running.limit = self.step_limit();
        running
    }

    /// How long a single step of a test may take on this host.
    pub fn step_limit(&self) -> Duration {
        match self.place {
            Some(Place::Machine(_)) => EMULATED_STEP_LIMIT,
            _ => STEP_LIMIT,
        }
    }

    /// Starts `migrate ARGS` so that it stops itself (SIGSTOP) when it enters a phase.
    pub fn start_held(&self, args: &[&str], phase: &str) -> Running {
        self.start_with(args, &[(HOLD, phase)])
    }

    /// Starts `migrate ARGS` with variables of its environment; empty ones ask for nothing.
    pub fn start_with(&self, args: &[&str], variables: &[(&str, &str)]) -> Running {
        let mut command = self.command(args);
        command.envs(variables.iter().copied());
        self.running(command)
    }

    /// Runs `migrate ARGS` to its end.
    pub fn run(&self, args: &[&str]) -> Finished {
        self.start(args).finish()
    }

    /// Starts a detached VM with the ledger guest.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn run_ledger(&self, name: &str, memory: &str, cmdline: &str, more: &[&str]) -> Finished {
        let mut args =
            vec!["vm", "run", "--name", name, "--memory", memory, "--cmdline", cmdline, "--detach"];
        args.extend(more);
        self.run(&args).success()
    }

    /// Starts `migrate receive` on a free port and gives it and its address.
    ///
    /// # Panics
    /// If it does not listen in time.
    pub fn receive(&self, more: &[&str]) -> (Running, String) {
        self.receive_held(more, "")
    }

    /// As [`Host::receive`], stopping itself when it enters a phase.
    ///
    /// # Panics
    /// If it does not listen in time.
    pub fn receive_held(&self, more: &[&str], phase: &str) -> (Running, String) {
        self.receive_with(more, &[(HOLD, phase)])
    }

    /// As [`Host::receive`], with variables of its environment.
    ///
    /// # Panics
    /// If it does not listen in time.
    pub fn receive_with(&self, more: &[&str], variables: &[(&str, &str)]) -> (Running, String) {
        let listen = format!("{}:0", self.place.as_ref().map_or("127.0.0.1", Place::ip));
        let mut args = vec!["receive", "--listen", &listen];
        args.extend(more);
        let mut receiver = self.start_with(&args, variables);
        let listening = receiver.wait_event("listening");
        let address = listening["address"].as_str().expect("an address").to_owned();
        (receiver, address)
    }

    /// The VMs of this host, as `migrate vm list` tells them.
    pub fn vms(&self) -> Vec<Value> {
        self.run(&["vm", "list"]).success().lines
    }

    /// The phase of a VM, if it is there.
    pub fn phase(&self, name: &str) -> Option<String> {
        self.vms().iter().find(|vm| vm["name"] == name)?["phase"].as_str().map(str::to_owned)
    }

    /// Waits until a VM is in this phase (`None`: is gone).
    ///
    /// # Panics
    /// After [`Host::step_limit`].
    pub fn wait_phase(&self, name: &str, wanted: Option<&str>) {
        let until = Instant::now() + self.step_limit();
        loop {
            let phase = self.phase(name);
            if phase.as_deref() == wanted {
                return;
            }
            assert!(Instant::now() < until, "{name} is {phase:?}, waited for {wanted:?}\n{}", self.log(name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The process of a VM's VMM.
    ///
    /// # Panics
    /// If there is no such VM.
    pub fn vm_pid(&self, name: &str) -> i32 {
        let vm = self.vms().into_iter().find(|vm| vm["name"] == name).expect("the VM is listed");
        i32::try_from(vm["pid"].as_i64().expect("a pid")).expect("a pid is an i32")
    }

    /// The process of a VM's VMM, whatever phase it is in, if it is there. Asks nobody, so it works while everything
    /// stands still, too.
    pub fn find_vm_pid(&self, name: &str) -> Option<i32> {
        let place = format!("\0{}\0", self.runtime_dir().display());
        let name = format!("\0--name\0{name}\0");
        let ours = |command: &str| [&place, &name, "\0vm\0"].iter().all(|word| command.contains(*word));
        commands().find(|(_, command)| ours(command)).map(|(pid, _)| pid)
    }

    /// Kills who keeps a container that is moved from here, and answers whether somebody did.
    pub fn kill_keeper(&self, id: &str) -> bool {
        let words = [format!("\0{}\0", self.runtime_dir().display()), format!("\0container-keeper\0{id}\0")];
        let found = commands().find(|(_, command)| words.iter().all(|word| command.contains(word)));
        let pid = found.and_then(|(pid, _)| rustix::process::Pid::from_raw(pid));
        // It may have ended by itself since.
        pid.is_some_and(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok())
    }

    /// What the VMM of a detached VM and its guest said.
    pub fn log(&self, name: &str) -> String {
        let read = |suffix| {
            let path = self.runtime_dir().join(format!("{name}.{suffix}"));
            let read = self.there(Path::new("cat")).arg(path).stdin(Stdio::null()).output();
            read.map(|read| String::from_utf8_lossy(&read.stdout).into_owned()).unwrap_or_default()
        };
        format!("{}\n{}", read("log"), read("serial"))
    }

    /// Waits until the ledger of a VM has filled its memory and writes.
    ///
    /// # Panics
    /// After [`Host::step_limit`].
    pub fn wait_ledger_running(&self, name: &str) {
        let until = Instant::now() + self.step_limit();
        loop {
            let asked = self.run(&["ledger", name]);
            if asked.lines.last().is_some_and(|ledger| ledger["state"] == "running") {
                return;
            }
            assert!(
                Instant::now() < until,
                "the ledger of {name} does not get to run: {asked:#?}\n{}",
                self.log(name)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Copies one of this host's own directories (see [`Host::path`]) to another host, and says where it is there.
    ///
    /// # Panics
    /// If it cannot be copied.
    pub fn copy_to(&self, other: &Self, name: &str) -> PathBuf {
        let run = |mut command: Command| {
            let done = command.stdin(Stdio::null()).output().expect("it can be started");
            assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        };
        let (from, to) = (self.path(name), other.path(name));
        // By way of this process: a machine's files are not to be seen here.
        let between = tempfile::tempdir_in(self.dir.path()).expect("a directory");
        let mut out = copy();
        if let Some(Place::Machine(bench)) = &self.place {
            out = bench.verb("get");
        }
        out.arg(&from).arg(between.path());
        run(out);
        let mut into = copy();
        if let Some(Place::Machine(bench)) = &other.place {
            let mut folder = bench.inside(Path::new("mkdir"));
            folder.arg("-p").arg(other.dir.path());
            run(folder);
            into = bench.verb("put");
        }
        into.arg(between.path().join(name)).arg(other.dir.path());
        run(into);
        to
    }

    /// The guest's account of itself.
    ///
    /// # Panics
    /// If it gives none.
    pub fn ledger(&self, name: &str) -> Value {
        self.run(&["ledger", name]).success().lines.pop().expect("a ledger")
    }

    /// Checks the guest's memory against what the model says it must hold, and the guest's own account.
    ///
    /// # Panics
    /// If anything is wrong, or if the guest does not go on writing.
    pub fn assert_sound(&self, name: &str) {
        let verified = self.run(&["ledger", name, "--verify"]);
        assert_eq!(verified.code, 0, "{verified:#?}\n{}", self.log(name));
        let before = self.ledger(name);
        let ticks = |ledger: &Value| ledger["ticks"].as_u64().expect("ticks");
        let until = Instant::now() + self.step_limit();
        while ticks(&self.ledger(name)) <= ticks(&before) {
            assert!(Instant::now() < until, "the guest {name} stands still\n{}", self.log(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // VMs outlive the program that started them, so they are ended by what their sockets say, or, where that is
        // not to be had, by their command line, which names this host's directory.
        let marker = self.dir.path().to_string_lossy().into_owned();
        if let Some(Place::Machine(_)) = &self.place {
            let mut command = self.there(Path::new("sh"));
            command.args(["-c", END_ALL_OF, "end", &marker]).stdin(Stdio::null()).status().ok();
            return;
        }
        end_all_of(&marker);
        if self.mounted {
            // Lazily: those that were killed a moment ago may still have files there.
            Command::new("umount").arg("--lazy").arg(self.runtime_dir()).status().ok();
        }
    }
}

/// As [`end_all_of`], and the directory is removed, where a shell is all there is. Busybox's grep sees nothing behind a line's
/// first zero byte, and arguments end with one.
const END_ALL_OF: &str = r#"
for process in /proc/[0-9]*; do
  pid=${process#/proc/}
  [ "$pid" = $$ ] || ! tr '\0' '\n' 2>/dev/null <"$process/cmdline" | grep -qF "$1" || kill -KILL "$pid"
done
rm -r -f "$1""#;

/// A command that copies directories on this machine.
fn copy() -> Command {
    let mut command = Command::new("cp");
    command.arg("-r");
    command
}

/// Kills all processes, but this one, on whose command line this text is.
fn end_all_of(marker: &str) {
    let own = i32::try_from(std::process::id()).ok();
    for (pid, command) in commands() {
        if Some(pid) != own
            && command.contains(marker)
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
    }
}

/// All processes and their command lines, whose words end with a zero byte.
/// The processes of this machine: their numbers, and their words with a zero byte behind each.
pub fn commands() -> impl Iterator<Item = (i32, String)> {
    std::fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let command = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&command).into_owned()))
    })
}

/// Ends the VMs and removes the directories, with what is mounted there, of test processes that are gone: a killed one
/// could not.
pub(crate) fn sweep() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(DIR_PREFIX).and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        if pid.is_some_and(|pid| pid.parse::<i32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            eprintln!("removing {name}, which a test process that is gone left behind");
            end_all_of(&entry.path().to_string_lossy());
            Command::new("umount")
                .arg("--lazy")
                .arg(entry.path().join("run"))
                .stderr(Stdio::null())
                .status()
                .ok();
            std::fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// Two hosts that trust each other.
///
/// # Panics
/// If their keys cannot be made.
pub fn trusting_pair(program: &Path) -> (Host, Host) {
    let (a, b) = (Host::new(program), Host::new(program));
    introduce(&a, &b);
    (a, b)
}

/// Gives two hosts keys, and lets them trust each other.
///
/// # Panics
/// If it does not work.
pub fn introduce(a: &Host, b: &Host) {
    for host in [a, b] {
        host.run(&["keys", "init"]).success();
    }
    trust(a, "b", b);
    trust(b, "a", a);
}

/// Lets `host` trust `other` under a name.
///
/// # Panics
/// If it does not work.
pub fn trust(host: &Host, name: &str, other: &Host) {
    let shown = other.run(&["keys", "show"]).success();
    let fingerprint = shown.lines[0]["fingerprint"].as_str().expect("a fingerprint").to_owned();
    host.run(&["keys", "trust", name, &fingerprint]).success();
}
