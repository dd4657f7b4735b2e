//! A new container under runc as a destination.
//!
//! Pages arrive in memory of this process. Once all are there CRIU makes the container, without its memory, and before any of it runs that is filled:
//! so when the sender is told that its container is ready here, nothing is left to be done but to let it run.

use crate::container::{Arena, Images, Parts, Plan, Restoring, Runtime, Version, arrivals};
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::paths::RuntimeDir;
use protocol::MigrationId;
use protocol::container::pagemap::Pagemap;
use protocol::container::{self as format, Description, Placement};
use protocol::control::{Offer, RefuseCode, WorkloadKind, check_name};
use protocol::layout::Layout;
use protocol::page::PageSet;
use protocol::state::State;
use serde_json::Value;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file in a bundle that says that it was made here.
const MARK: &str = ".made-by-migrate";

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
    layout: Layout,
    arena: Arc<Arena>,
    memory: Arc<GuestMemory>,
    /// Once the state is here. It goes first, and with it what uses the other parts.
    restoring: Option<Restoring>,
    bundle: Bundle,
    images: Images,
    tcp_established: bool,
}

/// A bundle that was made here, and is removed when it is dropped before its container runs. Nothing else in its folder is touched.
struct Bundle {
    path: PathBuf,
    is_needed: bool,
}

impl Bundle {
    /// A new one; or in the place of one that was made here before, whose container is gone.
    fn make(path: PathBuf, config: &[u8]) -> std::io::Result<Self> {
        let mark = path.join(MARK);
        if !mark.exists() {
            // Somebody else's is not to be overwritten, and certainly not to be removed.
            DirBuilder::new().mode(0o700).create(&path)?;
            std::fs::write(&mark, "")?;
        }
        let bundle = Self { path, is_needed: false };
        std::fs::write(bundle.path.join("config.json"), config)?;
        Ok(bundle)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if self.is_needed {
            return;
        }
        let removed = ["config.json", MARK]
            .into_iter()
            .try_for_each(|file| std::fs::remove_file(self.path.join(file)))
            .and_then(|()| std::fs::remove_dir(&self.path));
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "the bundle of a container that did not arrive is left");
        }
    }
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
            machine.section(name).filter(|section| section.version == format::SECTION_VERSION).ok_or_else(
                || {
                    refuse(
                        RefuseCode::BadOffer,
                        format!("the container's description has no {name} that this release understands"),
                    )
                },
            )
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
        let root = self.place.root.clone().unwrap_or_else(|| PathBuf::from(&description.root));
        if !root.is_dir() {
            let reason = format!(
                "its root file system is not here: there is no directory {}; mount it there, or say where it is with --rootfs",
                root.display()
            );
            return Err(refuse(RefuseCode::Machine, reason));
        }
        let bundle = self.bundle(&name, &root, &body(format::CONFIG)?.body)?;
        let images = Images::new(self.place.runtime_dir.path()).map_err(host)?;
        let arena = Arena::new(&offer.layout).map_err(host)?;
        let memory =
            arena.files().and_then(|files| GuestMemory::open(&offer.layout, files, &[])).map_err(host)?;
        Ok(Arrival {
            name,
            layout: offer.layout.clone(),
            arena: Arc::new(arena),
            memory: Arc::new(memory),
            restoring: None,
            bundle,
            images,
            tcp_established: description.tcp_established,
        })
    }

    /// The configuration as it came, with the root file system of this host.
    fn bundle(&self, name: &str, root: &Path, config: &[u8]) -> std::result::Result<Bundle, Refusal> {
        let wrong = |why: String| {
            refuse(RefuseCode::BadOffer, format!("the container's configuration is unusable: {why}"))
        };
        let mut config: Value = serde_json::from_slice(config).map_err(|error| wrong(error.to_string()))?;
        let path = config.get_mut("root").and_then(|root| root.get_mut("path"));
        *path.ok_or_else(|| wrong("it names no root".into()))? = root.to_string_lossy().into();
        if let Some(netns) = &self.place.netns {
            let namespaces =
                config.get_mut("linux").and_then(|linux| linux.get_mut("namespaces")?.as_array_mut());
            let network =
                namespaces.and_then(|all| all.iter_mut().find(|namespace| namespace["type"] == "network"));
            let network = network
                .ok_or_else(|| wrong("it has no network of its own, for which --netns names one".into()))?;
            network["path"] = netns.to_string_lossy().into();
        }
        let path = self.place.bundles.join(name);
        let written = serde_json::to_vec_pretty(&config).map_err(std::io::Error::other);
        let made = std::fs::create_dir_all(&self.place.bundles)
            .and(written)
            .and_then(|config| Bundle::make(path.clone(), &config));
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

impl Arrival {
    /// Makes everything but that it runs.
    fn load(&mut self, runtime: &Runtime, state: &[u8]) -> Result<()> {
        let state = State::decode(state)?;
        let section = state.section(format::PLACEMENT).ok_or_else(|| {
            Error::Workload("the container's state does not say where its pages are".into())
        })?;
        let placement = Placement::decode(&self.layout, &section.body)?;
        let (images, work) = (self.images.folder("images")?, self.images.folder("work")?);
        let mut pagemaps = Vec::new();
        for section in &state.sections {
            let Some(name) = section.name.strip_prefix(format::IMAGE) else { continue };
            format::check_image_name(name)?;
            if let Some(process) = format::process_of_pagemap(name) {
                pagemaps.push((process, Pagemap::decode(&section.body)?));
            }
            std::fs::write(images.join(name), &section.body)
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
        self.restoring = Some(Restoring::begin(runtime, &parts, plan, Arc::clone(&self.arena))?);
        Ok(())
    }
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
        restoring.run()?;
        arrival.bundle.is_needed = true;
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

    #[test]
    fn nobody_elses_bundle_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let theirs = path("theirs");
        std::fs::create_dir_all(theirs.join("rootfs")).unwrap();
        std::fs::write(theirs.join("config.json"), "theirs").unwrap();
        assert!(Bundle::make(theirs.clone(), b"ours").is_err());
        assert_eq!(std::fs::read(theirs.join("config.json")).unwrap(), b"theirs");
        assert!(theirs.join("rootfs").is_dir());

        let mut ours = Bundle::make(path("ours"), b"1").unwrap();
        ours.is_needed = true;
        drop(ours);
        // Its container is gone, and comes again; meanwhile somebody put something there.
        std::fs::write(path("ours").join("notes"), "x").unwrap();
        drop(Bundle::make(path("ours"), b"2").unwrap());
        assert_eq!(std::fs::read_dir(path("ours")).unwrap().count(), 1);
        drop(Bundle::make(path("new"), b"3").unwrap());
        assert!(!path("new").exists());
    }
}
