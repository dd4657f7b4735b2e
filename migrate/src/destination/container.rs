//! A new container under runc as a destination.
//!
//! Pages arrive in memory of this process. Once all are there CRIU makes the container, without its memory, and before any of it runs that is filled:
//! so when the sender is told that its container is ready here, nothing is left to be done but to let it run.

mod bundle;
mod files;

use crate::container::files::{unpack_placement, unpack_tree};
use crate::container::{Arena, Images, Parts, Plan, Restoring, Runtime, Version, arrivals};
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::paths::RuntimeDir;
use bundle::{Bundle, Part};
use files::{Incoming, WithFiles, lower_layers};
use protocol::MigrationId;
use protocol::container::pagemap::Pagemap;
use protocol::container::{
    self as format, Description, Placement, SECTION_VERSION, WITH_FILES_VERSION, timers,
};
use protocol::control::{Offer, RefuseCode, WorkloadKind, check_name};
use protocol::layout::{Layout, SpaceKind};
use protocol::page::{PageSet, SpaceId};
use protocol::state::{Section, State};
use serde_json::Value;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The image of open files.
const FILES_IMAGE: &str = "files.img";

/// Where and under which name an arriving container runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// What it runs under.
    pub runtime: Runtime,
    /// Where images are, if that is in memory.
    pub runtime_dir: RuntimeDir,
    /// Where the bundles of containers that arrive are made.
    pub bundles: PathBuf,
    /// Its name here, if not the one it had.
    pub name: Option<String>,
    /// Its root file system here, if that is not at the same path as there.
    pub root: Option<PathBuf>,
    /// The layers below its upper layer here, if that arrives and they are not at the same paths as there.
    pub lower: Vec<PathBuf>,
    /// Its network namespace here, if that is not at the same path as there.
    pub netns: Option<PathBuf>,
}

/// A container that is on its way. Dropped before `start`, nothing is left of it.
pub struct ContainerDestination {
    place: Place,
    arrival: Option<Arrival>,
}

struct Arrival {
    name: String,
    /// Of its memory.
    layout: Layout,
    arena: Arc<Arena>,
    memory: Arc<GuestMemory>,
    /// Once the state is here. It goes first, and with it what uses the other parts.
    restoring: Option<Restoring>,
    /// Its root file system, if that comes with it, in this layout.
    root: Option<(Arc<Incoming>, Layout)>,
    bundle: Bundle,
    images: Images,
    tcp_established: bool,
    /// Who is root in it, if it has a user namespace of its own.
    owner: Option<(u32, u32)>,
}

impl ContainerDestination {
    /// A destination that makes room when an offer comes.
    pub fn new(place: Place) -> Self {
        Self { place, arrival: None }
    }

