//! What moves between this host and others cost before: the part of the downtime that no page explains, and how fast their
//! first round was over how many connections.
//!
//! One small JSON file. It is a help and no truth: where it is missing, damaged or of another version, the engine
//! guesses as it does for a host it has never seen, and the next move writes the file anew.

use crate::connections::Carried;
use crate::error::{Error, Result};
use crate::report::micros;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The version of the file.
const VERSION: u32 = 1;

/// The most peers that are remembered; the one that was not used for longest is forgotten first.
const MAX_PEERS: usize = 256;

/// The moves that are remembered of each peer.
const MAX_MOVES: usize = 8;

/// The first rounds that are remembered of each peer.
const MAX_CARRIED: usize = 6;

/// The most bytes that are read: 256 peers of about 1100 bytes, with room.
const MAX_FILE_BYTES: u64 = 512 << 10;

/// The longest fixed part that is believed: a host that took longer once was ill.
const MAX_FIXED: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    version: u32,
    peers: BTreeMap<String, Past>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Past {
    /// When it was used last, in seconds since 1970.
    used_s: u64,
    /// The fixed part of its last moves, the newest last.
    fixed_us: Vec<u64>,
    /// How their first rounds went, the newest last.
    #[serde(default)]
    carried: Vec<Carried>,
}

/// The memory of earlier moves.
#[derive(Debug, Clone)]
pub struct History {
    path: PathBuf,
}

impl History {
    /// The file in this directory, which is made when something is to be remembered.
    pub fn in_dir(dir: &Path) -> Self {
        Self { path: dir.join("history.json") }
    }

    /// What freezing costs with the peer of this key when nothing remains, and from how many moves that is known: so much that
    /// three of four of them cost no more. Nothing when it is not known: a single move may have met with a hiccup of a host,
    /// and must not make the next one look hopeless.
    pub fn fixed(&self, peer: &str) -> Option<(Duration, usize)> {
        let mut moves = self.load_or_none().peers.get(peer)?.fixed_us.clone();
        moves.sort_unstable();
        let at = (moves.len() * 3 / 4).checked_sub(1)?;
        Some((Duration::from_micros(*moves.get(at)?).min(MAX_FIXED), moves.len()))
    }

    /// How the first rounds of moves to the peer of this key went, the newest last.
    pub fn carried(&self, peer: &str) -> Vec<Carried> {
        self.load_or_none().peers.remove(peer).map_or_else(Vec::new, |past| past.carried)
    }

    /// Remembers what a move to the peer of this key cost, and how its first round went, if that was measured.
    ///
    /// # Errors
    /// `Host` when the file cannot be written.
    pub fn record(&self, peer: &str, fixed: Duration, carried: Option<Carried>) -> Result<()> {
        let mut contents = self.load().unwrap_or_default();
        contents.version = VERSION;
        let past = contents.peers.entry(peer.to_owned()).or_default();
        past.used_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        past.fixed_us.push(micros(fixed.min(MAX_FIXED)));
        past.fixed_us.drain(..past.fixed_us.len().saturating_sub(MAX_MOVES));
        past.carried.extend(carried);
        past.carried.drain(..past.carried.len().saturating_sub(MAX_CARRIED));
        while contents.peers.len() > MAX_PEERS {
            let oldest =
                contents.peers.iter().min_by_key(|(_, past)| past.used_s).map(|(key, _)| key.clone());
            contents.peers.remove(&oldest.unwrap_or_default());
        }
        let bytes = serde_json::to_vec_pretty(&contents).unwrap_or_default();
        self.replace(&bytes)
            .map_err(|error| Error::Host(format!("{} cannot be written: {error}", self.path.display())))
    }

    fn load_or_none(&self) -> Contents {
        self.load().unwrap_or_else(|why| {
            tracing::warn!(file = %self.path.display(), why, "the memory of earlier moves cannot be used");
            Contents::default()
        })
    }

