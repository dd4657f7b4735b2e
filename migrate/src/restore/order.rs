//! What a running workload that misses pages gets next. Pure.
//!
//! What somebody waits for goes first; then what earlier restores of this checkpoint touched first, in that order; then everything else
//! by address. The unit is the extent, because that is what is read and unpacked: the pages around the one that was touched come with it.
//! (A post-copy source hands out pages of its own memory and cuts them as it likes: see `outbound/postcopy/shelf.rs`.)

use std::collections::VecDeque;

/// Where an extent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    /// Waiting, and somebody waits for it.
    Asked,
    /// Somebody reads it.
    Taken,
    Placed,
}

/// The extents that are still to come.
#[derive(Debug)]
pub(super) struct Order {
    states: Vec<State>,
    asked: VecDeque<u32>,
    /// The order of the stream; what was taken meanwhile is passed over.
    stream: VecDeque<u32>,
    /// Whether each stands in the stream.
    streamed: Vec<bool>,
    left: usize,
}

impl Order {
    /// `count` extents, of which `first` are streamed, until there is an order of [all others](Order::then).
    pub(super) fn new(count: usize, first: impl IntoIterator<Item = u32>) -> Self {
        let mut order = Self {
            states: vec![State::Waiting; count],
            asked: VecDeque::new(),
            stream: VecDeque::with_capacity(count),
            streamed: vec![false; count],
            left: count,
        };
        first.into_iter().for_each(|extent| order.enqueue(extent));
        order
    }

    /// Behind what is streamed already come these, and then what was never mentioned.
    pub(super) fn then(&mut self, next: impl IntoIterator<Item = u32>) {
        let all = (0..).take(self.states.len());
        next.into_iter().chain(all).for_each(|extent| self.enqueue(extent));
    }

    /// Extents that are not in place.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Somebody waits for a page of this one. Whether that is news: one that is being read is on its way.
    pub(super) fn ask(&mut self, extent: u32) -> bool {
        match self.states.get_mut(extent as usize) {
            Some(state @ State::Waiting) => {
                *state = State::Asked;
                self.asked.push_back(extent);
                true
            }
            _ => false,
        }
    }

    /// The next one that somebody waits for.
    pub(super) fn take_asked(&mut self) -> Option<u32> {
        let extent = self.asked.pop_front()?;
        self.states[extent as usize] = State::Taken;
        Some(extent)
    }

    /// The next one, asked for or not.
    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(asked) = self.take_asked() {
            return Some(asked);
        }
        while let Some(extent) = self.stream.pop_front() {
            self.streamed[extent as usize] = false;
            if self.states[extent as usize] == State::Waiting {
                self.states[extent as usize] = State::Taken;
                return Some(extent);
            }
        }
        None
    }

    /// All of it is in place.
    pub(super) fn placed(&mut self, extent: u32) {
        if let Some(state) = self.states.get_mut(extent as usize).filter(|state| **state != State::Placed) {
            *state = State::Placed;
            self.left -= 1;
        }
    }

    /// It could not be read: it comes again, behind all others.
    pub(super) fn failed(&mut self, extent: u32) {
        if let Some(state) = self.states.get_mut(extent as usize).filter(|state| **state == State::Taken) {
            *state = State::Waiting;
            self.enqueue(extent);
        }
    }

    fn enqueue(&mut self, extent: u32) {
        let at = extent as usize;
        if self.states.get(at) == Some(&State::Waiting) && !std::mem::replace(&mut self.streamed[at], true) {
            self.stream.push_back(extent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_extent_is_placed_once_and_what_is_asked_for_comes_next(
            count in 1usize..60,
            first in proptest::collection::vec(0u32..70, 0..30),
            next in proptest::collection::vec(0u32..70, 0..30),
            steps in proptest::collection::vec((0u8..5, 0u32..70), 0..200),
        ) {
            let mut order = Order::new(count, first);
            let (mut placed, mut held) = (vec![0; count], Vec::new());
            for (what, which) in steps {
                match what {
                    0 => {
                        let news = order.ask(which);
                        if news && order.asked.len() == 1 {
                            prop_assert_eq!(order.take(), Some(which));
                            held.push(which);
                        }
                    }
                    1 => held.extend(order.take()),
                    2 => if let Some(extent) = held.pop() {
                        order.placed(extent);
                        placed[extent as usize] += 1;
                    },
                    3 => if let Some(extent) = held.pop() {
                        order.failed(extent);
                    },
                    _ => order.then(next.iter().copied()),
                }
            }
            order.then(next);
            held.into_iter().for_each(|extent| order.failed(extent));
            while let Some(extent) = order.take() {
                order.placed(extent);
                placed[extent as usize] += 1;
            }
            prop_assert_eq!(order.left(), 0);
            prop_assert!(placed.iter().all(|times| *times == 1), "{placed:?}");
        }
    }

    #[test]
    fn what_was_touched_before_comes_before_the_rest() {
        let mut order = Order::new(6, [4, 2, 4, 9]);
        order.ask(5);
        let mut taken: Vec<_> = std::iter::from_fn(|| order.take()).collect();
        assert_eq!(taken, [5, 4, 2]);
        order.then([3]);
        taken.extend(std::iter::from_fn(|| order.take()));
        assert_eq!(taken, [5, 4, 2, 3, 0, 1]);
    }
}
