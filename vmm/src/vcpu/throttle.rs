//! Slowing a guest down: its vCPUs stand still for a share of every period.
//!
//! ```text
//!          |<------ PERIOD ------>|
//! vCPU     |#### stands ####|runs |#### stands ####|runs |
//! ```
//!
//! A thread tells every vCPU at the beginning of a period until when to stand; the vCPU counts that down by itself. So
//! a guest runs on within a period whatever becomes of the thread, and any other command (a pause, a run) ends the
//! standing at once: a freeze never waits for it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::Vcpu;
use crate::error::{Error, Result};

/// How often a throttled vCPU gets to run: a guest's own timers are mostly of 1 to 10 ms, and a kick costs some
/// microseconds, which is well under a percent of this.
const PERIOD: Duration = Duration::from_millis(5);

/// The throttle of a VM. Dropping it lets the vCPUs run.
pub(crate) struct Throttle {
    percent: Arc<AtomicU8>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Throttles these vCPUs from now on.
    ///
    /// # Errors
    /// [`Error::Host`] when the host gives no thread.
    pub(crate) fn start(vcpus: Arc<[Vcpu]>, percent: u8) -> Result<Self> {
        let shared = Arc::new(AtomicU8::new(percent));
        let (stop, stopped) = channel::<()>();
        let percent = shared.clone();
        let body = move || {
            let mut begins = Instant::now();
            loop {
                let stands = PERIOD * u32::from(percent.load(Ordering::Relaxed).min(100)) / 100;
                for vcpu in vcpus.iter() {
                    vcpu.stand(begins + stands);
                }
                // A host that was late does not make up for it: that would be a burst of standing still.
                begins = (begins + PERIOD).max(Instant::now());
                match stopped.recv_timeout(begins.saturating_duration_since(Instant::now())) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(body)
            .map_err(Error::host("start a thread that throttles"))?;
        Ok(Self { percent: shared, stop: Some(stop), thread: Some(thread) })
    }

    /// The share in percent.
    pub(crate) fn percent(&self) -> u8 {
        self.percent.load(Ordering::Relaxed)
    }

    /// Changes the share, from the next period on.
    pub(crate) fn set(&self, percent: u8) {
        self.percent.store(percent, Ordering::Relaxed);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that throttles panicked");
        }
    }
}
