//! One queue between driver and device, with nothing believed of what the driver writes.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice, bitmap::RefSlice};

use super::Broken;
use crate::{
    device::Interrupt,
    memory::{GuestMemory, OwnWrites},
};

/// A piece of guest memory as a device sees it: what is written to it is marked dirty.
pub(crate) type Slice<'a> = VolatileSlice<'a, RefSlice<'a, OwnWrites>>;

/// Bits of InterruptStatus (virtio 1.2, 4.2.2).
pub(super) const USED_BUFFER: u32 = 1;
pub(super) const CONFIG_CHANGE: u32 = 2;

/// How a device interrupts its driver.
#[derive(Debug)]
pub(super) struct Signal {
    status: AtomicU32,
    line: Interrupt,
}

impl Signal {
    pub(super) fn new(line: Interrupt) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::Release);
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        if let Err(error) = self.line.raise() {
            tracing::warn!(%error, "an interrupt was lost");
        }
    }
}

/// A piece of a chain, all of it in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) bytes: usize,
}

/// A request: what the driver gives, and where it wants the answer.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    /// What the device may read.
    pub(crate) readable: Vec<Segment>,
    /// What the device may write, all of it behind what it may read.
    pub(crate) writable: Vec<Segment>,
}

impl Chain {
    /// How much the device may write, in bytes.
    pub(crate) fn writable_bytes(&self) -> usize {
        total(&self.writable)
    }
}

/// Bytes of segments. At most 4 GiB, because a chain has no more.
pub(crate) fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.bytes).sum()
}

/// Cuts `bytes` off the front of segments; what is too short is taken whole.
pub(crate) fn split_front(segments: &mut Vec<Segment>, bytes: usize) -> Vec<Segment> {
    let mut front = Vec::new();
    let mut wanted = bytes;
    while wanted > 0
        && let Some(first) = segments.first_mut()
    {
        let taken = first.bytes.min(wanted);
        front.push(Segment { address: first.address, bytes: taken });
        wanted -= taken;
        if taken == first.bytes {
            segments.remove(0);
        } else {
            first.address = GuestAddress(first.address.0.saturating_add(taken as u64));
            first.bytes -= taken;
        }
    }
    front
}

/// A queue of a driver that is ready.
pub(crate) struct Ring {
    pub(super) queue: Queue,
    memory: Arc<GuestMemory>,
    signal: Arc<Signal>,
}

impl Ring {
    /// A ring over a queue whose parts lie in RAM.
    ///
    /// # Errors
    /// [`Broken`] when they do not.
    pub(super) fn new(queue: Queue, memory: Arc<GuestMemory>, signal: Arc<Signal>) -> Result<Self, Broken> {
        let entries = u64::from(queue.size());
        // Sizes of the three parts with an event index each (virtio 1.2, 2.7 and 2.7.6 to 2.7.8).
        let parts = [
            (queue.desc_table(), 16 * entries),
            (queue.avail_ring(), 6 + 2 * entries),
            (queue.used_ring(), 6 + 8 * entries),
        ];
        // Address 0 is what a queue has that was never told its place.
        if parts.iter().any(|(start, bytes)| *start == 0 || !memory.contains(*start, *bytes)) {
            return Err(Broken("a queue does not lie in memory"));
        }
        Ok(Self { queue, memory, signal })
    }

    /// The guest's memory.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// [`Broken`] for an index or a chain that cannot be.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let most = usize::from(self.queue.size());
        let map = self.memory.map();
        let mut available =
            self.queue.iter(map).map_err(|_| Broken("more is available than fits the queue"))?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        let mut chain = Chain { head: descriptors.head_index(), ..Chain::default() };
        let mut open = true;
        for descriptor in descriptors {
            open = descriptor.has_next();
            let segment = Segment { address: descriptor.addr(), bytes: descriptor.len() as usize };
            if !self.memory.contains(segment.address.0, segment.bytes as u64) {
                return Err(Broken("a descriptor does not lie in memory"));
            }
            if chain.readable.len() + chain.writable.len() == most {
                return Err(Broken("a chain is longer than its queue"));
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(Broken("a chain wants to be read behind what it wants to be written"));
            }
        }
        if open {
            return Err(Broken("a chain has no end"));
        }
        Ok(Some(chain))
    }

    /// Puts the last request back that was taken; nothing was done for it.
    pub(crate) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Answers a request, into whose memory `bytes` were written, and interrupts the driver if it wants that.
    ///
    /// # Errors
    /// [`Broken`] when the request was none of this queue.
    pub(crate) fn complete(&mut self, head: u16, bytes: usize) -> Result<(), Broken> {
        self.add(head, bytes)?;
        self.notify()
    }

    /// Answers a request without an interrupt; [`Ring::notify`] follows behind the last.
    ///
    /// # Errors
    /// [`Broken`] when the request was none of this queue.
    pub(crate) fn add(&mut self, head: u16, bytes: usize) -> Result<(), Broken> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.queue
            .add_used(self.memory.map(), head, bytes)
            .map_err(|_| Broken("a chain begins outside its queue"))
    }

    /// Interrupts the driver, if it wants to know of what was answered.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not in memory, which was checked.
    pub(crate) fn notify(&mut self) -> Result<(), Broken> {
        let wanted = self.queue.needs_notification(self.memory.map());
        if wanted.map_err(|_| Broken("a queue does not lie in memory"))? {
            self.signal.raise(USED_BUFFER);
        }
        Ok(())
    }

    /// Interrupts the driver because the device's configuration changed.
    pub(crate) fn config_changed(&self) {
        self.signal.raise(CONFIG_CHANGE);
    }

    /// The driver need not notify while the ring is looked at.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not in memory, which was checked.
    pub(crate) fn begin(&mut self) -> Result<(), Broken> {
        let outcome = self.queue.disable_notification(self.memory.map());
        outcome.map_err(|_| Broken("a queue does not lie in memory"))
    }

    /// The driver shall notify from now on. Whether there is more already.
    ///
    /// # Errors
    /// [`Broken`] when the ring is not in memory, which was checked.
    pub(crate) fn end(&mut self) -> Result<bool, Broken> {
        let more = self.queue.enable_notification(self.memory.map());
        more.map_err(|_| Broken("a queue does not lie in memory"))
    }
}

/// Segments as slices of mapped memory, cut where a space ends.
pub(crate) fn slices<'a>(memory: &'a GuestMemory, segments: &[Segment]) -> Vec<Slice<'a>> {
    let map = memory.map();
    segments
        .iter()
        .flat_map(|segment| map.get_slices(segment.address, segment.bytes))
        // Every segment was found to be RAM when its chain was taken.
        .filter_map(Result::ok)
        .collect()
}

/// Copies from segments; says how much there was.
pub(crate) fn gather(memory: &GuestMemory, segments: &[Segment], buffer: &mut [u8]) -> usize {
    let mut done = 0;
    for slice in slices(memory, segments) {
        if done == buffer.len() {
            break;
        }
        done += slice.copy_to(&mut buffer[done..]);
    }
    done
}

/// Copies into segments; says how much fitted.
pub(crate) fn scatter(memory: &GuestMemory, segments: &[Segment], bytes: &[u8]) -> usize {
    let mut done = 0;
    for slice in slices(memory, segments) {
        let piece = slice.len().min(bytes.len() - done);
        slice.copy_from(&bytes[done..done + piece]);
        done += piece;
    }
    done
}
