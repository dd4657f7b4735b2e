use super::*;
use std::os::unix::fs::PermissionsExt as _;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn init_then_load_is_the_same_identity_and_private() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("deep/keys");
    let made = Identity::init(&dir, "host-a", false).unwrap();
    assert_eq!(Identity::load(&dir).unwrap().fingerprint(), made.fingerprint());
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join(KEY_FILE)), 0o600);
    assert_eq!(mode(&dir.join(CERTIFICATE_FILE)), 0o600);
    assert!(!format!("{made:?}").contains("PRIVATE"));
}

#[test]
fn init_does_not_replace_a_key_unless_told_to() {
    let tmp = tempfile::tempdir().unwrap();
    let first = Identity::init(tmp.path(), "a", false).unwrap();
    let error = Identity::init(tmp.path(), "a", false).unwrap_err().to_string();
    assert!(error.contains("--force"), "{error}");
    assert_eq!(Identity::load(tmp.path()).unwrap().fingerprint(), first.fingerprint());
    let second = Identity::init(tmp.path(), "a", true).unwrap();
    assert_ne!(first.fingerprint(), second.fingerprint());
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    Identity::init(tmp.path(), "a", false).unwrap();
    for others in [0o640, 0o604, 0o620] {
        chmod(&tmp.path().join(KEY_FILE), others);
        let error = Identity::load(tmp.path()).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
    chmod(&tmp.path().join(KEY_FILE), 0o400);
    Identity::load(tmp.path()).unwrap();
}

#[test]
fn no_key_a_broken_key_and_a_foreign_certificate_say_what_to_do() {
    let tmp = tempfile::tempdir().unwrap();
    let error = Identity::load(tmp.path()).unwrap_err().to_string();
    assert!(error.contains("migrate keys init"), "{error}");

    let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
    Identity::init(&a, "a", false).unwrap();
    Identity::init(&b, "b", false).unwrap();
    std::fs::copy(b.join(CERTIFICATE_FILE), a.join(CERTIFICATE_FILE)).unwrap();
    assert!(Identity::load(&a).unwrap_err().to_string().contains("restore it"));
    for junk in [&b""[..], b"-----BEGIN PRIVATE KEY-----\n!!!\n-----END PRIVATE KEY-----\n", &[0xff; 4096]] {
        std::fs::write(b.join(KEY_FILE), junk).unwrap();
        assert!(Identity::load(&b).unwrap_err().to_string().contains("restore it"));
    }
    std::fs::write(b.join(KEY_FILE), vec![b'x'; 2 << 20]).unwrap();
    assert!(Identity::load(&b).unwrap_err().to_string().contains("larger than"));
}

#[test]
fn trust_is_added_listed_and_revoked_by_name_or_fingerprint() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("keys");
    let print = |name: &str| Identity::init(&tmp.path().join(name), name, false).unwrap().fingerprint();
    let (a, b, c) = (print("a"), print("b"), print("c"));
    let mut store = TrustStore::load(&dir).unwrap();
    assert!(store.list().is_empty());
    assert!(store.add("a", a).unwrap());
    assert!(!store.add("a", a).unwrap());
    // Another process adds at the same time: neither forgets the other's.
    TrustStore::load(&dir).unwrap().add("b", b).unwrap();
    assert!(store.add("c", c).unwrap());
    let names = |store: &TrustStore| store.list().iter().map(|host| host.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&store), ["a", "b", "c"]);
    assert_eq!(mode(&dir.join("trusted")), 0o600);
    assert_eq!(store.name_of(b), Some("b"));
    assert_eq!(store.keys_of("c"), [c]);

    let mut text = std::fs::read_to_string(dir.join("trusted")).unwrap();
    text.insert_str(0, "# mine\n\n");
    std::fs::write(dir.join("trusted"), text).unwrap();
    assert_eq!(store.revoke("a").unwrap().len(), 1);
    assert_eq!(store.revoke(&b.to_string()).unwrap().len(), 1);
    assert!(store.revoke("a").unwrap_err().to_string().contains("keys list"));
    assert_eq!(names(&TrustStore::load(&dir).unwrap()), ["c"]);
    assert!(std::fs::read_to_string(dir.join("trusted")).unwrap().starts_with("# mine\n\n"));
}

#[test]
fn a_bad_line_or_a_file_that_others_can_write_trusts_nobody() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("trusted");
    for bad in ["a", "a SHA256:short", "a b c", "na/me SHA256:short"] {
        std::fs::write(&path, format!("# fine\n{bad}\n")).unwrap();
        chmod(&path, 0o600);
        let error = TrustStore::load(tmp.path()).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(TrustStore::load(tmp.path()).unwrap_err().to_string().contains("not text"));
    std::fs::write(&path, "").unwrap();
    chmod(&path, 0o660);
    assert!(TrustStore::load(tmp.path()).unwrap_err().to_string().contains("chmod 600"));
}

#[test]
fn names_that_could_break_the_file_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let print = Identity::init(&tmp.path().join("k"), "k", false).unwrap().fingerprint();
    let mut store = TrustStore::load(tmp.path()).unwrap();
    for bad in ["", "a b", "a\nb", "#a", "SHA256:x", &"x".repeat(300)] {
        assert!(store.add(bad, print).is_err(), "{bad:?}");
    }
}
