//! The key of a store: 32 random bytes as 64 hexadecimal digits in a file that only its owner may read.

use crate::error::{Error, Result};
use crate::identity::files::{self, Guard};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

const KEY_BYTES: usize = 32;

/// See the module.
#[derive(Clone)]
pub struct StoreKey([u8; KEY_BYTES]);

/// Never shows the key.
impl std::fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoreKey")
    }
}

impl StoreKey {
    /// Makes a key and writes it to a file that is not there yet.
    ///
    /// # Errors
    /// `Identity` when there is a file, or it cannot be written; `Host` when the system gives no random numbers.
    pub fn generate(path: &Path) -> Result<Self> {
        let mut key = [0; KEY_BYTES];
        aws_lc_rs::rand::fill(&mut key)
            .map_err(|_| Error::Host("the system gives no random numbers: no key can be made".into()))?;
        let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let write = || {
            // Never over another one: what is sealed with that would be lost.
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(digits.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        };
        match write() {
            Ok(()) => Ok(Self(key)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::Identity(format!(
                "{} is there already: what is sealed with a key is lost without it, so none is replaced; name another file",
                path.display()
            ))),
            Err(error) => Err(Error::Identity(format!("cannot write the key {}: {error}", path.display()))),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// `Identity` when there is none, others may read it, or it is no key.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let text = files::read(path, Guard::Secret)?.ok_or_else(|| {
            Error::Identity(format!("there is no key {shown}: `migrate store key {shown}` makes one"))
        })?;
        Self::parse(&text).ok_or_else(|| {
            Error::Identity(format!(
                "{shown} is no key of a store: it has 64 hexadecimal digits and nothing else"
            ))
        })
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let (pairs, rest) = text.trim_ascii().as_chunks::<2>();
        if pairs.len() != KEY_BYTES || !rest.is_empty() {
            return None;
        }
        let mut key = [0; KEY_BYTES];
        for (byte, [high, low]) in key.iter_mut().zip(pairs) {
            let digit = |character: u8| char::from(character).to_digit(16);
            *byte = u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()?;
        }
        Some(Self(key))
    }

    /// From bytes that are kept elsewhere.
    pub fn from_bytes(key: [u8; KEY_BYTES]) -> Self {
        Self(key)
    }

    pub(super) fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_key_reads_back_and_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.key");
        let text = StoreKey::load(&path).unwrap_err().to_string();
        assert!(text.contains("migrate store key"), "{text}");
        let key = StoreKey::generate(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&path).unwrap().len(), 65);
        assert_eq!(StoreKey::load(&path).unwrap().bytes(), key.bytes());
        assert_eq!(format!("{key:?}"), "StoreKey");
        let before = fs::read(&path).unwrap();
        assert!(StoreKey::generate(&path).unwrap_err().to_string().contains("there already"));
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_ne!(StoreKey::generate(&dir.path().join("another")).unwrap().bytes(), key.bytes());
        StoreKey::generate(&dir.path().join("none/store.key")).unwrap_err();
    }

    #[test]
    fn a_key_that_others_may_read_or_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.key");
        let key = StoreKey::generate(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let text = StoreKey::load(&path).unwrap_err().to_string();
        assert!(text.contains("chmod 600"), "{text}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let digits: String = key.bytes().iter().map(|byte| format!("{byte:02X}")).collect();
        fs::write(&path, format!("  {digits}\n\n")).unwrap();
        assert_eq!(StoreKey::load(&path).unwrap().bytes(), key.bytes());
        for wrong in ["", "x", &digits[..62], &format!("{digits}0"), &digits.replacen(&digits[..1], "g", 1)] {
            fs::write(&path, wrong).unwrap();
            StoreKey::load(&path).unwrap_err();
        }
    }
}
