//! A VM: memory, vCPUs and devices under one roof, and what can be done with them together.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, nested::KvmNestedStateBuffer};
use kvm_ioctls::{VcpuFd, VmFd};
use protocol::{
    checkpoint::name::CheckpointId,
    layout::{Layout, MAX_DISK_BYTES, Space, SpaceKind},
    page::SpaceId,
    state::State,
};

use crate::{
    addresses::{KVM_IDENTITY_MAP, KVM_TSS, PAGE_SIZE, SERIAL_IRQ},
    boot::{Images, Start},
    cpuid::{self, CpuModel, Features},
    device::Interrupt,
    devices::{
        Devices, Input, InputThread, SerialSink, Slot,
        virtio::{self, Description, DeviceConfig, Image},
    },
    dirty::{KvmLog, LogMode, Tracker},
    error::{Error, Result},
    host::Host,
    memory::{GuestMemory, MAX_MEMORY_BYTES, SpaceInfo, spaces_for},
    state::{
        self, Catchup, MACHINE_SECTION, Machine, VERSION, VM_SECTION, VcpuContext, VcpuState, VmState,
        device_section, vcpu_section,
    },
    sys,
    vcpu::{Event, Throttle, Vcpu},
};

/// A virtual machine. It starts paused; whoever owns it says when it runs.
///
/// The fields are dropped in their order: input ends first; the throttle lets go of the vCPUs, the vCPU threads are joined before KVM lets go of the VM, and
/// that before the memory is unmapped.
pub(crate) struct Vm {
    _input: Option<InputThread>,
    throttle: Option<Throttle>,
    vcpus: Arc<[Vcpu]>,
    virtio: virtio::Set,
    tracker: Tracker,
    devices: Arc<Devices>,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    machine: Machine,
    clock_realtime: bool,
    /// The guest's TSC runs at another rate than this host's.
    tsc_scaled: bool,
    /// The places of the disks that are spaces for the session that holds the VM.
    copied: Vec<usize>,
}

/// How large a VM is, and which processor its guest is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) cpu: &'a CpuModel,
    /// Its guest may run guests of its own.
    pub(crate) nested: bool,
}

/// Checks that so wide addresses reach all of the memory.
///
/// # Errors
/// [`Error::Config`].
fn check_addresses(memory_bytes: u64, bits: u32) -> Result<()> {
    let end = spaces_for(memory_bytes)?.iter().map(|space| space.base + space.pages * PAGE_SIZE).max();
    if bits == 0 || end.unwrap_or(0) <= 1 << bits.min(63) {
        return Ok(());
    }
    Err(Error::Config(format!(
        "{memory_bytes} bytes of memory: the guest's CPU has {bits} bits of physical addresses, which do not reach it all"
    )))
}

/// What a VM is built of, without what runs in it.
struct Parts {
    input: Option<Input>,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    devices: Arc<Devices>,
    virtio: virtio::Set,
    fds: Vec<VcpuFd>,
    machine: Machine,
    tsc_scaled: bool,
}

impl Vm {
    /// Builds a VM and loads its kernel.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Image`] or [`Error::Host`].
    pub(crate) fn boot(
        host: &Host,
        shape: &Shape<'_>,
        images: &Images<'_>,
        serial: SerialSink,
        devices: &[DeviceConfig],
        events: &Sender<Event>,
    ) -> Result<Self> {
        let Shape { memory_bytes, vcpus, cpu, nested } = *shape;
        state::check_vcpus(vcpus, host)?;
        let leaves = cpuid::describe(host, vcpus, cpu, nested)?;
        check_addresses(memory_bytes, cpuid::physical_bits(&leaves))?;
        let parts = virtio::build_all(devices)?;
        let xsave_words = host.xsave_words.min(cpuid::xsave_words(&leaves));
        let xsave_words = u32::try_from(xsave_words).unwrap_or(u32::MAX);
        let machine = Machine { vcpus, tsc_khz: 0, xsave_words, cpuid: leaves };
        let mut parts = Parts::build(host, memory_bytes, machine, serial, parts)?;
        let tsc_khz = parts.tsc_khz()?;
        parts.machine.tsc_khz = tsc_khz;
        let slots: Vec<Slot> = parts.devices.slots().collect();
        let start = images.load(&parts.memory, vcpus, &slots, tsc_khz)?;
        for (index, fd) in (0_u32..).zip(&parts.fds) {
            parts.start_registers(index, fd, start)?;
        }
        parts.finish(host, events)
    }

