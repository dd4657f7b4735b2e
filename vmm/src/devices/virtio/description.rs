//! Which devices a VM has: as its operator says it, and as a destination is told.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Backend, MacAddress, block::Block, disk::Disk, net::Net, rng::Rng, tap};
use crate::{
    devices::Slot,
    error::{Error, Result},
};

/// The longest path that is looked at, in bytes (PATH_MAX of limits.h).
const MAX_PATH_BYTES: usize = 4096;

/// A disk as its operator says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image: a raw file or a block device.
    pub path: PathBuf,
    /// It is never written, and other readers may have it too.
    pub readonly: bool,
}

/// A network card as its operator says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// The tap, which exists already.
    pub tap: String,
    /// The guest's address.
    pub mac: MacAddress,
}

/// A device as its operator says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A network card.
    Net(NetConfig),
    /// A source of random bytes.
    Rng,
}

/// A device as a destination is told, in the order of the devices' places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Description {
    /// A disk.
    Block {
        /// The image, an absolute path at the source.
        path: String,
        /// It is never written.
        readonly: bool,
        /// Its length in sectors of 512 bytes.
        sectors: u64,
        /// What the guest was offered (virtio 1.2, 5.2.3).
        features: u64,
    },
    /// A source of random bytes.
    Rng {
        /// What the guest was offered.
        features: u64,
    },
    /// A network card.
    Net {
        /// The tap, at the source.
        tap: String,
        /// The guest's address.
        mac: MacAddress,
        /// What the guest was offered (virtio 1.2, 5.1.3).
        features: u64,
    },
}

/// What an arriving VM may have of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Folders in which its disks may lie.
    pub disk_folders: Vec<PathBuf>,
    /// Taps that its network cards may use.
    pub taps: Vec<String>,
}

impl Allowed {
    /// Checks that an image lies in one of the folders, wherever links lead.
    fn check_disk(&self, path: &Path) -> Result<()> {
        let wrong = |why: String| Error::Config(format!("disk {}: {why}", path.display()));
        let real = path.canonicalize().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => wrong("it does not exist here".into()),
            _ => wrong(error.to_string()),
        })?;
        let inside = |folder: &PathBuf| folder.canonicalize().is_ok_and(|folder| real.starts_with(folder));
        if self.disk_folders.iter().any(inside) {
            return Ok(());
        }
        Err(wrong(
            "no disk there may be used: allow its folder at the destination with --disks FOLDER".into(),
        ))
    }
}

/// The version of the section that [`encode`] makes.
const VERSION: u16 = 1;

/// A list of devices as the body of a section.
///
/// # Errors
/// [`Error::State`] when it cannot be encoded.
pub(crate) fn encode(devices: &[Description]) -> Result<(u16, Vec<u8>)> {
    Ok((VERSION, crate::state::encode(&devices)?))
}

/// Reads a list of devices from a peer.
///
/// # Errors
/// [`Error::State`] that says what is wrong with it.
pub(crate) fn decode(version: u16, bytes: &[u8]) -> Result<Vec<Description>> {
    let wrong = |why: String| Error::State(format!("the list of devices: {why}"));
    if version != VERSION {
        return Err(wrong(format!("version {version} is not {VERSION}: use a VMM as new as the source's")));
    }
    let devices: Vec<Description> = match postcard::take_from_bytes(bytes) {
        Ok((devices, [])) => devices,
        Ok((_, rest)) => return Err(wrong(format!("{} bytes too many", rest.len()))),
        Err(error) => return Err(wrong(error.to_string())),
    };
    check_count(devices.len())?;
    Ok(devices)
}

/// What a device's name in a saved state begins with; its place follows.
fn kind_name(config: &DeviceConfig) -> &'static str {
    match config {
        DeviceConfig::Disk(_) => "virtio-blk",
        DeviceConfig::Net(_) => "virtio-net",
        DeviceConfig::Rng => "virtio-rng",
    }
}

