//! Sealing: nobody without the store's key reads what its objects hold, or exchanges parts of them unnoticed.
//!
//! ```text
//! store key ──┬─ BLAKE3 derive_key "key check" ─▶ key check, in store.json
//!             └─ BLAKE3 derive_key "object", salt, name ─▶ key of one object ─▶ AES-256-GCM of each of its pieces
//! ```
//!
//! AES-GCM breaks when one nonce is used twice with one key. Every object has a key of its own, and a piece's nonce is its position
//! in the object, where nothing else ever lies. The salt makes the key a new one each time: a writer that was interrupted
//! leaves bytes under a name that is written again, and one key file may seal two stores that both know the name.
//! docs/checkpoint-format.md has it byte for byte.

mod key;

pub use key::StoreKey;

use crate::error::{Error, Result};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use protocol::checkpoint::manifest::{HexDigest, Seal};
use protocol::checkpoint::object::Digest;
use protocol::checkpoint::segment::TAG_BYTES;

/// Bytes of the salt that stands in front of what is sealed.
pub const SALT_BYTES: usize = 16;

/// What makes two objects' keys differ that have one name.
pub type Salt = [u8; SALT_BYTES];

/// The cipher's name in `store.json`.
const CIPHER: &str = "aes-256-gcm";

/// What the derived keys are for, as BLAKE3 wants it: never used for anything else.
const FOR_OBJECTS: &str = "migrate checkpoint store, format 1, key of an object";
const FOR_CHECK: &str = "migrate checkpoint store, format 1, key check";

/// Seals and opens the objects of a store.
#[derive(Clone)]
pub struct Sealer {
    key: StoreKey,
}

impl Sealer {
    /// With this key.
    pub fn new(key: &StoreKey) -> Self {
        Self { key: key.clone() }
    }

    /// What `store.json` says of the key.
    pub fn seal(&self) -> Seal {
        Seal { cipher: CIPHER.into(), key_check: HexDigest(self.key_check()) }
    }

    /// Checks that a store is sealed with this key.
    ///
    /// # Errors
    /// `Usage` when it is sealed with another one, or by a cipher that is not known.
    pub fn check(&self, seal: &Seal) -> Result<()> {
        if seal.cipher != CIPHER {
            let cipher = crate::error::clean(&seal.cipher);
            return Err(Error::Usage(format!(
                "the store is sealed by {cipher}, which this release does not know: use a newer one"
            )));
        }
        if seal.key_check.0 != self.key_check() {
            return Err(Error::Usage(
                "the store is sealed with another key: give the key file that it was made with to --encrypt"
                    .into(),
            ));
        }
        Ok(())
    }

    fn key_check(&self) -> Digest {
        *blake3::Hasher::new_derive_key(FOR_CHECK).update(self.key.bytes()).finalize().as_bytes()
    }

    /// The key of an object that is about to be written, and the salt to write in front of what is sealed.
    ///
    /// # Errors
    /// `Host` when the system gives no random numbers.
    pub fn begin(&self, name: &str) -> Result<(ObjectSeal, Salt)> {
        let mut salt = Salt::default();
        aws_lc_rs::rand::fill(&mut salt)
            .map_err(|_| Error::Host("the system gives no random numbers: nothing can be sealed".into()))?;
        Ok((self.object(name, &salt)?, salt))
    }

    /// The key of an object that was written with this salt.
    ///
    /// # Errors
    /// `Host` when the cipher cannot be used.
    pub fn object(&self, name: &str, salt: &Salt) -> Result<ObjectSeal> {
        let mut hasher = blake3::Hasher::new_derive_key(FOR_OBJECTS);
        // Key and salt have fixed lengths: no two triples make the same bytes.
        let derived = hasher.update(self.key.bytes()).update(salt).update(name.as_bytes()).finalize();
        let key = UnboundKey::new(&AES_256_GCM, derived.as_bytes())
            .map_err(|_| Error::Host("AES-256-GCM cannot be used here".into()))?;
        Ok(ObjectSeal { key: LessSafeKey::new(key), name: name.to_owned() })
    }

    /// Seals the body of an object that is one piece: it is the salt, the ciphertext and the tag then.
    ///
    /// # Errors
    /// `Host`.
    pub fn seal_body(&self, name: &str, body: &mut Vec<u8>) -> Result<()> {
        let (object, salt) = self.begin(name)?;
        object.seal(0, body)?;
        body.splice(..0, salt);
        Ok(())
    }

    /// Opens such a body.
    ///
    /// # Errors
    /// `Store` when it was not sealed by `seal_body` with this key and under this name, or is damaged.
    pub fn open_body(&self, name: &str, body: &mut Vec<u8>) -> Result<()> {
        let salt = *body.first_chunk().ok_or_else(|| wrong(name, 0))?;
        body.drain(..SALT_BYTES);
        let bytes = self.object(name, &salt)?.open(0, body)?;
        body.truncate(bytes);
        Ok(())
    }
}

/// Seals and opens the pieces of one object.
pub struct ObjectSeal {
    key: LessSafeKey,
    name: String,
}

impl ObjectSeal {
    /// Seals a piece in place and adds its tag of [`TAG_BYTES`]. A position, in bytes of the object, is used once.
    ///
    /// # Errors
    /// `Host`: only for pieces of more than 64 GiB, which the cipher cannot do.
    pub fn seal(&self, position: u64, bytes: &mut Vec<u8>) -> Result<()> {
        let tag = self.seal_in_place(position, bytes)?;
        bytes.extend_from_slice(&tag);
        Ok(())
    }

