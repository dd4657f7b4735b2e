//! Which page of which process lies where in the spaces of a layout.
//!
//! A space for each process that has pages when it is looked at first, its pages one behind the other; and the last space, with room for what comes
//! later. A page keeps its slot for as long as the move lasts, whatever becomes of it: what it holds then is what was written there last.

use protocol::container::{Placement, Run};
use protocol::layout::{Layout, MAX_SPACES, Space, SpaceKind};
use protocol::page::{PAGE_SIZE, SpaceId};
use std::collections::{BTreeMap, HashMap};

/// Where pages of a process are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// From this slot of this space on.
    At(SpaceId, u64),
    /// Nowhere yet.
    Nowhere,
}

/// All of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slots {
    /// Of each space, in the order of their slots, without a gap.
    spaces: Vec<Vec<Run>>,
    /// Of each process, by first page: the run's pages, space and slot.
    pages: HashMap<u32, BTreeMap<u64, (u32, SpaceId, u64)>>,
    /// Pages that the last space has room for.
    room: u64,
    /// The number of the first space in the layout.
    first: u16,
}

impl Slots {
    /// Places for the pages of these processes, given as ascending runs of first page and number, and room for more.
    ///
    /// # Errors
    /// How many processes there are, if those are more than there may be spaces.
    pub(crate) fn new(processes: &[(u32, Vec<(u64, u64)>)], room: u64) -> Result<Self, usize> {
        let mut slots = Self { spaces: Vec::new(), pages: HashMap::new(), room, first: 0 };
        for (process, runs) in processes.iter().filter(|(_, runs)| !runs.is_empty()) {
            slots.spaces.push(Vec::new());
            runs.iter().for_each(|(page, pages)| slots.append(*process, *page, *pages));
        }
        slots.spaces.push(Vec::new());
        match slots.spaces.len() {
            spaces if spaces > MAX_SPACES => Err(spaces - 1),
            _ => Ok(slots),
        }
    }

    /// One space for everything, which is not the first of its layout: what is in the files of a container. They stand in the place of processes.
    pub(crate) fn alone(space: SpaceId, room: u64) -> Self {
        Self { spaces: vec![Vec::new()], pages: HashMap::new(), room, first: space.0 }
    }

    /// The layout that it is in.
    pub(crate) fn layout(&self) -> Layout {
        let mut address = 0;
        let last = self.spaces.len().saturating_sub(1);
        let spaces = self.spaces.iter().enumerate().map(|(index, runs)| {
            let pages = if index == last { self.room } else { runs.last().map_or(0, end_of) };
            let guest_address = address;
            address += pages * PAGE_SIZE as u64;
            Space { id: self.id(index), kind: SpaceKind::Memory, pages, guest_address }
        });
        Layout { spaces: spaces.collect() }
    }

    /// Tells where pages of a process are, piece by piece: first page, number, and place.
    pub(crate) fn find(&self, process: u32, first: u64, count: u64, each: &mut dyn FnMut(u64, u64, Place)) {
        let (mut page, end) = (first, first.saturating_add(count));
        let Some(runs) = self.pages.get(&process) else { return each(page, count, Place::Nowhere) };
        // The run that begins at the first page or before it may reach into what is asked for.
        let begin = runs.range(..=page).next_back().map_or(page, |(begin, _)| *begin);
        for (begin, (pages, space, slot)) in runs.range(begin..end) {
            let run_end = begin + u64::from(*pages);
            if run_end <= page {
                continue;
            }
            if *begin > page {
                each(page, begin - page, Place::Nowhere);
                page = *begin;
            }
            let until = run_end.min(end);
            each(page, until - page, Place::At(*space, slot + (page - begin)));
            page = until;
        }
        if page < end {
            each(page, end - page, Place::Nowhere);
        }
    }

    /// Gives pages that are nowhere a place in the last space, if there is room.
    pub(crate) fn add(&mut self, process: u32, first: u64, count: u64) -> Option<(SpaceId, u64)> {
        let last = self.spaces.len().checked_sub(1)?;
        let slot = self.spaces.get(last)?.last().map_or(0, end_of);
        if slot + count > self.room {
            return None;
        }
        self.append(process, first, count);
        Some((self.id(last), slot))
    }

    /// Tells whose pages are in a range of slots, piece by piece: first slot, number, process and first page. Slots that were never given to
    /// a page are left out.
    pub(crate) fn at(
        &self,
        space: SpaceId,
        first: u64,
        count: u64,
        each: &mut dyn FnMut(u64, u64, u32, u64),
    ) {
        let index = space.0.checked_sub(self.first).map(usize::from);
        let Some(runs) = index.and_then(|index| self.spaces.get(index)) else { return };
        let end = first.saturating_add(count);
        let begin = runs.partition_point(|run| end_of(run) <= first);
        for run in runs.iter().skip(begin).take_while(|run| run.slot < end) {
            let (from, until) = (run.slot.max(first), end_of(run).min(end));
            each(from, until - from, run.process, run.page + (from - run.slot));
        }
    }

    /// All of it, for the destination.
    pub(crate) fn placement(&self) -> Placement {
        Placement { runs: self.spaces.iter().flatten().copied().collect() }
    }

    /// The number of a space in the layout.
    fn id(&self, index: usize) -> SpaceId {
        // There are at most MAX_SPACES.
        SpaceId(self.first + index as u16)
    }

