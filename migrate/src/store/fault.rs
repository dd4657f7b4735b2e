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

/// An error of a service.
pub(super) fn of_s3(place: &str, doing: &str, error: &object_store::Error) -> Error {
    use object_store::Error as S3;
    let advice = match error {
        S3::PermissionDenied { .. } => "; give these credentials the right to",
        S3::Unauthenticated { .. } => "; see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        S3::NotFound { .. } => "; see whether the bucket exists",
        S3::NotImplemented { .. } | S3::NotSupported { .. } => {
            "; a service with conditional writes (If-None-Match) is needed"
        }
        _ => "; see AWS_ENDPOINT_URL and AWS_REGION, and whether the service can be reached",
    };
    Error::Store(format!(
        "the store {place} cannot {doing}: {}{advice}",
        crate::error::clean(&error.to_string())
    ))
}

/// Letting go of a lock failed.
pub(super) fn unreleased(place: &str, stale: std::time::Duration) -> String {
    format!(
        "the lock of the store {place} could not be released: it is free in {} s by itself",
        stale.as_secs()
    )
}
