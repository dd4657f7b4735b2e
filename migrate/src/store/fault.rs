//! Faults of a store in words: what happened, to which object where, and what to do next.

use crate::error::Error;
use std::io::ErrorKind;

/// An error of the operating system.
pub(super) fn of_io(place: &str, doing: &str, error: &std::io::Error) -> Error {
    let advice = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; make room there, for example with `migrate store prune` and `migrate store gc`"
        }
        ErrorKind::ReadOnlyFilesystem => "; mount it for writing, or use another store",
        ErrorKind::PermissionDenied => "; give this user the right to, or use another store",
        _ => "",
    };
    Error::Store(format!("the store {place} cannot {doing}: {error}{advice}"))
}

/// There is no object of this name.
pub(super) fn missing(place: &str, name: &str) -> Error {
    Error::Store(format!("there is no object {name} in the store {place}"))
}

/// The name is taken.
pub(super) fn taken(place: &str, name: &str) -> Error {
    Error::Store(format!("the object {name} is in the store {place} already: objects are written once"))
}

/// An object ends before what was asked of it.
pub(super) fn short(place: &str, name: &str, bytes: u64) -> Error {
    Error::Store(format!(
        "the object {name} in the store {place} is cut short: it ends after {bytes} bytes, and more of it was expected"
    ))
}