    /// Builds the VM that a peer described, its memory zeroed and its vCPUs without a state.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] that names what this host lacks, [`Error::Config`] or [`Error::Host`].
    pub(crate) fn prepare(
        host: &Host,
        memory_bytes: u64,
        machine: Machine,
        serial: SerialSink,
        devices: Vec<virtio::Part>,
        events: &Sender<Event>,
    ) -> Result<Self> {
        machine.check(host, &CpuModel::Host)?;
        let mut parts = Parts::build(host, memory_bytes, machine, serial, devices)?;
        if parts.machine.tsc_must_be_set(parts.tsc_khz()?, host.tsc_scaling)? {
            for fd in &parts.fds {
                fd.set_tsc_khz(parts.machine.tsc_khz).map_err(Error::kvm("scale a vCPU's TSC"))?;
            }
            parts.tsc_scaled = true;
        }
        parts.finish(host, events)
    }

    /// The machine as the guest sees it.
    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// What a destination must know before the first page, see [`Machine::encode`].
    ///
    /// # Errors
    /// [`Error::State`] when it cannot be encoded.
    pub(crate) fn describe(&self) -> Result<Vec<u8>> {
        let mut descriptions = self.virtio.descriptions().to_vec();
        for (place, image) in self.copied_disks() {
            if let Some(Description::Block { path, sectors, features, .. }) = descriptions.get(place).cloned()
            {
                let allocated_bytes = image.allocated_bytes()?;
                descriptions[place] = Description::Copied { path, sectors, allocated_bytes, features };
            }
        }
        self.machine.encode(&descriptions)
    }

    /// The disks that are spaces for the session that holds the VM, by their places.
    fn copied_disks(&self) -> impl Iterator<Item = (usize, &Arc<Image>)> {
        let all = self.virtio.writable().iter().map(|(place, image)| (*place, image));
        all.filter(|(place, _)| self.copied.contains(place))
    }

    fn choose(&mut self, places: Vec<usize>) {
        let disks = self.virtio.writable().iter().enumerate();
        let disks: Vec<usize> =
            disks.filter(|(_, (place, _))| places.contains(place)).map(|(disk, _)| disk).collect();
        self.tracker.choose_disks(&disks);
        self.copied = places;
    }

    /// Makes the disks with these images, which the guest may write, spaces behind those of memory; the ones that were chosen
    /// before are none any more.
    ///
    /// # Errors
    /// [`Error::Config`] that names the image that cannot be one; all is as before then.
    pub(crate) fn copy_disks(&mut self, images: &[String]) -> Result<()> {
        let mut places = Vec::new();
        for image in images {
            let is_it = |device: &Description| device.writable_disk().is_some_and(|path| path == image);
            let wrong = |why: &str| Error::Config(format!("disk {image}: {why}"));
            let place = self.virtio.descriptions().iter().position(is_it);
            let place = place.ok_or_else(|| wrong("the VM has no such disk that its guest may write"))?;
            if places.contains(&place) {
                return Err(wrong("it was named twice"));
            }
            places.push(place);
        }
        let chosen = self.virtio.writable().iter().filter(|(place, _)| places.contains(place));
        let disk_bytes = chosen.fold(0_u64, |sum, (_, image)| sum.saturating_add(image.pages() * PAGE_SIZE));
        let most = MAX_DISK_BYTES.min(MAX_MEMORY_BYTES.saturating_sub(self.memory.total_bytes()));
        if disk_bytes > most {
            return Err(Error::Config(format!(
                "{disk_bytes} bytes of disks cannot go with a VM of this much memory, {most} can: keep them on storage that both \
                 hosts share"
            )));
        }
        self.choose(places);
        Ok(())
    }

    /// The memory and the disks of the session that holds the VM.
    pub(crate) fn layout(&self) -> Layout {
        let disk_pages: Vec<u64> = self.copied_disks().map(|(_, image)| image.pages()).collect();
        layout_of(&self.memory.layout(), &disk_pages)
    }

