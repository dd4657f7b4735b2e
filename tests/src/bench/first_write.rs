//! What dirty tracking costs a guest: the first write to a page that is protected, and being kept waiting meanwhile.
//!
//! ```text
//! plain    no tracking
//! tracked  all dirty pages are taken, the guest writes, and is asked which pages it wrote
//! ```
//!
//! The guest writes as fast as it can, at random, and nothing is read or sent: that is what a move adds. Time is that of the
//! vCPU's thread, so that nobody who takes its core is counted.

use super::account::{stats, wait_running};
use super::turns::{Turns, Vcpu};
use crate::Host;
use crate::guest::Window;
use ledger::PAGE_SIZE;
use protocol::monitor::Role;
use protocol::page::{PageRun, PageSet};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// How long the guest writes between being asked, and how often: short enough that many of its writes are first ones.
const WRITES: Duration = Duration::from_millis(20);
const ROUNDS: usize = 50;

/// How long the VMM may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// What a guest did in some time.
#[derive(Default)]
struct Done {
    writes: u64,
    ran_us: u64,
    waited_us: u64,
}

/// # Panics
/// If the guest cannot be started or tracked.
pub(super) fn measure(program: &Path) -> Value {
    let host = Host::new(program);
    host.run_ledger(
        "bench",
        "1GiB",
        "fill=768M ws=256M rate=max park=spin report_ms=0",
        &["--serial", "none"],
    );
    let pid = host.vm_pid("bench");
    let window = Window::open(pid).expect("the guest's memory");
    wait_running(&window);
    let vcpu = Vcpu::of(pid).expect("its threads");
    let plain = writing(&window, &vcpu, WRITES * u32::try_from(ROUNDS).expect("few"));

    let socket = host.runtime_dir().join("bench.sock");
    let mut client = vmm::Client::connect(&socket, Role::Session, "bench", ANSWER_LIMIT).expect("a session");
    let layout = client.describe().expect("a description").layout;
    client.track_start(false).expect("tracking");
    let (mut tracked, mut taking, mut first_writes) = (Done::default(), Done::default(), 0);
    for round in 0..=ROUNDS {
        let before = (stats(&window), vcpu.turns());
        client.harvest(&layout).expect("a harvest");
        for space in &layout.spaces {
            let count = u32::try_from(space.pages).expect("1 GiB");
            client.take(PageRun { space: space.id, first: 0, count }).expect("pages are taken");
        }
        let harvest = between(&before, &(stats(&window), vcpu.turns()));
        let writes = writing(&window, &vcpu, WRITES);
        let dirty: u64 = client.harvest(&layout).expect("a harvest").iter().map(PageSet::count).sum();
        // The first one takes all memory.
        if round > 0 {
            taking.add(&harvest);
            tracked.add(&writes);
            first_writes += dirty;
        }
    }
    let plain_ns = plain.ran_us as f64 * 1e3 / plain.writes as f64;
    let more_ns = tracked.ran_us as f64 * 1e3 - tracked.writes as f64 * plain_ns;
    json!({
        "write_ns": plain_ns,
        "first_write_more_ns": more_ns / first_writes as f64,
        "first_writes_share": first_writes as f64 / tracked.writes as f64,
        "mb_per_s": plain.mb_per_s(),
        "mb_per_s_tracked": tracked.mb_per_s(),
        "mb_per_s_while_taken": taking.mb_per_s(),
        "waited_share": tracked.waited_us as f64 / (tracked.ran_us + tracked.waited_us) as f64,
    })
}

impl Done {
    fn add(&mut self, more: &Self) {
        self.writes += more.writes;
        self.ran_us += more.ran_us;
        self.waited_us += more.waited_us;
    }

    fn mb_per_s(&self) -> f64 {
        (self.writes * PAGE_SIZE) as f64 / (self.ran_us + self.waited_us) as f64
    }
}

/// Lets it write for a while.
fn writing(window: &Window, vcpu: &Vcpu, time: Duration) -> Done {
    let before = (stats(window), vcpu.turns());
    std::thread::sleep(time);
    between(&before, &(stats(window), vcpu.turns()))
}

fn between(before: &(ledger::Stats, Turns), after: &(ledger::Stats, Turns)) -> Done {
    let Turns { ran_us, waited_us } = after.1.since(before.1);
    Done { writes: after.0.iterations - before.0.iterations, ran_us, waited_us }
}
