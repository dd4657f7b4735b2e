//! The ledger guest under this VMM: it boots by both entries, survives moves, and agrees with its replay.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

mod hop;

use std::time::{Duration, Instant};

use hop::Host;
use vmm::{Bytes, KernelSource, SerialSink, VmConfig, cpuid::CpuModel};

const MEMORY: u64 = 64 << 20;

/// Whether this host has KVM. Without it tests are skipped, loudly; in CI they fail.
fn kvm() -> bool {
    match vmm::host::Host::open() {
        Ok(_) => true,
        Err(error) if std::env::var_os("CI").is_some() => panic!("CI needs KVM: {error}"),
        Err(error) => {
            eprintln!("SKIPPED, needs KVM: {error}");
            false
        }
    }
}

fn boot(directory: &tempfile::TempDir, image: &[u8], memory_bytes: u64, vcpus: u32) -> Host {
    Host::boot(VmConfig {
        name: "ledger".into(),
        memory_bytes,
        vcpus,
        cpu: CpuModel::Host,
        nested: false,
        kernel: KernelSource::Kernel(Bytes::Inline(image.into())),
        initramfs: None,
        cmdline: "fill=32M ws=8M rate=20 tick_us=1000 scrub=16".into(),
        serial: SerialSink::None,
        devices: Vec::new(),
        socket_path: Some(directory.path().join("0.sock")),
    })
}

fn stats(host: &mut Host) -> Option<ledger::Stats> {
    ledger::Stats::read(host.reader()).ok()
}

fn wait_until_it_runs(host: &mut Host) -> ledger::Stats {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match stats(host) {
            Some(stats) if stats.state == ledger::State::Running && stats.iterations > 10 => return stats,
            _ => assert!(Instant::now() < deadline, "the guest does not get to run"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_ledger_moves_and_loses_nothing() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut host = boot(&directory, ledger::IMAGE, MEMORY, 2);
    let mut before = wait_until_it_runs(&mut host).iterations;
    for number in 1..=3 {
        let (moved, steps, source) = host.hop(&directory.path().join(format!("{number}.sock")), || {});
        host = moved;
        source.retire();
        eprintln!("{steps}");
        std::thread::sleep(Duration::from_millis(200));
        let after = stats(&mut host).unwrap();
        assert!(after.iterations > before, "it stands still after the move");
        assert_eq!(after.error_count(), 0);
        before = after.iterations;
    }
    host.session.freeze().unwrap();
    let stats = stats(&mut host).unwrap();
    let verdict = ledger::verify(&stats, host.reader()).unwrap();
    assert!(verdict.is_sound(), "{verdict}");
    host.terminate();
}

#[test]
fn the_ledger_boots_at_its_64_bit_entry() {
    if !kvm() {
        return;
    }
    // Without its PVH note, the ELF header's entry is what is left.
    let mut image = ledger::IMAGE.to_vec();
    let note = image.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
    image[note] = b'Y';
    let directory = tempfile::tempdir().unwrap();
    let mut host = boot(&directory, &image, MEMORY, 1);
    wait_until_it_runs(&mut host);
    host.terminate();
}

#[test]
fn memory_above_the_hole_works() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut host = boot(&directory, ledger::IMAGE, (3 << 30) + (64 << 20), 1);
    wait_until_it_runs(&mut host);
    assert_eq!(host.session.describe().unwrap().layout.spaces.len(), 2);
    host.terminate();
}