    /// One descriptor for each space, for another process; writable ones for the disks of a VM that has not started.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) fn share(&self, writable: bool) -> Result<Vec<OwnedFd>> {
        let mut fds = Vec::new();
        for index in 0..self.memory.layout().len() {
            fds.extend(self.memory.share(index)?);
        }
        for (_, image) in self.copied_disks() {
            fds.push(image.share(writable)?);
        }
        Ok(fds)
    }

    /// Makes the images that came with the VM files of this host, because it starts.
    ///
    /// # Errors
    /// What names the one that cannot be, and why; nothing was changed then.
    pub(crate) fn publish(&self) -> Result<()> {
        self.virtio.publish()
    }

    /// Takes the disks and whatever else only one VM may have.
    ///
    /// # Errors
    /// What names it, and why it is not to be had; nothing is taken then.
    pub(crate) fn acquire(&self) -> Result<()> {
        self.virtio.acquire()
    }

    /// Lets go of it, so that another VM may have it, but not of disks that go along: they are nobody else's. The VM stands still.
    ///
    /// # Errors
    /// When what was written could not be made safe; nothing is let go of then.
    pub(crate) fn release(&self) -> Result<()> {
        self.virtio.release(&self.copied).inspect_err(|_| {
            if let Err(error) = self.virtio.acquire() {
                tracing::error!(%error, "taking the devices back");
            }
        })
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The checkpoint that has all of its memory but what was written since.
    pub(crate) fn baseline(&self) -> Option<CheckpointId> {
        self.tracker.baseline()
    }

    /// The dirty tracking.
    pub(crate) fn tracker(&mut self) -> &mut Tracker {
        &mut self.tracker
    }

    /// Makes tracking use at best this mode of the host's log, to test the lesser ones.
    #[cfg(test)]
    pub(crate) fn cap_log_mode(&mut self, best: LogMode) {
        let log = KvmLog::new(self.vm.clone(), self.memory.clone(), best);
        self.tracker = Tracker::new(self.memory.clone(), Vec::new(), Box::new(log));
    }

    /// Lets all vCPUs and devices run.
    pub(crate) fn resume(&self) {
        self.devices.open(true);
        self.virtio.resume();
        for vcpu in self.vcpus.iter() {
            vcpu.resume();
        }
    }

    /// Lets all vCPUs stand still for this share of their time, in percent; 0 lets them run.
    ///
    /// # Errors
    /// [`Error::Host`] when the host gives no thread for it; they run then.
    pub(crate) fn throttle(&mut self, percent: u8) -> Result<()> {
        match &self.throttle {
            Some(throttle) if percent > 0 => throttle.set(percent),
            None if percent > 0 => self.throttle = Some(Throttle::start(self.vcpus.clone(), percent)?),
            _ => self.throttle = None,
        }
        Ok(())
    }

    /// How much of their time the vCPUs are made to stand still, in percent.
    pub(crate) fn throttle_percent(&self) -> u8 {
        self.throttle.as_ref().map_or(0, Throttle::percent)
    }

    /// Stops all vCPUs and devices. When it returns, nothing writes to guest memory any more, and all registers are
    /// the truth. Says how long it took.
    ///
    /// # Errors
    /// [`Error::GuestEnded`] when a vCPU ended meanwhile: there is nothing left to resume then.
    pub(crate) fn pause(&self) -> Result<Duration> {
        let started = Instant::now();
        self.devices.open(false);
        // All are asked before any is waited for.
        let pending: Vec<_> = self.vcpus.iter().map(Vcpu::pause).collect();
        let mut alive = true;
        for answer in pending {
            alive &= answer.wait()?;
        }
        // Behind the vCPUs, which could give the devices work again.
        self.virtio.pause();
        if alive { Ok(started.elapsed()) } else { Err(Error::GuestEnded("it powered off or crashed".into())) }
    }

    /// The state of a paused VM, as the bytes of a [`State`].
    ///
    /// # Errors
    /// [`Error::Host`] or [`Error::State`].
    pub(crate) fn save(&self) -> Result<Vec<u8>> {
        let mut saved = State::default();
        let pending: Vec<_> = self.vcpus.iter().map(Vcpu::save).collect();
        let vm = VmState::save(&self.vm)?;
        saved.push(MACHINE_SECTION, VERSION, state::encode(&self.machine)?);
        saved.push(VM_SECTION, VERSION, state::encode(&vm)?);
        for (index, answer) in (0_u32..).zip(pending) {
            let mut vcpu = answer.wait()??;
            // An offset is one from the host's TSC at the host's rate.
            if let Some(host_tsc) = vm.host_tsc().filter(|_| !self.tsc_scaled) {
                vcpu.set_tsc_of(host_tsc);
            }
            saved.push(vcpu_section(index), VERSION, state::encode(&vcpu)?);
        }
        self.devices.for_each(|device| {
            saved.push(device_section(device.name()), device.state_version(), device.save()?);
            Ok::<(), Error>(())
        })?;
        saved.encode().map_err(|error| Error::State(error.to_string()))
    }

    /// Loads a state into a prepared VM; everything is checked before the first part is changed. Answers whether
    /// that took registers from guest memory, which must have been right by then.
    ///
    /// # Errors
    /// [`Error::State`] when it does not fit, [`Error::Host`] when KVM refuses a part of it: the VM must
    /// then not be started.
    pub(crate) fn load(&self, bytes: &[u8]) -> Result<bool> {
        let saved = State::decode(bytes).map_err(|error| Error::State(error.to_string()))?;
        let machine: Machine = state::decode(&saved, MACHINE_SECTION)?;
        if machine != self.machine {
            return Err(Error::State("it is of another machine than was prepared".into()));
        }
        let vm: VmState = state::decode(&saved, VM_SECTION)?;
        vm.check()?;
        let vcpus = (0..machine.vcpus)
            .map(|index| state::decode(&saved, &vcpu_section(index)).map(Box::new))
            .collect::<Result<Vec<Box<VcpuState>>>>()?;
        let mut expected = 2 + vcpus.len();
        self.devices.for_each(|device| {
            expected += 1;
            let name = device_section(device.name());
            let section =
                saved.section(&name).ok_or_else(|| Error::State(format!("there is no section {name:?}")))?;
            device.restore(section.version, &section.body)
        })?;
        if saved.sections.len() != expected {
            return Err(Error::State(format!(
                "it has {} sections, this VM {expected}: it has devices that are unknown here",
                saved.sections.len()
            )));
        }

        let read_memory = vcpus.iter().any(|vcpu| vcpu.reads_memory());
        let elapsed = vm.elapsed();
        vm.load(&self.vm, elapsed, self.clock_realtime)?;
        let moment = state::moment(&self.vm).filter(|_| !self.tsc_scaled);
        let (saved_at_unix_ns, tsc_khz) = (vm.saved_at_unix_ns, machine.tsc_khz);
        let catchup = Catchup { saved_at_unix_ns, tsc_khz, moment };
        let pending: Vec<_> =
            self.vcpus.iter().zip(vcpus).map(|(vcpu, state)| vcpu.load(state, catchup)).collect();
        pending.into_iter().try_for_each(|answer| answer.wait()?)?;
        Ok(read_memory)
    }
}

