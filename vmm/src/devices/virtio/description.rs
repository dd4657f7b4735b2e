//! Which devices a VM has: as its operator says it, and as a destination is told.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use protocol::layout::MAX_DISK_BYTES;
use serde::{Deserialize, Serialize};

use super::{
    Backend, ConsoleConfig, Image, MacAddress,
    block::Block,
    console::Console,
    disk::{self, Disk},
    net::Net,
    rng::Rng,
    tap,
};
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

impl FromStr for DiskConfig {
    type Err = String;

    /// Reads `PATH[,readonly]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (path, readonly) = match text.strip_suffix(",readonly") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return Err("a disk needs the path of its image: PATH[,readonly]".into());
        }
        Ok(Self { path: path.into(), readonly })
    }
}

impl std::fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.path.display(), if self.readonly { ",readonly" } else { "" })
    }
}

/// A network card as its operator says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// The tap, which exists already.
    pub tap: String,
    /// The guest's address.
    pub mac: MacAddress,
}

impl FromStr for NetConfig {
    type Err = String;

    /// Reads `tap=NAME[,mac=ADDRESS]`; without an address it gets a random one.
    fn from_str(text: &str) -> Result<Self, String> {
        let (mut tap, mut mac) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) if tap.is_none() => tap = Some(name.to_owned()),
                Some(("mac", address)) if mac.is_none() => mac = Some(address.parse()?),
                _ => {
                    return Err(format!(
                        "{part:?} is not understood: a network card is tap=NAME[,mac=ADDRESS]"
                    ));
                }
            }
        }
        let tap = tap.ok_or("a network card needs a tap: tap=NAME[,mac=ADDRESS]")?;
        let mac = mac.map_or_else(|| MacAddress::random().map_err(|error| error.to_string()), Ok)?;
        Ok(Self { tap, mac })
    }
}

impl std::fmt::Display for NetConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tap={},mac={}", self.tap, self.mac)
    }
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
    /// A channel to a program of this host.
    Console(ConsoleConfig),
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
    /// A console. Where its other end is, every host says for itself.
    Console {
        /// What the guest was offered (virtio 1.2, 5.3.3).
        features: u64,
    },
    /// A disk that is written, and whose image goes with the VM: a space of its layout.
    Copied {
        /// The image, an absolute path at the source; its last part is its name at the destination.
        path: String,
        /// Its length in sectors of 512 bytes.
        sectors: u64,
        /// What of it is not a hole, in bytes.
        allocated_bytes: u64,
        /// What the guest was offered (virtio 1.2, 5.2.3).
        features: u64,
    },
}

impl Description {
    /// The image of a disk that its guest writes.
    pub fn writable_disk(&self) -> Option<&str> {
        match self {
            Description::Block { path, readonly: false, .. } => Some(path),
            _ => None,
        }
    }
}

/// What an arriving VM may have of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Folders in which its disks may lie.
    pub disk_folders: Vec<PathBuf>,
    /// Taps that its network cards may use.
    pub taps: Vec<String>,
    /// Where the other end of its consoles is; without one what they say is dropped.
    pub console: Option<ConsoleConfig>,
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
/// The version of a list with [`Description::Copied`] in it.
const WITH_COPIES: u16 = 2;

/// A list of devices as the body of a section.
///
/// # Errors
/// [`Error::State`] when it cannot be encoded.
pub(crate) fn encode(devices: &[Description]) -> Result<(u16, Vec<u8>)> {
    let copies = devices.iter().any(|device| matches!(device, Description::Copied { .. }));
    Ok((if copies { WITH_COPIES } else { VERSION }, crate::state::encode(&devices)?))
}

/// Reads a list of devices from a peer.
///
/// # Errors
/// [`Error::State`] that says what is wrong with it.
pub(crate) fn decode(version: u16, bytes: &[u8]) -> Result<Vec<Description>> {
    let wrong = |why: String| Error::State(format!("the list of devices: {why}"));
    if !(VERSION..=WITH_COPIES).contains(&version) {
        return Err(wrong(format!(
            "version {version} is not known here, {WITH_COPIES} is the latest: use a VMM as new as the source's"
        )));
    }
    let devices: Vec<Description> = match postcard::take_from_bytes(bytes) {
        Ok((devices, [])) => devices,
        Ok((_, rest)) => return Err(wrong(format!("{} bytes too many", rest.len()))),
        Err(error) => return Err(wrong(error.to_string())),
    };
    check_count(devices.len())?;
    let copies = devices.iter().any(|device| matches!(device, Description::Copied { .. }));
    if copies != (version == WITH_COPIES) {
        return Err(wrong(format!("version {version} does not fit what is in it")));
    }
    Ok(devices)
}

const CONSOLE: &str = "virtio-console";
/// What a disk's name in a saved state begins with.
const DISK_NAME: &str = "virtio-blk";

