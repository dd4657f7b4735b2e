//! A new container under runc as a destination.
//!
//! Pages are written to where CRIU reads them: what arrives of a process's memory lies in a file that is one of its images already. The images
//! are three directories, each the parent of the one before it, as those of CRIU's own incremental dumps are:
//!
//! ```text
//! dump    what CRIU wrote at the source; the pages that it left in place are in the parent
//! later   pages that came while the container was moving, in the order of their addresses
//! first   pages that there were at the beginning: the files that rounds write to
//! ```

mod bundle;
mod files;

use crate::container::files::{unpack_placement, unpack_tree};
use crate::container::{Images, Runtime, Version, arrivals};
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::paths::RuntimeDir;
use bundle::{Bundle, Part};
use files::{Incoming, WithFiles, lower_layers};
use protocol::MigrationId;
use protocol::container::pagemap::{Entry, LAZY, PARENT, PRESENT, Pagemap};
use protocol::container::{self as format, Description, Placement, Run, SECTION_VERSION, WITH_FILES_VERSION};
use protocol::control::{Offer, RefuseCode, WorkloadKind, check_name};
use protocol::layout::{Layout, SpaceKind};
use protocol::page::{PAGE_SIZE, PageSet, SpaceId};
use protocol::state::{Section, State};
use serde_json::Value;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    memory: Arc<GuestMemory>,
    /// Its root file system, if that comes with it, in this layout.
    root: Option<(Arc<Incoming>, Layout)>,
    bundle: Bundle,
    images: Images,
    tcp_established: bool,
    is_loaded: bool,
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
        let bundle = self.bundle(&name, &root, &body(format::CONFIG)?.body, comes_with)?;
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
        let memory = image_files(&images, &layout)
            .and_then(|files| GuestMemory::open(&layout, files, &[]))
            .map_err(host)?;
        Ok(Arrival {
            name,
            layout,
            memory: Arc::new(memory),
            root,
            bundle,
            images,
            tcp_established: description.tcp_established,
            is_loaded: false,
        })
    }

    /// The configuration as it came, with the root file system of this host.
    fn bundle(
        &self,
        name: &str,
        root: &Path,
        config: &[u8],
        has_root: bool,
    ) -> std::result::Result<Bundle, Refusal> {
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

/// The files of all spaces: those of the beginning are images.
fn image_files(images: &Images, layout: &Layout) -> Result<Vec<OwnedFd>> {
    let first = images.folder("first")?;
    let open = |(index, space): (usize, &protocol::layout::Space)| {
        let path = first.join(format!("pages-{}.img", index + 1));
        let make = || {
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            file.set_len(space.pages * PAGE_SIZE as u64).map(|()| file.into())
        };
        make().map_err(|error| {
            Error::Host(format!("there is no memory for {} pages of the container: {error}", space.pages))
        })
    };
    layout.spaces.iter().enumerate().map(open).collect()
}

impl Arrival {
    /// Writes everything that CRIU needs.
    fn load(&self, state: &[u8]) -> Result<()> {
        let state = State::decode(state)?;
        let section = state.section(format::PLACEMENT).ok_or_else(|| {
            Error::Workload("the container's state does not say where its pages are".into())
        })?;
        let placement = Placement::decode(&self.layout, &section.body)?;
        let dump = self.images.folder("dump")?;
        let later = self.images.folder("later")?;
        let written =
            |error: std::io::Error| Error::Host(format!("the container's images cannot be written: {error}"));
        std::os::unix::fs::symlink("../later", dump.join("parent")).map_err(written)?;
        std::os::unix::fs::symlink("../first", later.join("parent")).map_err(written)?;
        self.write_first(&placement)?;
        let by_page = placement.by_page();
        for section in &state.sections {
            let Some(name) = section.name.strip_prefix(format::IMAGE) else { continue };
            format::check_image_name(name)?;
            let bytes = match format::process_of_pagemap(name) {
                Some(process) => {
                    let pagemap = Pagemap::decode(&section.body)?;
                    self.write_later(process, &pagemap, &by_page)?;
                    with_parent(pagemap).encode()
                }
                None => section.body.clone(),
            };
            std::fs::write(dump.join(name), bytes).map_err(written)?;
        }
        self.finish_files(&state)
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

    /// The last space: what came later.
    fn last_space(&self) -> SpaceId {
        // A layout has at most MAX_SPACES.
        SpaceId(self.layout.spaces.len().saturating_sub(1) as u16)
    }

    /// Says what is in the files that rounds wrote to: all that there was at the beginning, whether it is wanted or not.
    fn write_first(&self, placement: &Placement) -> Result<()> {
        let first = self.images.folder("first")?;
        let last = self.last_space();
        for space in self.layout.spaces.iter().filter(|space| space.id != last) {
            let runs: Vec<Run> = placement.runs.iter().filter(|run| run.space == space.id).copied().collect();
            let wrong = |why: &str| {
                Error::Workload(format!(
                    "the container's state is unusable: the pages of space {} {why}",
                    space.id.0
                ))
            };
            let process = runs.first().ok_or_else(|| wrong("are nobody's"))?.process;
            if runs.iter().any(|run| run.process != process) {
                return Err(wrong("are of several processes"));
            }
            if runs.windows(2).any(|pair| pair[1].page < pair[0].page) {
                return Err(wrong("are not in the order of their addresses"));
            }
            let entries =
                runs.iter().map(|run| Entry { first: run.page, pages: u64::from(run.pages), flags: PRESENT });
            let pagemap = Pagemap { pages_id: u32::from(space.id.0) + 1, entries: entries.collect() };
            let path = first.join(format!("pagemap-{process}.img"));
            File::create_new(&path).and_then(|mut file| file.write_all(&pagemap.encode())).map_err(
                |error| {
                    Error::Host(format!(
                        "the container's image {} cannot be written: {error}",
                        path.display()
                    ))
                },
            )?;
        }
        Ok(())
    }

    /// Says of the pages that CRIU left in place which of them came later, and puts those into the order of their addresses.
    fn write_later(&self, process: u32, pagemap: &Pagemap, by_page: &[Run]) -> Result<()> {
        let later = self.images.folder("later")?;
        let (last, pages_id) = (self.last_space(), pagemap.pages_id);
        let path = later.join(format!("pages-{pages_id}.img"));
        let written = |error: std::io::Error| {
            Error::Host(format!("the container's image {} cannot be written: {error}", path.display()))
        };
        let mut pages = File::create(&path).map_err(written)?;
        let mut entries = Vec::new();
        let mut buffer = Vec::new();
        let begin = by_page.partition_point(|run| run.process < process);
        let mut runs = by_page.iter().skip(begin).take_while(|run| run.process == process).peekable();
        for entry in pagemap.entries.iter().filter(|entry| entry.flags & LAZY != 0) {
            let mut page = entry.first;
            while page < entry.end() {
                while runs.next_if(|run| run.page + u64::from(run.pages) <= page).is_some() {}
                let run = runs.peek().filter(|run| run.page <= page).ok_or_else(|| {
                    Error::Workload(format!(
                        "the container's state is unusable: page {:#x} of process {process} never came",
                        page * PAGE_SIZE as u64
                    ))
                })?;
                let until = entry.end().min(run.page + u64::from(run.pages));
                let count = until - page;
                let is_later = run.space == last;
                if is_later {
                    // Piece by piece: what the peer says must not decide how much is allocated.
                    let mut slot = run.slot + (page - run.page);
                    let end = slot + count;
                    while slot < end {
                        let piece = (end - slot).min(256);
                        buffer.resize(usize::try_from(piece).unwrap_or(0) * PAGE_SIZE, 0);
                        self.memory.read(run.space, slot * PAGE_SIZE as u64, &mut buffer)?;
                        pages.write_all(&buffer).map_err(written)?;
                        slot += piece;
                    }
                }
                entries.push(Entry {
                    first: page,
                    pages: count,
                    flags: if is_later { PRESENT } else { PARENT },
                });
                page = until;
            }
        }
        let image = Pagemap { pages_id, entries }.encode();
        std::fs::write(later.join(format!("pagemap-{process}.img")), image).map_err(written)
    }
}

/// The pages that were left in place are in the parent now.
fn with_parent(mut pagemap: Pagemap) -> Pagemap {
    for entry in pagemap.entries.iter_mut().filter(|entry| entry.flags & LAZY != 0) {
        entry.flags = PARENT;
    }
    pagemap
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
        let arrival = self.arrival()?;
        arrival.load(state)?;
        arrival.is_loaded = true;
        Ok(())
    }

    fn start(mut self: Box<Self>, migration: MigrationId) -> Result<String> {
        let (runtime, runtime_dir) = (self.place.runtime.clone(), self.place.runtime_dir.clone());
        let arrival = self.arrival()?;
        if !arrival.is_loaded {
            return Err(Error::Workload(format!("{} has no state yet", arrival.name)));
        }
        let (dump, work) = (arrival.images.folder("dump")?, arrival.images.folder("work")?);
        arrival.bundle.keep().map_err(|error| {
            Error::Host(format!("the bundle {} cannot be kept: {error}", arrival.bundle.path.display()))
        })?;
        runtime.restore(&arrival.name, &dump, &work, &arrival.bundle.path, arrival.tcp_established)?;
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