/// The layout of memory and of disks of these lengths in pages.
pub(crate) fn layout_of(memory: &[SpaceInfo], disk_pages: &[u64]) -> Layout {
    let memory = memory.iter().map(|space| (SpaceKind::Memory, space.pages, space.base));
    let disks = disk_pages.iter().map(|pages| (SpaceKind::Disk, *pages, 0));
    let spaces = (0_u16..).zip(memory.chain(disks)).map(|(index, (kind, pages, guest_address))| Space {
        id: SpaceId(index),
        kind,
        pages,
        guest_address,
    });
    Layout { spaces: spaces.collect() }
}

impl Parts {
    fn build(
        host: &Host,
        memory_bytes: u64,
        machine: Machine,
        serial: SerialSink,
        virtio: Vec<virtio::Part>,
    ) -> Result<Self> {
        let memory = Arc::new(GuestMemory::create(memory_bytes)?);
        let vm = Arc::new(host.kvm.create_vm().map_err(Error::kvm("create a VM"))?);
        vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(Error::kvm("place the identity-map page"))?;
        vm.set_tss_address(KVM_TSS as usize).map_err(Error::kvm("place the task state segment"))?;
        vm.create_irq_chip().map_err(Error::kvm("create the interrupt controllers"))?;
        // Port 0x61 must exist for guests that calibrate their clock by the PIT's gate there.
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
            .map_err(Error::kvm("create the PIT"))?;
        for (slot, region) in (0_u32..).zip(memory.regions()) {
            sys::set_memory_slot(&vm, slot, region, 0).map_err(Error::host("take the guest's memory"))?;
        }
        let input = serial.input();
        let mut devices = Devices::new(serial, Interrupt::line(vm.clone(), SERIAL_IRQ));
        let virtio = virtio::Set::plug(virtio, &vm, &memory, &mut devices)?;
        let devices = Arc::new(devices);
        let mut fds = Vec::new();
        for index in 0..machine.vcpus {
            let fd = vm.create_vcpu(index.into()).map_err(Error::kvm("create a vCPU"))?;
            fd.set_cpuid2(&cpuid::for_vcpu(&machine.cpuid, index)?)
                .map_err(Error::kvm("take a vCPU's CPUID"))?;
            fds.push(fd);
        }
        Ok(Self { input, vm, memory, devices, virtio, fds, machine, tsc_scaled: false })
    }

