//! The loop of a vCPU thread.

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError},
    },
    time::{Duration, Instant},
};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Command, Ending, Event, VcpuEvent, kick::Target};
use crate::{
    device::Effect,
    devices::Devices,
    state::{VcpuContext, VcpuState},
};

/// How late the kernel may wake a parked vCPU, in nanoseconds; the default of 50 us is more than a
/// guest that paces itself can use (prctl(2), PR_SET_TIMERSLACK).
const TIMER_SLACK_NS: NonZeroU64 = NonZeroU64::MIN;

/// Everything a vCPU thread owns.
pub(super) struct Runner {
    index: u32,
    fd: VcpuFd,
    devices: Arc<Devices>,
    context: VcpuContext,
    commands: Receiver<Command>,
    events: Sender<Event>,
}

/// What one stay in the guest led to.
enum Step {
    /// Go on.
    Again,
    /// An access was answered in `kvm_run`; KVM takes the answer with the next KVM_RUN.
    Access(Effect),
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// The vCPU cannot go on.
    Ended(Ending),
}

impl Runner {
    pub(super) fn new(
        index: u32,
        fd: VcpuFd,
        devices: Arc<Devices>,
        context: VcpuContext,
        commands: Receiver<Command>,
        events: Sender<Event>,
    ) -> Self {
        Self { index, fd, devices, context, commands, events }
    }

    /// Runs until the other end of the commands is gone.
    pub(super) fn run(self) {
        if let Err(error) = rustix::thread::set_current_timer_slack(Some(TIMER_SLACK_NS)) {
            tracing::debug!(%error, "timer slack stays as it is");
        }
        let mut thread = Thread {
            index: self.index,
            target: Target::new(self.fd),
            devices: self.devices,
            context: self.context,
            events: self.events,
            running: false,
            ended: false,
            unfinished: false,
            parked_until: None,
        };
        while let Some(command) = thread.next_command(&self.commands) {
            match command {
                Some(command) => thread.obey(command),
                // Only after a look that found nothing: entering straight after a command would
                // overlook one whose kick came while the thread was not in KVM_RUN.
                None => thread.enter(),
            }
        }
    }
}

struct Thread {
    index: u32,
    target: Target,
    devices: Arc<Devices>,
    context: VcpuContext,
    events: Sender<Event>,
    running: bool,
    /// The guest cannot go on; the event was sent.
    ended: bool,
    /// KVM still has to take the answer to an access.
    unfinished: bool,
    /// The guest sleeps until then, at most.
    parked_until: Option<Instant>,
}

