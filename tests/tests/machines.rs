//! What makes no machine, here or at a destination, is refused by its name before anything is changed.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Finished, Host, says, trusting_pair, without_kvm};
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// `migrate vm run` of what is refused.
fn run(host: &Host, more: &[&str]) -> Finished {
    host.run(&[&["vm", "run", "--name", "v", "--serial", "none"][..], more].concat())
}

fn file(host: &Host, name: &str, content: &[u8]) -> PathBuf {
    let path = host.path(name);
    std::fs::write(&path, content).expect("a file");
    path
}

/// A file that begins with nothing but this, at this place.
fn image(host: &Host, at: usize, magic: &[u8]) -> String {
    let mut content = vec![0; 0x1000];
    content[at..at + magic.len()].copy_from_slice(magic);
    file(host, "kernel", &content).to_string_lossy().into_owned()
}

/// The smallest ELF file that is one for another processor: e_ident, e_type, e_machine (elf(5)).
fn elf_of(host: &Host, machine: u16) -> String {
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0".to_vec();
    header.extend(machine.to_le_bytes());
    image(host, 0, &header)
}

#[test]
fn kernels_that_are_none_or_of_another_architecture() {
    let host = Host::new(Path::new(PROGRAM));
    let cases: [(usize, &[u8], &str); 4] = [
        (0, b"#!/bin/sh", "neither an ELF file nor a bzImage"),
        (0x38, b"ARM\x64", "AArch64"),
        (0x38, b"RSC\x05", "RISC-V"),
        (0, b"\x1f\x8b", "gzip"),
    ];
    for (at, magic, what) in cases {
        let kernel = image(&host, at, magic);
        says(&run(&host, &["--kernel", &kernel]), 2, &["kernel image", what]);
    }
    // EM_AARCH64
    let kernel = elf_of(&host, 183);
    says(&run(&host, &["--kernel", &kernel]), 2, &["kernel image", "AArch64", "not for x86-64"]);
    assert!(host.vms().is_empty());
}

#[test]
fn what_a_kernel_is_given_must_be_there_and_fit() {
    if without_kvm("what_a_kernel_is_given_must_be_there_and_fit") {
        return;
    }
    let host = Host::new(Path::new(PROGRAM));
    // An x86-64 bzImage by its header: setup_sects, boot_flag, "HdrS", protocol 2.15, loadflags, xloadflags, cmdline_size, pref_address,
    // init_size (Documentation/arch/x86/boot.rst).
    let fields: &[(usize, &[u8])] = &[
        (0x1f1, &[1]),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &[15, 2]),
        (0x211, &[1]),
        (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
        (0x236, &[1]),
        (0x238, &[0xff, 7]),
        (0x258, &[0, 0, 0x20]),
        (0x260, &[0, 0, 1]),
    ];
    let mut kernel = vec![0; 64 << 10];
    for (at, value) in fields {
        kernel[*at..at + value.len()].copy_from_slice(value);
    }
    let kernel = file(&host, "bzImage", &kernel).to_string_lossy().into_owned();
    let with_initramfs = |path: &str| run(&host, &["--kernel", &kernel, "--initrd", path]);
    says(&with_initramfs("/nonexistent/initrd.img"), 2, &["initramfs", "/nonexistent/initrd.img"]);
    let empty = file(&host, "empty", b"").to_string_lossy().into_owned();
    says(&with_initramfs(&empty), 2, &["initramfs"]);
    says(&run(&host, &["--cmdline", &"x".repeat(100_000)]), 2, &["command line", "100000 bytes"]);
    says(&run(&host, &["--vcpus", "300"]), 2, &["300", "vCPUs"]);
    assert!(host.vms().is_empty());
}

#[test]
fn disks_and_taps_that_cannot_be_had() {
    if without_kvm("disks_and_taps_that_cannot_be_had") {
        return;
    }
    let host = Host::new(Path::new(PROGRAM));
    let with = |disk: &Path| run(&host, &["--disk", &disk.to_string_lossy()]);
    says(&with(&host.path("missing")), 2, &["missing", "does not exist"]);
    says(&with(&file(&host, "odd", &[0; 513])), 2, &["odd", "513 bytes"]);
    says(&with(Path::new("/dev/null")), 2, &["/dev/null", "neither"]);
    says(&run(&host, &["--net", "tap=nosuchtap"]), 2, &["nosuchtap", "does not exist"]);
    let disk = file(&host, "disk", &[0; 1 << 20]).to_string_lossy().into_owned();
    host.run_ledger("holder", "64MiB", "fill=8M ws=4M rate=5", &["--disk", &disk]);
    for other in [disk.clone(), format!("{disk},readonly")] {
        says(&run(&host, &["--disk", &other]), 2, &[&disk, "in use"]);
    }
    assert_eq!(host.vms().len(), 1);
}

#[test]
fn a_disk_that_may_not_be_written() {
    if without_kvm("a_disk_that_may_not_be_written") {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: a_disk_that_may_not_be_written: it needs root, to mount something");
        return;
    }
    let host = Host::new(Path::new(PROGRAM));
    let folder = host.path("disks");
    std::fs::create_dir(&folder).expect("a directory");
    let disk = file(&host, "disks/disk", &[0; 1 << 20]);
    // In a mount namespace that ends with the program.
    let script = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(&folder).arg(PROGRAM);
    command.args(["vm", "run", "--name", "v", "--serial", "none", "--runtime-dir"]).arg(host.runtime_dir());
    let output = command.arg("--disk").arg(&disk).output().expect("it can be started");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(&*disk.to_string_lossy()) && stderr.contains("readonly"), "{stderr}");
}

#[test]
fn a_destination_without_the_disk_refuses_before_anything_is_changed() {
    if without_kvm("a_destination_without_the_disk_refuses_before_anything_is_changed") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    let folder = a.path("disks");
    std::fs::create_dir(&folder).expect("a directory");
    let disk = file(&a, "disks/disk", &[7; 1 << 20]);
    let (shown, folder) = (disk.to_string_lossy().into_owned(), folder.to_string_lossy().into_owned());
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &["--disk", &shown]);
    a.wait_ledger_running("v");
    let refused = |options: &[&str], words: &[&str]| {
        let (mut receiver, address) = b.receive(options);
        says(&a.run(&["send", "v", &address]), 6, words);
        assert!(receiver.is_running());
        assert!(b.vms().is_empty(), "something was made for what was refused");
    };
    refused(&[], &[&shown, "--disks"]);
    refused(&["--disks", &b.runtime_dir().to_string_lossy()], &[&shown, "--disks"]);
    a.assert_sound("v");
    let there = ["--disks", &folder];
    let truncated = |bytes| {
        let disk = std::fs::File::options().write(true).open(&disk).expect("it is there");
        disk.set_len(bytes).expect("it can be cut");
    };
    truncated(512 << 10);
    refused(&there, &[&shown, "1024 sectors here", "2048"]);
    truncated(1 << 20);
    let aside = a.path("aside");
    std::fs::rename(&disk, &aside).expect("it is there");
    refused(&there, &[&shown, "does not exist"]);
    std::fs::rename(&aside, &disk).expect("it is there");
    a.assert_sound("v");
    // And with all of that in order it moves.
    let (receiver, address) = b.receive(&there);
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
    says(&run(&a, &["--disk", &shown]), 2, &[&shown, "in use"]);
}