    fn arrive(&self, offer: &Offer, machine: &[u8]) -> std::result::Result<Arrival, Refusal> {
        let bad = |error: protocol::ProtocolError| refuse(RefuseCode::BadOffer, error.to_string());
        let host = |error: Error| refuse(RefuseCode::Host, error.to_string());
        if offer.kind != WorkloadKind::Container {
            return Err(refuse(RefuseCode::BadOffer, format!("{} is no container", offer.name)));
        }
        let name = self.place.name.clone().unwrap_or_else(|| offer.name.clone());
        check_name(&name).map_err(bad)?;
        let machine = State::decode(machine).map_err(bad)?;
        let body = |name: &'static str| {
            let newest = if name == format::DESCRIPTION { WITH_FILES_VERSION } else { SECTION_VERSION };
            let known = |section: &&Section| (SECTION_VERSION..=newest).contains(&section.version);
            machine.section(name).filter(known).ok_or_else(|| {
                refuse(
                    RefuseCode::BadOffer,
                    format!("the container's description has no {name} that this release understands"),
                )
            })
        };
        let description = Description::decode(&body(format::DESCRIPTION)?.body).map_err(bad)?;
        let [major, minor, patch] = description.criu;
        let (theirs, ours) = (Version { major, minor, patch }, self.place.runtime.criu().version);
        if ours < theirs {
            let reason = format!(
                "CRIU is version {ours} here and {theirs} there, and may not understand what that writes: take a newer one here"
            );
            return Err(refuse(RefuseCode::Machine, reason));
        }
        if self.place.runtime.knows(&name) {
            let reason = format!(
                "a container named {name} is here already; take this one in under another name with --name"
            );
            return Err(refuse(RefuseCode::NameTaken, reason));
        }
        let (layout, comes_with) = memory_of(&offer.layout, &description).map_err(bad)?;
        let config: Value = serde_json::from_slice(&body(format::CONFIG)?.body)
            .map_err(|error| unusable(&error.to_string()))?;
        let owner = root_in_user_namespace(&config);
        self.place
            .runtime
            .can_fill(owner.is_some())
            .map_err(|error| refuse(RefuseCode::Machine, error.to_string()))?;
        bundle::remove_stale(&self.place.bundles);
        let lower = match &description.files {
            Some(_) if self.place.root.is_some() => {
                let reason = "its root file system comes with it: take it without --rootfs";
                return Err(refuse(RefuseCode::Machine, reason.into()));
            }
            Some(files) => lower_layers(files, &self.place.lower)
                .map_err(|error| refuse(RefuseCode::Machine, error.to_string()))?,
            None => Vec::new(),
        };
        let root = match (&description.files, &self.place.root) {
            (Some(_), _) => bundle::root_in(&self.place.bundles.join(&name)),
            (None, Some(root)) => root.clone(),
            (None, None) => PathBuf::from(&description.root),
        };
        if !comes_with && !root.is_dir() {
            let reason = format!(
                "its root file system is not here: there is no directory {}; mount it there, say where it is with --rootfs, or let it come with \
                 --copy-rootfs at the sender",
                root.display()
            );
            return Err(refuse(RefuseCode::Machine, reason));
        }
        let bundle = self.bundle(&name, &root, config, comes_with)?;
        let root = match &description.files {
            Some(files) => {
                let tree = unpack_tree(&body(format::FILES)?.body).map_err(host)?;
                let space = SpaceId(files.space);
                let placement = unpack_placement(&offer.layout, space, &body(format::FILES_PLACEMENT)?.body)
                    .map_err(host)?;
                let pages = offer.layout.space(space).map_or(0, |space| space.pages);
                let incoming =
                    Incoming::make(&bundle, files, lower, tree, &placement, pages).map_err(host)?;
                Some((Arc::new(incoming), offer.layout.clone()))
            }
            None => None,
        };
        let images = Images::new(self.place.runtime_dir.path()).map_err(host)?;
        let arena = Arena::new(&layout).map_err(host)?;
        let memory = arena.files().and_then(|files| GuestMemory::open(&layout, files, &[])).map_err(host)?;
        Ok(Arrival {
            name,
            layout,
            arena: Arc::new(arena),
            memory: Arc::new(memory),
            restoring: None,
            root,
            bundle,
            images,
            tcp_established: description.tcp_established,
            owner,
        })
    }

    /// The configuration as it came, with the root file system of this host.
    fn bundle(
        &self,
        name: &str,
        root: &Path,
        mut config: Value,
        has_root: bool,
    ) -> std::result::Result<Bundle, Refusal> {
        let path = config.get_mut("root").and_then(|root| root.get_mut("path"));
        *path.ok_or_else(|| unusable("it names no root"))? = root.to_string_lossy().into();
        if let Some(netns) = &self.place.netns {
            let namespaces =
                config.get_mut("linux").and_then(|linux| linux.get_mut("namespaces")?.as_array_mut());
            let network =
                namespaces.and_then(|all| all.iter_mut().find(|namespace| namespace["type"] == "network"));
            let network = network
                .ok_or_else(|| unusable("it has no network of its own, for which --netns names one"))?;
            network["path"] = netns.to_string_lossy().into();
        }
        let path = self.place.bundles.join(name);
        let written = serde_json::to_vec_pretty(&config).map_err(std::io::Error::other);
        let made = std::fs::create_dir_all(&self.place.bundles)
            .and(written)
            .and_then(|config| Bundle::make(path.clone(), &config, has_root));
        made.map_err(|error| {
            refuse(
                RefuseCode::Host,
                format!(
                    "its bundle {} cannot be made: {error}; take it in under another name with --name, or name another folder with \
                     --containers",
                    path.display()
                ),
            )
        })
    }

    fn arrival(&mut self) -> Result<&mut Arrival> {
        self.arrival.as_mut().ok_or_else(|| Error::Workload("no container was prepared here".into()))
    }
}