    fn load(&self) -> std::result::Result<Contents, String> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Contents::default()),
            Err(error) => return Err(error.to_string()),
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err("it is larger than migrate writes it".into());
        }
        let contents: Contents = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        match contents.version {
            VERSION => Ok(contents),
            other => Err(format!("it is of version {other}, and {VERSION} is known")),
        }
    }

    /// Replaces the file as a whole: after a crash it is the old one or the new one.
    fn replace(&self, bytes: &[u8]) -> std::io::Result<()> {
        if let Some(dir) = self.path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let temporary = self.path.with_extension(format!("new-{}", std::process::id()));
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &self.path)
        };
        write().inspect_err(|_| {
            // The error that is told is the one that matters.
            let _ = std::fs::remove_file(&temporary);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_a_move_cost_is_remembered_for_its_peer_alone() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::in_dir(&dir.path().join("made"));
        assert_eq!(history.fixed("b"), None);
        for cost in [4, 2, 3, 9] {
            history.record("b", MS * cost, None).unwrap();
        }
        assert_eq!(history.fixed("b"), Some((MS * 4, 4)), "three of four cost no more");
        assert_eq!(history.fixed("c"), None);
        for _ in 0..20 {
            history.record("b", MS, None).unwrap();
        }
        assert_eq!(history.fixed("b"), Some((MS, MAX_MOVES)), "old moves are forgotten");
        history.record("b", Duration::from_secs(3600), None).unwrap();
        assert!(history.load().unwrap().peers["b"].fixed_us.iter().all(|us| *us <= micros(MAX_FIXED)));
    }

    #[test]
    fn how_first_rounds_went_is_remembered_where_it_was_measured() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::in_dir(dir.path());
        // As releases wrote it that did not measure this.
        std::fs::write(&history.path, r#"{"version":1,"peers":{"b":{"used_s":0,"fixed_us":[1000]}}}"#)
            .unwrap();
        assert_eq!((history.carried("b"), history.carried("c")), (vec![], vec![]));
        let carried = |number| Carried { connections: number, bytes_per_s: 7, busy_percent: 90 };
        for number in 1..=8 {
            history.record("b", MS, Some(carried(number))).unwrap();
            history.record("b", MS, None).unwrap();
        }
        assert_eq!(history.carried("b"), (3..=8).map(carried).collect::<Vec<_>>());
    }

    #[test]
    fn the_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::in_dir(dir.path());
        let mut contents = Contents { version: VERSION, ..Contents::default() };
        let full = Carried { connections: 8, bytes_per_s: u64::MAX, busy_percent: 100 };
        let past = |peer| Past {
            used_s: peer as u64,
            fixed_us: vec![micros(MAX_FIXED); MAX_MOVES],
            carried: vec![full; MAX_CARRIED],
        };
        for peer in 0..MAX_PEERS {
            contents.peers.insert(format!("peer {peer:0>43}"), past(peer));
        }
        history.replace(&serde_json::to_vec(&contents).unwrap()).unwrap();
        history.record("new", MS, None).unwrap();
        let peers = history.load().unwrap().peers;
        assert_eq!(peers.len(), MAX_PEERS);
        assert!(peers.contains_key("new") && !peers.contains_key(&format!("peer {:0>43}", 0)));
        assert!(std::fs::metadata(&history.path).unwrap().len() < MAX_FILE_BYTES);
    }

    #[test]
    fn a_damaged_file_is_as_good_as_none_and_the_next_move_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::in_dir(dir.path());
        let huge = vec![b' '; MAX_FILE_BYTES as usize + 1];
        let damaged: [&[u8]; 4] = [b"{", b"\xff\xfe", br#"{"version":99,"peers":{}}"#, &huge];
        for bytes in damaged {
            std::fs::write(&history.path, bytes).unwrap();
            assert!(history.load().is_err());
            assert_eq!(history.fixed("b"), None);
            history.record("b", MS, None).unwrap();
            assert_eq!(history.fixed("b"), None, "one move is no evidence");
            history.record("b", MS * 50, None).unwrap();
            assert_eq!(history.fixed("b"), Some((MS, 2)));
        }
        let odd = br#"{"version":1,"peers":{"b":{"used_s":0,"fixed_us":[]},"c":{"used_s":0,"fixed_us":[18446744073709551615,18446744073709551615]}}}"#;
        std::fs::write(&history.path, odd).unwrap();
        assert_eq!(history.fixed("b"), None);
        assert_eq!(history.fixed("c"), Some((MAX_FIXED, 2)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left lying about");
    }
}
