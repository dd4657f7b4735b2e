#[path = "../../tests/format/reader.rs"]
mod reader;

use super::sample::{Memory, chain, id, vault};
use super::*;
use crate::exit;
use crate::store::{LocalStore, MemoryStore};
use protocol::checkpoint::index::At;
use protocol::checkpoint::manifest::Group;
use protocol::checkpoint::segment::Encoding;
use protocol::page::PAGE_SIZE;
use std::path::Path;

/// The memory that a chain stands for, page by page from the newest link that has it.
fn restored(vault: &Vault, id: CheckpointId) -> Result<Vec<Vec<u8>>> {
    let links = vault.chain(id)?;
    let layout = &links[0].manifest.layout;
    let mut spaces: Vec<_> =
        layout.spaces.iter().map(|space| vec![0; space.pages as usize * PAGE_SIZE]).collect();
    let mut unpacker = Unpacker::default();
    for link in links.iter().rev() {
        let index = vault.index(&link.manifest)?;
        let readers: Result<Vec<_>> =
            link.manifest.segments.iter().map(|segment| SegmentReader::open(vault, segment)).collect();
        let (readers, starts) = (readers?, index.sum_starts());
        for placed in &index.runs {
            let target = &mut spaces[usize::from(placed.run.space.0)][placed.run.offset() as usize..]
                [..placed.run.bytes()];
            let At::Extent { extent: at, page } = placed.at else {
                target.fill(0);
                continue;
            };
            let extent = &index.extents[at as usize];
            let reader = &readers[extent.segment as usize];
            let from = usize::from(page) * PAGE_SIZE;
            let pages = reader.read(extent, &mut unpacker)?;
            target.copy_from_slice(&pages[from..from + placed.run.bytes()]);
            // The same by pages alone, where that can be.
            let count = placed.run.count as usize;
            let sums = &index.sums[starts[at as usize] + usize::from(page)..][..count];
            let part = reader.part(extent, page, placed.run.count as u16);
            assert_eq!(part.is_some(), extent.encoding == Encoding::Raw);
            if let Some(part) = part {
                let mut stored = vec![0; (part.end - part.start) as usize];
                reader.fetch(part.start, &mut stored)?;
                assert_eq!(reader.decode_part(extent, page, sums, &stored, &mut unpacker)?, target);
            }
        }
    }
    Ok(spaces)
}

#[test]
fn a_chain_holds_the_memory_of_each_of_its_links() {
    let vault = vault();
    let (links, images) = chain(&vault, 4);
    for (link, image) in links.iter().zip(&images) {
        assert!(restored(&vault, link.manifest.id).unwrap() == *image, "{}", link.manifest.id);
        let state = vault.state(&link.manifest).unwrap();
        assert_eq!(state, (b"machine".to_vec(), link.manifest.id.to_string().into_bytes()));
    }
    let found = vault.chain(links[4].manifest.id).unwrap();
    assert!(found.iter().eq(links.iter().rev()), "the newest first");
    let again = Vault::open(Arc::clone(vault.store()), None).unwrap();
    assert_eq!(again.info(), vault.info());
    assert_eq!(again.manifests().unwrap().committed, links);
}

fn key(byte: u8) -> StoreKey {
    StoreKey::from_bytes([byte; 32])
}

/// A full checkpoint and a delta of a memory of a few pages.
fn small(key: Option<&StoreKey>) -> (Vault, MemoryStore, CheckpointId) {
    let store = MemoryStore::new();
    let vault = Vault::create(Arc::new(store.clone()), key).unwrap();
    write_small(&vault);
    (vault, store, id(1))
}

fn write_small(vault: &Vault) -> Memory {
    let mut layout = sample::layout();
    layout.spaces[0].pages = 3;
    layout.spaces[1].pages = 2;
    let mut memory = Memory::of(layout, 3);
    memory.write(4);
    memory.noise(0, 0);
    memory.noise(1, 1);
    let full = memory.checkpoint(vault, id(0), "web-1", None);
    memory.noise(0, 1);
    memory.checkpoint(vault, id(1), "web-1", Some(&full));
    memory
}

/// Reads everything that a restore does.
fn read_all(store: &MemoryStore, key: Option<&StoreKey>, id: CheckpointId) -> Result<()> {
    let vault = Vault::open(Arc::new(store.clone()), key)?;
    let chain = vault.chain(id)?;
    vault.state(&chain[0].manifest)?;
    vault.state(&chain[1].manifest)?;
    restored(&vault, id).map(drop)
}

