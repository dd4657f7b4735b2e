//! Tests of whole VMs on real KVM.

use std::{
    io::Write,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, channel},
    },
    time::{Duration, Instant},
};

use protocol::checkpoint::name::CheckpointId;

use crate::{
    addresses::BOOT_END,
    boot::{Bytes, Images, KernelSource, Ring},
    cpuid::CpuModel,
    devices::SerialSink,
    dirty::LogMode,
    host::Host,
    test_images::{self, COUNTERS, LOAD, MAILBOX},
    vcpu::{Ending, Event, VcpuEvent},
    vm::{Shape, Vm},
};

const MEMORY: u64 = 16 << 20;

/// This host's KVM. Without it a test is skipped, loudly; in CI it fails.
pub(crate) fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) if std::env::var_os("CI").is_some() => panic!("CI needs KVM: {error}"),
        Err(error) => {
            eprintln!("SKIPPED, needs KVM: {error}");
            None
        }
    }
}

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn flat(image: Vec<u8>) -> KernelSource {
    KernelSource::Flat {
        image: Bytes::Inline(image.into()),
        load_address: LOAD,
        entry: LOAD,
        ring: Ring::User,
    }
}

fn boot(host: &Host, vcpus: u32, image: Vec<u8>, sink: SerialSink) -> (Vm, Receiver<Event>) {
    let (sender, events) = channel();
    let source = flat(image);
    let images = Images::read(&source, None, "").unwrap();
    (Vm::boot(host, &shape(vcpus, &CpuModel::Host), &images, sink, &[], &sender).unwrap(), events)
}

fn shape(vcpus: u32, cpu: &CpuModel) -> Shape<'_> {
    Shape { memory_bytes: MEMORY, vcpus, cpu, nested: false }
}

