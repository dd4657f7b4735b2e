//! Who writes: what one who is refused is told.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The one writer of a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What it does.
    pub owner: String,
    /// On which host.
    pub host: String,
    /// In which process there.
    pub pid: u32,
    /// Since when, in milliseconds since 1970, by that host's clock.
    pub since_unix_ms: u64,
    /// Tells it from every other one.
    pub token: String,
}

/// The longest record of a holder, in bytes.
pub(super) const MAX_RECORD_BYTES: usize = 4096;

impl Holder {
    /// This process, from now on.
    pub(super) fn here(owner: &str) -> Self {
        let uname = rustix::system::uname();
        Self {
            owner: crate::error::clean(owner),
            host: crate::error::clean(&uname.nodename().to_string_lossy()),
            pid: std::process::id(),
            since_unix_ms: unix_ms(),
            token: format!("{:016x}", random()),
        }
    }

    /// As it is stored.
    pub(super) fn to_record(&self) -> Vec<u8> {
        // Strings and numbers can always be written.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// From what is stored, if it is one.
    pub(super) fn from_record(record: &[u8]) -> Option<Self> {
        if record.len() > MAX_RECORD_BYTES {
            return None;
        }
        let found: Self = serde_json::from_slice(record).ok()?;
        let (owner, host) = (crate::error::clean(&found.owner), crate::error::clean(&found.host));
        Some(Self { owner, host, ..found })
    }

    /// Who holds it when nothing says who.
    pub(super) fn unknown() -> Self {
        let unknown = String::new;
        Self { owner: unknown(), host: unknown(), pid: 0, since_unix_ms: unix_ms(), token: unknown() }
    }

    /// How long it has been at it, as far as the two hosts' clocks agree.
    pub fn age(&self) -> Duration {
        Duration::from_millis(unix_ms().saturating_sub(self.since_unix_ms))
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.token.is_empty() {
            return f.write_str("another process");
        }
        let age = humantime::format_duration(Duration::from_secs(self.age().as_secs()));
        write!(f, "{} (process {} on {}) for {age}", self.owner, self.pid, self.host)
    }
}

/// Milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// 64 random bits.
pub(super) fn random() -> u64 {
    let mut bytes = [0; 8];
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes),
        // Names must differ, not be secret.
        Err(_) => unix_ms().rotate_left(32) ^ u64::from(std::process::id()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn who_is_refused_hears_who_is_at_it_and_for_how_long() {
        let mut holder = Holder::here("checkpoint web\n");
        holder.since_unix_ms -= 61_000;
        let text = Holder::from_record(&holder.to_record()).unwrap().to_string();
        assert!(text.starts_with("checkpoint web  (process "), "{text}");
        assert!(text.ends_with("for 1m 1s"), "{text}");
        assert_eq!(Holder::unknown().to_string(), "another process");
    }

    proptest! {
        #[test]
        fn any_record_is_read_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Holder::from_record(&bytes);
        }
    }
}
