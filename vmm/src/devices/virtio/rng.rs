//! Entropy (virtio 1.2, 5.4): the host kernel's random bytes.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::rand::GetRandomFlags;

use super::{
    Backend, Broken, Ring, failed,
    ring::{scatter, split_front},
};

const KIND: u32 = 4;
/// The most bytes for one request: it may get fewer than it has room for, and asks again.
const MOST: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub(crate) struct Rng;

impl Backend for Rng {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn serve(&mut self, rings: &mut [Ring], halt: &AtomicBool) -> Result<(), Broken> {
        let Some(ring) = rings.first_mut() else { return Ok(()) };
        loop {
            ring.begin()?;
            while !halt.load(Ordering::SeqCst)
                && let Some(mut chain) = ring.pop()?
            {
                let room = split_front(&mut chain.writable, MOST);
                let mut bytes = [0; MOST];
                let drawn = match rustix::rand::getrandom(&mut bytes[..], GetRandomFlags::empty()) {
                    Ok(drawn) => drawn,
                    Err(error) => {
                        failed("rng", "draw random bytes", &error.into());
                        0
                    }
                };
                let written = scatter(ring.memory(), &room, &bytes[..drawn]);
                ring.complete(chain.head, written)?;
            }
            if halt.load(Ordering::SeqCst) || !ring.end()? {
                return Ok(());
            }
        }
    }
}
