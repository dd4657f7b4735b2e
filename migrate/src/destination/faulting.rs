//! A VM that was started before all of its memory was there, seen through its VMM's page-fault descriptor.

use super::Incomplete;
use crate::error::{Error, Result};
use crate::sys::{self, Filled};
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use rustix::io::Errno;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use vmm::{Client, PageFaults};

/// A running VM that misses pages. The session is held until the last of them is there: dropping it leaves the VM as it
/// is, and another engine may take it up.
pub(super) struct FaultingVm {
    name: String,
    layout: Layout,
    faults: PageFaults,
    client: Mutex<Client>,
}

impl FaultingVm {
    /// Gets the descriptor from the VMM.
    pub(super) fn hold(name: String, layout: Layout, mut client: Client) -> Result<Self> {
        let faults = client.page_faults(&layout)?;
        Ok(Self { name, layout, faults, client: Mutex::new(client) })
    }

    fn client(&self) -> std::sync::MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the VM run.
    pub(super) fn start(&self, migration: protocol::MigrationId) -> Result<()> {
        Ok(self.client().start(migration)?)
    }

    fn address(&self, run: PageRun) -> Result<u64> {
        self.layout.check(&run)?;
        let base = self.faults.addresses.get(usize::from(run.space.0));
        let base = base.ok_or_else(|| Error::Workload(format!("there is no space {}", run.space.0)))?;
        Ok(base + run.offset())
    }

    /// Fills the pages from an address on, until all of them are there, whoever filled them.
    fn fill(
        &self,
        run: PageRun,
        mut part: impl FnMut(u64, usize) -> std::result::Result<Filled, Errno>,
    ) -> Result<()> {
        let (start, bytes, mut at) = (self.address(run)?, run.bytes(), 0);
        while at < bytes {
            let here = start + at as u64;
            match part(here, at).map_err(refused)? {
                // Never less than a page, and never more than was asked for.
                Filled::Bytes(filled) => at += filled as usize,
                Filled::Present => {
                    // Somebody may have begun to wait for it right before it was there.
                    sys::wake(&self.faults.descriptor, here, PAGE_SIZE as u64).map_err(refused)?;
                    at += PAGE_SIZE;
                }
                Filled::Again => std::thread::yield_now(),
            }
        }
        Ok(())
    }
}

fn refused(error: Errno) -> Error {
    match error {
        Errno::SRCH => Error::Workload("the VM ended while pages of it were still to come".into()),
        error => Error::Host(format!("a page could not be put in place: {error}")),
    }
}

impl Incomplete for FaultingVm {
    fn name(&self) -> &str {
        &self.name
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn missing(&self) -> &[PageSet] {
        &self.faults.missing
    }

    fn touched(&self, limit: Duration) -> Result<Vec<(SpaceId, u64)>> {
        let addresses = sys::page_faults(&self.faults.descriptor, limit)
            .map_err(|error| Error::Host(format!("page faults of the VM cannot be read: {error}")))?;
        let places = addresses.iter().filter_map(|address| {
            let spaces = self.layout.spaces.iter().zip(&self.faults.addresses);
            spaces
                .filter_map(|(space, base)| {
                    let page = address.checked_sub(*base)? / PAGE_SIZE as u64;
                    (page < space.pages).then_some((space.id, page))
                })
                .next()
        });
        Ok(places.collect())
    }

    fn place(&self, run: PageRun, bytes: &[u8]) -> Result<()> {
        if bytes.len() != run.bytes() {
            return Err(Error::Host(format!("{} bytes are not {} pages", bytes.len(), run.count)));
        }
        self.fill(run, |address, at| sys::copy(&self.faults.descriptor, address, &bytes[at..]))
    }

    fn place_zeros(&self, run: PageRun) -> Result<()> {
        let bytes = run.bytes();
        self.fill(run, |address, at| sys::zero(&self.faults.descriptor, address, (bytes - at) as u64))
    }

    fn complete(&self) -> Result<()> {
        Ok(self.client().complete()?)
    }
}
