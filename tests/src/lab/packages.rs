//! The parts of a host that come from Debian: kernel, modules, busybox. They are downloaded once, unpacked into a cache outside
//! the repository, and never installed on this machine.

use super::{Context as _, Result};
use rustix::fs::FlockOperation;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package whose dependency is the newest stock kernel for virtual machines, with kvm-amd among its modules.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Debian's busybox without shared libraries.
const BUSYBOX: &str = "busybox-static";

/// What was unpacked.
#[derive(Debug, Clone)]
pub struct Packages {
    root: PathBuf,
    release: String,
}

/// Where everything that is kept between laboratories lies.
///
/// # Errors
/// If there is no home directory.
pub fn cache_dir() -> Result<PathBuf> {
    let of = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")));
    Ok(cache.ok_or("neither HOME nor XDG_CACHE_HOME says where to keep Debian's kernel")?.join("migrate-lab"))
}

impl Packages {
    /// What is in the cache, after a download if it is not there yet. Two that come at once wait for each other.
    ///
    /// # Errors
    /// If Debian's archive cannot be reached.
    pub fn ensure() -> Result<Self> {
        let cache = cache_dir()?;
        let failed = || cache.display().to_string();
        std::fs::create_dir_all(&cache).context(failed)?;
        let lock = std::fs::File::create(cache.join("lock")).context(failed)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).context(failed)?;
        let root = cache.join("debian");
        if !root.exists() {
            // Under another name first: what is there is whole.
            let fresh = cache.join("debian.new");
            if fresh.exists() {
                std::fs::remove_dir_all(&fresh).context(failed)?;
            }
            download(&fresh)?;
            std::fs::rename(&fresh, &root).context(failed)?;
        }
        Self::open(&root)
    }

    fn open(root: &Path) -> Result<Self> {
        let modules = root.join("lib/modules");
        let entries = std::fs::read_dir(&modules).context(|| modules.display().to_string())?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let release = names.max().ok_or_else(|| {
            format!("{} holds no kernel: remove {} and try again", modules.display(), root.display())
        })?;
        Ok(Self { root: root.into(), release })
    }

    /// The kernel's release, as `uname -r` tells it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The kernel, a bzImage.
    pub fn kernel(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Busybox, linked statically.
    pub fn busybox(&self) -> PathBuf {
        self.root.join("bin/busybox")
    }

    /// These modules and those they depend on, in the order in which they can be loaded. Those that are built into the
    /// kernel are left out.
    ///
    /// # Errors
    /// If one is missing.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let home = self.root.join("lib/modules").join(&self.release);
        let mut files = Vec::new();
        collect(&home.join("kernel"), &mut files)?;
        let built_in = std::fs::read_to_string(home.join("modules.builtin"))
            .context(|| "the list of built-in modules".into())?;
        let built_in: Vec<_> = built_in.lines().map(|line| module_name(Path::new(line))).collect();
        let mut order = Vec::new();
        for name in names {
            add(name, &files, &built_in, &mut order)?;
        }
        Ok(order)
    }
}

/// Adds a module behind what it depends on.
fn add(name: &str, files: &[PathBuf], built_in: &[String], order: &mut Vec<PathBuf>) -> Result<()> {
    let name = name.replace('-', "_");
    if built_in.contains(&name) || order.iter().any(|path| module_name(path) == name) {
        return Ok(());
    }
    let path = files.iter().find(|path| module_name(path) == name);
    let path = path.ok_or_else(|| format!("Debian's kernel has no module {name}"))?;
    let bytes = std::fs::read(path).context(|| path.display().to_string())?;
    for needed in dependencies(&bytes) {
        add(&needed, files, built_in, order)?;
    }
    order.push(path.clone());
    Ok(())
}

/// What a module's own account (its section .modinfo) says it needs.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value).into_owned();
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// A module's name by its file's: without its ending, and with one kind of dash.
fn module_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split(".ko").next().unwrap_or_default().replace('-', "_")
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).context(|| folder.display().to_string())?.flatten() {
        if entry.path().is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Downloads and unpacks the packages into a new directory.
fn download(into: &Path) -> Result<()> {
    let failed = || into.display().to_string();
    std::fs::create_dir(into).context(failed)?;
    let archives = into.join("archives");
    std::fs::create_dir(&archives).context(failed)?;
    if run(&archives, "apt-cache", &["show", KERNEL]).is_err() {
        run(&archives, "apt-get", &["update", "-qq"]).context(|| {
            format!("apt knows no {KERNEL}, which the laboratory's hosts run (Debian 12 has it)")
        })?;
    }
    let depends = run(&archives, "apt-cache", &["depends", KERNEL])?;
    let kernel = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let kernel = kernel.ok_or_else(|| format!("{KERNEL} depends on no kernel:\n{depends}"))?;
    eprintln!("lab: downloading {kernel} and {BUSYBOX} (once, into {})", into.with_extension("").display());
    // Without it apt wants to download as another user, who may not enter this directory.
    run(&archives, "apt-get", &["download", "-qq", "-o", "APT::Sandbox::User=root", kernel, BUSYBOX])?;
    for entry in std::fs::read_dir(&archives).context(failed)?.flatten() {
        let (package, into) = (entry.path(), into.to_string_lossy().into_owned());
        run(&archives, "dpkg", &["-x", &package.to_string_lossy(), &into])?;
    }
    std::fs::remove_dir_all(&archives).context(failed)
}

/// Runs a command in a directory and gives what it says.
///
/// # Errors
/// With what it says, if it fails.
pub fn run(folder: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let what = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).current_dir(folder).output().context(what)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(
            dependencies(b"ELF\0license=GPL\0depends=virtio,virtio_ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\0depends=\0retpoline=Y\0").is_empty());
        assert!(dependencies(b"nothing of that kind").is_empty());
        assert_eq!(module_name(Path::new("kernel/drivers/char/hw_random/virtio-rng.ko")), "virtio_rng");
    }
}
