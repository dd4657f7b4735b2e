//! Who lets a container go on when the program that moves it is killed.
//!
//! A container that stands still does so until somebody lets it go on, and that must not depend on a program that talks to another
//! host. So a second process, which does nothing else, pauses it, and waits: for orders, on a socket, or for the end of whoever gives them. Before the
//! pledge that end lets the container go on. Behind it, the container stays as it is, and `migrate recover` gives the next order.
//!
//! ```text
//! running ── freeze ─▶ frozen ── pledge ─▶ pledged ── hand over ─▶ ended
//!    ▲                   │ thaw, resume,      │ resume
//!    └───────────────────┴── the end ◀────────┘
//! ```
//!
//! Were the keeper killed, too, the container would stand still, and a note in the runtime directory says so: `migrate recover` finds it.

mod kept;

pub(crate) use kept::Kept;

use super::{Programs, Runtime, folder};
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use kept::{end_container, free};
use protocol::monitor::Pledge;
use serde::{Deserialize, Serialize};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long CRIU may take to write everything down but memory.
const HOLD_LIMIT: Duration = Duration::from_secs(60);

/// How long CRIU may take to let go.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// How long the keeper may take to begin.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

/// How long an order may take: holding, and everything that it has to do when that fails.
const ORDER_LIMIT: Duration = Duration::from_secs(120);

/// The longest order or answer.
const LINE_BYTES: u64 = 64 << 10;

/// What the keeper is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Let it stand still, and write everything down but its private memory.
    Freeze {
        /// Where to.
        images: PathBuf,
        /// With its TCP connections.
        tcp_established: bool,
    },
    /// Let it stand still, and nothing else.
    Pause,
    /// Let it go on; it will be frozen again.
    Thaw,
    /// From now on it does not go on by itself.
    Pledge(Pledge),
    /// Let it go on, for good.
    Resume,
    /// It runs elsewhere: end it.
    HandOver,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// What is noted of a container that stands still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Its id.
    pub(crate) id: String,
    /// The programs that it is under.
    pub(crate) programs: Programs,
    /// To whom it was promised, if it was.
    pub(crate) pledge: Option<Pledge>,
    /// Where CRIU listens that holds it, on the loopback: who comes there and goes again tells it to let go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

fn note_path(runtime: &RuntimeDir, id: &str) -> PathBuf {
    folder(runtime).join(format!("{id}.note"))
}

fn socket_path(runtime: &RuntimeDir, id: &str) -> PathBuf {
    folder(runtime).join(format!("{id}.keeper"))
}

/// All notes that there are.
///
/// # Errors
/// `Host` when the directory cannot be read.
pub(crate) fn notes(runtime: &RuntimeDir) -> Result<Vec<Note>> {
    let folder = folder(runtime);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::Host(format!("{} cannot be read: {error}", folder.display()))),
    };
    let is_note = |path: &Path| path.extension().is_some_and(|extension| extension == "note");
    let read = |path: PathBuf| serde_json::from_slice(&std::fs::read(path).ok()?).ok();
    let mut notes: Vec<Note> =
        entries.flatten().map(|entry| entry.path()).filter(|path| is_note(path)).filter_map(read).collect();
    notes.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(notes)
}

/// The other end: whoever gives the orders. Dropped, it is the end of them.
pub(crate) struct Keeper {
    stream: Option<BufReader<UnixStream>>,
    id: String,
    /// If it was started here. It ends with its last order, or with us, unless the container was pledged.
    child: Option<Child>,
    pledged: bool,
}