/// The layout of a container's memory alone, and whether its files come with it.
fn memory_of(
    layout: &Layout,
    description: &Description,
) -> std::result::Result<(Layout, bool), protocol::ProtocolError> {
    let of_files = description.files.as_ref().map(|files| usize::from(files.space));
    let memory: Vec<_> = layout.of_kind(SpaceKind::Memory).cloned().collect();
    let others = layout.spaces.len() - memory.len();
    // Behind all memory: spaces keep their numbers.
    let is_last = layout.spaces.last().is_some_and(|space| space.kind == SpaceKind::Disk);
    let fits = match of_files {
        Some(space) => others == 1 && is_last && space == memory.len(),
        None => others == 0,
    };
    match fits {
        true => Ok((Layout { spaces: memory }, of_files.is_some())),
        false => Err(protocol::ProtocolError::Layout {
            why: "its last space, and no other, has the container's files if they come with it".into(),
        }),
    }
}

impl Arrival {
    /// Makes everything but that it runs.
    fn load(&mut self, runtime: &Runtime, state: &[u8]) -> Result<()> {
        let state = State::decode(state)?;
        let section = state.section(format::PLACEMENT).ok_or_else(|| {
            Error::Workload("the container's state does not say where its pages are".into())
        })?;
        let placement = Placement::decode(&self.layout, &section.body)?;
        let (images, work) = (self.images.folder("images")?, self.images.folder("work")?);
        if let Some((user, group)) = self.owner {
            // CRIU reads some of them when it is that user already. Only who has the folder open can reach them.
            std::os::unix::fs::chown(&images, Some(user), Some(group)).map_err(|error| {
                Error::Host(format!("the container's images cannot be given to its own root: {error}"))
            })?;
        }
        let mut pagemaps = Vec::new();
        for section in &state.sections {
            let Some(name) = section.name.strip_prefix(format::IMAGE) else { continue };
            format::check_image_name(name)?;
            if let Some(process) = format::process_of_pagemap(name) {
                pagemaps.push((process, Pagemap::decode(&section.body)?));
            }
            let mut bytes = Cow::Borrowed(&section.body);
            if name == FILES_IMAGE && timers::start_again(bytes.to_mut()) > 0 {
                tracing::debug!("timers that expired while the container stood still start again");
            }
            std::fs::write(images.join(name), bytes.as_slice())
                .map_err(|error| Error::Host(format!("the container's images cannot be written: {error}")))?;
        }
        let parts = Parts {
            id: &self.name,
            images: &images,
            work: &work,
            bundle: &self.bundle.path,
            tcp_established: self.tcp_established,
        };
        let plan = Plan::new(&placement, &pagemaps)?;
        // CRIU opens what processes had open.
        self.finish_files(&state)?;
        self.restoring = Some(Restoring::begin(runtime, &parts, plan, Arc::clone(&self.arena))?);
        Ok(())
    }

