//! The registers of a modern virtio-mmio device (virtio 1.2, 4.2.2 to 4.2.3).

use std::sync::{Arc, atomic::Ordering};

use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{
    Backend, Broken, Handle, Ring,
    state::{Registers, Saved, SavedQueue},
    worker::Core,
};
use crate::{
    device::{Device, Effect, Interrupt},
    error::{Error, Result},
    memory::GuestMemory,
    state,
};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Not assigned by anybody: "MGR1".
const VENDOR: u32 = 0x3152_474d;
/// Where a driver writes the number of a queue in which there is something new.
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
/// Where the device's own configuration begins.
pub(super) const CONFIG: u64 = 0x100;

/// What the transport and the rings offer for every device.
pub(super) const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
/// Bits of the status that a driver may set.
const DRIVER_BITS: u32 =
    VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | FEATURES_OK | DRIVER_OK | VIRTIO_CONFIG_S_FAILED;

/// Version of the state that is saved.
const STATE_VERSION: u16 = 1;

/// A device as its driver sees it.
pub(crate) struct Transport {
    core: Arc<Core>,
    kind: u32,
    offered: u64,
    sizes: &'static [u16],
    registers: Registers,
}

impl Transport {
    /// A device as after power-on, with a worker that stands still.
    ///
    /// # Errors
    /// [`Error::Host`] when the host has no thread or event for it.
    pub(crate) fn new(
        name: String,
        memory: Arc<GuestMemory>,
        line: Interrupt,
        backend: Box<dyn Backend>,
    ) -> Result<(Self, Handle)> {
        let (kind, sizes) = (backend.kind(), backend.queue_sizes());
        let offered = backend.features() | RING_FEATURES;
        let core = Core::new(name, memory, line, backend)?;
        let handle = Handle::start(Arc::clone(&core))?;
        let mut transport = Self { core, kind, offered, sizes, registers: Registers::default() };
        transport.registers = transport.fresh();
        Ok((transport, handle))
    }

    /// How many queues a driver can notify.
    pub(crate) fn queues(&self) -> usize {
        self.sizes.len()
    }

    fn fresh(&self) -> Registers {
        let queues = self.sizes.iter().map(|size| SavedQueue { size: *size, ..SavedQueue::default() });
        Registers { queues: queues.collect(), ..Registers::default() }
    }

    fn status(&self) -> u32 {
        let broken = self.core.broken.load(Ordering::SeqCst);
        self.registers.status | if broken { NEEDS_RESET } else { 0 }
    }

