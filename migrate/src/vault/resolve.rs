//! Which checkpoint an operator means.

use super::{Committed, Vault};
use crate::error::{Error, Result};
use protocol::checkpoint::name::{self, CheckpointId};
use std::time::UNIX_EPOCH;

/// The word for the newest one.
const LATEST: &str = "latest";

impl Vault {
    /// The checkpoint that is meant by `latest`, a name or its beginning, a time (RFC 3339: the newest that is not younger), a
    /// workload's name, or `NAME@latest`, `NAME@TIME` for one of that workload's.
    ///
    /// # Errors
    /// `Store` when there is none, `Usage` when there are several.
    pub fn resolve(&self, text: &str) -> Result<CheckpointId> {
        // A name that is there needs no look at the others, which may be many.
        if let Ok(id) = text.parse::<CheckpointId>()
            && self.store.contains(&name::manifest(id))?
        {
            return Ok(id);
        }
        let listing = self.manifests()?;
        let place = self.place();
        match pick(&listing.committed, text) {
            Picked::One(id) => Ok(id),
            Picked::Many(ids) => Err(Error::Usage(format!(
                "{text:?} is the beginning of {} checkpoints in {place}: {}; write more of it",
                ids.len(),
                some(&ids)
            ))),
            Picked::None => {
                let unread = match listing.damaged.len() {
                    0 => String::new(),
                    count => format!(" ({count} cannot be read)"),
                };
                Err(Error::Store(format!(
                    "there is no checkpoint {text:?} in {place}{unread}: `migrate store list` says which there are"
                )))
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Picked {
    One(CheckpointId),
    Many(Vec<CheckpointId>),
    None,
}

fn some(ids: &[CheckpointId]) -> String {
    let shown: Vec<_> = ids.iter().take(4).map(CheckpointId::to_string).collect();
    shown.join(", ") + if ids.len() > shown.len() { ", …" } else { "" }
}

fn pick(all: &[Committed], text: &str) -> Picked {
    let newest = |workload: Option<&str>, until_ms: u64| {
        let ours = all.iter().map(|found| &found.manifest).filter(|manifest| {
            workload.is_none_or(|name| manifest.workload == name) && manifest.taken_unix_ms <= until_ms
        });
        ours.max_by_key(|manifest| (manifest.taken_unix_ms, manifest.id))
            .map_or(Picked::None, |manifest| Picked::One(manifest.id))
    };
    let (workload, when) = match text.rsplit_once('@') {
        Some((workload, when)) => (Some(workload), when),
        None => (None, text),
    };
    if when == LATEST {
        return newest(workload, u64::MAX);
    }
    if let Some(until_ms) = unix_ms(when) {
        return newest(workload, until_ms);
    }
    if workload.is_some() {
        return Picked::None;
    }
    match newest(Some(text), u64::MAX) {
        Picked::None => {}
        found => return found,
    }
    let ids = all.iter().map(|found| found.manifest.id);
    let begun: Vec<_> = ids.filter(|id| !text.is_empty() && id.to_string().starts_with(text)).collect();
    match begun.as_slice() {
        [] => Picked::None,
        [id] => Picked::One(*id),
        _ => Picked::Many(begun),
    }
}

/// A time in milliseconds since 1970, to the end of what was written: a second without a fraction means all of it.
fn unix_ms(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339_weak(text).ok()?;
    let millis = time.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64;
    Some(if text.contains('.') { millis } else { millis.saturating_add(999) })
}