    /// Makes the root file system as it was in the end, if it came.
    fn finish_files(&self, state: &State) -> Result<()> {
        let Some((root, layout)) = &self.root else { return Ok(()) };
        let missing = || Error::Workload("the container's state does not say which files it has".into());
        let body = |name| state.section(name).map(|section| section.body.as_slice()).ok_or_else(missing);
        let tree = unpack_tree(body(format::FILES)?)?;
        root.finish(&tree, &unpack_placement(layout, root.space(), body(format::FILES_PLACEMENT)?)?)?;
        for part in [Part::Moved, Part::Later] {
            self.bundle.forget(part).map_err(|error| {
                Error::Host(format!("{} cannot be tidied up: {error}", self.bundle.path.display()))
            })?;
        }
        Ok(())
    }
}

fn unusable(why: &str) -> Refusal {
    refuse(RefuseCode::BadOffer, format!("the container's configuration is unusable: {why}"))
}

/// The user and the group on this host that are root in a container with a user namespace of its own (user_namespaces(7)).
fn root_in_user_namespace(config: &Value) -> Option<(u32, u32)> {
    let linux = config.get("linux")?;
    let namespaces = linux.get("namespaces")?.as_array()?;
    namespaces.iter().find(|namespace| namespace["type"] == "user")?;
    let number = |mappings: &str| {
        let mappings = linux.get(mappings)?.as_array()?;
        let root = mappings.iter().find(|mapping| mapping["containerID"] == 0)?;
        u32::try_from(root["hostID"].as_u64()?).ok()
    };
    Some((number("uidMappings")?, number("gidMappings")?))
}

fn refuse(code: RefuseCode, reason: String) -> Refusal {
    Refusal { code, reason }
}

impl Destination for ContainerDestination {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        self.arrival = None;
        self.arrival = Some(self.arrive(offer, machine)?);
        Ok(())
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        match &self.arrival {
            Some(Arrival { memory, root: Some((root, _)), .. }) => {
                Arc::new(WithFiles { memory: memory.clone(), root: root.clone() })
            }
            Some(arrival) => arrival.memory.clone(),
            None => Arc::new(GuestMemory::none()),
        }
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        let runtime = self.place.runtime.clone();
        self.arrival()?.load(&runtime, state)
    }

    fn start(mut self: Box<Self>, migration: MigrationId) -> Result<String> {
        let runtime_dir = self.place.runtime_dir.clone();
        let arrival = self.arrival()?;
        let restoring = arrival
            .restoring
            .take()
            .ok_or_else(|| Error::Workload(format!("{} has no state yet", arrival.name)))?;
        arrival.bundle.keep().map_err(|error| {
            Error::Host(format!("the bundle {} cannot be kept: {error}", arrival.bundle.path.display()))
        })?;
        restoring.run()?;
        arrival.bundle.runs();
        if let Err(error) = arrivals::note(&runtime_dir, &arrival.name, migration) {
            // It runs, and this process says so.
            tracing::warn!("{error}");
        }
        Ok(arrival.name.clone())
    }

    fn expect(&mut self, _: &[PageSet]) -> Result<()> {
        Err(Error::Host(
            "a container is not started before all of its memory is there: move it without post-copy".into(),
        ))
    }

    fn start_incomplete(self: Box<Self>, _: MigrationId) -> Result<Arc<dyn Incomplete>> {
        Err(Error::Host(
            "a container is not started before all of its memory is there: move it without post-copy".into(),
        ))
    }

    fn take_up(&self, _: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        Ok(None)
    }

    fn discard(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_containers_root_may_be_somebody_else_here() {
        let mapping =
            |inside: u64, outside: u64| json!({"containerID": inside, "hostID": outside, "size": 9});
        let with = |namespaces: Value| {
            json!({"linux": {
                "namespaces": namespaces,
                "uidMappings": [mapping(9, 5), mapping(0, 100_000)],
                "gidMappings": [mapping(0, 200_000)],
            }})
        };
        let user = with(json!([{"type": "mount"}, {"type": "user"}]));
        assert_eq!(root_in_user_namespace(&user), Some((100_000, 200_000)));
        assert_eq!(root_in_user_namespace(&with(json!([{"type": "mount"}]))), None);
        assert_eq!(root_in_user_namespace(&json!({"linux": 7})), None);
    }
}
