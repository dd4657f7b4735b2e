//! Where a link can be dialled again after it was cut.

use super::{Cable, Cut, Duplex, NOBODY, Profile, pair};
use crate::error::{Error, Result};
use crate::identity::Fingerprint;
use crate::link::Link;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One host that listens and any that dial it. The connections are cut where a test said, in the order in which they
/// are made.
#[derive(Clone, Default)]
pub struct Network {
    profile: Profile,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    dialled: Condvar,
}

#[derive(Default)]
struct State {
    down: bool,
    cuts: VecDeque<Option<Cut>>,
    waiting: VecDeque<Duplex>,
    cables: Vec<Cable>,
    /// Who the listening host says it is, connection by connection.
    answers: VecDeque<Fingerprint>,
}

impl Network {
    /// A network whose first connections are cut like this, and all others never.
    pub fn new(profile: Profile, cuts: impl IntoIterator<Item = Option<Cut>>) -> Self {
        let network = Self { profile, ..Self::default() };
        network.lock().cuts.extend(cuts);
        network
    }

    /// Says which keys the listening host has for the next connections.
    pub fn answer_as(&self, keys: impl IntoIterator<Item = Fingerprint>) {
        self.lock().answers.extend(keys);
    }

    /// Makes the listening host reachable or not; connections that exist go on.
    pub fn set_reachable(&self, reachable: bool) {
        self.lock().down = !reachable;
    }

    /// Pulls the cables of all connections.
    pub fn cut(&self) {
        self.lock().cables.iter().for_each(Cable::cut);
    }

    /// How many connections were made.
    pub fn dialled(&self) -> usize {
        self.lock().cables.len()
    }

    /// Connects.
    ///
    /// # Errors
    /// `Link` while the listening host cannot be reached.
    pub fn dial(&self) -> Result<Box<dyn Link>> {
        self.dial_as(NOBODY)
    }

    /// Connects as the host with this key.
    ///
    /// # Errors
    /// As [`Network::dial`].
    pub fn dial_as(&self, key: Fingerprint) -> Result<Box<dyn Link>> {
        let mut state = self.lock();
        if state.down {
            return Err(Error::Link("the host cannot be reached".into()));
        }
        let cut = state.cuts.pop_front().flatten();
        let (mut here, mut there, cable) = pair(&self.profile, cut);
        there.peer_key = key;
        here.peer_key = state.answers.pop_front().unwrap_or(NOBODY);
        state.waiting.push_back(there);
        state.cables.push(cable);
        self.shared.dialled.notify_all();
        Ok(Box::new(here))
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// `TimedOut`.
    pub fn accept(&self, limit: Duration) -> Result<Box<dyn Link>> {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(link) = state.waiting.pop_front() {
                return Ok(Box::new(link));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::TimedOut { what: "a connection", after: limit });
            }
            state = self.shared.dialled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