#[test]
fn any_byte_that_is_flipped_is_noticed_and_named() {
    flip_every_byte(None);
}

#[test]
fn any_byte_of_a_sealed_store_that_is_flipped_is_noticed_and_named() {
    flip_every_byte(Some(&key(1)));
}

fn flip_every_byte(key: Option<&StoreKey>) {
    let (vault, store, delta) = small(key);
    read_all(&store, key, delta).unwrap();
    let mut flipped = 0;
    for object in vault.store().list("").unwrap() {
        let reader = vault.store().open(&object.name).unwrap();
        let mut bytes = vec![0; object.bytes as usize];
        reader.read_at(0, &mut bytes).unwrap();
        for at in 0..bytes.len() {
            bytes[at] ^= 1 << (at % 8);
            store.delete(&object.name).unwrap();
            store.put(&object.name, &bytes).unwrap();
            let error =
                read_all(&store, key, delta).expect_err(&format!("byte {at} of {}", object.name)).to_string();
            assert!(error.contains(&object.name), "byte {at} of {}: {error}", object.name);
            bytes[at] ^= 1 << (at % 8);
            flipped += 1;
        }
        store.delete(&object.name).unwrap();
        store.put(&object.name, &bytes).unwrap();
    }
    read_all(&store, key, delta).unwrap();
    assert!(flipped > 10_000, "{flipped}");
}

#[test]
fn any_object_that_is_cut_or_gone_is_noticed_and_named() {
    let (vault, store, delta) = small(None);
    for object in vault.store().list("").unwrap() {
        let reader = vault.store().open(&object.name).unwrap();
        let mut bytes = vec![0; object.bytes as usize];
        reader.read_at(0, &mut bytes).unwrap();
        for length in [0, 7, 16, 55, 56, bytes.len() - 1, bytes.len() + 1] {
            let mut other = bytes.clone();
            other.resize(length, 0);
            store.delete(&object.name).unwrap();
            store.put(&object.name, &other).unwrap();
            let error = read_all(&store, None, delta).expect_err(&object.name).to_string();
            assert!(error.contains(&object.name), "{length} bytes of {}: {error}", object.name);
        }
        store.delete(&object.name).unwrap();
        let error = read_all(&store, None, delta).expect_err(&object.name).to_string();
        let id = wrong::checkpoint_of(&object.name).map(|id| id.to_string()).unwrap_or_default();
        assert!(
            error.contains(&object.name) || !id.is_empty() && error.contains(&id),
            "{}: {error}",
            object.name
        );
        store.put(&object.name, &bytes).unwrap();
    }
}

#[test]
fn an_operator_names_a_checkpoint_in_many_ways() {
    let vault = vault();
    let (links, _) = chain(&vault, 2);
    let other = Memory::new(9).checkpoint(&vault, id(3), "db", None);
    let ids: Vec<_> = links.iter().map(|link| link.manifest.id).collect();
    let newest = other.manifest.id;
    let time = |id: CheckpointId| {
        humantime::format_rfc3339_seconds(UNIX_EPOCH + std::time::Duration::from_secs(id.unix_s()))
            .to_string()
    };
    for (text, expected) in [
        ("latest".to_owned(), newest),
        ("web-1".into(), ids[2]),
        ("web-1@latest".into(), ids[2]),
        ("db@latest".into(), newest),
        (ids[1].to_string(), ids[1]),
        (ids[1].to_string()[..15].into(), ids[1]),
        (time(ids[1]), ids[1]),
        (time(newest), newest),
        (format!("web-1@{}", time(newest)), ids[2]),
    ] {
        assert_eq!(vault.resolve(&text).unwrap(), expected, "{text}");
    }
    let ambiguous = vault.resolve(&ids[0].to_string()[..5]).unwrap_err();
    assert!(
        ambiguous.to_string().contains(&ids[3 - 1].to_string()) && exit::code(&ambiguous) == 2,
        "{ambiguous}"
    );
    for unknown in ["", "web-2", "web-1@1999-01-01T00:00:00Z", "1999-01-01T00:00:00Z", "web-1@x", "@latest"] {
        let error = vault.resolve(unknown).unwrap_err();
        assert!(
            error.to_string().contains("migrate store list") && exit::code(&error) == 12,
            "{unknown}: {error}"
        );
    }
}