    /// Puts pages behind what the last space has.
    fn append(&mut self, process: u32, mut page: u64, mut count: u64) {
        let index = self.spaces.len().saturating_sub(1);
        let space = self.id(index);
        let Some(runs) = self.spaces.get_mut(index) else { return };
        let pages_of = self.pages.entry(process).or_default();
        while count > 0 {
            let pages = u32::try_from(count).unwrap_or(u32::MAX);
            let slot = runs.last().map_or(0, end_of);
            let next = runs.last_mut().filter(|run| {
                run.process == process
                    && run.page + u64::from(run.pages) == page
                    && run.pages.checked_add(pages).is_some()
            });
            let run = match next {
                Some(run) => {
                    run.pages += pages;
                    *run
                }
                None => {
                    let run = Run { process, page, pages, space, slot };
                    runs.push(run);
                    run
                }
            };
            pages_of.insert(run.page, (run.pages, run.space, run.slot));
            page += u64::from(pages);
            count -= u64::from(pages);
        }
    }
}

/// The slot behind a run.
fn end_of(run: &Run) -> u64 {
    run.slot + u64::from(run.pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(slots: &Slots, process: u32, first: u64, count: u64) -> Vec<(u64, u64, Place)> {
        let mut found = Vec::new();
        slots.find(process, first, count, &mut |page, count, place| found.push((page, count, place)));
        found
    }

    #[test]
    fn pages_are_found_where_they_were_put() {
        let mut slots =
            Slots::new(&[(1, vec![(10, 5), (20, 5)]), (7, vec![]), (9, vec![(10, 1)])], 100).unwrap();
        let pages: Vec<u64> = slots.layout().spaces.iter().map(|space| space.pages).collect();
        assert_eq!(pages, [10, 1, 100]);
        slots.layout().validate(u64::MAX).unwrap();
        let at = |space, slot| Place::At(SpaceId(space), slot);
        assert_eq!(
            found(&slots, 1, 8, 15),
            [(8, 2, Place::Nowhere), (10, 5, at(0, 0)), (15, 5, Place::Nowhere), (20, 3, at(0, 5))]
        );
        assert_eq!(found(&slots, 1, 12, 2), [(12, 2, at(0, 2))]);
        assert_eq!(found(&slots, 7, 12, 2), [(12, 2, Place::Nowhere)]);
        assert_eq!(slots.add(1, 15, 5), Some((SpaceId(2), 0)));
        assert_eq!(slots.add(7, 1, 95), Some((SpaceId(2), 5)));
        assert_eq!(slots.add(7, 200, 1), None, "there is no room");
        assert_eq!(found(&slots, 1, 14, 7), [(14, 1, at(0, 4)), (15, 5, at(2, 0)), (20, 1, at(0, 5))]);
        let mut pieces = Vec::new();
        slots.at(SpaceId(2), 3, 90, &mut |slot, count, process, page| {
            pieces.push((slot, count, process, page));
        });
        assert_eq!(pieces, [(3, 2, 1, 18), (5, 88, 7, 1)]);
        let placement = slots.placement();
        assert_eq!(Placement::decode(&slots.layout(), &placement.encode().unwrap()).unwrap(), placement);
    }

    #[test]
    fn a_space_alone_has_the_number_that_it_was_given() {
        let space = SpaceId(7);
        let mut slots = Slots::alone(space, 10);
        assert_eq!(
            (slots.add(3, 0, 4), slots.add(4, 1, 6), slots.add(4, 9, 1)),
            (Some((space, 0)), Some((space, 4)), None)
        );
        assert_eq!(found(&slots, 4, 0, 3), [(0, 1, Place::Nowhere), (1, 2, Place::At(space, 4))]);
        let mut pieces = Vec::new();
        slots.at(space, 2, 4, &mut |slot, count, file, page| pieces.push((slot, count, file, page)));
        assert_eq!(pieces, [(2, 2, 3, 2), (4, 2, 4, 1)]);
        slots.at(SpaceId(6), 0, 10, &mut |_, _, _, _| panic!("it has no other"));
        assert!(slots.placement().runs.iter().all(|run| run.space == space));
    }

    proptest! {
        #[test]
        fn every_page_has_one_slot_and_every_slot_one_page(
            first in prop::collection::vec((0_u64..6, 1_u64..9), 0..8),
            later in prop::collection::vec((0_u32..3, 0_u64..120, 1_u64..9), 0..20),
        ) {
            let mut end = 0;
            let runs: Vec<_> = first.into_iter().map(|(gap, pages)| {
                let page = end + gap;
                end = page + pages;
                (page, pages)
            }).collect();
            let mut slots = Slots::new(&[(1, runs)], 1000).unwrap();
            for (process, page, count) in later {
                for (page, count, place) in found(&slots, process, page, count) {
                    if place == Place::Nowhere {
                        slots.add(process, page, count).unwrap();
                    }
                }
            }
            let placement = slots.placement();
            let read = Placement::decode(&slots.layout(), &placement.encode().unwrap()).unwrap();
            prop_assert_eq!(&read, &placement);
            for run in placement.runs {
                for (index, page) in (run.page..run.page + u64::from(run.pages)).enumerate() {
                    let slot = run.slot + index as u64;
                    prop_assert_eq!(found(&slots, run.process, page, 1), [(page, 1, Place::At(run.space, slot))]);
                    let mut whose = Vec::new();
                    slots.at(run.space, slot, 1, &mut |slot, _, process, page| whose.push((slot, process, page)));
                    prop_assert_eq!(whose, [(slot, run.process, page)]);
                }
            }
        }
    }
}
