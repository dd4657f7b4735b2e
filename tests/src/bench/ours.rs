//! One move by `migrate send`.

use super::account::{Before, undisturbed, wait_running};
use super::cases::Case;
use super::memory::{MemoryWatch, touch};
use super::turns::Vcpu;
use crate::guest::Window;
use crate::host::Place;
use crate::network::{Cable, FAR, NEAR};
use crate::{Host, Running, trusting_pair};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// What a guest of ours is called.
const VM: &str = "bench";

/// A guest that runs and may be moved.
pub(super) struct Ours {
    a: Host,
    b: Host,
    source: Window,
    before: Before,
    vcpu: Vcpu,
}

impl Ours {
    /// Starts the guest and lets it run undisturbed for a while; on two network namespaces if there is a cable.
    pub(super) fn start(program: &Path, case: &Case, seed: u64, cable: Option<&Cable>) -> Self {
        let (mut a, mut b) = trusting_pair(program);
        if let Some(cable) = cable {
            a = a.moved_to(Place::Namespace { name: cable.near().into(), ip: NEAR.into() });
            b = b.moved_to(Place::Namespace { name: cable.far().into(), ip: FAR.into() });
        }
        let cmdline = format!("{} seed={seed} report_ms=0", case.cmdline);
        a.run_ledger(VM, &format!("{}MiB", case.memory_mib), &cmdline, &["--serial", "none"]);
        let source = Window::open(a.vm_pid(VM)).expect("the guest's memory");
        wait_running(&source);
        let before = undisturbed(&source);
        let vcpu = Vcpu::of(a.vm_pid(VM)).expect("its threads");
        Self { a, b, source, before, vcpu }
    }

    /// How fast the TSC runs here, as our VMM tells its guests.
    pub(super) fn tsc_khz(&self) -> u64 {
        self.before.at.tsc_khz.expect("our VMM tells its guests")
    }

    /// Moves it.
    ///
    /// # Panics
    /// If it does not arrive or is not sound.
    pub(super) fn measure(self, memory_mib: u64, more: &[&str]) -> Value {
        self.try_measure(memory_mib, more).unwrap_or_else(|why| panic!("{why}"))
    }

    /// Moves it; an error when it does not arrive.
    ///
    /// # Panics
    /// If it is not sound.
    pub(super) fn try_measure(self, memory_mib: u64, more: &[&str]) -> Result<Value, String> {
        let Self { a, b, source, mut before, vcpu } = self;
        touch(memory_mib);
        let (receiver, address) = b.receive(&["--serial", "none"]);
        let receiver_memory = MemoryWatch::start(receiver.pid());
        before.begin(&source);
        let turns = vcpu.turns();
        let begun = Instant::now();
        let mut sender = a.start(&[&["send", VM, &address][..], more].concat());
        let sender_memory = MemoryWatch::start(sender.pid());
        let frozen_tsc = last_tick(&mut sender, &source);
        let turns = vcpu.turns().since(turns);
        let sent = sender.finish();
        let wall_us = begun.elapsed().as_micros();
        if sent.code != 0 {
            return Err(format!("{sent:#?}"));
        }
        let frozen_tsc = frozen_tsc.ok_or("the sender froze nothing")?;
        let report = sent.event("report").cloned().ok_or("the sender gave no report")?;
        let arrived = Window::open(b.find_vm_pid(VM).ok_or("no VM arrived")?).ok_or("it has no memory")?;
        let mut sample = before.end(&arrived, frozen_tsc);
        receiver.finish().success();
        b.assert_sound(VM);
        let more = json!({
            "vcpu_ran_us": turns.ran_us,
            "vcpu_waited_us": turns.waited_us,
            "phases": report["phases"],
            "each_round": report["rounds"],
            "total_us": report["total_us"],
            "wall_us": wall_us,
            "downtime_engine_us": report["downtime_us"],
            "rounds": report["rounds"].as_array().map(Vec::len),
            "first_round_bytes_per_s": report["rounds"][0]["rate_bytes_per_s"],
            "sent_bytes": report["sent_bytes"],
            "sender_rss_kib": sender_memory.stop(),
            "receiver_rss_kib": receiver_memory.stop(),
        });
        merge(&mut sample, &more);
        Ok(sample)
    }
}

/// The guest's last tick at the source: it stands still when the sender says that it is in the freeze, or a moment later.
fn last_tick(sender: &mut Running, source: &Window) -> Option<u64> {
    let limit = super::peer::MOVE_LIMIT;
    sender.saw(limit, |line| line["event"] == "phase" && line["phase"] == "freeze").then_some(())?;
    source.stats().map(|stats| stats.tsc_last)
}

/// Adds the members of one object to another.
pub(super) fn merge(sample: &mut Value, more: &Value) {
    for (name, value) in more.as_object().into_iter().flatten() {
        sample[name] = value.clone();
    }
}
