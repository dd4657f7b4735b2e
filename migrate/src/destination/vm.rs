//! A new VM under the `vmm` crate as a destination.

use super::faulting::FaultingVm;
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::paths::RuntimeDir;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::{Offer, RefuseCode, WorkloadKind, check_name};
use protocol::layout::Layout;
use protocol::monitor::{ErrorCode, Role, Status};
use protocol::page::PageSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::Client;
use vmm::devices::virtio::{Allowed, Description};

/// How long the VMM may take for one answer; making the memory of a large VM takes seconds on a busy host.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// How long a new VMM process may take until it answers on its socket.
const SPAWN_LIMIT: Duration = Duration::from_secs(10);

/// Where and under which name an arriving VM runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// The program that is a VMM when called with `vm incoming`: this one.
    pub program: PathBuf,
    /// Where its socket and log go.
    pub runtime: RuntimeDir,
    /// Its name here, if not the one it had.
    pub name: Option<String>,
    /// Where its serial port goes: `none`, or a file; by default one in the runtime directory.
    pub serial: Option<String>,
    /// What it may have of this host: its disks and taps are those of its description.
    pub allowed: Allowed,
    /// The most that its guest may have been shown of a processor: a model, as `migrate vm run --cpu` takes it.
    pub cpu: String,
    /// Who holds it until it is whole, for others who want it meanwhile.
    pub holder: &'static str,
}

/// A VMM process that waits for a VM. Dropped before `start`, it ends.
pub struct VmDestination {
    place: Place,
    arrival: Option<Arrival>,
}

struct Arrival {
    name: String,
    layout: Layout,
    client: Client,
    memory: Arc<GuestMemory>,
    child: Child,
}

impl VmDestination {
    /// A destination that makes its VMM process when an offer comes.
    pub fn new(place: Place) -> Self {
        Self { place, arrival: None }
    }

    /// Ends a VMM that was not started.
    fn clear(&mut self) {
        if let Some(mut arrival) = self.arrival.take() {
            if let Err(error) = arrival.client.discard() {
                tracing::debug!(%error, "the VMM was asked to discard");
            }
            drop(arrival.client);
            end(&mut arrival.child);
        }
    }

    fn arrival(&mut self) -> Result<&mut Arrival> {
        self.arrival.as_mut().ok_or_else(|| Error::Workload("no VM was prepared here".into()))
    }

    fn arrive(&self, offer: &Offer, machine: &[u8]) -> std::result::Result<Arrival, Refusal> {
        if offer.kind != WorkloadKind::Vm {
            let reason = format!("{} is no VM: the program that it is of restores it itself", offer.name);
            return Err(refuse(RefuseCode::BadOffer, reason));
        }
        let name = self.place.name.clone().unwrap_or_else(|| offer.name.clone());
        check_name(&name).map_err(|error| refuse(RefuseCode::BadOffer, error.to_string()))?;
        let socket = self.place.runtime.socket(&name);
        if Client::connect(&socket, Role::Query, self.place.holder, SPAWN_LIMIT).is_ok() {
            let reason = format!(
                "a VM named {name} runs here already; take this one in under another name with --name"
            );
            return Err(refuse(RefuseCode::NameTaken, reason));
        }
        let mut child = self.spawn(&name)?;
        let prepared = connect(&mut child, &socket, self.place.holder).and_then(|mut client| {
            let description = client.prepare(&name, &offer.layout, machine).map_err(|error| {
                let code = match &error {
                    vmm::Error::Refused { code: ErrorCode::Unsupported, .. } => RefuseCode::Machine,
                    vmm::Error::Refused { code: ErrorCode::BadRequest, .. } => RefuseCode::BadOffer,
                    _ => RefuseCode::Host,
                };
                refuse(code, error.to_string())
            })?;
            let disks = disks_of(&description.machine);
            let memory = GuestMemory::open(&offer.layout, description.memory, &disks)
                .map_err(|error| refuse(RefuseCode::Host, error.to_string()))?;
            Ok((client, memory))
        });
        match prepared {
            Ok((client, memory)) => {
                Ok(Arrival { name, layout: offer.layout.clone(), client, memory: Arc::new(memory), child })
            }
            Err(refusal) => {
                end(&mut child);
                Err(refusal)
            }
        }
    }

    fn spawn(&self, name: &str) -> std::result::Result<Child, Refusal> {
        let host = |what: &str, error: std::io::Error| refuse(RefuseCode::Host, format!("{what}: {error}"));
        let log_path = self.place.runtime.log(name);
        let log = File::create(&log_path).map_err(|error| host("the VM's log cannot be written", error))?;
        let serial = match &self.place.serial {
            Some(serial) => serial.clone(),
            None => self.place.runtime.serial(name).to_string_lossy().into_owned(),
        };
        // A process group of its own: a Ctrl-C for this program must not reach a VM that arrived.
        let Allowed { disk_folders, taps, console } = &self.place.allowed;
        Command::new(&self.place.program)
            .args(["vm", "incoming", "--name", name, "--serial", &serial])
            .args(disk_folders.iter().flat_map(|folder| [OsStr::new("--disks"), folder.as_os_str()]))
            .args(console.iter().flat_map(|console| ["--console".to_owned(), console.to_string()]))
            .args(["--cpu", &self.place.cpu])
            .args(taps.iter().flat_map(|tap| ["--taps", tap]))
            .arg("--runtime-dir")
            .arg(self.place.runtime.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|error| host("the VMM cannot be started", error))
    }
}