impl Thread {
    /// The next command, waited for if there is nothing else to do. `None`: there will be none any more.
    fn next_command(&mut self, commands: &Receiver<Command>) -> Option<Option<Command>> {
        if !self.running {
            return commands.recv().ok().map(Some);
        }
        if let Some(until) = self.parked_until {
            let command = match commands.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return None,
            };
            // What is left of the sleep after a command is forgone: parking means "at most".
            self.parked_until = None;
            return Some(command);
        }
        // Before the look, so that a kick that comes after it is not undone.
        self.target.set_immediate_exit(false);
        match commands.try_recv() {
            Ok(command) => Some(Some(command)),
            Err(TryRecvError::Empty) => Some(None),
            Err(TryRecvError::Disconnected) => None,
        }
    }

    fn obey(&mut self, command: Command) {
        // An asker that is gone does not want the answer any more.
        match command {
            Command::Run => {
                if !self.running && !self.ended {
                    // Guests with kvmclock are told that they stood still, so that their watchdogs keep quiet: here and
                    // not at the pause, because KVM writes it when it enters the guest, which may be on another
                    // host or hours later. Guests without it answer EINVAL.
                    let _ = self.target.fd().kvmclock_ctrl();
                }
                self.running = !self.ended;
            }
            Command::Stand(until) => self.parked_until = self.running.then_some(until),
            Command::Pause(answer) => {
                self.finish();
                self.running = false;
                let _ = answer.send(!self.ended);
            }
            Command::Save(answer) => {
                let _ = answer.send(VcpuState::save(self.target.fd(), &self.context));
            }
            Command::Load(state, catchup, answer) => {
                let _ = answer.send(state.load(self.target.fd(), &self.context, catchup));
            }
        }
    }

    /// Lets KVM take the answer to the last access, without entering the guest: only then are the
    /// registers the truth. An access over a page boundary comes in pieces, hence the loop.
    fn finish(&mut self) {
        while self.unfinished && !self.ended {
            self.target.set_immediate_exit(true);
            self.enter();
        }
        self.target.set_immediate_exit(false);
    }

    /// One stay in the guest.
    fn enter(&mut self) {
        let step = step(self.target.fd(), &self.devices);
        self.unfinished = matches!(step, Step::Access(_));
        match step {
            Step::Again | Step::Interrupted | Step::Access(Effect::None) => {}
            Step::Access(Effect::Park(time)) => self.park(time),
            Step::Access(Effect::PowerOff(code)) => self.end(Ending::PowerOff(code)),
            Step::Access(Effect::Reset) => self.end(Ending::Reset),
            Step::Ended(ending) => self.end(ending),
        }
    }

    fn park(&mut self, time: Duration) {
        if !time.is_zero() {
            self.parked_until = Instant::now().checked_add(time);
        }
    }

    fn end(&mut self, ending: Ending) {
        self.running = false;
        self.ended = true;
        let _ = self.events.send(Event::Vcpu(VcpuEvent { index: self.index, ending }));
    }
}

fn step(fd: &mut VcpuFd, devices: &Devices) -> Step {
    match fd.run() {
        Ok(VcpuExit::MmioRead(address, data)) => {
            devices.mmio_read(address, data);
            Step::Access(Effect::None)
        }
        Ok(VcpuExit::MmioWrite(address, data)) => Step::Access(devices.mmio_write(address, data)),
        Ok(VcpuExit::IoIn(port, data)) => {
            devices.port_read(port, data);
            Step::Access(Effect::None)
        }
        Ok(VcpuExit::IoOut(port, data)) => Step::Access(devices.port_write(port, data)),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_)) => {
            Step::Again
        }
        Ok(VcpuExit::Hlt) => Step::Ended(Ending::Failed("the guest halted outside the kernel's APIC".into())),
        Ok(VcpuExit::Shutdown) => Step::Ended(Ending::Shutdown),
        Ok(VcpuExit::SystemEvent(kind, _)) => Step::Ended(system_event(kind)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => Step::Ended(Ending::Failed(format!(
            "the processor refused to enter the guest: reason {reason:#x} on CPU {cpu}"
        ))),
        Ok(VcpuExit::InternalError) => Step::Ended(Ending::Failed(internal_error(fd))),
        Ok(exit) => {
            Step::Ended(Ending::Failed(format!("KVM left the guest for a reason unknown here: {exit:?}")))
        }
        Err(errno) => match std::io::Error::from_raw_os_error(errno.errno()).kind() {
            std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock => Step::Interrupted,
            _ => Step::Ended(Ending::Failed(format!("KVM_RUN failed: {errno}"))),
        },
    }
}

/// KVM_SYSTEM_EVENT_* of linux/kvm.h.
fn system_event(kind: u32) -> Ending {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Ending::PowerOff(0),
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Ending::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Ending::Failed("the guest reported a crash".into()),
        _ => Ending::Failed(format!("KVM reported system event {kind}")),
    }
}

/// What KVM says about an error inside it, with where the guest was.
fn internal_error(fd: &VcpuFd) -> String {
    let place =
        fd.get_regs().map_or_else(|_| "an unknown address".to_owned(), |regs| format!("{:#x}", regs.rip));
    format!("KVM could not emulate the guest's instruction at {place}")
}
