//! A store in a directory.

use crate::contract;
use migrate::store::{self, LocalStore, Store};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

#[test]
fn a_store_in_a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let next = std::cell::Cell::new(0);
    contract::check(&|| {
        next.set(next.get() + 1);
        Arc::new(LocalStore::new(&dir.path().join(format!("deep/er/{}", next.get()))))
    });
}

#[test]
fn a_store_is_opened_by_its_path_and_nothing_is_made_before_it_is_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = store::open(path.to_str().unwrap()).unwrap();
    assert_eq!(store.place(), path.to_str().unwrap());
    assert!(store.list("").unwrap().is_empty() && store.leftovers().unwrap().is_empty());
    store.delete("store.json").unwrap();
    assert!(store.open("store.json").is_err());
    assert!(!path.exists());
    store.put("store.json", b"x").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700, "others can read what was in the memory of guests");
    assert_eq!(mode(&path.join("store.json")), 0o600);
    for wrong in ["", "ftp://x/y", "https://x"] {
        assert!(matches!(store::open(wrong), Err(migrate::Error::Usage(_))), "{wrong}");
    }
}

#[test]
fn what_is_no_object_is_not_taken_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::new(dir.path());
    store.put("data/x/index", b"x").unwrap();
    fs::write(dir.path().join("data/.nfs0001"), "x").unwrap();
    fs::write(dir.path().join("data/x y"), "x").unwrap();
    fs::create_dir(dir.path().join("data/empty")).unwrap();
    symlink("/etc/passwd", dir.path().join("data/link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("data/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let listed: Vec<_> = store.list("").unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(listed, ["data/x/index"]);
    for name in ["data/fifo", "data/empty"] {
        let text = store.open(name).err().unwrap().to_string();
        assert!(text.contains(name) && text.contains("no file"), "{text}");
    }
}

#[test]
fn what_a_crash_left_is_listed_and_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::new(dir.path());
    let mut writer = store.create("data/x/segment-00000").unwrap();
    writer.append(&vec![7; 3 << 20]).unwrap();
    // As after a crash: nobody tidies up.
    std::mem::forget(writer);
    let left = store.leftovers().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].bytes, 3 << 20);
    assert!(store.list("").unwrap().is_empty());
    store.remove_leftover(&left[0].name).unwrap();
    assert_eq!(store.leftovers().unwrap(), []);
}

#[test]
fn a_lock_of_somebody_who_is_gone_is_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("lock"),
        r#"{"owner":"checkpoint web","host":"gone","pid":1,"since_unix_ms":1,"token":"x"}"#,
    )
    .unwrap();
    let store: Arc<dyn Store> = Arc::new(LocalStore::new(dir.path()));
    let lease = store.lock("compact").unwrap();
    // Whoever removes the file takes the lock away.
    lease.check().unwrap();
    fs::remove_file(dir.path().join("lock")).unwrap();
    lease.check().unwrap_err();
    let text = {
        fs::write(dir.path().join("lock"), "").unwrap();
        lease.check().unwrap_err().to_string()
    };
    assert!(text.contains("was replaced"), "{text}");
}

#[test]
fn a_store_that_cannot_be_written_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let store = LocalStore::new(&dir.path().join("file/store"));
    let text = store.put("store.json", b"x").unwrap_err().to_string();
    assert!(text.contains("store.json") && text.contains("file/store"), "{text}");
    // Even for root nothing can be made there.
    let text = LocalStore::new(Path::new("/proc/store")).put("store.json", b"x").unwrap_err().to_string();
    assert!(text.contains("store.json"), "{text}");
}
