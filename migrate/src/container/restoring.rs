//! A container that is made anew: first all of it but that it runs, and then that.

use super::filling::{Arena, Filling, Plan};
use super::gate::Gate;
use super::{Runtime, reason};
use crate::error::{Error, Result};
use crate::programs::{end_group, wait};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long CRIU may take until everything is made, without memory: files in tmpfs mounts and shared memory are at most some 60 MiB.
const MAKE_LIMIT: Duration = Duration::from_secs(120);

/// How long runc may take from then on.
const RUN_LIMIT: Duration = Duration::from_secs(60);

/// How long runc may take to take everything down again.
const ABORT_LIMIT: Duration = Duration::from_secs(10);

/// Between two looks at whether it has come so far, or has ended.
const PAUSE: Duration = Duration::from_millis(5);

/// What a container is made of.
pub(crate) struct Parts<'a> {
    /// Its name.
    pub(crate) id: &'a str,
    /// What CRIU wrote.
    pub(crate) images: &'a Path,
    /// An empty folder in memory.
    pub(crate) work: &'a Path,
    /// Its configuration.
    pub(crate) bundle: &'a Path,
    /// With its TCP connections.
    pub(crate) tcp_established: bool,
}

/// A container of which everything is there, and nothing runs. Dropped, nothing is left of it.
pub(crate) struct Restoring {
    runtime: Runtime,
    id: String,
    work: PathBuf,
    /// runc, until it has ended.
    child: Option<Child>,
    gate: Option<Gate>,
    /// CRIU says goodbye there.
    _stream: Option<UnixStream>,
}

impl Restoring {
    /// Makes everything, and fills its memory.
    ///
    /// # Errors
    /// `Workload` with CRIU's words. Nothing is left then.
    pub(crate) fn begin(runtime: &Runtime, parts: &Parts<'_>, plan: Plan, arena: Arc<Arena>) -> Result<Self> {
        let gate = Gate::new(parts.work, parts.images, &runtime.criu().program())?;
        let filling = Filling::listen(parts.work, plan, arena)?;
        let mut command = runtime.restore(parts)?;
        gate.lead(&mut command);
        // Its processes keep these, and must not keep what is ours.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let child =
            command.spawn().map_err(|error| Error::Host(format!("runc cannot be started: {error}")))?;
        let mut restoring = Self {
            runtime: runtime.clone(),
            id: parts.id.into(),
            work: parts.work.into(),
            child: Some(child),
            gate: Some(gate),
            _stream: None,
        };
        restoring.reach()?;
        restoring._stream = filling.fill()?;
        Ok(restoring)
    }

    /// Waits until CRIU has made everything.
    fn reach(&mut self) -> Result<()> {
        let until = Instant::now() + MAKE_LIMIT;
        while !self.gate.as_ref().is_some_and(|gate| gate.is_reached(PAUSE)) {
            let has_ended = self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if has_ended {
                return Err(self.wrong());
            }
            if Instant::now() > until {
                return Err(Error::Workload(format!(
                    "{} could not be made anew: CRIU did not come to an end within {} s",
                    self.id,
                    MAKE_LIMIT.as_secs()
                )));
            }
        }
        Ok(())
    }

    /// Lets it run.
    ///
    /// # Errors
    /// `Workload` with CRIU's words; nothing of it runs then.
    pub(crate) fn run(mut self) -> Result<()> {
        let opened = self.gate.as_mut().map_or(Ok(()), Gate::open);
        let status = self.child.as_mut().filter(|_| opened.is_ok()).and_then(|child| wait(child, RUN_LIMIT));
        if status.is_some_and(|status| status.success()) {
            self.child = None;
            return Ok(());
        }
        // runc hung, or is gone; CRIU may be far enough to go on without it, or takes down what it made. It must not be killed: what it has half made
        // would stand for ever.
        let is_sure = self.let_go();
        let runs = self.runtime.state(&self.id).is_ok_and(|state| state.status == "running");
        if runs && is_sure {
            // Whoever is told that nothing runs here lets it run elsewhere.
            tracing::warn!("{} runs, though runc did not say so: {}", self.id, reason(&self.work, LOG));
            return Ok(());
        }
        if self.runtime.knows(&self.id) {
            self.runtime.delete(&self.id)?;
        }
        Err(self.wrong())
    }

    /// Ends runc, and lets CRIU come to its end. Answers whether it did.
    fn let_go(&mut self) -> bool {
        if let Some(mut child) = self.child.take()
            && wait(&mut child, Duration::ZERO).is_none()
        {
            // It alone.
            child.kill().ok();
            child.wait().ok();
        }
        self.gate.take().is_none_or(Gate::close)
    }

    fn wrong(&self) -> Error {
        Error::Workload(format!("{} could not be made anew: {}", self.id, reason(&self.work, LOG)))
    }
}

/// Where CRIU says what it does.
const LOG: &str = "restore.log";

impl Drop for Restoring {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // Shut for good: CRIU ends what it made, and runc what is left.
        self.gate = None;
        if wait(&mut child, ABORT_LIMIT).is_none() {
            tracing::warn!("runc does not take {} down, and is killed", self.id);
            end_group(&mut child);
        }
        if self.runtime.knows(&self.id)
            && let Err(error) = self.runtime.delete(&self.id)
        {
            tracing::warn!("{error}");
        }
    }
}