    fn queue(&self) -> Option<&SavedQueue> {
        self.registers.queues.get(self.registers.queue_select as usize)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let half = |word: u64, select: u32| match select {
            0 => low(word),
            1 => low(word >> 32),
            _ => 0,
        };
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.kind,
            0x00c => VENDOR,
            0x010 => half(self.offered, self.registers.device_features_select),
            0x034 => self.sizes.get(self.registers.queue_select as usize).map_or(0, |size| u32::from(*size)),
            0x044 => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            0x060 => self.core.signal.status(),
            0x070 => self.status(),
            0x0fc => self.ask(Backend::config_generation),
            _ => u32::MAX,
        }
    }

    /// What the device says itself, behind the request that is being carried out. For vCPUs, which stand still before the worker does.
    fn ask<T>(&self, question: impl FnOnce(&(dyn Backend + 'static)) -> T) -> T {
        let answer = question(&*self.core.stand().backend);
        self.core.go_on();
        answer
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.registers.device_features_select = value,
            0x020 => self.accept_features(value),
            0x024 => self.registers.driver_features_select = value,
            0x030 => self.registers.queue_select = value,
            QUEUE_NOTIFY if (value as usize) < self.sizes.len() => self.core.notify(),
            0x064 => self.core.signal.acknowledge(value),
            0x070 => self.write_status(value),
            0x038..=0x0a4 => self.write_queue(offset, value),
            _ => {}
        }
    }

    fn accept_features(&mut self, value: u32) {
        let shift = match self.registers.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if self.registers.status & FEATURES_OK == 0 {
            let features = &mut self.registers.driver_features;
            *features = *features & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
        }
    }

    /// A queue is set up between the features and the driver's readiness, and is what it is from then on.
    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.registers.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.registers.queues.get_mut(self.registers.queue_select as usize) else { return };
        let set_low = |word: &mut u64| *word = *word & !u64::from(u32::MAX) | u64::from(value);
        let set_high = |word: &mut u64| *word = u64::from(low(*word)) | u64::from(value) << 32;
        match offset {
            // A size that cannot be is kept, and found when the driver is ready.
            0x038 => queue.size = u16::try_from(value).unwrap_or(0),
            0x044 => queue.ready = value & 1 != 0,
            0x080 => set_low(&mut queue.descriptors),
            0x084 => set_high(&mut queue.descriptors),
            0x090 => set_low(&mut queue.available),
            0x094 => set_high(&mut queue.available),
            0x0a0 => set_low(&mut queue.used),
            0x0a4 => set_high(&mut queue.used),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.registers.status;
        let mut new = old | value & DRIVER_BITS;
        if new & !old & FEATURES_OK != 0 && !self.features_are_acceptable(self.registers.driver_features) {
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.registers.status = new;
        if new & !old & DRIVER_OK != 0 {
            let mut engine = self.core.stand();
            let needed = engine.backend.queues(self.registers.driver_features);
            match self.rings(&self.registers, needed) {
                Ok(rings) => {
                    engine.rings = rings;
                    engine.backend.activate(self.registers.driver_features);
                }
                Err(broken) => self.core.break_device(broken),
            }
            drop(engine);
            self.core.go_on();
        }
    }

    fn features_are_acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn reset(&mut self) {
        // Behind the request that is being carried out: the driver takes its memory back when it reads a status of 0.
        let mut engine = self.core.stand();
        engine.rings.clear();
        engine.backend.activate(0);
        self.core.broken.store(false, Ordering::SeqCst);
        self.core.signal.set_status(0);
        drop(engine);
        self.core.go_on();
        self.registers = self.fresh();
    }

    /// The rings of a driver that is ready and must have set up so many.
    fn rings(&self, registers: &Registers, needed: usize) -> Result<Vec<Ring>, Broken> {
        let event_index = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        registers
            .queues
            .iter()
            .zip(self.sizes)
            .take(needed)
            .map(|(saved, size)| {
                let queue = queue_of(saved, *size, event_index)
                    .ok_or(Broken("a queue cannot be what it is set to"))?;
                Ring::new(queue, Arc::clone(&self.core.memory), Arc::clone(&self.core.signal))
            })
            .collect()
    }

    fn check(&self, saved: &Saved) -> Result<(), String> {
        let registers = &saved.registers;
        if saved.kind != self.kind {
            return Err(format!("it is of a device of kind {}, not {}", saved.kind, self.kind));
        }
        let missing = registers.driver_features & !self.offered;
        if missing != 0 {
            return Err(format!("its driver uses features that are not offered here: {missing:#x}"));
        }
        let (queues, needed) =
            (registers.queues.len(), self.core.engine().backend.queues(registers.driver_features));
        if !(needed..=self.sizes.len()).contains(&queues) {
            return Err(format!("it has {queues} queues, not {}", self.sizes.len()));
        }
        if registers.status & !DRIVER_BITS != 0
            || registers.status & (FEATURES_OK | DRIVER_OK) == DRIVER_OK
            || registers.status & FEATURES_OK != 0 && !self.features_are_acceptable(registers.driver_features)
        {
            return Err(format!("its status is {:#x}", registers.status));
        }
        Ok(())
    }
}

fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

/// A queue as it was set up, if it can be.
fn queue_of(saved: &SavedQueue, most: u16, event_index: bool) -> Option<Queue> {
    let mut queue = Queue::new(most).ok()?;
    queue.try_set_size(saved.size).ok()?;
    queue.try_set_desc_table_address(GuestAddress(saved.descriptors)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(saved.available)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(saved.used)).ok()?;
    queue.set_next_avail(saved.next_available);
    queue.set_next_used(saved.next_used);
    queue.set_event_idx(event_index);
    queue.set_ready(saved.ready);
    saved.ready.then_some(queue)
}

impl Device for Transport {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(place) = offset.checked_sub(CONFIG) {
            let config = self.ask(Backend::config);
            let rest = usize::try_from(place).ok().and_then(|place| config.get(place..)).unwrap_or_default();
            data.iter_mut().zip(rest).for_each(|(byte, value)| *byte = *value);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Ok(value) = data.try_into()
            && offset < CONFIG
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
        Effect::None
    }

    fn state_version(&self) -> u16 {
        STATE_VERSION
    }

    fn save(&self) -> Result<Vec<u8>> {
        let engine = self.core.engine();
        let mut registers = self.registers.clone();
        for (queue, ring) in registers.queues.iter_mut().zip(&engine.rings) {
            queue.next_available = ring.queue.next_avail();
            queue.next_used = ring.queue.next_used();
        }
        state::encode(&Saved {
            kind: self.kind,
            interrupt_status: self.core.signal.status(),
            broken: self.core.broken.load(Ordering::SeqCst),
            registers,
        })
    }

    fn restore(&mut self, version: u16, bytes: &[u8]) -> Result<()> {
        let name = &self.core.name;
        if version != STATE_VERSION {
            return Err(Error::State(format!(
                "{name}: version {version} is not {STATE_VERSION}: use a VMM as new as the source's"
            )));
        }
        let saved = Saved::decode(bytes).map_err(|why| Error::State(format!("{name}: {why}")))?;
        self.check(&saved).map_err(|why| Error::State(format!("{name}: {why}")))?;
        let mut registers = saved.registers;
        // Older devices had fewer queues, and their drivers know of no more.
        let known = registers.queues.len();
        registers.queues.extend(self.fresh().queues.into_iter().skip(known));
        let needed = self.core.engine().backend.queues(registers.driver_features);
        // A broken device has no rings that could be trusted, and needs none before its reset.
        let rings = if registers.status & DRIVER_OK != 0 && !saved.broken {
            self.rings(&registers, needed).map_err(|Broken(why)| Error::State(format!("{name}: {why}")))?
        } else {
            Vec::new()
        };
        let mut engine = self.core.stand();
        engine.rings = rings;
        engine.backend.activate(registers.driver_features);
        self.core.broken.store(saved.broken, Ordering::SeqCst);
        self.core.signal.set_status(saved.interrupt_status);
        drop(engine);
        self.registers = registers;
        Ok(())
    }
}