#[test]
fn a_chain_with_a_link_missing_or_exchanged_says_which() {
    let vault = vault();
    let (links, _) = chain(&vault, 2);
    let [full, middle, top] = [0, 1, 2].map(|at: usize| links[at].manifest.id);
    let name = name::manifest(middle);
    vault.store().delete(&name).unwrap();
    let error = vault.chain(top).unwrap_err().to_string();
    assert!(
        error.contains(&top.to_string()) && error.contains(&middle.to_string()) && error.contains("gone"),
        "{error}"
    );
    // Another manifest in its place.
    let manifest = Manifest { pause_us: 99, ..links[1].manifest.clone() };
    vault.put_json(Kind::Manifest, &name, &manifest).unwrap();
    let error = vault.chain(top).unwrap_err().to_string();
    assert!(error.contains("is not the one it was taken on"), "{error}");
    assert_eq!(vault.chain(full).unwrap().len(), 1);
    // One that says it stands on itself, or on other memory.
    vault.store().delete(&name).unwrap();
    vault.put_json(Kind::Manifest, &name, &Manifest { id: full, ..manifest }).unwrap();
    let error = vault.chain(top).unwrap_err().to_string();
    assert!(error.contains("cannot be read") && error.contains("stored under another"), "{error}");
}

#[test]
fn what_is_damaged_does_not_hide_the_rest() {
    let vault = vault();
    let (links, _) = chain(&vault, 2);
    let name = name::manifest(links[1].manifest.id);
    vault.store().delete(&name).unwrap();
    vault.store().put(&name, b"not an object").unwrap();
    vault.store().put("checkpoints/noise", b"").unwrap();
    let listing = vault.manifests().unwrap();
    assert_eq!(listing.committed, [links[0].clone(), links[2].clone()]);
    let damaged: Vec<_> =
        listing.damaged.iter().map(|damaged| (damaged.object.as_str(), damaged.id)).collect();
    assert_eq!(damaged, [(name.as_str(), Some(links[1].manifest.id)), ("checkpoints/noise", None)]);
}

#[test]
fn a_member_exists_when_its_group_does() {
    let vault = vault();
    let mut memory = Memory::new(5);
    let alone = memory.checkpoint(&vault, id(0), "web-1", None);
    let group = id(9);
    let name = name::manifest(alone.manifest.id);
    vault.store().delete(&name).unwrap();
    let lease = vault.store().lock("a test").unwrap();
    let member = vault.commit(&*lease, Manifest { group: Some(group), ..alone.manifest }).unwrap();
    let error = vault.manifest(member.manifest.id).unwrap_err().to_string();
    assert!(error.contains("was never completed") && error.contains(&group.to_string()), "{error}");
    assert_eq!(vault.manifests().unwrap().orphans, std::slice::from_ref(&member));
    assert!(vault.resolve("latest").is_err());
    let value = Group { id: group, name: "app".into(), taken_unix_ms: 7, members: vec![member.as_parent()] };
    vault.put_json(Kind::Group, &name::group(group), &value).unwrap();
    assert_eq!(vault.manifest(member.manifest.id).unwrap(), member);
    assert_eq!(vault.resolve("latest").unwrap(), member.manifest.id);
    // One that lists another manifest of this name does not make it exist.
    vault.store().delete(&name::group(group)).unwrap();
    let mut wrong = member.as_parent();
    wrong.digest.0[0] ^= 1;
    vault.put_json(Kind::Group, &name::group(group), &Group { members: vec![wrong], ..value }).unwrap();
    vault.manifest(member.manifest.id).unwrap_err();
    assert!(vault.manifests().unwrap().committed.is_empty());
}

#[test]
fn a_store_is_opened_only_where_there_is_one_of_our_version() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let error = Vault::open(Arc::clone(&store), None).err().unwrap();
    assert!(error.to_string().contains("is no checkpoint store") && exit::code(&error) == 12, "{error}");
    let made = Vault::open_or_create(Arc::clone(&store), None).unwrap();
    assert!(Vault::create(Arc::clone(&store), None).is_err(), "there is one");
    assert_eq!(Vault::open_or_create(Arc::clone(&store), None).unwrap().info(), made.info());
    let mut newer = object::encode(Kind::Store, false, b"{}").0;
    newer[8] = 2;
    store.delete(name::STORE).unwrap();
    store.put(name::STORE, &newer).unwrap();
    let error = Vault::open(store, None).err().unwrap().to_string();
    assert!(error.contains("version 2") && error.contains(name::STORE), "{error}");
    assert!(!error.contains("other end"), "{error}");
}

