//! The short form of a host's public key that people compare and files hold.

use crate::error::{Error, Result};
use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;
use std::fmt;
use std::str::FromStr;

/// SHA-256 of a public key (its `SubjectPublicKeyInfo` in DER, as in RFC 7469). Shown as `SHA256:` and 43
/// characters of base64 without padding, the way SSH shows keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

const PREFIX: &str = "SHA256:";

impl Fingerprint {
    /// The fingerprint of the key in a certificate.
    ///
    /// Nothing else of the certificate counts, neither its names nor its dates: the key is the identity.
    ///
    /// # Errors
    /// `Identity` when the bytes are no certificate.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self> {
        let parsed = ParsedCertificate::try_from(certificate)
            .map_err(|error| Error::Identity(format!("the certificate cannot be read: {error}")))?;
        Self::of_key(&parsed.subject_public_key_info())
    }

    /// A fingerprint that was computed before, or one of nobody, for a link without keys.
    pub const fn from_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    fn of_key(spki_der: &[u8]) -> Result<Self> {
        let digest = digest::digest(&digest::SHA256, spki_der);
        let bytes = digest.as_ref().try_into().map_err(|_| {
            Error::Identity("this build's SHA-256 does not give 32 bytes: rebuild migrate".into())
        })?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", STANDARD_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.strip_prefix(PREFIX)
            .filter(|digest| digest.len() == 43)
            .and_then(|digest| STANDARD_NO_PAD.decode(digest).ok())
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| {
                let shown = crate::error::clean(&text.chars().take(60).collect::<String>());
                Error::Identity(format!(
                    "“{shown}” is no fingerprint: it looks like SHA256: and 43 characters; `migrate keys show` on \
                     the other host prints it"
                ))
            })
    }
}

impl serde::Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let one = Fingerprint([7; 32]);
        let text = one.to_string();
        assert_eq!(text.len(), PREFIX.len() + 43);
        assert_eq!(text.parse::<Fingerprint>().unwrap(), one);
    }

    #[test]
    fn the_digest_is_sha256() {
        // FIPS 180-2, appendix B.1: SHA-256 of "abc".
        let expected = "SHA256:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0";
        assert_eq!(Fingerprint::of_key(b"abc").unwrap().to_string(), expected);
    }

    #[test]
    fn what_is_no_fingerprint_is_refused() {
        let good = Fingerprint([0xff; 32]).to_string();
        for bad in
            ["", "SHA256:", "MD5:abc", &good[1..], &format!("{good}="), &good.replace('/', "*"), "\u{1b}[2J"]
        {
            let error = bad.parse::<Fingerprint>().unwrap_err().to_string();
            assert!(error.contains("keys show") && !error.contains('\u{1b}'), "{error}");
        }
    }
}
