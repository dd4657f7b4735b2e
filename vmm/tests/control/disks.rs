//! A VM's disks belong to one VM at a time: locked from its boot or start to its pledge, and named where they are refused.

use std::path::Path;

use protocol::monitor::Phase;
use vmm::{
    Bytes, Client, Error, ExitReason, IncomingConfig, KernelSource, Ring, SerialSink, VmConfig,
    cpuid::CpuModel,
    devices::virtio::{Allowed, DeviceConfig, DiskConfig},
};

use super::{LOAD, MEMORY, MIGRATION, Memory, Running, kvm, round, test_images};

fn config(socket: &Path, devices: Vec<DeviceConfig>) -> VmConfig {
    VmConfig {
        name: "source".into(),
        memory_bytes: MEMORY,
        vcpus: 1,
        cpu: CpuModel::Host,
        nested: false,
        kernel: KernelSource::Flat {
            image: Bytes::Inline(test_images::counter().into()),
            load_address: LOAD,
            entry: LOAD,
            ring: Ring::User,
        },
        initramfs: None,
        cmdline: String::new(),
        serial: SerialSink::None,
        devices,
        socket_path: Some(socket.to_owned()),
    }
}

fn boot(folder: &Path, devices: Vec<DeviceConfig>) -> Running {
    let path = folder.join("source.sock");
    let config = config(&path, devices);
    Running::wait(path, std::thread::spawn(move || vmm::run(config)))
}

fn incoming(folder: &Path, disk_folder: &Path) -> Running {
    let path = folder.join("target.sock");
    let config = IncomingConfig {
        name: "target".into(),
        max_memory_bytes: MEMORY,
        serial: SerialSink::None,
        allowed: Allowed { disk_folders: vec![disk_folder.to_owned()], taps: Vec::new(), console: None },
        cpu: CpuModel::Host,
        socket_path: path.clone(),
    };
    Running::wait(path, std::thread::spawn(move || vmm::run_incoming(config)))
}

fn disk(path: &Path) -> Vec<DeviceConfig> {
    vec![DeviceConfig::Disk(DiskConfig { path: path.to_owned(), readonly: false }), DeviceConfig::Rng]
}

/// Whether a VM could have the disk now.
fn is_free(folder: &Path, image: &Path) -> bool {
    // It takes its devices before its image is loaded, which cannot be.
    let mut config = config(&folder.join("probe.sock"), disk(image));
    if let KernelSource::Flat { load_address, .. } = &mut config.kernel {
        *load_address = 1 << 40;
    }
    let error = vmm::run(config).unwrap_err().to_string();
    assert!(error.contains("in use") || error.contains("inside guest memory"), "{error}");
    !error.contains("in use")
}

/// Moves everything but the commit.
fn arrive(from: &mut Client, to: &mut Client) {
    let (memory, layout, machine) = Memory::of(from);
    let prepared = to.prepare("moved", &layout, &machine).unwrap();
    let there = Memory(prepared.memory.into_iter().next().unwrap().into());
    from.track_start(false).unwrap();
    from.freeze().unwrap();
    round(from, &layout, &memory, &there);
    to.load(&from.save().unwrap()).unwrap();
}

#[test]
fn a_disk_goes_from_hand_to_hand_and_back_where_the_move_fails() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, [0; 8192]).unwrap();
    let source = boot(folder.path(), disk(&image));
    let mut from = source.session();
    assert!(!is_free(folder.path(), &image));
    // A destination that cannot have it says so before anything is moved, and the source has it still.
    let elsewhere = tempfile::tempdir().unwrap();
    let target = incoming(folder.path(), elsewhere.path());
    let mut to = target.session();
    let (_, layout, machine) = Memory::of(&mut from);
    let error = to.prepare("moved", &layout, &machine).err().unwrap();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(error.to_string().contains("image") && error.to_string().contains("--disks"), "{error}");
    drop(to);
    assert_eq!(target.end(), ExitReason::Discarded);
    // One whose image is shorter than its guest thinks, likewise.
    let target = incoming(folder.path(), folder.path());
    let mut to = target.session();
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(4096).unwrap();
    let error = to.prepare("moved", &layout, &machine).err().unwrap().to_string();
    assert!(error.contains("8 sectors here, its guest thinks 16"), "{error}");
    file.set_len(8192).unwrap();

    arrive(&mut from, &mut to);
    assert!(
        to.start(MIGRATION).unwrap_err().to_string().contains("in use"),
        "before the pledge it is the source's"
    );
    assert_eq!(target.phase(), Phase::Loaded);
    from.pledge(MIGRATION, "there").unwrap();
    assert!(is_free(folder.path(), &image));
    // The move fails here: the source takes it back. While another one has it, it waits.
    let other = boot(elsewhere.path(), disk(&image));
    let error = from.resume(Some(MIGRATION)).unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    assert_eq!(source.phase(), Phase::Pledged);
    other.terminate();
    from.resume(Some(MIGRATION)).unwrap();
    assert_eq!(source.phase(), Phase::Running);
    assert!(!is_free(folder.path(), &image));
    drop(to);
    assert_eq!(target.end(), ExitReason::Discarded);

    // And once more, to its end.
    let target = incoming(folder.path(), folder.path());
    let mut to = target.session();
    arrive(&mut from, &mut to);
    from.pledge(MIGRATION, "there").unwrap();
    to.start(MIGRATION).unwrap();
    assert!(!is_free(folder.path(), &image));
    from.hand_over(MIGRATION).unwrap();
    assert_eq!(source.end(), ExitReason::HandedOver);
    to.terminate().unwrap();
    assert_eq!(target.end(), ExitReason::Terminated);
    assert!(is_free(folder.path(), &image));
}
