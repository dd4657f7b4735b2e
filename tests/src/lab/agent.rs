//! What runs in a host and starts there what it is asked for. It listens on the control network only, and answers who knows the
//! laboratory's secret.

use super::wire::{self, Kind};
use super::{Context as _, Result, image, machine};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a shell says of a command that cannot be started.
const NOT_STARTED: i32 = 127;

/// How long the last output of a command that ended is waited for: what it left running may hold its pipes for ever.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// Pieces of standard input that may wait for a command.
const INPUT_PIECES: usize = 64;

/// Of /proc/PID/oom_score_adj (proc(5)): never killed for want of memory, and as likely as any.
const NEVER_FOR_MEMORY: &str = "-1000";
const AS_ANY: &str = "0";

/// Serves until the host ends.
///
/// # Errors
/// If it cannot listen.
pub fn serve() -> Result<Infallible> {
    let token = std::fs::read_to_string(image::TOKEN).context(|| image::TOKEN.into())?;
    let token: Arc<str> = token.into();
    let listener = TcpListener::bind((machine::CONTROL_IP, machine::AGENT_PORT))
        .context(|| "the agent's port".into())?;
    // With this process the host ends. Where memory runs out, what it started is to go first.
    std::fs::write("/proc/self/oom_score_adj", NEVER_FOR_MEMORY)
        .context(|| "the agent's oom_score_adj".into())?;
    println!("the agent listens");
    loop {
        let attended = listener.accept().and_then(|(stream, _)| {
            let token = token.clone();
            std::thread::Builder::new().spawn(move || {
                if let Err(error) = attend(&stream, &token) {
                    eprintln!("lab: {error}");
                }
                stream.shutdown(Shutdown::Both).ok();
            })
        });
        // A host without threads or descriptors to spare has some again when a command ends.
        if let Err(error) = attended {
            eprintln!("lab: the agent's port: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A command's process group, as long as it may be signalled.
type Group = Arc<Mutex<Option<Pid>>>;

fn kill(group: &Group) {
    if let Some(pid) = *group.lock().unwrap_or_else(PoisonError::into_inner) {
        rustix::process::kill_process_group(pid, Signal::KILL).ok();
    }
}

/// One connection: one command.
fn attend(stream: &TcpStream, token: &str) -> Result<()> {
    stream.set_nodelay(true).context(|| "a connection".into())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).context(|| "a connection".into())?;
    let Some((Kind::Request, request)) = wire::read(stream).context(|| "a request".into())? else {
        return Ok(());
    };
    let request: Value = serde_json::from_slice(&request).context(|| "a request".into())?;
    if request["token"] != token {
        return Err("somebody asked who does not know the laboratory's secret".into());
    }
    stream.set_read_timeout(None).context(|| "a connection".into())?;
    let started = command(&request).and_then(|command| start(command, &request["terminal"]));
    let (mut child, input, outputs) = match started {
        Ok(started) => started,
        Err(why) => {
            wire::write(stream, Kind::Stderr, format!("lab: {why}\n").as_bytes())?;
            return wire::write(stream, Kind::Exit, &NOT_STARTED.to_le_bytes());
        }
    };
    let group: Group = Arc::new(Mutex::new(i32::try_from(child.id()).ok().and_then(Pid::from_raw)));
    let to = Arc::new(Mutex::new(stream.try_clone().context(|| "a connection".into())?));
    let (ended, ends) = channel();
    let number = outputs.len();
    for (kind, from) in outputs {
        let (to, group, ended) = (to.clone(), group.clone(), ended.clone());
        std::thread::spawn(move || pump(from, kind, &to, &group, &ended));
    }
    let (from, killed) = (stream.try_clone().context(|| "a connection".into())?, group.clone());
    std::thread::spawn(move || {
        feed(&from, input);
        kill(&killed);
    });
    let status = child.wait().context(|| "a command".into())?;
    *group.lock().unwrap_or_else(PoisonError::into_inner) = None;
    for _ in 0..number {
        if ends.recv_timeout(LAST_OUTPUT).is_err() {
            break;
        }
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    let to = to.lock().unwrap_or_else(PoisonError::into_inner);
    wire::write(&*to, Kind::Exit, &code.to_le_bytes())
}

/// The command that is asked for.
fn command(request: &Value) -> Result<Command> {
    let words = |name: &str| -> Vec<&str> {
        request[name].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
    };
    let words_of_command = words("command");
    let (program, arguments) = words_of_command.split_first().ok_or("there is no command in the request")?;
    let terminal = request["terminal"].is_object();
    // What a terminal is for belongs to the session of the process that sits at it.
    let mut command = if terminal { Command::new("setsid") } else { Command::new(program) };
    if terminal {
        command.arg("-c").arg(program);
    } else {
        command.process_group(0);
    }
    command.args(arguments).current_dir("/root");
    for (name, value) in words("variables").iter().filter_map(|variable| variable.split_once('=')) {
        command.env(name, value);
    }
    Ok(command)
}

type Input = Box<dyn Write + Send>;
type Outputs = Vec<(Kind, Box<dyn Read + Send>)>;

/// Starts it, with pipes or with a terminal of this size.
fn start(mut command: Command, terminal: &Value) -> Result<(Child, Input, Outputs)> {
    let what = format!("{} cannot be started", command.get_program().display());
    if terminal.is_object() {
        let (near, far) = open_terminal(terminal)?;
        let copy = || far.try_clone().context(|| "the terminal".into());
        command.stdin(copy()?).stdout(copy()?).stderr(copy()?).env("TERM", "linux");
        let child = spawn(&mut command).context(|| what)?;
        let reader = near.try_clone().context(|| "the terminal".into())?;
        return Ok((child, Box::new(near), vec![(Kind::Stdout, Box::new(reader))]));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(&mut command).context(|| what.clone())?;
    let (Some(input), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(format!("{what}: no pipes"));
    };
    Ok((child, Box::new(input), vec![(Kind::Stdout, Box::new(stdout)), (Kind::Stderr, Box::new(stderr))]))
}

/// Starts it as a process that may be killed for want of memory, other than this one.
fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let child = command.spawn()?;
    // It fails if the command has ended.
    std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), AS_ANY).ok();
    Ok(child)
}

/// A pair of ends (pty(7)): the one to read and write here, and the one for the command.
fn open_terminal(size: &Value) -> Result<(File, File)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let failed = || "the terminal".to_owned();
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context(failed)?;
    grantpt(&near).context(failed)?;
    unlockpt(&near).context(failed)?;
    let name = ptsname(&near, Vec::new()).context(failed)?;
    let far = File::options().read(true).write(true).open(name.to_string_lossy().as_ref()).context(failed)?;
    let cells = |name: &str| size[name].as_u64().and_then(|cells| u16::try_from(cells).ok()).unwrap_or(80);
    let size = rustix::termios::Winsize {
        ws_row: cells("rows"),
        ws_col: cells("columns"),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&far, size).context(failed)?;
    Ok((File::from(near), far))
}

/// Sends what a command says. If nobody listens any more, it ends.
fn pump(
    mut from: Box<dyn Read + Send>,
    kind: Kind,
    to: &Mutex<TcpStream>,
    group: &Group,
    ended: &Sender<()>,
) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        let to = to.lock().unwrap_or_else(PoisonError::into_inner);
        if wire::write(&*to, kind, &piece[..length]).is_err() {
            kill(group);
            break;
        }
    }
    ended.send(()).ok();
}

/// Gives a command what comes for it, until the connection ends.
fn feed(from: &TcpStream, input: Input) {
    let (send, pieces) = sync_channel(INPUT_PIECES);
    std::thread::spawn(move || write_input(input, &pieces));
    let mut send = Some(send);
    while let Ok(Some((Kind::Stdin, mut piece))) = wire::read(from) {
        if piece.is_empty() {
            send = None;
        }
        while let Some(Err(TrySendError::Full(back))) = send.as_ref().map(|send| send.try_send(piece)) {
            // The command does not read; that the connection is gone is to be noticed all the same.
            if hung_up(from) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
            piece = back;
        }
    }
}

fn write_input(mut input: Input, pieces: &Receiver<Vec<u8>>) {
    while let Ok(piece) = pieces.recv() {
        if input.write_all(&piece).is_err() {
            break;
        }
    }
}

/// Whether the other end is gone.
fn hung_up(stream: &TcpStream) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut descriptors = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut descriptors, Some(&now)).is_ok_and(|ready| ready > 0)
}
