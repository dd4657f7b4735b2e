//! The first file system of a host: busybox, kernel modules, and our programs with their shared libraries.

use super::cpio::Archive;
use super::packages::Packages;
use super::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a host is booted with.
const HOST_INIT: &str = include_str!("host-init.sh");

/// What a Linux guest in a host is booted with, if nothing else is put there.
const GUEST_INIT: &str = include_str!("guest-init.sh");

/// Modules of hosts: their network cards, KVM, and what VMs need for their own network and disks.
const HOST_MODULES: &[&str] = &["virtio_pci", "virtio_net", "kvm-amd", "tun", "bridge", "loop"];

/// More of them, for hosts with containers: what CRIU asks about sockets, and by what it keeps packets away.
const CONTAINER_MODULES: &[&str] = &[
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "af_packet_diag",
    "netlink_diag",
    // With the one CRIU asks for the other, and takes its absence for an error.
    "nf_tables",
    "nf_conntrack_netlink",
    "veth",
    "macvlan",
    "overlay",
];

/// Modules of Linux guests. They have no PCI: their devices are found through ACPI.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "vmw_vsock_virtio_transport",
];

/// Where in a host the files for Linux guests are.
const GUEST_KERNEL: &str = "boot/vmlinuz";
const GUEST_IMAGE: &str = "boot/initramfs";

/// Where in a host the secret lies that its agent asks for.
pub(super) const TOKEN: &str = "/etc/lab-token";

/// A program that is put into a host, in /bin.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its name there.
    pub name: String,
    /// The file on this machine.
    pub path: PathBuf,
}

impl std::str::FromStr for Program {
    type Err = String;

    /// `PATH`, or `NAME=PATH`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) => (name.to_owned(), PathBuf::from(path)),
            None => {
                let name = Path::new(text).file_name().ok_or_else(|| format!("{text} is no file"))?;
                (name.to_string_lossy().into_owned(), PathBuf::from(text))
            }
        };
        if name.is_empty() || name.contains('/') || !path.is_file() {
            return Err(format!("{text} is neither the path of a file nor NAME=PATH"));
        }
        Ok(Self { name, path })
    }
}

/// Builds the file system of a host. `work` is a directory for what lies there for a moment.
///
/// # Errors
/// If a program cannot be read or a library is missing.
pub fn host(packages: &Packages, programs: &[Program], token: &str, work: &Path) -> Result<Vec<u8>> {
    let mut archive = base(packages, HOST_INIT, &[HOST_MODULES, CONTAINER_MODULES].concat())?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file(TOKEN.trim_start_matches('/'), 0o600, token.as_bytes());
    archive.copy(GUEST_KERNEL, 0o644, &packages.kernel())?;
    archive.file(GUEST_IMAGE, 0o644, &base(packages, GUEST_INIT, GUEST_MODULES)?.finish());
    add_programs(&mut archive, programs, work)?;
    Ok(archive.finish())
}

/// What, behind the first file system of a Linux guest (`/boot/initramfs` in a host), makes it run this script, with these programs, and
/// power off. `work` is a directory for what lies there for a moment.
///
/// # Errors
/// If a program cannot be read or a library is missing.
pub fn script(script: &str, programs: &[Program], work: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file("run.sh", 0o755, script.as_bytes());
    add_programs(&mut archive, programs, work)?;
    Ok(archive.finish())
}

/// Programs in /bin, and the shared libraries of all of them.
fn add_programs(archive: &mut Archive, programs: &[Program], work: &Path) -> Result<()> {
    let mut libraries = BTreeSet::new();
    for program in programs {
        let stripped = strip(&program.path, work)?;
        archive.copy(&format!("bin/{}", program.name), 0o755, &stripped)?;
        libraries.extend(shared_libraries(&program.path)?);
    }
    for library in libraries {
        archive.copy(library.to_string_lossy().trim_start_matches('/'), 0o755, &library)?;
    }
    Ok(())
}

/// Busybox under all of its names, modules and the list in which they are loaded, and the first program.
fn base(packages: &Packages, init: &str, modules: &[&str]) -> Result<Archive> {
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "run", "tmp", "root", "sbin", "etc"] {
        archive.directory(directory);
    }
    archive.file("init", 0o755, init.as_bytes());
    archive.copy("bin/busybox", 0o755, &packages.busybox())?;
    let mut order = String::new();
    for path in packages.modules(modules)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.copy(&format!("lib/modules/{name}"), 0o644, &path)?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    Ok(archive)
}

/// The program without its debugging information, which is ten times as large as the rest; as it is where there is no strip(1).
fn strip(program: &Path, work: &Path) -> Result<PathBuf> {
    let name = program.file_name().unwrap_or_default();
    let stripped = work.join("stripped").join(name);
    std::fs::create_dir_all(work.join("stripped")).context(|| work.display().to_string())?;
    let done = Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(program).output();
    Ok(if done.is_ok_and(|output| output.status.success()) { stripped } else { program.into() })
}

/// The files that the dynamic linker loads with a program, itself among them; none for a static program.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context(|| "ldd".into())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("not found") {
        return Err(format!("{} misses a library:\n{text}", program.display()));
    }
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}