impl Keeper {
    /// Starts a keeper for a container.
    ///
    /// # Errors
    /// `Host` when it does not begin, `Workload` when the container is kept already.
    pub(crate) fn start(
        program: &Path,
        runtime_dir: &RuntimeDir,
        runtime: &Runtime,
        id: &str,
    ) -> Result<Self> {
        if let Some(note) = notes(runtime_dir)?.into_iter().find(|note| note.id == id) {
            let is_moved = note.pledge.is_none() && note.is_kept(runtime_dir);
            return Err(Error::Workload(match is_moved {
                true => kept_already(id),
                false => format!(
                    "{id} stands still since a move of it was cut off: settle it with migrate recover {id}"
                ),
            }));
        }
        let cannot =
            |error: std::io::Error| Error::Host(format!("the keeper of {id} cannot be started: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(cannot)?;
        ours.set_read_timeout(Some(BEGIN_LIMIT)).map_err(cannot)?;
        // A process group of its own: a Ctrl-C for this program must not reach it.
        let child = Command::new(program)
            .args(["container-keeper", id, "--runtime-dir"])
            .arg(runtime_dir.path())
            .args(runtime.programs().arguments())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let stream = Some(BufReader::new(ours));
        let mut keeper = Self { stream, id: id.into(), child: Some(child), pledged: false };
        keeper.answer()?;
        if let Some(stream) = &keeper.stream {
            stream.get_ref().set_read_timeout(Some(ORDER_LIMIT)).map_err(cannot)?;
        }
        Ok(keeper)
    }

    /// The keeper of a container, if it has one.
    ///
    /// # Errors
    /// `Workload` when it has none.
    fn connect(runtime_dir: &RuntimeDir, id: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket_path(runtime_dir, id))
            .and_then(|stream| stream.set_read_timeout(Some(ORDER_LIMIT)).map(|()| stream))
            .map_err(|error| Error::Workload(format!("{id} has no keeper that answers: {error}")))?;
        Ok(Self { stream: Some(BufReader::new(stream)), id: id.into(), child: None, pledged: false })
    }

    /// Gives an order, and waits until it is done.
    ///
    /// # Errors
    /// `Workload` with the keeper's words.
    pub(crate) fn order(&mut self, order: &Order) -> Result<()> {
        let mut line = serde_json::to_vec(order).unwrap_or_default();
        line.push(b'\n');
        if matches!(order, Order::Pledge(_)) {
            // Also where the answer is lost.
            self.pledged = true;
        }
        if let Some(stream) = &mut self.stream {
            stream.get_mut().write_all(&line).map_err(|error| gone(&self.id, &error))?;
        }
        self.answer()
    }

    /// Waits for an answer.
    fn answer(&mut self) -> Result<()> {
        let mut line = String::new();
        let read = self.stream.as_mut().map(|stream| stream.take(LINE_BYTES).read_line(&mut line));
        match read {
            Some(Ok(1..)) => {}
            Some(Err(error)) => return Err(gone(&self.id, &error)),
            _ => return Err(gone(&self.id, &"it hung up")),
        }
        let answer: Answer = serde_json::from_str(&line).map_err(|error| gone(&self.id, &error))?;
        answer.error.map_or(Ok(()), |why| Err(Error::Workload(why)))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stream = None;
        // A series of checkpoints starts many.
        if let Some(child) = self.child.as_mut().filter(|_| !self.pledged)
            && crate::programs::wait(child, RELEASE_LIMIT).is_none()
        {
            tracing::warn!("the keeper of {} has not let it go yet", self.id);
        }
    }
}

fn gone(id: &str, why: &dyn std::fmt::Display) -> Error {
    Error::Workload(format!("the keeper of {id} is gone: {why}"))
}

fn kept_already(id: &str) -> String {
    format!("{id} is being moved or written down already: see migrate status")
}

fn forget(runtime_dir: &RuntimeDir, id: &str) -> Result<()> {
    let path = note_path(runtime_dir, id);
    std::fs::remove_file(&path)
        .or_else(missing_is_fine)
        .map_err(|error| Error::Host(format!("the note {} cannot be removed: {error}", path.display())))
}

impl Note {
    /// Whether a keeper is at it.
    pub(crate) fn is_kept(&self, runtime_dir: &RuntimeDir) -> bool {
        UnixStream::connect(socket_path(runtime_dir, &self.id)).is_ok()
    }

    /// Lets the container go on here, or end: by its keeper, if that lives.
    ///
    /// # Errors
    /// `Workload` with runc's words, or the keeper's.
    pub(crate) fn settle(&self, runtime_dir: &RuntimeDir, goes_on: bool) -> Result<()> {
        if let Ok(mut keeper) = Keeper::connect(runtime_dir, &self.id) {
            return keeper.order(if goes_on { &Order::Resume } else { &Order::HandOver });
        }
        let runtime = self.programs.find()?;
        if goes_on {
            // A CRIU whose keeper was killed may still be at work, or wait for somebody who will not come any more.
            free(&runtime, &self.id, self.port, HOLD_LIMIT)?;
        }
        match goes_on {
            true if runtime.state(&self.id)?.status == "paused" => runtime.resume(&self.id)?,
            true => {}
            false => end_container(&runtime, &self.id)?,
        }
        forget(runtime_dir, &self.id)
    }
}

fn missing_is_fine(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
