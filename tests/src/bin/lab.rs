//! The laboratory's command line: see `scripts/lab --help` and `e2e::lab`.

use clap::{Args, Parser, Subcommand};
use e2e::lab::access::Order;
use e2e::lab::image::Program;
use e2e::lab::keeper::{self, Plan, READY, STAY};
use e2e::lab::machine::Hardware;
use e2e::lab::{Lab, Result, agent};
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The exit code when the laboratory itself failed, as ssh(1) has it.
const FAILED: u8 = 255;

/// Complete hosts with hardware virtualisation, emulated on this machine.
///
/// Each host is a QEMU machine with nested SVM that runs Debian's stock kernel with kvm-amd and, as root, what it is told to. They
/// are called host1, host2, and so on, and have a private network: 10.78.0.1, 10.78.0.2, and so on.
#[derive(Parser)]
#[command(
    name = "scripts/lab",
    after_help = "\
Example:
  scripts/lab up
  scripts/lab run host1 -- migrate vm run --name v --memory 128MiB --detach
  scripts/lab down"
)]
struct Cli {
    /// The folder of the laboratory: two of them run side by side in two folders.
    #[arg(long, global = true, env = "MIGRATE_LAB", value_name = "DIR")]
    folder: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Brings up a laboratory and returns when its hosts can be used.
    Up(Wishes),
    /// Runs a command in a host, as root in /root; its exit code is passed through (255: the laboratory failed, 124: time ran out).
    /// The command ends when this program ends.
    Run {
        /// Ends it after so many seconds.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// host1, or 1.
        host: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// A root shell in a host.
    Shell {
        /// host1, or 1.
        host: String,
    },
    /// Puts a file or a directory into a host.
    Put {
        /// host1, or 1.
        host: String,
        /// What.
        from: PathBuf,
        /// Where to; a directory for directories.
        to: String,
    },
    /// Gets a file or a directory out of a host.
    Get {
        /// host1, or 1.
        host: String,
        /// What.
        from: String,
        /// Into which directory.
        #[arg(default_value = ".")]
        to: PathBuf,
    },
    /// What the hosts' consoles and QEMU said; also of a laboratory that ended.
    Logs {
        /// Only this host's.
        host: Option<String>,
    },
    /// The hosts, their addresses, and whether they answer.
    Status,
    /// Ends the laboratory. Its logs stay until the next one.
    Down,
    /// Holds a laboratory, in the foreground, as long as standard input is open.
    #[command(hide = true)]
    Keep(Wishes),
    /// Serves a host from inside.
    #[command(hide = true)]
    Agent,
}

#[derive(Args, Clone)]
struct Wishes {
    /// How many hosts.
    #[arg(long, default_value_t = 2, value_name = "N")]
    hosts: usize,
    /// Virtual CPUs of each.
    #[arg(long, default_value_t = Hardware::default().vcpus, value_name = "N")]
    vcpus: u32,
    /// Memory of each, in MiB.
    #[arg(long, default_value_t = Hardware::default().memory_mib, value_name = "MIB")]
    memory: u32,
    /// The largest packet of the private network, in bytes; small ones cost an emulated host the more.
    #[arg(long, default_value_t = Hardware::default().mtu, value_name = "BYTES")]
    mtu: u32,
    /// Puts a program into /bin of each host, with its shared libraries; as often as wanted.
    #[arg(long, value_name = "[NAME=]PATH")]
    program: Vec<Program>,
    /// When it ends by itself, in hours.
    #[arg(long, default_value_t = 4, value_name = "HOURS")]
    hours: u64,
    /// Leaves no logs behind.
    #[arg(long)]
    discard: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(why) => {
            eprintln!("lab: {why}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(cli: Cli) -> Result<u8> {
    let folder = cli.folder.unwrap_or_else(usual_folder);
    match cli.verb {
        Verb::Up(wishes) => up(&folder, &wishes),
        Verb::Run { timeout, host, command } => {
            let mut order = Order::new(&command.iter().map(String::as_str).collect::<Vec<_>>());
            order.limit = timeout.map(Duration::from_secs);
            run_in(&folder, &host, &order)
        }
        Verb::Shell { host } => shell(&folder, &host),
        Verb::Put { host, from, to } => {
            let lab = Lab::open(&folder)?;
            lab.put(lab.host(&host)?, &from, &to).map(|()| 0)
        }
        Verb::Get { host, from, to } => {
            let lab = Lab::open(&folder)?;
            lab.get(lab.host(&host)?, &from, &to).map(|()| 0)
        }
        Verb::Logs { host } => logs(&folder, host.as_deref()),
        Verb::Status => status(&folder),
        Verb::Down => keeper::end(&folder).map(|()| 0),
        Verb::Keep(wishes) => keeper::keep(&folder, &plan(&wishes)?).map(|()| 0),
        Verb::Agent => agent::serve().map(|never| match never {}),
    }
}

/// In the user's own runtime directory, which not every system has.
fn usual_folder() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) => PathBuf::from(runtime).join("migrate-lab"),
        None => std::env::temp_dir().join(format!("migrate-lab-{}", rustix::process::geteuid().as_raw())),
    }
}

