//! Where the VMM's part of the downtime goes: moves a ledger guest between VMMs of this process.
//!
//!     cargo run --release -p vmm --example downtime -- MEMORY_MIB MOVES VCPUS LEDGER_PARAMETERS...
#![allow(clippy::unwrap_used, clippy::panic, reason = "a measurement that fails has nothing to report")]

#[path = "../tests/hop/mod.rs"]
mod hop;

use std::time::Duration;

use hop::{Host, Steps};
use vmm::{Bytes, KernelSource, SerialSink, VmConfig, cpuid::CpuModel};

fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default| args.next().map_or(default, |text| text.parse().unwrap());
    let (memory_mib, moves, vcpus): (u64, usize, u64) = (number(1024), number(5) as usize, number(1));
    let parameters: Vec<String> = args.collect();
    let cmdline = if parameters.is_empty() { "fill=768M ws=256M".into() } else { parameters.join(" ") };
    println!("{memory_mib} MiB, {vcpus} vCPUs, {moves} moves, {cmdline}");
    let directory = tempfile::tempdir().unwrap();
    let mut host = Host::boot(VmConfig {
        name: "ledger".into(),
        memory_bytes: memory_mib << 20,
        vcpus: vcpus as u32,
        cpu: CpuModel::Host,
        nested: false,
        kernel: KernelSource::Kernel(Bytes::Inline(ledger::IMAGE.into())),
        initramfs: None,
        cmdline,
        serial: SerialSink::None,
        devices: Vec::new(),
        socket_path: Some(directory.path().join("0.sock")),
    });
    let mut reader = host.reader();
    while ledger::Stats::read(&mut reader).map_or(true, |stats| stats.state != ledger::State::Running) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut all: Vec<Steps> = Vec::new();
    let mut gaps = Vec::new();
    for number in 1..=moves {
        let mut reader = host.reader();
        let mut since = 0;
        let about_to_freeze = || since = ledger::Stats::read(&mut reader).unwrap().tsc_last;
        let (moved, steps, source) =
            host.hop(&directory.path().join(format!("{number}.sock")), about_to_freeze);
        host = moved;
        // Long enough for the guest's first tick, too short for many hiccups of a busy machine.
        std::thread::sleep(Duration::from_millis(4));
        let stats = ledger::Stats::read(host.reader()).unwrap();
        source.retire();
        let gap = stats.longest_gap_since(since).and_then(|gap| stats.us(gap.cycles)).unwrap_or(0);
        println!("guest's gap {gap} us, {steps}");
        gaps.push(Duration::from_micros(gap));
        all.push(steps);
    }
    let median = |of: fn(&Steps) -> Duration| {
        let mut values: Vec<Duration> = all.iter().map(of).collect();
        values.sort();
        values[values.len() / 2]
    };
    gaps.sort();
    println!(
        "medians: guest's gap {:?}; total {:?} = freeze {:?} + harvest {:?} + copy {:?} + save {:?} + load {:?} + pledge {:?} + start {:?}",
        gaps[gaps.len() / 2],
        median(|steps| steps.total),
        median(|steps| steps.freeze),
        median(|steps| steps.harvest),
        median(|steps| steps.copy),
        median(|steps| steps.save),
        median(|steps| steps.load),
        median(|steps| steps.pledge),
        median(|steps| steps.start),
    );
    host.session.freeze().unwrap();
    let verdict = ledger::verify(&ledger::Stats::read(host.reader()).unwrap(), host.reader()).unwrap();
    println!("{verdict}");
    host.terminate();
}
