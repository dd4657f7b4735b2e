//! Who this host is, and which hosts it trusts.
//!
//! ```text
//! DIR                 0700   --keys DIR, or $XDG_CONFIG_HOME/migrate, or ~/.config/migrate
//! DIR/host.key        0600   the key: PKCS#8 in PEM, Ed25519
//! DIR/host.crt        0600   a certificate for it that it signed itself: TLS wants one
//! DIR/trusted         0600   the hosts to trust: NAME FINGERPRINT a line
//! ```
//!
//! The key is the identity. Certificates are not compared, do not expire and are signed by nobody else: what
//! counts is the [`Fingerprint`] of the key in them, which the operator carries from one host to the other once
//! (`migrate keys show` here, `migrate keys trust` there), as with SSH.

pub(crate) mod files;
mod fingerprint;
mod trust;

pub use files::directory;
pub use fingerprint::Fingerprint;
pub use trust::{TrustStore, TrustedHost};

use crate::error::{Error, Result};
use files::Guard;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::path::{Path, PathBuf};

const KEY_FILE: &str = "host.key";
const CERTIFICATE_FILE: &str = "host.crt";

/// This host's key.
pub struct Identity {
    dir: PathBuf,
    key: PrivatePkcs8KeyDer<'static>,
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

/// Never shows the key.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("dir", &self.dir).field("fingerprint", &self.fingerprint).finish()
    }
}

impl Identity {
    /// Makes a new key in `dir`, which is created if it is not there. `name` stands in the certificate, for people
    /// who look into it.
    ///
    /// # Errors
    /// `Identity` when there is a key already and `replace` is not set, or nothing can be written there.
    pub fn init(dir: &Path, name: &str, replace: bool) -> Result<Self> {
        trust::check_name(name)?;
        files::create_directory(dir)?;
        let _lock = files::lock(dir)?;
        let path = dir.join(KEY_FILE);
        if !replace && path.exists() {
            return Err(Error::Identity(format!(
                "{} is there already: `migrate keys show` shows it; --force replaces it, and then every host that \
                 trusts it must trust the new one",
                path.display()
            )));
        }
        let failed = |error: rcgen::Error| Error::Identity(format!("cannot make a key: {error}"));
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(failed)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).map_err(failed)?;
        // The certificate goes first: until the new key is there, `load` sees a pair that does not match and says so.
        files::write(&dir.join(CERTIFICATE_FILE), certificate.pem().as_bytes())?;
        files::write(&path, key.serialize_pem().as_bytes())?;
        Self::load(dir)
    }

    /// Reads the key from `dir`.
    ///
    /// # Errors
    /// `Identity` when there is none, others may read it, or it does not fit its certificate.
    pub fn load(dir: &Path) -> Result<Self> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        let missing = |path: &Path| {
            let keys = dir.display();
            Error::Identity(format!(
                "this host has no key ({} is missing): run `migrate keys init --keys {keys}`",
                path.display()
            ))
        };
        let broken = |path: &Path, why: &dyn std::fmt::Display| {
            Error::Identity(format!(
                "{} is not what `migrate keys init` wrote ({why}): restore it, or run `migrate keys init --force`",
                path.display()
            ))
        };
        let key = files::read(&key_path, Guard::Secret)?.ok_or_else(|| missing(&key_path))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&key).map_err(|error| broken(&key_path, &error))?;
        let certificate =
            files::read(&certificate_path, Guard::Unforged)?.ok_or_else(|| missing(&certificate_path))?;
        let certificate = CertificateDer::from_pem_slice(&certificate)
            .map_err(|error| broken(&certificate_path, &error))?;
        let fingerprint =
            Fingerprint::of_certificate(&certificate).map_err(|error| broken(&certificate_path, &error))?;
        let identity = Self { dir: dir.to_owned(), key, certificate, fingerprint };
        identity.certified_key().map_err(|error| broken(&key_path, &error))?;
        Ok(identity)
    }

    /// What the other host must trust.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Key and certificate as TLS wants them; fails when they do not belong together.
    pub(crate) fn certified_key(&self) -> std::result::Result<rustls::sign::CertifiedKey, rustls::Error> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        rustls::sign::CertifiedKey::from_der(vec![self.certificate.clone()], key, &provider)
    }
}

/// What this host calls itself, as far as it makes a name for a trust store.
pub fn this_host() -> String {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    let fits = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name: String = name.chars().filter(fits).take(64).collect();
    if name.is_empty() { "HOST".into() } else { name }
}

#[cfg(test)]
mod tests;
