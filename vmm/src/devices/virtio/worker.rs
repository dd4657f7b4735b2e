//! The thread of a device, and how it is made to stand still.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use rustix::event::{PollFd, PollFlags, Timespec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Backend, Broken, Ring,
    ring::{CONFIG_CHANGE, Signal},
};
use crate::{
    device::Interrupt,
    error::{Error, Result},
    memory::GuestMemory,
    sys,
};

/// The device behind the registers, and its rings as long as a driver is ready.
pub(super) struct Engine {
    pub(super) backend: Box<dyn Backend>,
    pub(super) rings: Vec<Ring>,
}

/// What registers, worker and the VM share of a device.
pub(super) struct Core {
    pub(super) name: String,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) signal: Arc<Signal>,
    /// The driver broke the rules: nothing is served until it resets the device.
    pub(super) broken: AtomicBool,
    /// Whoever wants the engine sets this first, so that the worker lets go of it.
    halt: AtomicBool,
    end: AtomicBool,
    pub(super) kick: EventFd,
    engine: Mutex<Engine>,
    /// Whether the worker has a duplicate of what it waits for. It becomes true under the engine's lock only.
    held: Mutex<bool>,
    let_go: Condvar,
}

impl Core {
    pub(super) fn new(
        name: String,
        memory: Arc<GuestMemory>,
        line: Interrupt,
        backend: Box<dyn Backend>,
    ) -> Result<Arc<Self>> {
        let kick = EventFd::new(EFD_NONBLOCK).map_err(Error::host("create a device's event"))?;
        Ok(Arc::new(Self {
            name,
            memory,
            signal: Arc::new(Signal::new(line)),
            broken: AtomicBool::new(false),
            halt: AtomicBool::new(true),
            end: AtomicBool::new(false),
            kick,
            engine: Mutex::new(Engine { backend, rings: Vec::new() }),
            held: Mutex::new(false),
            let_go: Condvar::new(),
        }))
    }

    /// The engine. Whoever is not the worker has [`Core::stand`] for it, or waits as long as the worker has work.
    pub(super) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine, behind the request that is being carried out. The worker serves on when it is told to.
    pub(super) fn stand(&self) -> MutexGuard<'_, Engine> {
        self.halt.store(true, Ordering::SeqCst);
        self.engine()
    }

    /// Lets the worker serve, and look at all rings once: what was notified before is looked at now.
    pub(super) fn go_on(&self) {
        self.halt.store(false, Ordering::SeqCst);
        self.notify();
    }

    /// There may be something in the rings.
    pub(super) fn notify(&self) {
        // It fails when the counter is full, and then the worker is woken anyway.
        let _ = self.kick.write(1);
    }

    pub(super) fn break_device(&self, Broken(why): Broken) {
        tracing::warn!(
            device = self.name,
            why,
            "the guest's driver broke the rules: its device stands still"
        );
        self.broken.store(true, Ordering::SeqCst);
        self.signal.raise(CONFIG_CHANGE);
    }

    fn serve(&self) {
        let mut engine = self.engine();
        let Engine { backend, rings } = &mut *engine;
        let idle = rings.is_empty() || self.broken.load(Ordering::SeqCst);
        if self.halt.load(Ordering::SeqCst) || idle {
            return;
        }
        if let Err(broken) = backend.serve(rings, &self.halt) {
            self.break_device(broken);
        }
    }

    fn held(&self) -> MutexGuard<'_, bool> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there may be something to do, or it is time to.
    fn wait(&self) {
        // Only for the descriptor: the worker is the only one to change what it waits for, but for a reset or a pause, which
        // it is woken for. A closed descriptor's number could be another one's by then, so it is duplicated.
        let mut source = None;
        let mut due = None;
        if !self.halt.load(Ordering::SeqCst) {
            let engine = self.engine();
            if !engine.rings.is_empty() && !self.broken.load(Ordering::SeqCst) {
                source = engine.backend.source().and_then(|source| source.try_clone_to_owned().ok());
                due = engine.backend.due();
                *self.held() = source.is_some();
            }
        }
        // A time that does not fit is no earlier than the next kick.
        let patience =
            due.and_then(|due| Timespec::try_from(due.saturating_duration_since(Instant::now())).ok());
        let kick = sys::descriptor_of(&self.kick);
        let mut polled = vec![PollFd::new(&kick, PollFlags::IN)];
        polled.extend(source.as_ref().map(|source| PollFd::new(source, PollFlags::IN)));
        if let Err(error) = rustix::event::poll(&mut polled, patience.as_ref())
            && error != rustix::io::Errno::INTR
        {
            tracing::warn!(device = self.name, %error, "waiting for work");
        }
        if source.take().is_some() {
            *self.held() = false;
            self.let_go.notify_all();
        }
        // It fails when nobody kicked.
        let _ = self.kick.read();
    }

    fn work(&self) {
        while !self.end.load(Ordering::SeqCst) {
            self.wait();
            self.serve();
        }
    }
}

/// The VM's hold of a device. Dropping it ends the worker.
pub(crate) struct Handle {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Starts a device's worker; it stands still until [`Handle::resume`].
    ///
    /// # Errors
    /// [`Error::Host`] when the host gives no thread.
    pub(super) fn start(core: Arc<Core>) -> Result<Self> {
        let worker = Arc::clone(&core);
        let thread = std::thread::Builder::new()
            .name(core.name.chars().take(15).collect())
            .spawn(move || worker.work())
            .map_err(Error::host("start a device's thread"))?;
        Ok(Self { core, thread: Some(thread) })
    }

    /// What the guest's notifications may go to directly.
    pub(crate) fn kick(&self) -> &EventFd {
        &self.core.kick
    }

    /// Lets it stop behind the request it carries out; [`Handle::wait_paused`] follows. The vCPUs stand still already.
    pub(crate) fn ask_pause(&self) {
        self.core.halt.store(true, Ordering::SeqCst);
    }

    /// When this returns, the device touches neither guest memory nor its disk or tap.
    pub(crate) fn wait_paused(&self) {
        drop(self.core.stand());
    }

    /// Lets it go on. The guest is interrupted anew where it has not acknowledged: an edge may have come where nobody saw it.
    pub(crate) fn resume(&self) {
        let status = self.core.signal.status();
        if status != 0 {
            self.core.signal.raise(status);
        }
        self.core.go_on();
    }

    /// Takes what only one VM may have.
    ///
    /// # Errors
    /// What names it, and why it is not to be had.
    pub(crate) fn acquire(&self) -> Result<()> {
        self.core.engine().backend.acquire()
    }

    /// Makes what came with the VM a part of this host, because it starts. Answers whether there was something.
    ///
    /// # Errors
    /// What names it, and why it cannot be; nothing was changed then.
    pub(crate) fn publish(&self) -> Result<bool> {
        self.core.engine().backend.publish()
    }

    /// Undoes that: it does not start.
    pub(crate) fn retract(&self) {
        self.core.engine().backend.retract();
    }

    /// Lets go of it, while the VM stands still.
    ///
    /// # Errors
    /// When what was written could not be made safe; it is let go of all the same.
    pub(crate) fn release(&self) -> Result<()> {
        let outcome = self.core.engine().backend.release();
        // Nobody else can have it as long as the worker has a duplicate. There is nothing left that it could take another of.
        self.core.notify();
        drop(self.core.let_go.wait_while(self.core.held(), |held| *held));
        outcome
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.halt.store(true, Ordering::SeqCst);
        self.core.end.store(true, Ordering::SeqCst);
        self.core.notify();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(device = self.core.name, "the device's thread panicked");
        }
    }
}
