//! The network device (virtio 1.2, 5.1), over a tap.
//!
//! Checksums and segmentation are left to whom they cost least: a frame's header goes through as it is, in both directions. A
//! frame that the host refuses, or that the guest has no room for, is lost, as on any network.

use std::{
    os::fd::{AsFd, BorrowedFd},
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::{
    Backend, Broken, Ring, failed,
    ring::{Chain, gather, scatter},
    tap::{HEADER, Offloads, Tap},
};
use crate::error::{Error, Result};

const KIND: u32 = 1;
/// The largest frame: what segmentation offload makes of it at most, behind its Ethernet header with a VLAN tag.
const FRAME: usize = HEADER + 18 + (64 << 10);
/// Frames in one direction before the other gets its turn.
const BATCH: usize = 64;
/// Where the header says over how many buffers a frame is spread (virtio 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;

/// When a guest that came to another host is announced, counted from its start. A tap that was just taken needs its moment until a
/// bridge passes on what comes from it, and no announcement is ever acknowledged by those whom it is for, so there are several.
const ANNOUNCED_AFTER_MS: [u64; 6] = [0, 50, 150, 400, 1000, 2500];

/// The address of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A random one of those that everybody may give out (locally administered, one card).
    ///
    /// # Errors
    /// [`Error::Host`] when the host has no random numbers.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
            .map_err(Error::os("draw random bytes"))?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not the address of one card, as 02:00:00:00:00:01 is");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        let one_card = bytes[0] & 1 == 0 && bytes != [0; 6];
        if parts.next().is_none() && one_card { Ok(Self(bytes)) } else { Err(wrong()) }
    }
}

/// The network device.
#[derive(Debug)]
pub(crate) struct Net {
    name: String,
    tap_name: String,
    mac: MacAddress,
    tap: Option<Tap>,
    features: u64,
    outgoing: Box<[u8]>,
    buffer: Box<[u8]>,
    /// Bytes of a frame that is in the buffer and waits for room.
    waiting: Option<usize>,
    /// The guest has no room: the tap is left alone until it says that it has.
    starved: bool,
    /// How often the guest was announced, and since when it is.
    announced: Option<(usize, Instant)>,
    /// The guest is asked to announce itself, and did not say yet that it did.
    asked: bool,
    generation: u32,
}

impl Net {
    /// A device for a tap that is taken later.
    pub(super) fn new(name: String, tap_name: String, mac: MacAddress) -> Self {
        let [outgoing, buffer] = [(); 2].map(|()| vec![0; FRAME].into());
        Self {
            name,
            tap_name,
            mac,
            tap: None,
            features: 0,
            outgoing,
            buffer,
            waiting: None,
            starved: false,
            announced: None,
            asked: false,
            generation: 0,
        }
    }

    fn offloads(&self) -> Offloads {
        let pairs = [
            (VIRTIO_NET_F_GUEST_CSUM, Offloads::CHECKSUM),
            (VIRTIO_NET_F_GUEST_TSO4, Offloads::TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, Offloads::TSO6),
            (VIRTIO_NET_F_GUEST_ECN, Offloads::ECN),
        ];
        let taken = pairs.iter().filter(|(feature, _)| self.features & 1 << feature != 0);
        let bits = taken.fold(0, |bits, (_, offload)| bits | offload);
        // Without checksums the kernel takes nothing else either (tun(4), TUNSETOFFLOAD).
        Offloads(if bits & Offloads::CHECKSUM == 0 { 0 } else { bits })
    }

    fn apply_offloads(&self) {
        if let Some(tap) = &self.tap
            && let Err(error) = tap.set_offloads(self.offloads())
        {
            failed(&self.name, "tell the tap what the guest does itself", &error);
        }
    }

