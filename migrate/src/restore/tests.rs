//! Restores from a store in memory into scripted destinations.

use super::report::{Event, Report};
use super::{Options, restore, take_up};
use crate::cancel::CancelFlag;
use crate::destination::scripted::{Call, Scripted, Site};
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::source::scripted::{Who, Witness};
use crate::vault::sample::{Memory, id, vault};
use crate::vault::{Committed, Vault};
use proptest::prelude::*;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::checkpoint::object::HEADER_BYTES;
use protocol::control::{Offer, RefuseCode};
use protocol::page::PageSet;
use protocol::state::State;
use std::sync::Arc;

/// A scripted destination that is given the state of a sample.
struct Place(Box<Scripted>, CheckpointId);

impl Destination for Place {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        self.0.prepare(offer, machine)
    }
    fn memory(&self) -> Arc<dyn PageMemory> {
        self.0.memory()
    }
    fn load(&mut self, state: &[u8]) -> Result<()> {
        assert_eq!(state, self.1.to_string().as_bytes(), "the state of another checkpoint");
        let mut scripted = State::default();
        scripted.push("scripted", 1, Vec::new());
        self.0.load(&scripted.encode()?)
    }
    fn start(self: Box<Self>, migration: MigrationId) -> Result<String> {
        self.0.start(migration)
    }
    fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        self.0.expect(missing)
    }
    fn start_incomplete(self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>> {
        self.0.start_incomplete(migration)
    }
    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        self.0.take_up(migration)
    }
    fn discard(self: Box<Self>) {
        self.0.discard();
    }
}

/// A chain in a store, and the memory of each link.
struct Scene {
    vault: Vault,
    links: Vec<Committed>,
    images: Vec<Vec<Vec<u8>>>,
}

impl Scene {
    fn new(seed: u64, deltas: u32) -> Self {
        let vault = vault();
        let mut memory = Memory::new(seed);
        let (mut links, mut images) = (Vec::new(), Vec::new());
        for number in 0..=deltas {
            memory.write(if number == 0 { 14 } else { 3 });
            let link = memory.checkpoint(&vault, id(number), "web-1", links.last());
            links.push(link);
            images.push(memory.spaces.clone());
        }
        Self { vault, links, images }
    }

    fn newest(&self) -> CheckpointId {
        self.links.last().unwrap().manifest.id
    }

    /// Who must see the memory of this link.
    fn witness(&self, link: usize) -> Witness {
        let witness = Witness::default();
        witness.frozen_with(&self.images[link]);
        witness
    }

    fn restore(&self, link: usize, witness: &Witness, lazy: bool) -> Result<Report> {
        let place = Scripted::new(witness.clone(), None);
        self.restore_to(link, place, lazy, &CancelFlag::default(), &mut |_| {})
    }

    fn restore_to(
        &self,
        link: usize,
        place: Box<Scripted>,
        lazy: bool,
        cancel: &CancelFlag,
        observer: &mut dyn FnMut(&Event),
    ) -> Result<Report> {
        let id = self.links[link].manifest.id;
        let options = Options { lazy, ..Options::new(u64::MAX) };
        restore(&self.vault, id, Box::new(Place(place, id)), &options, cancel, observer)
    }
}