    /// Seals a piece in place and answers the tag to store behind it.
    ///
    /// # Errors
    /// As `seal`.
    pub fn seal_in_place(&self, position: u64, bytes: &mut [u8]) -> Result<[u8; TAG_BYTES]> {
        let sealed = self.key.seal_in_place_separate_tag(nonce(position), self.bound_to(position), bytes);
        let tag = sealed.ok().and_then(|tag| tag.as_ref().try_into().ok());
        tag.ok_or_else(|| Error::Host(format!("{} bytes of {} cannot be sealed", bytes.len(), self.name)))
    }

    /// Opens a piece with its tag in place: the plaintext is the first so many bytes then. Nothing is to be used of one that fails.
    ///
    /// # Errors
    /// `Store` when it was sealed with another key, for another object or at another position, or is damaged.
    pub fn open(&self, position: u64, bytes: &mut [u8]) -> Result<usize> {
        let opened = self.key.open_in_place(nonce(position), self.bound_to(position), bytes);
        opened.map(|plaintext| plaintext.len()).map_err(|_| wrong(&self.name, position))
    }

    /// The associated data: name and position.
    fn bound_to(&self, position: u64) -> Aad<Vec<u8>> {
        let mut data = Vec::with_capacity(self.name.len() + 8);
        data.extend_from_slice(self.name.as_bytes());
        data.extend_from_slice(&position.to_le_bytes());
        Aad::from(data)
    }
}

/// A position as a nonce: 8 bytes, little-endian, and 4 of zero.
fn nonce(position: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce.iter_mut().zip(position.to_le_bytes()).for_each(|(place, byte)| *place = byte);
    Nonce::assume_unique_for_key(nonce)
}

fn wrong(name: &str, position: u64) -> Error {
    Error::Store(format!(
        "the object {name} is damaged or forged: what is sealed at its byte {position} does not open with the store's key"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn sealer(byte: u8) -> Sealer {
        Sealer::new(&StoreKey::from_bytes([byte; 32]))
    }

    #[test]
    fn a_store_is_opened_by_its_own_key_alone() {
        let seal = sealer(1).seal();
        assert_eq!(seal.cipher, "aes-256-gcm");
        sealer(1).check(&seal).unwrap();
        assert!(matches!(sealer(2).check(&seal), Err(Error::Usage(_))));
        let newer = Seal { cipher: "rot13".into(), ..seal };
        let text = sealer(1).check(&newer).unwrap_err().to_string();
        assert!(text.contains("rot13") && text.contains("newer"), "{text}");
    }

    /// What docs/checkpoint-format.md says, computed once by another implementation (AES-GCM of OpenSSL): a change of any of it makes every sealed store unreadable.
    #[test]
    fn what_is_sealed_is_the_same_for_ever() {
        let sealer = sealer(7);
        let mut bytes = b"a piece".to_vec();
        sealer.object("data/x/state", &[9; SALT_BYTES]).unwrap().seal(32, &mut bytes).unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&bytes), "17c842973ecc4a42a960fcfcd30ac7a4197aa27b61e666");
        assert_eq!(
            hex(&sealer.key_check()),
            "3916edf933112732125c9caaf1b2a414b562026f389b4560bc24c6a1bb327f58"
        );
    }

    #[test]
    fn the_same_name_is_never_sealed_with_the_same_key_twice() {
        let sealer = sealer(1);
        let (mut one, mut other) = (b"plaintext".to_vec(), b"plaintext".to_vec());
        sealer.seal_body("pruned/x", &mut one).unwrap();
        sealer.seal_body("pruned/x", &mut other).unwrap();
        assert_ne!(one, other);
        assert_ne!(one[SALT_BYTES..], other[SALT_BYTES..]);
        assert!(!one.windows(9).any(|part| part == b"plaintext"));
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_and_nothing_else_does(
            body in prop::collection::vec(any::<u8>(), 0..200), position: u64, at in any::<Index>(), bit in 0..8_u8,
        ) {
            let other = sealer(4);
            let sealer = sealer(3);
            let mut whole = body.clone();
            sealer.seal_body("data/x/index", &mut whole).unwrap();
            prop_assert_eq!(whole.len(), body.len() + SALT_BYTES + TAG_BYTES);
            let mut opened = whole.clone();
            sealer.open_body("data/x/index", &mut opened).unwrap();
            prop_assert_eq!(&opened, &body);
            // Any bit, any end, another name, another key.
            let mut wrong = whole.clone();
            wrong[at.index(whole.len())] ^= 1 << bit;
            prop_assert!(sealer.open_body("data/x/index", &mut wrong).is_err());
            prop_assert!(sealer.open_body("data/x/index", &mut whole[..at.index(whole.len())].to_vec()).is_err());
            prop_assert!(sealer.open_body("data/y/index", &mut whole.clone()).is_err());
            prop_assert!(other.open_body("data/x/index", &mut whole.clone()).is_err());
            // A piece at another position.
            let (object, salt) = sealer.begin("data/x/segment-00000").unwrap();
            let mut piece = body.clone();
            object.seal(position, &mut piece).unwrap();
            let again = sealer.object("data/x/segment-00000", &salt).unwrap();
            prop_assert!(again.open(position ^ 1 << bit, &mut piece.clone()).is_err());
            let bytes = again.open(position, &mut piece).unwrap();
            prop_assert_eq!(&piece[..bytes], &body[..]);
        }
    }
}