/// A device that is not in a machine yet.
pub(crate) struct Part {
    pub(super) name: String,
    pub(super) backend: Box<dyn Backend>,
    pub(super) description: Description,
}

/// Makes devices as their operator says, and takes for this VM what only one may have.
///
/// # Errors
/// [`Error::Config`] that names what is wrong.
pub(crate) fn build_all(configs: &[DeviceConfig]) -> Result<Vec<Part>> {
    check_count(configs.len())?;
    let build = |(place, config)| {
        let mut part = build(place, config)?;
        part.backend.acquire()?;
        Ok(part)
    };
    configs.iter().enumerate().map(build).collect()
}

/// Makes devices as a source described them; what only one VM may have is looked at, and not taken yet.
///
/// # Errors
/// [`Error::Config`] that names what is missing here or differs.
pub(crate) fn rebuild_all(devices: &[Description], allowed: &Allowed) -> Result<Vec<Part>> {
    check_count(devices.len())?;
    devices.iter().enumerate().map(|(place, described)| rebuild(place, described, allowed)).collect()
}

fn build(place: usize, config: &DeviceConfig) -> Result<Part> {
    let name = format!("{}{place}", kind_name(config));
    let (backend, description): (Box<dyn Backend>, _) = match config {
        DeviceConfig::Disk(config) => {
            let absolute = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
            let shown = absolute.display();
            let Some(path) = absolute.to_str().filter(|path| path.len() <= MAX_PATH_BYTES) else {
                return Err(Error::Config(format!("disk {shown}: its path is no UTF-8, or is too long")));
            };
            let disk = Disk::open(&DiskConfig { path: absolute.clone(), readonly: config.readonly })?;
            let sectors = disk.sectors();
            let block = Block::new(name.clone(), disk);
            let features = block.features();
            let path = path.to_owned();
            (Box::new(block), Description::Block { path, readonly: config.readonly, sectors, features })
        }
        DeviceConfig::Net(NetConfig { tap, mac }) => {
            tap::check(tap)?;
            let net = Net::new(name.clone(), tap.clone(), *mac);
            let features = net.features();
            (Box::new(net), Description::Net { tap: tap.clone(), mac: *mac, features })
        }
        DeviceConfig::Rng => (Box::new(Rng), Description::Rng { features: Rng.features() }),
    };
    Ok(Part { name, backend, description })
}

fn rebuild(place: usize, described: &Description, allowed: &Allowed) -> Result<Part> {
    let config = match described {
        Description::Block { path, readonly, .. } => {
            let path = PathBuf::from(path);
            if !path.is_absolute() || path.as_os_str().len() > MAX_PATH_BYTES {
                return Err(Error::Config(format!("disk {}: that is no absolute path", path.display())));
            }
            allowed.check_disk(&path)?;
            DeviceConfig::Disk(DiskConfig { path, readonly: *readonly })
        }
        Description::Net { tap, mac, .. } => {
            if !allowed.taps.contains(tap) {
                return Err(Error::Config(format!(
                    "tap {tap:?}: it may not be used: allow it at the destination with --taps NAME"
                )));
            }
            DeviceConfig::Net(NetConfig { tap: tap.clone(), mac: *mac })
        }
        Description::Rng { .. } => DeviceConfig::Rng,
    };
    let part = build(place, &config)?;
    let here = &part.description;
    if let (Description::Block { path, sectors, .. }, Description::Block { sectors: here, .. }) =
        (described, here)
        && sectors != here
    {
        return Err(Error::Config(format!(
            "disk {path}: it has {here} sectors here, its guest thinks {sectors}"
        )));
    }
    if here != described {
        return Err(Error::Config(format!(
            "{}: this VMM offers other features than the source's ({here:?}, not {described:?})",
            part.name
        )));
    }
    Ok(part)
}

fn check_count(devices: usize) -> Result<()> {
    if devices <= Slot::COUNT {
        return Ok(());
    }
    Err(Error::Config(format!("{devices} disks and other devices: a VM has at most {}", Slot::COUNT)))
}
