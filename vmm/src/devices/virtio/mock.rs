//! A driver for the tests. It writes guest memory as a guest does: past the VMM's own marks.

use std::{
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Backend, Handle, Transport,
    transport::{QUEUE_NOTIFY, RING_FEATURES},
};
use crate::{
    device::{Device, Interrupt},
    memory::GuestMemory,
};

/// Bytes of guest memory.
pub(super) const MEMORY: u64 = 4 << 20;
/// Where queues lie: a page for each part, three for each queue.
const RINGS: u64 = 0x1_0000;
/// Where tests put their data.
pub(super) const DATA: u64 = 0x10_0000;
pub(super) const SIZE: u16 = 16;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
const EVENT_INDEX: u64 = 1 << 29;

/// One entry of a descriptor table.
pub(super) type Descriptor = (u64, u32, u16, u16);

pub(super) fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::create(MEMORY).unwrap())
}

pub(super) struct Driver {
    pub(super) device: Transport,
    pub(super) handle: Handle,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) interrupts: Arc<AtomicU32>,
    /// Next index of the available ring, and of the used ring, for each queue.
    pub(super) available: [u16; 4],
    pub(super) used: [u16; 4],
}

impl Driver {
    pub(super) fn new(memory: Arc<GuestMemory>, backend: Box<dyn Backend>) -> Self {
        let interrupts = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&interrupts);
        let line = Interrupt::to(move || {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(())
        });
        let (device, handle) = Transport::new("device0".into(), memory.clone(), line, backend).unwrap();
        Self { device, handle, memory, interrupts, available: [0; 4], used: [0; 4] }
    }

    pub(super) fn write(&mut self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    pub(super) fn read(&mut self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn poke(&self, address: u64, bytes: &[u8]) {
        self.memory.file(0).unwrap().write_all_at(bytes, address).unwrap();
    }

    pub(super) fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.memory.file(0).unwrap().read_exact_at(&mut buffer, address).unwrap();
        buffer
    }

    fn peek_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.peek(address, 2).try_into().unwrap())
    }

    /// Brings the device up with these features beside the transport's. Answers the status.
    pub(super) fn start(&mut self, features: u64, event_index: bool) -> u32 {
        self.write(0x070, 0);
        (self.available, self.used) = ([0; 4], [0; 4]);
        self.write(0x070, 1);
        self.write(0x070, 3);
        let ring = if event_index { RING_FEATURES } else { RING_FEATURES & !EVENT_INDEX };
        let wanted = features | ring;
        for (half, bits) in [(0, wanted as u32), (1, (wanted >> 32) as u32)] {
            self.write(0x024, half);
            self.write(0x020, bits);
        }
        self.write(0x070, 11);
        for queue in 0_u32.. {
            self.write(0x030, queue);
            if self.read(0x034) == 0 {
                break;
            }
            self.poke(part(queue, 0), &[0; 3 * 4096]);
            self.write(0x038, SIZE.into());
            for (register, which) in [(0x080, 0), (0x090, 1), (0x0a0, 2)] {
                self.write(register, part(queue, which) as u32);
                self.write(register + 4, 0);
            }
            self.write(0x044, 1);
        }
        self.write(0x070, 15);
        self.read(0x070)
    }

    /// Writes descriptors into a queue's table from `first` on, and makes the chain of them available.
    pub(super) fn submit(&mut self, queue: u32, first: u16, chain: &[Descriptor]) {
        for (index, descriptor) in (first..).zip(chain) {
            self.poke(part(queue, 0) + 16 * u64::from(index), &entry(*descriptor));
        }
        self.offer(queue, first);
    }

    pub(super) fn offer(&mut self, queue: u32, head: u16) {
        let next = &mut self.available[queue as usize];
        let slot = part(queue, 1) + 4 + 2 * u64::from(*next % SIZE);
        *next = next.wrapping_add(1);
        let next = *next;
        self.poke(slot, &head.to_le_bytes());
        self.poke(part(queue, 1) + 2, &next.to_le_bytes());
    }

    pub(super) fn notify(&mut self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// What was answered since the last look: heads and bytes.
    pub(super) fn answers(&mut self, queue: u32) -> Vec<(u32, u32)> {
        let mut answers = Vec::new();
        let index = self.peek_u16(part(queue, 2) + 2);
        while self.used[queue as usize] != index {
            let next = self.used[queue as usize];
            let entry = self.peek(part(queue, 2) + 4 + 8 * u64::from(next % SIZE), 8);
            let half = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            answers.push((half(0), half(4)));
            self.used[queue as usize] = next.wrapping_add(1);
        }
        // The driver wants to know of the next one (event index).
        let (place, used) = (part(queue, 1) + 4 + 2 * u64::from(SIZE), self.used[queue as usize]);
        self.poke(place, &used.to_le_bytes());
        answers
    }

    /// Submits one chain and waits for its answer; how many bytes the device says it wrote.
    pub(super) fn request(&mut self, queue: u32, chain: &[Descriptor]) -> u32 {
        self.submit(queue, 0, chain);
        self.notify(queue);
        let mut answers = Vec::new();
        self.wait("an answer", |driver| {
            answers = driver.answers(queue);
            !answers.is_empty()
        });
        assert_eq!((answers.len(), answers[0].0), (1, 0));
        answers[0].1
    }

    pub(super) fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < until, "waited 20 s for {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The pages that the VMM itself wrote since the last look.
    pub(super) fn marked(&self) -> Vec<u64> {
        let mut bits = vec![0; (MEMORY / 4096 / 64) as usize];
        self.memory.drain_own_writes(0, &mut bits);
        (0..MEMORY / 4096).filter(|page| bits[(page / 64) as usize] >> (page % 64) & 1 == 1).collect()
    }
}

/// Where a part of a queue lies: 0 descriptors, 1 available, 2 used.
pub(super) fn part(queue: u32, which: u64) -> u64 {
    RINGS + 4096 * (3 * u64::from(queue) + which)
}

pub(super) fn entry((address, bytes, flags, next): Descriptor) -> Vec<u8> {
    let mut entry = address.to_le_bytes().to_vec();
    entry.extend(bytes.to_le_bytes());
    entry.extend(flags.to_le_bytes());
    entry.extend(next.to_le_bytes());
    entry
}

/// A chain of pieces, `(address, bytes, writable)`, for descriptors from `first` on.
pub(super) fn chain(first: u16, pieces: &[(u64, u32, bool)]) -> Vec<Descriptor> {
    let last = pieces.len() - 1;
    let link = |(index, piece): (usize, &(u64, u32, bool))| {
        let next = if index < last { NEXT } else { 0 };
        (piece.0, piece.1, next | if piece.2 { WRITE } else { 0 }, first + index as u16 + 1)
    };
    pieces.iter().enumerate().map(link).collect()
}