/// What a device's name in a saved state begins with; its place follows.
fn kind_name(config: &DeviceConfig) -> &'static str {
    match config {
        DeviceConfig::Disk(_) => DISK_NAME,
        DeviceConfig::Net(_) => "virtio-net",
        DeviceConfig::Rng => "virtio-rng",
        DeviceConfig::Console(_) => CONSOLE,
    }
}

/// A device that is not in a machine yet.
pub(crate) struct Part {
    pub(super) name: String,
    pub(super) backend: Box<dyn Backend>,
    pub(super) description: Description,
    /// The contents of a disk that is written.
    pub(super) image: Option<Arc<Image>>,
    /// They come with the VM.
    pub(super) is_arriving: bool,
}

/// Makes devices as their operator says, and takes for this VM what only one may have.
///
/// # Errors
/// [`Error::Config`] that names what is wrong.
pub(crate) fn build_all(configs: &[DeviceConfig]) -> Result<Vec<Part>> {
    check_count(configs.len())?;
    let build = |(place, config)| {
        let mut part = build(place, config, false)?;
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
    let needed_bytes = devices.iter().fold(0_u64, |sum, device| match device {
        Description::Copied { allocated_bytes, .. } => sum.saturating_add(*allocated_bytes),
        _ => sum,
    });
    if let (1.., Some(folder)) = (needed_bytes, allowed.disk_folders.first()) {
        disk::check_room(folder, needed_bytes)?;
    }
    let mut parts: Vec<Part> = Vec::new();
    for (place, described) in devices.iter().enumerate() {
        let part = rebuild(place, described, allowed)?;
        if let Description::Block { path, .. } = &part.description
            && part.is_arriving
            && parts.iter().any(
                |other| matches!(&other.description, Description::Block { path: other, .. } if other == path),
            )
        {
            return Err(Error::Config(format!("disk {path}: two disks would have that name here")));
        }
        parts.push(part);
    }
    Ok(parts)
}

/// `shared`: a VM elsewhere has it still.
fn build(place: usize, config: &DeviceConfig, shared: bool) -> Result<Part> {
    let name = format!("{}{place}", kind_name(config));
    let mut image = None;
    let (backend, description): (Box<dyn Backend>, _) = match config {
        DeviceConfig::Disk(config) => {
            let absolute = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
            let shown = absolute.display();
            let Some(path) = absolute.to_str().filter(|path| path.len() <= MAX_PATH_BYTES) else {
                return Err(Error::Config(format!("disk {shown}: its path is no UTF-8, or is too long")));
            };
            let disk = Disk::open(&DiskConfig { path: absolute.clone(), readonly: config.readonly })?;
            if shared && !config.readonly {
                disk.check_shared()?;
            }
            let sectors = disk.sectors();
            image = (!config.readonly).then(|| Arc::clone(disk.image()));
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
        DeviceConfig::Console(config) => return Ok(console(place, Some(config.clone()))),
    };
    Ok(Part { name, backend, description, image, is_arriving: false })
}

/// A disk whose image comes with the VM: a new file in the first of the allowed folders.
fn arriving(place: usize, path: &str, sectors: u64, allowed: &Allowed) -> Result<Part> {
    let wrong = |why: String| Error::Config(format!("disk {path}: {why}"));
    let Some(folder) = allowed.disk_folders.first() else {
        return Err(wrong(
            "its image cannot come along: say at the destination where it may lie, with --disks FOLDER"
                .into(),
        ));
    };
    let folder = folder.canonicalize().map_err(|error| {
        wrong(format!("the folder for it, {}, cannot be used: {error}", folder.display()))
    })?;
    let name = Path::new(path).file_name().and_then(|name| name.to_str());
    let Some(name) = name.filter(|name| !name.chars().any(char::is_control)) else {
        return Err(wrong("that is no name for a file".into()));
    };
    if !(1..=MAX_DISK_BYTES / disk::SECTOR).contains(&sectors) {
        return Err(wrong(format!("{sectors} sectors cannot come along")));
    }
    let disk = Disk::arriving(&folder, name, sectors)?;
    let path =
        disk.path().to_str().map(str::to_owned).ok_or_else(|| wrong("its folder is no UTF-8".into()))?;
    let image = Some(Arc::clone(disk.image()));
    let name = format!("{DISK_NAME}{place}");
    let block = Block::new(name.clone(), disk);
    let description = Description::Block { path, readonly: false, sectors, features: block.features() };
    Ok(Part { name, backend: Box::new(block), description, image, is_arriving: true })
}

fn console(place: usize, config: Option<ConsoleConfig>) -> Part {
    let name = format!("{CONSOLE}{place}");
    let backend = Console::new(name.clone(), config);
    let description = Description::Console { features: backend.features() };
    Part { name, backend: Box::new(backend), description, image: None, is_arriving: false }
}

fn rebuild(place: usize, described: &Description, allowed: &Allowed) -> Result<Part> {
    let config = match described {
        Description::Console { features } => {
            let part = console(place, allowed.console.clone());
            return if *features == part.backend.features() {
                Ok(part)
            } else {
                Err(Error::Config(format!(
                    "{}: this VMM offers other features than {features:#x}",
                    part.name
                )))
            };
        }
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
        Description::Copied { path, sectors, features, .. } => {
            let part = arriving(place, path, *sectors, allowed)?;
            return match &part.description {
                Description::Block { features: here, .. } if here == features => Ok(part),
                other => Err(other_features(&part.name, other, described)),
            };
        }
    };
    let part = build(place, &config, true)?;
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
        return Err(other_features(&part.name, here, described));
    }
    Ok(part)
}

fn other_features(name: &str, here: &Description, described: &Description) -> Error {
    Error::Config(format!(
        "{name}: this VMM offers other features than the source's ({here:?}, not {described:?})"
    ))
}

fn check_count(devices: usize) -> Result<()> {
    if devices <= Slot::COUNT {
        return Ok(());
    }
    Err(Error::Config(format!("{devices} disks and other devices: a VM has at most {}", Slot::COUNT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(path: &Path, sectors: u64) -> Description {
        let features = Block::new(String::new(), Disk::open(&disk(path)).unwrap()).features();
        Description::Block { path: path.to_str().unwrap().into(), readonly: false, sectors, features }
    }

    fn disk(path: &Path) -> DiskConfig {
        DiskConfig { path: path.to_owned(), readonly: false }
    }

    fn refusal(described: &Description, allowed: &Allowed) -> String {
        rebuild_all(std::slice::from_ref(described), allowed).err().unwrap().to_string()
    }

    #[test]
    fn options_are_read() {
        assert_eq!("/a,b".parse(), Ok(disk("/a,b".as_ref())));
        let readonly: DiskConfig = "a,readonly".parse().unwrap();
        assert_eq!((readonly.readonly, readonly.to_string()), (true, "a,readonly".into()));
        assert!(",readonly".parse::<DiskConfig>().is_err());
        let net: NetConfig = "tap=t0,mac=02:00:00:00:00:0a".parse().unwrap();
        assert_eq!(net.to_string(), "tap=t0,mac=02:00:00:00:00:0a");
        for bad in ["", "t0", "mac=02:00:00:00:00:01", "tap=a,tap=b", "tap=a,speed=1", "tap=a,mac=1"] {
            assert!(bad.parse::<NetConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_image_that_comes_along_is_a_new_file_with_a_name_once_its_vm_starts() {
        let folder = tempfile::tempdir().unwrap();
        let allowed = Allowed { disk_folders: vec![folder.path().to_owned()], ..Allowed::default() };
        let any = tempfile::NamedTempFile::new().unwrap();
        any.as_file().set_len(4096).unwrap();
        let Description::Block { features, .. } = described(any.path(), 8) else { unreachable!() };
        let copied = |path: &str, sectors, allocated_bytes| Description::Copied {
            path: path.into(),
            sectors,
            allocated_bytes,
            features,
        };
        let files = || std::fs::read_dir(folder.path()).unwrap().count();
        let rebuild = |devices: &[Description]| rebuild_all(devices, &allowed);
        let refusal = |devices: &[Description]| rebuild(devices).err().unwrap().to_string();
        let mut parts = rebuild(&[copied("/srv/a.img", 9, 4096)]).unwrap();
        assert_eq!((files(), parts[0].image.as_ref().unwrap().pages()), (0, 2));
        parts[0].backend.acquire().unwrap();
        assert!(parts[0].backend.publish().unwrap());
        let path = folder.path().canonicalize().unwrap().join("a.img");
        assert_eq!(path.metadata().unwrap().len(), 9 * 512);
        let Description::Block { path: named, .. } = &parts[0].description else { unreachable!() };
        assert_eq!(named, path.to_str().unwrap());
        assert!(refusal(&[copied("/other/a.img", 8, 0)]).contains("there already"));
        parts[0].backend.retract();
        assert_eq!(files(), 0);
        // One whose name was taken meanwhile gets none.
        std::fs::write(&path, "mine").unwrap();
        assert!(parts[0].backend.publish().unwrap_err().to_string().contains("there already"));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        for (bad, why) in [
            (vec![copied("/srv/b", 8, u64::MAX)], "no space"),
            (vec![copied("/srv/b", 0, 0)], "0 sectors"),
            (vec![copied("/srv/b", u64::MAX, 0)], "sectors"),
            (vec![copied("/srv/b", 8, 0), copied("/var/b", 8, 0)], "two disks"),
            (vec![copied("/srv/..", 8, 0)], "no name"),
            (vec![copied("", 8, 0)], "no name"),
        ] {
            assert!(refusal(&bad).contains(why), "{bad:?}: {}", refusal(&bad));
        }
        let nowhere = rebuild_all(&[copied("/srv/b", 8, 0)], &Allowed::default()).err().unwrap().to_string();
        assert!(nowhere.contains("--disks"), "{nowhere}");
        assert_eq!(files(), 1);
    }

    #[test]
    fn a_peer_gets_the_disks_of_the_allowed_folders_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, image) = (folder.path().join("inside"), folder.path().join("inside/image"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(&image, [0; 4096]).unwrap();
        let allowed =
            Allowed { disk_folders: vec![inside.clone()], taps: vec!["t0".into()], ..Allowed::default() };
        // One that nobody has locked is not the one that its VM writes.
        assert!(refusal(&described(&image, 8), &allowed).contains("not the file"));
        let mut source = Disk::open(&disk(&image)).unwrap();
        source.acquire().unwrap();
        assert_eq!(rebuild_all(&[described(&image, 8)], &allowed).unwrap().len(), 1);
        assert!(refusal(&described(&image, 8), &Allowed::default()).contains("--disks"));
        // A link out of the folder, and a path through it.
        std::fs::write(folder.path().join("secret"), [0; 4096]).unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
        assert!(refusal(&described(&inside.join("link"), 8), &allowed).contains("--disks"));
        assert!(refusal(&described(&inside.join("../secret"), 8), &allowed).contains("--disks"));
        let missing =
            Description::Block { path: "/nowhere/a".into(), readonly: false, sectors: 8, features: 0 };
        assert!(refusal(&missing, &allowed).contains("/nowhere/a: it does not exist"));
        let relative = Description::Block { path: "a".into(), readonly: false, sectors: 8, features: 0 };
        assert!(refusal(&relative, &allowed).contains("absolute"));
        assert!(refusal(&described(&image, 9), &allowed).contains("8 sectors here, its guest thinks 9"));
        let Description::Block { path, .. } = described(&image, 8) else { unreachable!() };
        let other = Description::Block { path, readonly: false, sectors: 8, features: 0 };
        assert!(refusal(&other, &allowed).contains("other features"));
        let net = |tap: &str| Description::Net { tap: tap.into(), mac: MacAddress([2; 6]), features: 0 };
        assert!(refusal(&net("t1"), &allowed).contains("--taps"));
        assert!(refusal(&net("t0"), &allowed).contains("does not exist"));
        let many = vec![Description::Rng { features: 0 }; Slot::COUNT + 1];
        assert!(rebuild_all(&many, &allowed).is_err());
        assert_eq!(rebuild_all(&many[1..], &allowed).unwrap().len(), Slot::COUNT);
        // Nobody here may be at the other end, and the guest has its console all the same.
        let console = |features| Description::Console { features };
        assert_eq!(rebuild_all(&[console(0)], &allowed).unwrap()[0].name, "virtio-console0");
        assert!(refusal(&console(1), &allowed).contains("other features"));
    }

    /// The bytes of version 1: they must not change, or VMs of today and tomorrow do not understand each other.
    #[test]
    fn the_list_has_its_bytes_and_a_damaged_one_is_refused() {
        let list = [
            Description::Block { path: "/d".into(), readonly: true, sectors: 300, features: 0x224 },
            Description::Rng { features: 0 },
            Description::Net { tap: "t0".into(), mac: MacAddress([2, 0, 0, 0, 0, 1]), features: 0x8023 },
            Description::Console { features: 0 },
        ];
        let (version, bytes) = encode(&list).unwrap();
        let golden = [
            4, 0, 2, b'/', b'd', 1, 172, 2, 164, 4, 1, 0, 2, 2, b't', b'0', 2, 0, 0, 0, 0, 1, 0xa3, 0x80, 2,
            3, 0,
        ];
        assert_eq!((version, bytes.as_slice()), (1, golden.as_slice()));
        assert_eq!(decode(1, &bytes).unwrap(), list);
        assert!(decode(2, &bytes).is_err());
        let copied =
            [Description::Copied { path: "/d".into(), sectors: 300, allocated_bytes: 4096, features: 0x224 }];
        let (version, bytes) = encode(&copied).unwrap();
        assert_eq!((version, bytes.as_slice()), (2, &[1, 4, 2, b'/', b'd', 172, 2, 128, 32, 164, 4][..]));
        assert_eq!(decode(2, &bytes).unwrap(), copied);
        assert!(decode(1, &bytes).is_err());
        for at in 0..bytes.len() {
            assert!(decode(1, &bytes[..at]).is_err());
            let mut bad = bytes.clone();
            bad[at] ^= 0xff;
            let _ = decode(1, &bad);
        }
    }
}