    fn tsc_khz(&self) -> Result<u32> {
        let first = self.fds.first().ok_or_else(|| Error::Config("a VM needs a vCPU".into()))?;
        first.get_tsc_khz().map_err(Error::kvm("say how fast the TSC runs"))
    }

    fn start_registers(&self, index: u32, fd: &VcpuFd, start: Start) -> Result<()> {
        if !start.runs_at_once(index) {
            return Ok(());
        }
        let mut sregs = fd.get_sregs().map_err(Error::kvm("read a vCPU's segment registers"))?;
        let regs = start.registers(index, &mut sregs);
        fd.set_sregs(&sregs).map_err(Error::kvm("take a vCPU's segment registers"))?;
        fd.set_regs(&regs).map_err(Error::kvm("take a vCPU's registers"))?;
        let runnable = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
        fd.set_mp_state(runnable).map_err(Error::kvm("take a vCPU's run state"))
    }

    fn finish(self, host: &Host, events: &Sender<Event>) -> Result<Vm> {
        let Self { input, vm, memory, devices, virtio, fds, machine, tsc_scaled } = self;
        let first = fds.first().ok_or_else(|| Error::Config("a VM needs a vCPU".into()))?;
        let features = Features::of(&machine.cpuid);
        let msrs: Vec<u32> =
            host.msrs.iter().copied().filter(|msr| cpuid::shows_msr(&features, *msr)).collect();
        let context = VcpuContext {
            msrs: state::readable_msrs(first, &msrs)?.into(),
            xsave_words: host.xsave_words,
            // A guest that cannot have guests has no such state, and then no destination needs to know of it.
            nested: cpuid::has_nesting(&machine.cpuid)
                && (1..=size_of::<KvmNestedStateBuffer>()).contains(&host.nested_bytes),
        };
        let vcpus = (0_u32..)
            .zip(fds)
            .map(|(index, fd)| Vcpu::spawn(index, fd, devices.clone(), context.clone(), events.clone()))
            .collect::<Result<Vec<_>>>()?
            .into();
        let log = KvmLog::new(vm.clone(), memory.clone(), LogMode::ManualInitiallySet);
        let disks = virtio.writable().iter().map(|(_, image)| Arc::clone(image)).collect();
        let tracker = Tracker::new(memory.clone(), disks, Box::new(log));
        let mut vm = Vm {
            _input: input.map(|input| InputThread::start(input, devices.clone())).transpose()?,
            throttle: None,
            vcpus,
            virtio,
            tracker,
            devices,
            vm,
            memory,
            machine,
            clock_realtime: host.clock_realtime,
            tsc_scaled,
            copied: Vec::new(),
        };
        // What comes along is the whole disk, as for whoever sends it.
        let arriving = vm.virtio.arriving().to_vec();
        vm.choose(arriving);
        Ok(vm)
    }
}