#[test]
fn a_sealed_store_shows_nothing_and_is_opened_by_its_key_alone() {
    let (_, store, delta) = small(Some(&key(1)));
    read_all(&store, Some(&key(1)), delta).unwrap();
    for wrong in [None, Some(key(2))] {
        let error = Vault::open(Arc::new(store.clone()), wrong.as_ref()).err().unwrap();
        assert_eq!(exit::code(&error), 2, "{error}");
    }
    let (_, plain, same) = small(None);
    assert_eq!(same, delta);
    assert_eq!(exit::code(&read_all(&plain, Some(&key(1)), same).unwrap_err()), 2);
    // Somebody without the key puts what is not sealed in the place of what is.
    for object in plain.list("").unwrap().iter().filter(|object| object.name != name::STORE) {
        let mut bytes = [Vec::new(), Vec::new()];
        for (store, bytes) in [&store, &plain].into_iter().zip(&mut bytes) {
            let reader = store.open(&object.name).unwrap();
            bytes.resize(reader.bytes() as usize, 0);
            reader.read_at(0, bytes).unwrap();
        }
        let [sealed, forged] = bytes;
        assert!(!sealed.windows(16).any(|part| forged[56.min(forged.len() - 16)..].starts_with(part)));
        store.delete(&object.name).unwrap();
        store.put(&object.name, &forged).unwrap();
        let error = read_all(&store, Some(&key(1)), delta).unwrap_err().to_string();
        assert!(error.contains(&object.name), "{error}");
        store.delete(&object.name).unwrap();
        store.put(&object.name, &sealed).unwrap();
    }
}

#[test]
fn a_sealed_chain_holds_the_memory_of_each_of_its_links() {
    let vault = Vault::create(Arc::new(MemoryStore::new()), Some(&key(3))).unwrap();
    let (links, images) = chain(&vault, 2);
    for (link, image) in links.iter().zip(&images) {
        assert!(restored(&vault, link.manifest.id).unwrap() == *image, "{}", link.manifest.id);
    }
}

#[test]
fn a_reader_of_the_document_reads_what_is_written() {
    for key in [None, Some(key(5))] {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::create(Arc::new(LocalStore::new(folder.path())), key.as_ref()).unwrap();
        let (links, images) = chain(&vault, 3);
        let reader = reader::Reader::open(folder.path(), key.map(|_| [5; 32])).unwrap();
        for (link, image) in links.iter().zip(&images) {
            let id = link.manifest.id.to_string();
            let found = reader.restore(&id).unwrap();
            assert!(found.spaces == *image, "{id}");
            assert_eq!((found.machine, found.state), (b"machine".to_vec(), id.into_bytes()));
        }
    }
}

#[test]
fn the_golden_stores_are_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    if std::env::var_os("BLESS").is_some_and(|value| value == "1") {
        assert!(
            !golden.exists(),
            "what was written once is not written again: it is what must be read for ever"
        );
        for (folder, key) in [("open", None), ("sealed", Some(key(7)))] {
            let folder = golden.join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            let vault = Vault::create(Arc::new(LocalStore::new(&folder)), key.as_ref()).unwrap();
            let memory = write_small(&vault);
            std::fs::write(golden.join("memory.raw"), memory.spaces.concat()).unwrap();
            std::fs::remove_file(folder.join("lock")).unwrap();
            std::fs::remove_dir(folder.join("tmp")).unwrap();
        }
        // A run that blesses is not a run that tests.
        panic!("the golden stores were written: test without BLESS");
    }
    let memory = std::fs::read(golden.join("memory.raw")).unwrap();
    for (folder, key) in [("open", None), ("sealed", Some(key(7)))] {
        let vault = Vault::open(Arc::new(LocalStore::new(&golden.join(folder))), key.as_ref()).unwrap();
        let id = vault.resolve("latest").unwrap();
        assert!(restored(&vault, id).unwrap().concat() == memory, "{folder}");
        let state = vault.state(&vault.manifest(id).unwrap().manifest).unwrap();
        assert_eq!(state, (b"machine".to_vec(), id.to_string().into_bytes()));
    }
}