fn word(vm: &Vm, address: u64) -> u64 {
    let mut bytes = [0; 8];
    vm.memory().read(address, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn counter(vm: &Vm, vcpu: u64) -> u64 {
    word(vm, COUNTERS + vcpu * 4096)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_flat_guest_at_cpl_3_prints_and_powers_off() {
    let Some(host) = host() else { return };
    let output = Output::default();
    let sink = SerialSink::Custom(Box::new(output.clone()));
    let (vm, events) = boot(&host, 1, test_images::hello(b"hello\n", 7), sink);
    vm.resume();
    let event = events.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(event, Event::Vcpu(VcpuEvent { index: 0, ending: Ending::PowerOff(7) }));
    assert_eq!(*output.0.lock().unwrap(), b"hello\n");
    assert!(vm.pause().is_err());
}

#[test]
fn a_triple_fault_ends_the_guest_and_nothing_else() {
    let Some(host) = host() else { return };
    let (vm, events) = boot(&host, 1, test_images::crash(), SerialSink::None);
    vm.resume();
    let event = events.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(event, Event::Vcpu(VcpuEvent { index: 0, ending: Ending::Shutdown }));
}

#[test]
fn no_kick_is_lost_in_hundreds_of_pauses() {
    let Some(host) = host() else { return };
    for (name, image) in [
        ("counting", test_images::counter()),
        ("in MMIO", test_images::mmio_counter()),
        ("parked", test_images::sleeper()),
    ] {
        let (vm, _events) = boot(&host, 1, image, SerialSink::None);
        let mut times = Vec::new();
        vm.resume();
        for round in 0..200 {
            std::thread::sleep(Duration::from_micros(round % 40 * 10));
            times.push(vm.pause().unwrap());
            let before = counter(&vm, 0);
            std::thread::sleep(Duration::from_micros(50));
            assert_eq!(counter(&vm, 0), before, "a paused guest counts");
            vm.resume();
        }
        times.sort();
        eprintln!("pause, {name}: median {:?}, worst {:?}", times[times.len() / 2], times[times.len() - 1]);
        if name != "parked" {
            let before = counter(&vm, 0);
            wait_until("counting", || counter(&vm, 0) > before);
        }
    }
}

/// Copies the memory and state of a paused VM into a new one.
fn move_to_new(host: &Host, source: &Vm) -> (Vm, Receiver<Event>) {
    let (sender, events) = channel();
    let (machine, _) = crate::state::Machine::decode(&source.describe().unwrap()).unwrap();
    let target = Vm::prepare(host, MEMORY, machine, SerialSink::None, Vec::new(), &sender).unwrap();
    let mut bytes = vec![0; MEMORY as usize];
    source.memory().read(0, &mut bytes).unwrap();
    target.memory().write(0, &bytes).unwrap();
    let started = Instant::now();
    let state = source.save().unwrap();
    let saved = Instant::now();
    target.load(&state).unwrap();
    eprintln!("save {:?}, load {:?}, {} bytes", saved - started, saved.elapsed(), state.len());
    (target, events)
}

#[test]
fn a_counter_continues_in_another_vm() {
    let Some(host) = host() else { return };
    for vcpus in [1, 4] {
        for image in [test_images::counter(), test_images::mmio_counter()] {
            let (mut vm, mut events) = boot(&host, vcpus, image, SerialSink::None);
            vm.resume();
            for _ in 0..5 {
                wait_until("counting", || (0..vcpus).all(|vcpu| counter(&vm, vcpu.into()) > 1000));
                vm.pause().unwrap();
                let before: Vec<u64> = (0..vcpus).map(|vcpu| counter(&vm, vcpu.into())).collect();
                (vm, events) = move_to_new(&host, &vm);
                let loaded: Vec<u64> = (0..vcpus).map(|vcpu| counter(&vm, vcpu.into())).collect();
                assert_eq!(before, loaded);
                vm.resume();
                // The count is in a register: a lost register would start again at a small number.
                for (vcpu, before) in (0_u64..).zip(before) {
                    wait_until("counting on", || counter(&vm, vcpu) > before);
                }
            }
            assert!(events.try_recv().is_err());
        }
    }
}

/// What KVM says of a paused VM's clocks: whether the moment is known, and the TSC offset and the clock at the save.
fn clocks(vm: &Vm) -> (bool, Vec<u64>, u64) {
    let saved = protocol::state::State::decode(&vm.save().unwrap()).unwrap();
    let state: crate::state::VmState = crate::state::decode(&saved, "vm").unwrap();
    let tsc = |vcpu: &crate::state::VcpuState| vcpu.msrs.iter().find(|(index, _)| *index == 0x10).unwrap().1;
    let known = state.host_tsc();
    let vcpus = crate::state::vcpus(&saved).unwrap();
    let ahead = vcpus.iter().map(|vcpu| tsc(vcpu).wrapping_sub(known.unwrap_or(0))).collect();
    (known.is_some(), ahead, state.clock.clock.wrapping_sub(state.saved_at_unix_ns))
}

#[test]
fn clocks_go_on_as_if_there_had_been_no_move() {
    let Some(host) = host() else { return };
    let (source, _events) = boot(&host, 2, test_images::counter(), SerialSink::None);
    source.resume();
    wait_until("counting", || (0..2).all(|vcpu| counter(&source, vcpu) > 1000));
    source.pause().unwrap();
    let before = clocks(&source);
    let (target, _events) = move_to_new(&host, &source);
    std::thread::sleep(Duration::from_millis(30));
    target.resume();
    std::thread::sleep(Duration::from_millis(30));
    target.pause().unwrap();
    let after = clocks(&target);
    eprintln!("before {before:?}, after {after:?}, {} kHz", source.machine().tsc_khz);
    // Both are of this host: what is counted from the same beginning stays where it was, but for the adjustment of real time.
    let drift_ns = after.2.wrapping_sub(before.2).cast_signed().unsigned_abs();
    assert!(drift_ns < 2_000_000, "the clock is off by {drift_ns} ns");
    if !before.0 || !after.0 {
        println!(
            "not tested: this host's KVM does not say of which moment the clock is, so the TSC's offset is not known"
        );
        return;
    }
    for (before, after) in before.1.iter().zip(&after.1) {
        let drift = after.wrapping_sub(*before).cast_signed().unsigned_abs();
        assert!(drift < u64::from(source.machine().tsc_khz), "the TSC is off by {drift} ticks");
    }
    assert_eq!(after.1[0], after.1[1], "the vCPUs' TSCs are one");
}

#[test]
fn a_state_of_another_machine_or_cut_short_is_refused() {
    let Some(host) = host() else { return };
    let (one, _events) = boot(&host, 1, test_images::counter(), SerialSink::None);
    let (two, _events) = boot(&host, 2, test_images::counter(), SerialSink::None);
    let state = one.save().unwrap();
    assert!(two.load(&state).is_err());
    for cut in [0, 1, state.len() / 2, state.len() - 1] {
        assert!(one.load(&state[..cut]).is_err());
    }
    one.load(&state).unwrap();
}

#[test]
fn too_many_vcpus_are_refused_in_words() {
    let Some(host) = host() else { return };
    let (sender, _events) = channel();
    for vcpus in [0, 100_000] {
        let outcome = Vm::boot(
            &host,
            &shape(vcpus, &CpuModel::Host),
            &Images::read(&flat(test_images::counter()), None, "").unwrap(),
            SerialSink::None,
            &[],
            &sender,
        );
        assert!(outcome.is_err_and(|error| error.to_string().contains("vCPUs")));
    }
}

/// Lets the guest of [`test_images::mailbox`] write to an address, and waits for it.
fn poke(vm: &Vm, address: u64) {
    vm.memory().write(MAILBOX, &address.to_le_bytes()).unwrap();
    wait_until("the guest's write", || word(vm, MAILBOX) == 0);
}

#[test]
fn exactly_the_written_pages_are_dirty() {
    let Some(host) = host() else { return };
    for best in [LogMode::ManualInitiallySet, LogMode::Manual, LogMode::Plain] {
        exactly_the_written_pages_are_dirty_in(best, &host);
    }
}

fn exactly_the_written_pages_are_dirty_in(best: LogMode, host: &Host) {
    let (mut vm, _events) = boot(host, 1, test_images::mailbox(), SerialSink::None);
    vm.cap_log_mode(best);
    vm.resume();
    poke(&vm, 0x40_0000);
    let pages = MEMORY / 4096;
    let tracker = vm.tracker();
    tracker.start(false).unwrap();
    eprintln!("dirty log: {:?} of at best {best:?}", tracker.mode());
    assert_eq!(tracker.harvest().unwrap(), [pages]);
    assert_eq!(tracker.take(0, 0, pages).unwrap().count(), pages);

    let dirty = |vm: &mut Vm| -> Vec<u64> {
        vm.tracker().harvest().unwrap();
        let words = vm.tracker().take(0, 0, pages).unwrap();
        // Below the image lie the page tables, in which the processor sets accessed and dirty bits.
        (BOOT_END / 4096..pages)
            .filter(|page| words.bits[(page / 64) as usize] & (1 << (page % 64)) != 0)
            .collect()
    };
    assert!(dirty(&mut vm).is_empty());
    let mailbox = MAILBOX / 4096;
    for target in [0x40_0000, 0x41_0000, 0xff_f000] {
        poke(&vm, target);
        assert_eq!(dirty(&mut vm), [mailbox, target / 4096]);
        assert!(dirty(&mut vm).is_empty());
    }
    // A write between harvest and take is in what is read after the take.
    poke(&vm, 0x50_0000);
    vm.tracker().harvest().unwrap();
    poke(&vm, 0x50_0000);
    let read_then_shown_again = vm.tracker().mode() == LogMode::Plain;
    let taken = vm.tracker().take(0, 0x500, 1).unwrap();
    assert_eq!((taken.count(), word(&vm, 0x50_0000)), (1, 2));
    // The plain log was cleared by the harvest, so the second write shows once more.
    if read_then_shown_again {
        assert_eq!(dirty(&mut vm), [mailbox, 0x500]);
    }
    // One after the take shows up in the next harvest.
    poke(&vm, 0x50_0000);
    assert_eq!(dirty(&mut vm), [mailbox, 0x500]);
    // From a baseline on, stopping keeps the log, and starting finds what was written in between. A session that takes
    // every page in between does not blur that.
    let covered: CheckpointId = "20261123T194831Z-3f9a1c07".parse().unwrap();
    vm.tracker().take(0, 0, pages).unwrap();
    vm.tracker().set_baseline(covered).unwrap();
    vm.tracker().stop().unwrap();
    poke(&vm, 0x52_0000);
    vm.tracker().start(false).unwrap();
    assert_eq!(vm.tracker().harvest().unwrap(), [pages]);
    poke(&vm, 0x53_0000);
    assert_eq!(vm.tracker().take(0, 0, pages).unwrap().count(), pages);
    vm.tracker().stop().unwrap();
    vm.tracker().start(true).unwrap();
    assert_eq!(vm.tracker().baseline(), Some(covered));
    assert_eq!(dirty(&mut vm), [mailbox, 0x520, 0x530]);
    // Without one, stopping and starting makes everything pending.
    vm.tracker().forget_baseline().unwrap();
    vm.tracker().stop().unwrap();
    poke(&vm, 0x51_0000);
    vm.tracker().start(false).unwrap();
    assert_eq!(vm.tracker().harvest().unwrap(), [pages]);
}

#[test]
fn a_state_with_a_damaged_section_never_panics() {
    let Some(host) = host() else { return };
    let (vm, _events) = boot(&host, 1, test_images::counter(), SerialSink::None);
    let good = protocol::state::State::decode(&vm.save().unwrap()).unwrap();
    let mut refused = 0;
    for section in 0..good.sections.len() {
        for step in 0..40 {
            let mut bad = good.clone();
            let body = &mut bad.sections[section].body;
            let at = step * 7919 % body.len();
            body[at] ^= 0xff;
            if step % 4 == 3 {
                body.truncate(at);
            }
            refused += u32::from(vm.load(&bad.encode().unwrap()).is_err());
        }
        let mut bad = good.clone();
        bad.sections[section].version += 1;
        assert!(vm.load(&bad.encode().unwrap()).is_err());
        let mut bad = good.clone();
        bad.sections.remove(section);
        assert!(vm.load(&bad.encode().unwrap()).is_err());
    }
    let mut bad = good.clone();
    bad.push("device/unknown", 1, vec![1]);
    assert!(vm.load(&bad.encode().unwrap()).is_err());
    assert!(refused > 40, "{refused}");
    vm.load(&good.encode().unwrap()).unwrap();
}