/// The images of the disks that are spaces, in their order. What cannot be read has no names, which only errors need.
pub(crate) fn disks_of(machine: &[u8]) -> Vec<String> {
    let devices = vmm::state::Machine::decode(machine).map(|(_, devices)| devices).unwrap_or_default();
    let copied = devices.into_iter().filter_map(|device| match device {
        Description::Copied { path, .. } => Some(path),
        _ => None,
    });
    copied.collect()
}

fn refuse(code: RefuseCode, reason: String) -> Refusal {
    Refusal { code, reason }
}

/// Waits until the new VMM answers on its socket.
fn connect(
    child: &mut Child,
    socket: &std::path::Path,
    holder: &str,
) -> std::result::Result<Client, Refusal> {
    let until = Instant::now() + SPAWN_LIMIT;
    loop {
        match Client::connect(socket, Role::Session, holder, ANSWER_LIMIT) {
            Ok(client) => return Ok(client),
            Err(error) => {
                let ended = child.try_wait().ok().flatten();
                if ended.is_some() || Instant::now() > until {
                    let log = socket.with_extension("log");
                    let said = std::fs::read_to_string(&log).unwrap_or_default();
                    let last = said.lines().last().map_or_else(|| error.to_string(), str::to_owned);
                    return Err(refuse(RefuseCode::Host, format!("the VMM did not come up: {last}")));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends a VMM process that is not needed: it does so by itself when its session closes, and is killed if it does not.
fn end(child: &mut Child) {
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        if let Ok(Some(_)) = child.try_wait() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
        tracing::warn!(pid = child.id(), %error, "a VMM that is not needed could not be ended");
    }
}

impl Destination for VmDestination {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        // One that loaded a state cannot forget it, and what loading wrote to memory is not known: another one takes its place.
        self.clear();
        self.arrival = Some(self.arrive(offer, machine)?);
        Ok(())
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        match &self.arrival {
            Some(arrival) => arrival.memory.clone(),
            None => Arc::new(GuestMemory::none()),
        }
    }

    fn begin_from(&mut self, checkpoint: CheckpointId) -> Result<()> {
        Ok(self.arrival()?.client.set_baseline(Some(checkpoint))?)
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        Ok(self.arrival()?.client.load(state)?)
    }

    fn start(mut self: Box<Self>, migration: MigrationId) -> Result<String> {
        let arrival = self.arrival()?;
        arrival.client.start(migration)?;
        let name = arrival.name.clone();
        // It lives on without this process: nothing is waited for, nothing is ended.
        self.arrival = None;
        Ok(name)
    }

    fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        Ok(self.arrival()?.client.expect(missing)?)
    }

    fn start_incomplete(mut self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>> {
        let Some(Arrival { name, layout, client, mut child, .. }) = self.arrival.take() else {
            return Err(Error::Workload("no VM was prepared here".into()));
        };
        // Everything that can fail comes before the start: behind it the VM is on its own feet.
        let started = FaultingVm::hold(name, layout, client).and_then(|vm| vm.start(migration).map(|()| vm));
        match started {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        let sockets = self.place.runtime.names()?.into_iter().map(|name| self.place.runtime.socket(&name));
        let ours = |vm: &Status| vm.arrived_by == Some(migration) && vm.awaiting_pages.is_some();
        let found = sockets.into_iter().find_map(|socket| {
            let vm = Client::connect(&socket, Role::Query, self.place.holder, SPAWN_LIMIT).ok()?;
            ours(vm.welcome()).then(|| (socket, vm.welcome().clone()))
        });
        let Some((socket, vm)) = found else { return Ok(None) };
        let wrong = |error: vmm::Error| {
            Error::Workload(format!("{} misses pages still, and cannot be taken up: {error}", vm.name))
        };
        let mut client =
            Client::connect(&socket, Role::Session, self.place.holder, ANSWER_LIMIT).map_err(wrong)?;
        let layout = client.describe().map_err(wrong)?.layout;
        Ok(Some(Arc::new(FaultingVm::hold(vm.name.clone(), layout, client)?)))
    }

    fn discard(mut self: Box<Self>) {
        self.clear();
    }
}

impl Drop for VmDestination {
    fn drop(&mut self) {
        if let Some(mut arrival) = self.arrival.take() {
            drop(arrival.client);
            end(&mut arrival.child);
        }
    }
}
