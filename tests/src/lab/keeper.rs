//! The process that holds a laboratory: it makes the hosts and the network between them, and whatever ends it ends them.
//!
//! It ends when it is told to (SIGTERM, SIGINT, SIGHUP), when its standard input ends before somebody said on it that it may stay,
//! when its time is over, and when no host is left. If it is killed, the kernel kills the hosts.

use super::access::{HostAccess, Order, description};
use super::image::{self, Program};
use super::machine::{Files, Hardware, Machine};
use super::packages::Packages;
use super::{Context as _, Lab, Result, clock, switch};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::{BufRead as _, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What is said on the keeper's standard input to let it stay when that ends.
pub const STAY: &str = "stay";

/// What the keeper says when the hosts can be used.
pub const READY: &str = "ready";

/// Hosts have one digit of an address.
const MAX_HOSTS: usize = 9;

/// How long hosts may take to come up: twenty times what they took on two quiet cores in November 2026.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How long an agent may take to answer before it is asked again; nothing ends the keeper meanwhile.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How often it is looked whether there is a reason to end.
const TICK: Duration = Duration::from_millis(50);

/// What a laboratory is to be like.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many hosts.
    pub hosts: usize,
    /// What each of them is made of.
    pub hardware: Hardware,
    /// What is put into each of them.
    pub programs: Vec<Program>,
    /// When it ends by itself.
    pub limit: Duration,
    /// Removes the folder at the end, logs and all.
    pub discard: bool,
}

/// Reasons to end that come from outside.
struct Watch {
    told: Arc<OnceLock<String>>,
    until: Instant,
}

impl Watch {
    fn start(limit: Duration) -> Result<Self> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        let told = Arc::new(OnceLock::new());
        let mut signals =
            signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM]).context(|| "signals".into())?;
        let by_signal = told.clone();
        std::thread::spawn(move || {
            for signal in &mut signals {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
                by_signal.set(format!("told to end by {name}")).ok();
            }
        });
        let by_input = told.clone();
        std::thread::spawn(move || {
            let mut lines = std::io::stdin().lock().lines().map_while(std::io::Result::ok);
            if !lines.any(|line| line == STAY) {
                by_input.set("who asked for it is gone".into()).ok();
            }
        });
        Ok(Self { told, until: Instant::now() + limit })
    }

    /// Whether to go on.
    fn check(&self) -> Result<()> {
        if let Some(why) = self.told.get() {
            return Err(why.clone());
        }
        if Instant::now() > self.until {
            return Err("its time is over".into());
        }
        Ok(())
    }
}

/// A folder that is this laboratory's as long as this lives.
struct Folder {
    path: PathBuf,
    discard: bool,
    _lock: File,
}

impl Folder {
    fn take(path: &Path, discard: bool) -> Result<Self> {
        let failed = || path.display().to_string();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).context(failed)?;
        let about = path.metadata().context(failed)?;
        if about.uid() != rustix::process::geteuid().as_raw() || about.permissions().mode() & 0o077 != 0 {
            return Err(format!("{} is open to others: name another folder with --folder", path.display()));
        }
        let lock = File::create(path.join("lock")).context(failed)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            format!("there is a laboratory in {} already: scripts/lab down ends it", path.display())
        })?;
        let folder = Self { path: path.into(), discard, _lock: lock };
        folder.clear();
        let logs = path.join("logs");
        if logs.exists() {
            std::fs::remove_dir_all(&logs).context(failed)?;
        }
        std::fs::create_dir(&logs).context(failed)?;
        Ok(folder)
    }

    /// Removes everything but logs and the lock.
    fn clear(&self) {
        for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let kept = ["logs", "lock"].iter().any(|name| entry.file_name() == *name);
            let path = entry.path();
            if !kept && std::fs::remove_file(&path).is_err() {
                std::fs::remove_dir_all(&path).ok();
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.clear();
        if self.discard {
            std::fs::remove_dir_all(&self.path).ok();
        }
    }
}

