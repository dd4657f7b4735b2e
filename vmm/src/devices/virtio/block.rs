//! The block device (virtio 1.2, 5.2).
//!
//! A request is header, data, status. Its parts may be cut into descriptors in any way; the status is the last byte that the
//! device may write. A request that cannot be is answered with an error of its own, and a chain without a header or a place for
//! the status breaks the device.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{
    Backend, Broken, Ring,
    disk::{Disk, SECTOR},
    failed,
    ring::{Chain, Segment, gather, scatter, slices, split_front, total},
};
use crate::{error::Result, memory::GuestMemory};

const KIND: u32 = 2;
const QUEUE: u16 = 256;
/// Data segments of a request: a queue's entries without header and status.
const SEGMENTS: u32 = 254;
const HEADER: usize = 16;
/// Bytes of one range in a discard or write-zeroes request.
const RANGE: usize = 16;
/// The most ranges of one, and the most sectors of each: 1 GiB, so that none keeps a freeze waiting long.
const RANGES: u32 = 16;
const RANGE_SECTORS: u32 = 1 << 21;

/// The block device.
#[derive(Debug)]
pub(crate) struct Block {
    name: String,
    disk: Disk,
    /// The driver cannot flush, so that every write is safe when it is answered.
    write_through: bool,
}

/// How a request ended: its status, and the bytes written before the status.
type Outcome = (u32, usize);

impl Block {
    /// A device over an image. `name` is what the guest reads as its serial number, at most 20 bytes of it.
    pub(super) fn new(name: String, disk: Disk) -> Self {
        Self { name, disk, write_through: false }
    }

    fn carry_out(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<usize, Broken> {
        let mut header = [0; HEADER];
        let front = split_front(&mut chain.readable, HEADER);
        if gather(memory, &front, &mut header) < HEADER {
            return Err(Broken("a request has no header"));
        }
        let Some(room) = chain.writable_bytes().checked_sub(1) else {
            return Err(Broken("a request has no place for its status"));
        };
        // What is left behind the data is the status alone.
        let data = split_front(&mut chain.writable, room);
        let (kind, rest) = header.split_at(4);
        let kind = u32::from_le_bytes(kind.try_into().unwrap_or_default());
        let sector = u64::from_le_bytes(rest[4..].try_into().unwrap_or_default());
        let (status, written) = match kind {
            VIRTIO_BLK_T_IN => self.read(memory, sector, &data),
            VIRTIO_BLK_T_OUT => self.write(memory, sector, &chain.readable),
            VIRTIO_BLK_T_FLUSH => (self.answer("flush a disk", Disk::flush), 0),
            VIRTIO_BLK_T_GET_ID => self.identify(memory, &data),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !self.disk.is_readonly() => {
                (self.clear(memory, kind, &chain.readable), 0)
            }
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        let status = [u8::try_from(status).unwrap_or(u8::MAX)];
        scatter(memory, &chain.writable, &status);
        Ok(written + status.len())
    }

    /// Where data of this many bytes lie, if they are whole sectors inside the disk.
    fn place(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.disk.sectors()).then_some(sector * SECTOR)
    }

    fn read(&mut self, memory: &GuestMemory, sector: u64, data: &[Segment]) -> Outcome {
        let bytes = total(data);
        let Some(at) = self.place(sector, bytes as u64) else { return (VIRTIO_BLK_S_IOERR, 0) };
        let status = self.answer("read a disk", |disk| disk.read(at, &slices(memory, data)));
        (status, if status == VIRTIO_BLK_S_OK { bytes } else { 0 })
    }

    fn write(&mut self, memory: &GuestMemory, sector: u64, data: &[Segment]) -> Outcome {
        match self.place(sector, total(data) as u64) {
            Some(at) if !self.disk.is_readonly() => {
                let flush = self.write_through;
                let status = self.answer("write a disk", |disk| {
                    disk.write(at, &slices(memory, data))?;
                    if flush { disk.flush() } else { Ok(()) }
                });
                (status, 0)
            }
            _ => (VIRTIO_BLK_S_IOERR, 0),
        }
    }

    fn identify(&self, memory: &GuestMemory, data: &[Segment]) -> Outcome {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        id.iter_mut().zip(self.name.bytes()).for_each(|(byte, of_name)| *byte = of_name);
        (VIRTIO_BLK_S_OK, scatter(memory, data, &id))
    }

    /// Discards ranges, or makes zeros of them. All are checked before the first is changed.
    fn clear(&mut self, memory: &GuestMemory, kind: u32, data: &[Segment]) -> u32 {
        let bytes = total(data);
        let zeroes = kind == VIRTIO_BLK_T_WRITE_ZEROES;
        if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes / RANGE > RANGES as usize {
            return VIRTIO_BLK_S_IOERR;
        }
        let mut buffer = [0; RANGE * RANGES as usize];
        gather(memory, data, &mut buffer[..bytes]);
        let mut ranges = Vec::new();
        for range in buffer[..bytes].as_chunks::<RANGE>().0 {
            let sector = u64::from_le_bytes(range[..8].try_into().unwrap_or_default());
            let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap_or_default());
            let flags = u32::from_le_bytes(range[12..].try_into().unwrap_or_default());
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || unmap && !zeroes {
                return VIRTIO_BLK_S_UNSUPP;
            }
            let bytes = u64::from(sectors) * SECTOR;
            match self.place(sector, bytes) {
                Some(at) if (1..=RANGE_SECTORS).contains(&sectors) => ranges.push((at, bytes, unmap)),
                _ => return VIRTIO_BLK_S_IOERR,
            }
        }
        self.answer("clear a part of a disk", |disk| {
            ranges.into_iter().try_for_each(|(at, bytes, unmap)| {
                if zeroes { disk.write_zeroes(at, bytes, unmap) } else { disk.discard(at, bytes) }
            })
        })
    }

