//! What the version of every page must be after so many iterations.

use crate::model::page::{FILLED, FIRST_VERSION, Identity};
use crate::stats::Setup;

/// The pattern, replayed: who wrote each page of the working set last, and how often it was written.
#[derive(Clone, Debug)]
pub struct Replay {
    setup: Setup,
    iterations: u64,
    /// For each page of the working set: its version and the iteration that wrote it.
    written: Vec<(u32, u64)>,
}

impl Replay {
    /// The fill and nothing more.
    pub fn new(setup: Setup) -> Replay {
        // The working set was checked to lie below 64 GiB when `Setup` was decoded.
        let pages = usize::try_from(setup.ws_pages).unwrap_or(usize::MAX);
        Replay { setup, iterations: 0, written: vec![(FIRST_VERSION, FILLED); pages] }
    }

    /// Goes on until `iterations` were done. A few nanoseconds each.
    pub fn advance_to(&mut self, iterations: u64) {
        for k in self.iterations..iterations {
            let page = self.setup.pattern.page_of(self.setup.seed, self.setup.ws_pages, k);
            if let Some((version, iteration)) =
                usize::try_from(page).ok().and_then(|page| self.written.get_mut(page))
            {
                *version = version.wrapping_add(1);
                *iteration = k;
            }
        }
        self.iterations = self.iterations.max(iterations);
    }

    /// What page `page` is after these iterations, if it is one of those filled.
    pub fn identity(&self, page: u64) -> Option<Identity> {
        if page >= self.setup.fill_pages {
            return None;
        }
        let written = usize::try_from(page).ok().and_then(|page| self.written.get(page));
        let (version, iteration) = written.copied().unwrap_or((FIRST_VERSION, FILLED));
        let Setup { seed, content, .. } = self.setup;
        Some(Identity { seed, page, version, iteration, content })
    }
}
