//! The hosts that this host will talk to.

use super::files::{self, Guard};
use super::fingerprint::Fingerprint;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// The file's name in the key directory.
const FILE: &str = "trusted";

const HEADER: &str =
    "# Hosts that may connect to this one, and that this one connects to: NAME FINGERPRINT a line.\n";

/// The most characters in a host's name: that of a DNS name (RFC 1035).
const MAX_NAME_CHARS: usize = 253;

/// One trusted host.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TrustedHost {
    /// What the operator calls it.
    pub name: String,
    /// Its key.
    pub fingerprint: Fingerprint,
}

/// The file `trusted`: a line for each host, its name and its fingerprint; `#` begins a comment.
///
/// A name may have several keys (while a host changes from one to the next), and a key several names.
#[derive(Debug, Clone)]
pub struct TrustStore {
    dir: PathBuf,
    hosts: Vec<TrustedHost>,
}

impl TrustStore {
    /// Reads it; no file means that nobody is trusted.
    ///
    /// # Errors
    /// `Identity` when the file cannot be read, has a line that is neither host nor comment, or can be changed
    /// by others. One bad line is an error for all, as it may be the one that somebody relied on.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let text = text_of(&path)?;
        let mut hosts = Vec::new();
        for (index, line) in text.lines().enumerate() {
            match parse_line(line) {
                Ok(None) => {}
                Ok(Some(host)) => hosts.push(host),
                Err(error) => {
                    return Err(Error::Identity(format!("{}, line {}: {error}", path.display(), index + 1)));
                }
            }
        }
        Ok(Self { dir: dir.to_owned(), hosts })
    }

    /// Adds a host and writes the file. Answers whether it is new.
    ///
    /// # Errors
    /// `Identity` for a name that cannot be or a file that cannot be written.
    pub fn add(&mut self, name: &str, fingerprint: Fingerprint) -> Result<bool> {
        check_name(name)?;
        files::create_directory(&self.dir)?;
        let _lock = files::lock(&self.dir)?;
        *self = Self::load(&self.dir)?;
        let host = TrustedHost { name: name.into(), fingerprint };
        if self.hosts.contains(&host) {
            return Ok(false);
        }
        let path = self.dir.join(FILE);
        let mut text = text_of(&path)?;
        if text.is_empty() {
            text.push_str(HEADER);
        }
        if !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&format!("{name} {fingerprint}\n"));
        files::write(&path, text.as_bytes())?;
        self.hosts.push(host);
        Ok(true)
    }

    /// Removes every host of this name or fingerprint and writes the file. Answers who was removed.
    ///
    /// # Errors
    /// `Identity` when there is none, or the file cannot be written.
    pub fn revoke(&mut self, name_or_fingerprint: &str) -> Result<Vec<TrustedHost>> {
        let gone = |host: &TrustedHost| {
            host.name == name_or_fingerprint || host.fingerprint.to_string() == name_or_fingerprint
        };
        let lock = self.dir.exists().then(|| files::lock(&self.dir)).transpose()?;
        *self = Self::load(&self.dir)?;
        let (revoked, kept): (Vec<_>, Vec<_>) = self.hosts.drain(..).partition(gone);
        self.hosts = kept;
        if revoked.is_empty() {
            let shown = crate::error::clean(&name_or_fingerprint.chars().take(60).collect::<String>());
            return Err(Error::Identity(format!(
                "no trusted host has the name or fingerprint “{shown}”: `migrate keys list` shows them"
            )));
        }
        // Comments and order stay as the operator wrote them.
        let path = self.dir.join(FILE);
        let text = text_of(&path)?;
        let stays = |line: &&str| !matches!(parse_line(line), Ok(Some(host)) if gone(&host));
        let text: String = text.lines().filter(stays).flat_map(|line| [line, "\n"]).collect();
        files::write(&path, text.as_bytes())?;
        drop(lock);
        Ok(revoked)
    }

    /// All of them, in the order of the file.
    pub fn list(&self) -> &[TrustedHost] {
        &self.hosts
    }

    /// The name of the host with this key, if it is trusted.
    pub fn name_of(&self, fingerprint: Fingerprint) -> Option<&str> {
        self.hosts.iter().find(|host| host.fingerprint == fingerprint).map(|host| host.name.as_str())
    }

    /// The keys that a host of this name may have; empty when no name is like this.
    pub fn keys_of(&self, name: &str) -> Vec<Fingerprint> {
        self.hosts.iter().filter(|host| host.name == name).map(|host| host.fingerprint).collect()
    }
}

fn text_of(path: &Path) -> Result<String> {
    let bytes = files::read(path, Guard::Unforged)?.unwrap_or_default();
    String::from_utf8(bytes).map_err(|_| {
        Error::Identity(format!("{} is not text: move it away and trust the hosts again", path.display()))
    })
}

fn parse_line(line: &str) -> Result<Option<TrustedHost>> {
    let mut words = line.split_whitespace();
    let name = match words.next() {
        None => return Ok(None),
        Some(word) if word.starts_with('#') => return Ok(None),
        Some(name) => name,
    };
    let (Some(fingerprint), None | Some("#")) = (words.next(), words.next()) else {
        return Err(Error::Identity("expected NAME FINGERPRINT, or a comment behind #".into()));
    };
    check_name(name)?;
    Ok(Some(TrustedHost { name: name.into(), fingerprint: fingerprint.parse()? }))
}

/// Whether this may be a host's name: letters, digits and `.-_:`, as names and addresses have them.
pub(super) fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    if !name.is_empty()
        && name.len() <= MAX_NAME_CHARS
        && name.chars().all(fits)
        && !name.starts_with("SHA256:")
    {
        return Ok(());
    }
    Err(Error::Identity(format!(
        "a host's name has 1 to {MAX_NAME_CHARS} of the characters A–Z a–z 0–9 . - _ : and does not look like a \
         fingerprint"
    )))
}