fn assert_arrived(witness: &Witness) {
    assert!(witness.is_running(Who::Destination) && witness.memory_arrived() && !witness.saw_wrong_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn what_runs_has_exactly_the_memory_of_its_checkpoint(seed in any::<u64>(), deltas in 0u32..7) {
        let scene = Scene::new(seed, deltas);
        for link in 0..scene.links.len() {
            for lazy in [false, true] {
                let witness = scene.witness(link);
                let report = scene.restore(link, &witness, lazy).unwrap();
                assert_arrived(&witness);
                prop_assert_eq!(report.links as usize, link + 1);
                prop_assert_eq!(report.lazily.is_some(), lazy && report.data_pages > 0);
            }
        }
    }
}

#[test]
fn a_checkpoint_is_restored_twice_at_once() {
    let scene = Scene::new(3, 4);
    std::thread::scope(|scope| {
        for lazy in [true, false, true] {
            let scene = &scene;
            scope.spawn(move || {
                let witness = scene.witness(4);
                scene.restore(4, &witness, lazy).unwrap();
                assert_arrived(&witness);
            });
        }
    });
}

#[test]
fn whatever_fails_nothing_runs() {
    let scene = Scene::new(5, 2);
    for (lazy, calls) in [
        (false, &[Call::Prepare, Call::Write, Call::Load, Call::Start][..]),
        (true, &[Call::Prepare, Call::Load, Call::Expect, Call::Start][..]),
    ] {
        for call in calls {
            let witness = scene.witness(2);
            let place = Scripted::new(witness.clone(), Some(*call));
            let error = scene.restore_to(2, place, lazy, &CancelFlag::default(), &mut |_| {}).unwrap_err();
            assert!(error.to_string().contains("as the script says"), "{call:?}: {error}");
            assert!(!witness.is_running(Who::Destination), "{call:?}");
        }
    }
}

#[test]
fn too_little_memory_is_refused_before_anything_is_read() {
    let scene = Scene::new(5, 0);
    let witness = scene.witness(0);
    let place = Box::new(Place(Scripted::new(witness, None), id(0)));
    let mut steps = Vec::new();
    let error = restore(
        &scene.vault,
        id(0),
        place,
        &Options::new(389 * 4096),
        &CancelFlag::default(),
        &mut |event| {
            if let Event::Step { step } = event {
                steps.push(step.name());
            }
        },
    )
    .unwrap_err();
    assert!(matches!(error, Error::Refused { code: RefuseCode::Memory, .. }), "{error}");
    assert!(error.to_string().contains(&id(0).to_string()), "{error}");
    assert_eq!(steps, ["chain"]);
}

#[test]
fn an_interrupted_restore_leaves_nothing() {
    let scene = Scene::new(5, 1);
    for lazy in [false, true] {
        let (witness, cancel) = (scene.witness(1), CancelFlag::default());
        assert!(cancel.set());
        let place = Scripted::new(witness.clone(), None);
        let error = scene.restore_to(1, place, lazy, &cancel, &mut |_| {}).unwrap_err();
        assert!(matches!(error.root(), Error::Interrupted(_)), "{error}");
        assert!(!witness.is_running(Who::Destination));
    }
}

/// Replaces an object, or removes it.
fn put(vault: &Vault, name: &str, bytes: Option<&[u8]>) {
    vault.store().delete(name).unwrap();
    if let Some(bytes) = bytes {
        vault.store().put(name, bytes).unwrap();
    }
}

fn objects(vault: &Vault) -> Vec<(String, Vec<u8>)> {
    let names = vault.store().list("").unwrap().into_iter().map(|found| found.name);
    names
        .map(|name| {
            let reader = vault.store().open(&name).unwrap();
            let mut bytes = vec![0; reader.bytes() as usize];
            reader.read_at(0, &mut bytes).unwrap();
            (name, bytes)
        })
        .collect()
}

#[test]
fn damage_of_every_kind_is_named_and_starts_nothing() {
    let scene = Scene::new(11, 3);
    let mut damaged = 0;
    for (name, whole) in objects(&scene.vault) {
        if name == "store.json" {
            continue;
        }
        let mut versions = vec![None, Some(whole[..whole.len() - 1].to_vec()), Some(Vec::new())];
        let mut longer = whole.clone();
        longer.push(0);
        versions.push(Some(longer));
        let mut newer = whole.clone();
        newer[8] = 2;
        versions.push(Some(newer));
        let places =
            (0..HEADER_BYTES).step_by(7).chain((HEADER_BYTES..whole.len()).step_by(whole.len() / 24 + 1));
        for at in places.filter(|at| *at < whole.len()) {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            versions.push(Some(flipped));
        }
        let is_data = name.contains("/segment-");
        for (number, version) in versions.iter().enumerate() {
            put(&scene.vault, &name, version.as_deref());
            let witness = scene.witness(3);
            match scene.restore(3, &witness, false) {
                // A page that is hidden by a newer one, or a link that has nothing more to say.
                Ok(_) => assert_arrived(&witness),
                Err(error) => {
                    damaged += 1;
                    let text = error.to_string();
                    assert!(matches!(error.root(), Error::Store(_)), "{name}, {number}: {text}");
                    let checkpoint = name.split('/').nth(1).unwrap();
                    assert!(text.contains(checkpoint), "{name}, {number}: {text}");
                    assert!(!is_data || text.contains(&name), "{name}, {number}: {text}");
                    assert!(!witness.is_running(Who::Destination), "{name}, {number}");
                    if number == 4 && !is_data {
                        assert!(text.contains("version"), "{name}: {text}");
                    }
                    if !is_data || number < 5 {
                        // Known before a lazy one is started, too.
                        let witness = scene.witness(3);
                        scene.restore(3, &witness, true).unwrap_err();
                        assert!(!witness.is_running(Who::Destination), "{name}, {number}");
                    }
                }
            }
        }
        put(&scene.vault, &name, Some(&whole));
    }
    assert!(damaged > 150, "{damaged}");
    let witness = scene.witness(3);
    scene.restore(3, &witness, true).unwrap();
    assert_arrived(&witness);
}

/// Flips a bit in each extent of the segments of a link.
fn damage(scene: &Scene, link: usize) -> Vec<(String, Vec<u8>)> {
    let of = scene.links[link].manifest.id.to_string();
    let mut whole = objects(&scene.vault);
    whole.retain(|(name, _)| name.contains(&of) && name.contains("/segment-"));
    for (name, bytes) in &whole {
        let mut flipped = bytes.clone();
        flipped.iter_mut().skip(16).for_each(|byte| *byte ^= 1);
        put(&scene.vault, name, Some(&flipped));
    }
    whole
}

#[test]
fn a_running_workload_waits_until_the_store_is_well_again() {
    let scene = Scene::new(7, 2);
    let whole = damage(&scene, 0);
    let witness = scene.witness(2);
    let place = Scripted::new(witness.clone(), None);
    let mut troubles = Vec::new();
    let report = scene
        .restore_to(2, place, true, &CancelFlag::default(), &mut |event| {
            if let Event::StoreTrouble { reason, missing_pages } = event {
                assert!(*missing_pages > 0);
                troubles.push(reason.clone());
                whole.iter().for_each(|(name, bytes)| put(&scene.vault, name, Some(bytes)));
            }
        })
        .unwrap();
    assert!(troubles[0].contains(&id(0).to_string()) && troubles[0].contains("segment-"), "{troubles:?}");
    assert!(report.lazily.unwrap().failed_reads > 0);
    assert_arrived(&witness);
}

#[test]
fn what_an_ended_restore_left_is_taken_up_from_the_same_checkpoint_only() {
    let scene = Scene::new(9, 2);
    let whole = damage(&scene, 0);
    let (witness, site) = (scene.witness(2), Site::default());
    let cancel = CancelFlag::default();
    let place = Scripted::at(site.clone(), witness.clone(), None);
    let (mut troubled, mut migration) = (false, None);
    let error = scene
        .restore_to(2, place, true, &cancel, &mut |event| {
            troubled |= matches!(event, Event::StoreTrouble { .. });
            // Once and once more, as an operator would.
            if troubled {
                cancel.set_all();
            }
            if let Event::Running { migration: of, .. } = event {
                migration = Some(*of);
            }
        })
        .unwrap_err();
    assert!(error.to_string().contains("--resume scripted"), "{error}");
    assert!(witness.is_running(Who::Destination) && !witness.memory_arrived());
    whole.iter().for_each(|(name, bytes)| put(&scene.vault, name, Some(bytes)));
    let migration = migration.unwrap();
    let go_on = |link| {
        let id: CheckpointId = scene.links[link as usize].manifest.id;
        let place = Place(Scripted::at(site.clone(), witness.clone(), None), id);
        let options = Options::new(u64::MAX);
        take_up(&scene.vault, id, &place, migration, &options, &CancelFlag::default(), &mut |_| {})
    };
    let error = go_on(1).unwrap_err();
    assert!(error.to_string().contains("was not restored from checkpoint"), "{error}");
    assert!(!witness.memory_arrived());
    go_on(2).unwrap();
    assert_arrived(&witness);
    go_on(2).unwrap_err();
}

#[test]
fn first_touches_are_recorded_for_the_next_one() {
    let scene = Scene::new(13, 1);
    let recorded = || {
        let witness = scene.witness(1);
        let report = scene.restore(1, &witness, true).unwrap();
        assert_arrived(&witness);
        report.lazily.unwrap().recorded_extents
    };
    assert_eq!(recorded(), 0);
    let layout = &scene.links[1].manifest.layout;
    for _ in 0..20 {
        recorded();
    }
    let records = scene.vault.touched(scene.newest(), layout);
    assert!((1..=8).contains(&records.len()), "{}", records.len());
    assert!(recorded() > 0);
    // A record that is damaged is none.
    for (name, bytes) in objects(&scene.vault) {
        if name.starts_with("touched/") {
            put(&scene.vault, &name, Some(&bytes[..bytes.len() / 2]));
        }
    }
    assert_eq!(recorded(), 0);
}
