//! A VM's disks belong to one VM at a time: locked from its boot or start to its pledge, and named where they are refused.

use std::{os::unix::fs::FileExt, path::Path};

use protocol::{
    layout::{Layout, SpaceKind},
    monitor::Phase,
    page::{PageRun, SpaceId},
};
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

/// Copies everything of the disk, whatever is dirty.
fn copy_disk(from: &std::os::fd::OwnedFd, to: &std::os::fd::OwnedFd) {
    let (from, to): (std::fs::File, std::fs::File) =
        (from.try_clone().unwrap().into(), to.try_clone().unwrap().into());
    let mut bytes = vec![0; 8192];
    from.read_exact_at(&mut bytes, 0).unwrap();
    assert!(from.write_all_at(&bytes, 0).is_err(), "a source's image can be written");
    to.write_all_at(&bytes, 0).unwrap();
}

#[test]
fn a_disk_that_goes_along_is_a_space_of_its_session_and_a_file_once_its_vm_starts() {
    if !kvm() {
        return;
    }
    let (folder, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let image = folder.path().join("image");
    std::fs::write(&image, [7; 8192]).unwrap();
    let name = image.to_str().unwrap().to_owned();
    let source = boot(folder.path(), disk(&image));
    let mut from = source.session();
    let plain = from.describe().unwrap();
    assert!(plain.can_copy_disks && plain.layout.spaces.len() == 1);
    for wrong in [vec!["/nowhere".to_owned()], vec![name.clone(), name.clone()]] {
        let error = from.copy_disks(wrong.clone()).unwrap_err().to_string();
        assert!(error.contains(&wrong[0]), "{error}");
        assert_eq!(from.describe().unwrap().layout, plain.layout);
    }
    let described = from.copy_disks(vec![name.clone()]).unwrap();
    assert_eq!(described.layout.spaces[1].kind, SpaceKind::Disk);
    assert_eq!((described.layout.spaces[1].pages, described.memory.len()), (2, 2));
    from.track_start(false).unwrap();
    assert!(from.copy_disks(Vec::new()).is_err(), "while it is tracked");
    assert_eq!(from.harvest(&described.layout).unwrap()[1].count(), 2);
    from.take(PageRun { space: SpaceId(1), first: 0, count: 2 }).unwrap();
    assert!(from.harvest(&described.layout).unwrap()[1].is_empty());
    // A baseline covers all of the disks, or is none.
    from.set_baseline(Some("20261123T194831Z-3f9a1c07".parse().unwrap())).unwrap();
    from.track_stop().unwrap();
    from.copy_disks(Vec::new()).unwrap();
    from.track_start(true).unwrap();
    assert!(from.set_baseline(Some("20261123T194831Z-3f9a1c08".parse().unwrap())).is_err());
    from.set_baseline(None).unwrap();
    from.track_stop().unwrap();

    let target = incoming(folder.path(), there.path());
    let mut to = target.session();
    let described = from.copy_disks(vec![name]).unwrap();
    let prepared = to.prepare("moved", &described.layout, &described.machine).unwrap();
    assert_eq!(prepared.layout, described.layout);
    assert_eq!(std::fs::read_dir(there.path()).unwrap().count(), 0, "it has no name yet");
    from.track_start(false).unwrap();
    from.freeze().unwrap();
    let memory = |fds: &[std::os::fd::OwnedFd]| Memory(fds[0].try_clone().unwrap().into());
    let memory_layout = Layout { spaces: described.layout.spaces[..1].to_vec() };
    let bytes = usize::try_from(MEMORY).unwrap();
    let mut all = vec![0; bytes];
    memory(&described.memory).0.read_exact_at(&mut all, 0).unwrap();
    memory(&prepared.memory).0.write_all_at(&all, 0).unwrap();
    assert_eq!(memory_layout.memory_bytes(), MEMORY);
    copy_disk(&described.memory[1], &prepared.memory[1]);
    to.load(&from.save().unwrap()).unwrap();
    from.pledge(MIGRATION, "there").unwrap();
    assert!(!is_free(folder.path(), &image), "it is the source's until that has ended");
    // A name that was taken meanwhile: it does not start, and the other file is untouched.
    let arrived = there.path().join("image");
    std::fs::write(&arrived, "mine").unwrap();
    let error = to.start(MIGRATION).unwrap_err().to_string();
    assert!(error.contains("image") && error.contains("there already"), "{error}");
    assert_eq!((target.phase(), std::fs::read(&arrived).unwrap()), (Phase::Loaded, b"mine".to_vec()));
    std::fs::remove_file(&arrived).unwrap();
    to.start(MIGRATION).unwrap();
    assert_eq!(std::fs::read(&arrived).unwrap(), [7; 8192]);
    assert!(!is_free(folder.path(), &arrived));
    from.hand_over(MIGRATION).unwrap();
    assert_eq!(source.end(), ExitReason::HandedOver);
    assert!(is_free(folder.path(), &image));
    // It is a disk like any other there, and the next session's if it wants it.
    drop(to);
    let mut to = target.session();
    assert_eq!(to.describe().unwrap().layout.spaces.len(), 1);
    let arrived = arrived.canonicalize().unwrap().to_str().unwrap().to_owned();
    assert_eq!(to.copy_disks(vec![arrived]).unwrap().layout, described.layout);
    to.terminate().unwrap();
    assert_eq!(target.end(), ExitReason::Terminated);
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