/// What a keeper is asked for: this program is always among what is put into the hosts, as their agent.
fn plan(wishes: &Wishes) -> Result<Plan> {
    let own = std::env::current_exe().map_err(|error| format!("this program's file: {error}"))?;
    let mut programs = wishes.program.clone();
    programs.push(Program { name: "lab".into(), path: own });
    let hardware = Hardware { vcpus: wishes.vcpus, memory_mib: wishes.memory, mtu: wishes.mtu };
    let limit = Duration::from_secs(wishes.hours * 3600);
    Ok(Plan { hosts: wishes.hosts, hardware, programs, limit, discard: wishes.discard })
}

/// Starts a keeper and lets it stay once it is ready. If this program ends before, the keeper does.
fn up(folder: &Path, wishes: &Wishes) -> Result<u8> {
    let begun = Instant::now();
    let own = std::env::current_exe().map_err(|error| format!("this program's file: {error}"))?;
    let mut command = Command::new(own);
    command.arg("--folder").arg(folder).arg("keep");
    for (name, value) in [
        ("--hosts", wishes.hosts.to_string()),
        ("--vcpus", wishes.vcpus.to_string()),
        ("--memory", wishes.memory.to_string()),
        ("--mtu", wishes.mtu.to_string()),
        ("--hours", wishes.hours.to_string()),
    ] {
        command.args([name, &value]);
    }
    for program in &wishes.program {
        command.arg("--program").arg(format!("{}={}", program.name, program.path.display()));
    }
    command.args(wishes.discard.then_some("--discard"));
    // A group of its own: Ctrl-C at the terminal is for this program, and its end says the rest.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut keeper = command.spawn().map_err(|error| format!("the keeper: {error}"))?;
    let (Some(mut input), Some(output), Some(errors)) =
        (keeper.stdin.take(), keeper.stdout.take(), keeper.stderr.take())
    else {
        return Err("the keeper has no pipes".into());
    };
    std::thread::spawn(move || std::io::copy(&mut std::io::BufReader::new(errors), &mut std::io::stderr()));
    let mut lines = std::io::BufReader::new(output).lines().map_while(std::io::Result::ok);
    if !lines.any(|line| line == READY) {
        let status = keeper.wait().map_err(|error| format!("the keeper: {error}"))?;
        return Err(format!("the laboratory did not come up ({status})"));
    }
    writeln!(input, "{STAY}").map_err(|error| format!("the keeper: {error}"))?;
    for host in Lab::open(folder)?.hosts {
        println!("{} {}", host.name, host.ip);
    }
    eprintln!(
        "lab: up in {:.1} s; it ends by scripts/lab down, or after {} h",
        begun.elapsed().as_secs_f64(),
        wishes.hours
    );
    Ok(0)
}

fn run_in(folder: &Path, host: &str, order: &Order<'_>) -> Result<u8> {
    let lab = Lab::open(folder)?;
    let (mut output, mut errors) = (std::io::stdout(), std::io::stderr());
    let code = lab.run(lab.host(host)?, order, std::io::stdin(), &mut output, &mut errors)?;
    // As a shell has it: the low eight bits.
    Ok(code.to_le_bytes()[0])
}

/// A shell at this terminal, or, where there is none, one that reads what it is to do.
fn shell(folder: &Path, host: &str) -> Result<u8> {
    let terminal = std::io::stdin();
    if !terminal.is_terminal() {
        return run_in(folder, host, &Order::new(&["sh"]));
    }
    let failed = |error: rustix::io::Errno| format!("this terminal: {error}");
    let size = rustix::termios::tcgetwinsize(&terminal).map_err(failed)?;
    let before = rustix::termios::tcgetattr(&terminal).map_err(failed)?;
    let mut raw = before.clone();
    raw.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &raw).map_err(failed)?;
    let mut order = Order::new(&["sh", "-l"]);
    order.terminal = Some((size.ws_row, size.ws_col));
    let code = run_in(folder, host, &order);
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &before).map_err(failed)?;
    code
}

fn logs(folder: &Path, host: Option<&str>) -> Result<u8> {
    let logs = folder.join("logs");
    let entries = std::fs::read_dir(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let wanted = |path: &PathBuf| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        host.is_none_or(|host| stem == host || stem.strip_prefix("host") == Some(host))
    };
    for path in files.iter().filter(|path| wanted(path)) {
        let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("== {}\n{}", path.display(), String::from_utf8_lossy(&text).trim_end());
    }
    Ok(0)
}

/// 0 if all hosts answer.
fn status(folder: &Path) -> Result<u8> {
    let lab = Lab::open(folder)?;
    let mut code = 0;
    for host in &lab.hosts {
        let order = Order { limit: Some(Duration::from_secs(10)), ..Order::new(&["cat", "/proc/uptime"]) };
        let mut said = Vec::new();
        match lab.run(host, &order, std::io::empty(), &mut said, &mut std::io::sink()) {
            Ok(0) => {
                let said = String::from_utf8_lossy(&said).into_owned();
                println!("{} {} up {} s", host.name, host.ip, said.split(' ').next().unwrap_or_default());
            }
            _ => {
                println!("{} {} does not answer", host.name, host.ip);
                code = 1;
            }
        }
    }
    Ok(code)
}