    fn answer(&mut self, action: &str, act: impl FnOnce(&mut Disk) -> io::Result<()>) -> u32 {
        match act(&mut self.disk) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(error) => {
                failed(&self.name, action, &error);
                VIRTIO_BLK_S_IOERR
            }
        }
    }
}

impl Backend for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let changes = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | if self.disk.is_readonly() { 1 << VIRTIO_BLK_F_RO } else { changes }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE]
    }

    /// `struct virtio_blk_config` (virtio 1.2, 5.2.4), up to write_zeroes_may_unmap and its padding.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(12, SEGMENTS);
        put(20, 512);
        if !self.disk.is_readonly() {
            put(36, RANGE_SECTORS);
            put(40, RANGES);
            // What a discard should be aligned to: a page, which is what file systems give back.
            put(44, 8);
            put(48, RANGE_SECTORS);
            put(52, RANGES);
            put(56, 1);
        }
        config[..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        config
    }

    fn activate(&mut self, features: u64) {
        self.write_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
    }

    fn serve(&mut self, rings: &mut [Ring], halt: &AtomicBool) -> Result<(), Broken> {
        let Some(ring) = rings.first_mut() else { return Ok(()) };
        loop {
            ring.begin()?;
            while !halt.load(Ordering::SeqCst)
                && let Some(mut chain) = ring.pop()?
            {
                let written = self.carry_out(ring.memory(), &mut chain)?;
                ring.complete(chain.head, written)?;
            }
            if halt.load(Ordering::SeqCst) || !ring.end()? {
                return Ok(());
            }
        }
    }

    fn acquire(&mut self) -> Result<()> {
        self.disk.acquire()
    }

    fn release(&mut self) -> Result<()> {
        self.disk.release()
    }

    fn publish(&mut self) -> Result<bool> {
        self.disk.publish()
    }

    fn retract(&mut self) {
        self.disk.retract();
    }
}