    /// Sends what the guest has, at most a batch. Whether there may be more.
    fn transmit(&mut self, ring: &mut Ring, halt: &AtomicBool) -> Result<bool, Broken> {
        ring.begin()?;
        for _ in 0..BATCH {
            if halt.load(Ordering::SeqCst) {
                return Ok(false);
            }
            let Some(chain) = ring.pop()? else { return ring.end() };
            let bytes = gather(ring.memory(), &chain.readable, &mut self.outgoing);
            if let Some(tap) = &self.tap
                && bytes > HEADER
                && let Err(error) = tap.send(&self.outgoing[..bytes])
            {
                tracing::debug!(device = self.name, %error, "a frame of the guest was lost");
            }
            ring.complete(chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives the guest what the tap has, at most a batch. Whether there may be more.
    fn receive(&mut self, ring: &mut Ring, halt: &AtomicBool) -> Result<bool, Broken> {
        ring.begin()?;
        for _ in 0..BATCH {
            if halt.load(Ordering::SeqCst) {
                return Ok(false);
            }
            let Some(bytes) = self.next_frame() else { return Ok(false) };
            if !self.deliver(ring, bytes)? {
                self.starved = true;
                return Ok(false);
            }
            self.waiting = None;
        }
        Ok(true)
    }

    fn next_frame(&mut self) -> Option<usize> {
        if self.waiting.is_none() {
            match self.tap.as_ref()?.receive(&mut self.buffer) {
                Ok(frame) => self.waiting = frame.filter(|bytes| *bytes > HEADER),
                Err(error) => {
                    // It was taken away or is gone. Another one comes with the next start, if at all.
                    failed(&self.name, "read from the tap any more", &error);
                    self.tap = None;
                }
            }
        }
        self.waiting
    }

    /// Spreads the frame over the guest's buffers. `false`: there are not enough of them, and the guest notifies when it adds one.
    fn deliver(&mut self, ring: &mut Ring, bytes: usize) -> Result<bool, Broken> {
        let merge = self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < bytes && (merge || chains.is_empty()) {
            let Some(chain) = ring.pop()? else {
                // Asked for here, where all that is available was taken: an event index says from which buffer on.
                if ring.end()? {
                    continue;
                }
                chains.iter().for_each(|_| ring.put_back());
                return Ok(false);
            };
            room += chain.writable_bytes();
            chains.push(chain);
        }
        if room < bytes {
            // One buffer is all it may have, and it is too small: the frame is lost, the buffer is not.
            ring.put_back();
            return Ok(true);
        }
        let spread = u16::try_from(chains.len()).unwrap_or(u16::MAX).to_le_bytes();
        self.buffer[NUM_BUFFERS..HEADER].copy_from_slice(&spread);
        let mut rest = &self.buffer[..bytes];
        for chain in &chains {
            let written = scatter(ring.memory(), &chain.writable, rest);
            rest = &rest[written..];
            ring.add(chain.head, written)?;
        }
        ring.notify()?;
        Ok(true)
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Announces the guest where it is now, if it is time to: to bridges and switches itself, to neighbours by the guest, which knows its
    /// addresses. A driver that can does it as the configuration asks (virtio 1.2, 5.1.6.5.4): gratuitous ARP, and unsolicited
    /// neighbour advertisements.
    fn announce(&mut self, ring: &Ring) {
        let Some(due) = self.due() else { return };
        if due > Instant::now() {
            return;
        }
        self.announced = self.announced.map(|(rounds, since)| (rounds + 1, since));
        if let Some(tap) = &self.tap
            && let Err(error) = tap.send(&self.announcement())
        {
            tracing::debug!(device = self.name, %error, "an announcement of the guest was lost");
        }
        if self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.has(VIRTIO_NET_F_CTRL_VQ) {
            self.ask(true);
            ring.config_changed();
        }
    }

    fn ask(&mut self, asked: bool) {
        self.generation = self.generation.wrapping_add(u32::from(self.asked != asked));
        self.asked = asked;
    }

    /// Carries out what the driver wants of the device. It knows of nothing but announcements.
    fn control(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        const DONE: [u32; 2] = [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK];
        loop {
            ring.begin()?;
            while let Some(chain) = ring.pop()? {
                let mut command = [0; 2];
                let bytes = gather(ring.memory(), &chain.readable, &mut command);
                let known = bytes == command.len() && command.map(u32::from) == DONE;
                if known {
                    self.ask(false);
                }
                let answer = if known { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
                let written = scatter(ring.memory(), &chain.writable, &answer.to_le_bytes()[..1]);
                ring.complete(chain.head, written)?;
            }
            if !ring.end()? {
                return Ok(());
            }
        }
    }

    /// A RARP request of the guest's card (RFC 903), by which bridges and switches learn where it is now.
    fn announcement(&self) -> [u8; HEADER + 60] {
        let MacAddress(mac) = self.mac;
        let mut frame = [0; HEADER + 60];
        let mut put = |at: usize, bytes: &[u8]| frame[HEADER + at..][..bytes.len()].copy_from_slice(bytes);
        put(0, &[0xff; 6]);
        put(6, &mac);
        // RARP; Ethernet, IPv4, lengths of their addresses, request reverse.
        put(12, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        put(22, &mac);
        put(32, &mac);
        frame
    }
}

impl Backend for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    /// Receive, then transmit, then control.
    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 64]
    }

    fn queues(&self, features: u64) -> usize {
        if features & 1 << VIRTIO_NET_F_CTRL_VQ == 0 { 2 } else { 3 }
    }

    fn config(&self) -> Vec<u8> {
        let status = VIRTIO_NET_S_LINK_UP | if self.asked { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        [&self.mac.0[..], &status.to_le_bytes()[..2]].concat()
    }

    fn config_generation(&self) -> u32 {
        self.generation
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.starved = false;
        // A driver that begins announces itself.
        self.announced = None;
        self.ask(false);
        self.waiting = None;
        self.apply_offloads();
    }

    fn serve(&mut self, rings: &mut [Ring], halt: &AtomicBool) -> Result<(), Broken> {
        let [receive, transmit, control @ ..] = rings else { return Ok(()) };
        self.starved = false;
        self.announce(transmit);
        if let Some(control) = control.first_mut() {
            self.control(control)?;
        }
        loop {
            let sent_more = self.transmit(transmit, halt)?;
            let got_more = !self.starved && self.receive(receive, halt)?;
            if halt.load(Ordering::SeqCst) || !sent_more && !got_more {
                return Ok(());
            }
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.tap.as_ref().filter(|_| !self.starved).map(Tap::as_fd)
    }

    fn due(&self) -> Option<Instant> {
        let (rounds, since) = self.announced?;
        Some(since + Duration::from_millis(*ANNOUNCED_AFTER_MS.get(rounds)?))
    }

    fn acquire(&mut self) -> Result<()> {
        if self.tap.is_none() {
            self.tap = Some(Tap::open(&self.tap_name)?);
            self.apply_offloads();
            // Where no driver was at work yet, there is nothing that others could know already.
            self.announced = (self.features != 0).then(|| (0, Instant::now()));
        }
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        self.tap = None;
        self.waiting = None;
        Ok(())
    }
}