/// Whether a laboratory's keeper lives.
pub fn is_held(folder: &Path) -> bool {
    let Ok(lock) = File::open(folder.join("lock")) else { return false };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// Ends a laboratory.
///
/// # Errors
/// If its keeper cannot be ended.
pub fn end(folder: &Path) -> Result<()> {
    if !is_held(folder) {
        std::fs::remove_file(description(folder)).ok();
        return Ok(());
    }
    let lab = Lab::open(folder).map_err(|_| {
        format!("the laboratory in {} is just coming up: end the command that does it", folder.display())
    })?;
    let keeper = rustix::process::Pid::from_raw(lab.keeper_pid).ok_or("the keeper has no process id")?;
    for (signal, patience_s) in [(rustix::process::Signal::TERM, 15), (rustix::process::Signal::KILL, 5)] {
        rustix::process::kill_process(keeper, signal).ok();
        let until = Instant::now() + Duration::from_secs(patience_s);
        while Instant::now() < until {
            if !is_held(folder) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Err(format!("process {} still holds the laboratory in {}", lab.keeper_pid, folder.display()))
}

/// Makes a laboratory and holds it until there is a reason to end. Says [`READY`] on standard output when it can be used. Must
/// be called on the main thread, because the kernel ends the machines together with the thread that started them.
///
/// # Errors
/// If it does not come up.
pub fn keep(folder: &Path, plan: &Plan) -> Result<()> {
    if !(1..=MAX_HOSTS).contains(&plan.hosts) {
        return Err(format!("a laboratory has 1 to {MAX_HOSTS} hosts, not {}", plan.hosts));
    }
    let watch = Watch::start(plan.limit)?;
    let folder = Folder::take(folder, plan.discard)?;
    let tsc = clock::Measurement::begin();
    let packages = Packages::ensure()?;
    let token = secret()?;
    let image_path = folder.path.join("image");
    let image = image::host(&packages, &plan.programs, &token, &folder.path)?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&image_path)
        .context(|| image_path.display().to_string())?;
    file.write_all(&image).context(|| image_path.display().to_string())?;
    let socket = folder.path.join("switch");
    switch::start(&socket)?;
    let (kernel, logs) = (packages.kernel(), folder.path.join("logs"));
    let tsc_khz = tsc.finish();
    let files = Files {
        tsc_khz,
        kernel: &kernel,
        image: &image_path,
        switch: &socket,
        logs: &logs,
        folder: &folder.path,
    };
    let mut machines = Vec::new();
    for number in 1..=plan.hosts {
        machines.push(Machine::start(number, &plan.hardware, &files)?);
    }
    let access = |machine: &Machine| HostAccess {
        name: machine.name.clone(),
        ip: machine.ip.clone(),
        port: machine.port,
    };
    let lab = Lab::new(&folder.path, machines.iter().map(access).collect(), token);
    for (machine, host) in machines.iter_mut().zip(&lab.hosts) {
        wait_until_up(machine, host, &lab, &watch, &logs)?;
    }
    lab.publish()?;
    // Who asked for it may be gone; then standard input says so.
    writeln!(std::io::stdout(), "{READY}").and_then(|()| std::io::stdout().flush()).ok();
    // A laboratory never ends without a word: its logs may be removed, and who works with it hears of a refused connection.
    let why = loop {
        if let Err(why) = watch.check() {
            break why;
        }
        machines
            .retain_mut(|machine| machine.check(&logs).inspect_err(|why| eprintln!("lab: {why}")).is_ok());
        if machines.is_empty() {
            break "no host is left".into();
        }
        std::thread::sleep(TICK);
    };
    eprintln!("lab: the laboratory in {} ends: {why}", folder.path.display());
    drop(machines);
    Ok(())
}

/// Waits until a host's agent answers.
fn wait_until_up(
    machine: &mut Machine,
    host: &HostAccess,
    lab: &Lab,
    watch: &Watch,
    logs: &Path,
) -> Result<()> {
    let until = Instant::now() + BOOT_LIMIT;
    loop {
        let order = Order { limit: Some(ATTEMPT), ..Order::new(&["true"]) };
        match lab.run(host, &order, std::io::empty(), &mut std::io::sink(), &mut std::io::sink()) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(_) => machine.check(logs)?,
        }
        watch.check()?;
        if Instant::now() > until {
            let words = machine.last_words();
            return Err(format!("{} was not up after {} s\n{words}", host.name, BOOT_LIMIT.as_secs()));
        }
        std::thread::sleep(TICK);
    }
}

/// What only this laboratory's users know.
fn secret() -> Result<String> {
    let mut bytes = [0; 16];
    let failed = || "/dev/urandom".to_owned();
    File::open("/dev/urandom").context(failed)?.read_exact(&mut bytes).context(failed)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
