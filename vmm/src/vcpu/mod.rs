//! One thread for each vCPU.
//!
//! ```text
//!            commands (mpsc)                      events (mpsc)
//! Vm ──────────────────────────> vCPU thread ──────────────────────> whoever runs the VM
//!    ── kick (signal) ─────────>      │
//!                                  KVM_RUN
//! ```
//!
//! A thread is *running* or *paused*. Paused, it waits for commands; running, it enters the guest and
//! looks for commands whenever it comes out. No command is lost between the look and KVM_RUN: the sender
//! kicks after sending, and the kick's handler sets `immediate_exit`, which the thread cleared before it
//! looked. KVM_RUN then returns at once.

#[allow(unsafe_code, reason = "a signal handler writes one byte of the shared kvm_run page")]
mod kick;
mod run;
mod throttle;

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvm_ioctls::VcpuFd;

use crate::{
    config::ExitReason,
    devices::Devices,
    error::{Error, Result},
    state::{Catchup, VcpuContext, VcpuState},
};

/// The longest a vCPU may take to answer a command. A pause takes microseconds; more than this means
/// that the host is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) use throttle::Throttle;

/// How a vCPU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The guest switched off, with this code.
    PowerOff(u32),
    /// The guest asked for a reset.
    Reset,
    /// A triple fault, or another shutdown that KVM reports.
    Shutdown,
    /// KVM or this VMM could not go on; the text says why.
    Failed(String),
}

/// A vCPU that ended, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VcpuEvent {
    pub(crate) index: u32,
    pub(crate) ending: Ending,
}

/// What whoever runs a VM waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A vCPU ended.
    Vcpu(VcpuEvent),
    /// Somebody asked for the end.
    End(ExitReason),
}

/// What the VM tells a vCPU thread. Those that are answered are so on a channel of their own.
enum Command {
    Run,
    Stand(Instant),
    Pause(Sender<bool>),
    Save(Sender<Result<VcpuState>>),
    Load(Box<VcpuState>, Catchup, Sender<Result<()>>),
}

/// The VM's end of a vCPU thread. Dropping it stops the thread and waits for it.
pub(crate) struct Vcpu {
    index: u32,
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// An answer that is on its way.
pub(crate) struct Pending<T> {
    index: u32,
    answer: Receiver<T>,
}

impl<T> Pending<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// [`Error::Timeout`] when the vCPU does not answer, [`Error::GuestEnded`] when its thread is gone.
    pub(crate) fn wait(self) -> Result<T> {
        self.answer.recv_timeout(ANSWER_TIMEOUT).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::Timeout {
                what: "stop a vCPU",
                waited_ms: u64::try_from(ANSWER_TIMEOUT.as_millis()).unwrap_or(0),
            },
            RecvTimeoutError::Disconnected => {
                Error::GuestEnded(format!("the thread of vCPU {} is gone", self.index))
            }
        })
    }
}

impl Vcpu {
    /// Starts the thread of a vCPU, paused.
    ///
    /// # Errors
    /// [`Error::Host`] when the host gives no thread.
    pub(crate) fn spawn(
        index: u32,
        fd: VcpuFd,
        devices: Arc<Devices>,
        context: VcpuContext,
        events: Sender<Event>,
    ) -> Result<Self> {
        kick::install()?;
        let (commands, receiver) = channel();
        let runner = run::Runner::new(index, fd, devices, context, receiver, events);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || runner.run())
            .map_err(Error::host("start a vCPU thread"))?;
        Ok(Self { index, commands: Some(commands), thread: Some(thread) })
    }

    /// Lets it run. It starts within microseconds.
    pub(crate) fn resume(&self) {
        self.send(Command::Run);
    }

    /// Lets it stand still until then, if it runs; the next command ends that.
    fn stand(&self, until: Instant) {
        self.send(Command::Stand(until));
    }

    /// Asks it to stop; the answer says whether the guest could go on (`false`: it ended).
    pub(crate) fn pause(&self) -> Pending<bool> {
        self.ask(Command::Pause)
    }

    /// Asks a paused vCPU for its state.
    pub(crate) fn save(&self) -> Pending<Result<VcpuState>> {
        self.ask(Command::Save)
    }

    /// Gives a paused vCPU its state.
    pub(crate) fn load(&self, state: Box<VcpuState>, catchup: Catchup) -> Pending<Result<()>> {
        self.ask(|answer| Command::Load(state, catchup, answer))
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Pending<T> {
        let (sender, answer) = channel();
        self.send(command(sender));
        Pending { index: self.index, answer }
    }

    fn send(&self, command: Command) {
        // A thread that is gone drops the answer's sender, which is how the asker learns of it.
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            self.kick();
        }
    }

    fn kick(&self) {
        if let Some(thread) = self.thread.as_ref().filter(|thread| !thread.is_finished()) {
            kick::kick(thread);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        drop(self.commands.take());
        self.kick();
        if let Some(thread) = self.thread.take() {
            let started = Instant::now();
            if thread.join().is_err() {
                tracing::error!(vcpu = self.index, "the vCPU thread panicked");
            }
            tracing::trace!(vcpu = self.index, took = ?started.elapsed(), "joined");
        }
    }
}
