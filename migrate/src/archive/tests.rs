use super::*;
use crate::cancel::CancelFlag;
use crate::exit;
use crate::restore::image::Image;
use crate::seal::StoreKey;
use crate::store::MemoryStore;
use crate::vault::{Vault, sample};
use protocol::checkpoint::name::{self, CheckpointId};
use std::sync::Arc;

fn exported(vault: &Vault, id: CheckpointId) -> Vec<u8> {
    let mut bytes = Vec::new();
    export(vault, id, &mut bytes, &CancelFlag::default()).unwrap();
    bytes
}

fn imported(vault: &Vault, archive: &[u8]) -> crate::Result<Imported> {
    let lease = vault.store().lock("a test").unwrap();
    import(vault, &mut &*archive, &*lease, &CancelFlag::default())
}

fn forecast(vault: &Vault, archive: &[u8]) -> crate::Result<Imported> {
    import_forecast(vault, &mut &*archive, &CancelFlag::default())
}

fn names(vault: &Vault) -> Vec<String> {
    vault.store().list("").unwrap().into_iter().map(|found| found.name).collect()
}

fn sealed() -> Vault {
    Vault::create(Arc::new(MemoryStore::new()), Some(&StoreKey::from_bytes([1; 32]))).unwrap()
}

#[test]
fn a_checkpoint_is_carried_with_all_that_it_stands_on() {
    for (from, to) in [(sample::vault(), sample::vault()), (sealed(), sealed())] {
        let (links, _) = sample::chain(&from, 3);
        let id = links[2].manifest.id;
        let archive = exported(&from, id);
        let mut written = Vec::new();
        let done = export(&from, id, &mut written, &CancelFlag::default()).unwrap();
        assert_eq!(export_forecast(&from, id).unwrap(), done);
        let expected = forecast(&to, &archive).unwrap();
        assert_eq!(names(&to), [name::STORE]);
        let found = imported(&to, &archive).unwrap();
        assert_eq!(expected, found);
        assert_eq!((found.id, found.checkpoints), (id, 3));
        assert_eq!(to.manifests().unwrap().committed, links[..3]);
        Image::open(&to, id).unwrap().each(&CancelFlag::default(), &mut |_, _, _| Ok(())).unwrap();
        // Once more there is nothing to do; with another link, only that.
        let again = imported(&to, &archive).unwrap();
        assert_eq!((again.checkpoints, again.objects, again.bytes), (0, 0, 0));
        assert_eq!(forecast(&to, &archive).unwrap(), again);
        let rest = imported(&to, &exported(&from, links[3].manifest.id)).unwrap();
        assert_eq!(rest.checkpoints, 1);
        assert_eq!(to.manifests().unwrap().committed, links);
    }
}

#[test]
fn an_archive_that_is_cut_or_damaged_leaves_no_checkpoint() {
    let from = sample::vault();
    let mut memory = sample::Memory::new(8);
    memory.noise(0, 1);
    let full = memory.checkpoint(&from, sample::id(0), "web-1", None);
    memory.noise(1, 2);
    let archive = exported(&from, memory.checkpoint(&from, sample::id(1), "web-1", Some(&full)).manifest.id);
    let to = sample::vault();
    // All but the zeros at its end.
    let end = archive.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    for length in (0..end).step_by(97) {
        forecast(&to, &archive[..length]).unwrap_err();
        let error = imported(&to, &archive[..length]).unwrap_err();
        assert!([3, 12].contains(&exit::code(&error)), "{length}: {error}");
        assert_eq!(names(&to), [name::STORE], "{length}: {error}");
    }
    // Padding between entries and some fields of tar are nobody's.
    let mut refused = 0;
    for at in (0..end).step_by(61) {
        let mut changed = archive.clone();
        changed[at] ^= 1;
        if imported(&to, &changed).is_err() {
            assert_eq!(names(&to), [name::STORE], "byte {at}");
            refused += 1;
            continue;
        }
        Image::open(&to, sample::id(1)).unwrap().each(&CancelFlag::default(), &mut |_, _, _| Ok(())).unwrap();
        for name in names(&to).iter().filter(|found| *found != name::STORE) {
            to.store().delete(name).unwrap();
        }
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn an_archive_fits_only_a_store_that_is_sealed_alike() {
    let (open, shut) = (sample::vault(), sealed());
    let (links, _) = sample::chain(&open, 0);
    let archive = exported(&open, links[0].manifest.id);
    let error = imported(&shut, &archive).unwrap_err();
    assert_eq!(exit::code(&error), 2, "{error}");
    sample::chain(&shut, 0);
    let error = imported(&sample::vault(), &exported(&shut, links[0].manifest.id)).unwrap_err();
    assert_eq!(exit::code(&error), 2, "{error}");
}

#[test]
fn names_that_no_manifest_speaks_of_are_refused() {
    let from = sample::vault();
    let (links, _) = sample::chain(&from, 0);
    let archive = exported(&from, links[0].manifest.id);
    for name in ["../x", "data/x", "lock", "data/20261123T194831Z-00000000/segment-00007", "checkpoints/x"] {
        let mut longer = archive[..archive.len() - 1024].to_vec();
        let mut header = tar::Header::new_ustar();
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(3);
        header.set_mode(0o600);
        header.set_cksum();
        longer.extend_from_slice(header.as_bytes());
        longer.extend_from_slice(&[7; 512]);
        longer.extend_from_slice(&[0; 1024]);
        let to = sample::vault();
        let error = imported(&to, &longer).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        assert_eq!(names(&to), [name::STORE]);
    }
}
