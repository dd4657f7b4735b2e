//! Exit codes, as docs/scripting.md lists them.

use crate::error::Error;

/// This host lacks or refuses something.
pub const HOST: u8 = 3;

/// The guest's ledger, or the guest itself, says that something is broken.
pub const GUEST: u8 = 11;

/// The store of checkpoints refused something, or what lies there is damaged.
pub const STORE: u8 = 12;

/// The exit code of an error: one for each class of fault, so that a script can act on it.
pub fn code(error: &Error) -> u8 {
    match error.root() {
        Error::Usage(_) => 2,
        Error::Host(_) => HOST,
        Error::Workload(_) | Error::NotResumed { .. } | Error::During { .. } | Error::OfMember { .. } => 4,
        Error::Identity(_) => 5,
        Error::Refused { .. } => 6,
        Error::Link(_) | Error::TimedOut { .. } | Error::PeerFailed { .. } => 7,
        Error::Protocol(_) => 8,
        Error::NotConverged(_) => 9,
        Error::InDoubt(_) => 10,
        Error::Store(_) => STORE,
        Error::Interrupted(_) => 130,
    }
}

/// The class of an error as `--json` names it.
pub fn class(error: &Error) -> &'static str {
    match error.root() {
        Error::Usage(_) => "usage",
        Error::Host(_) => "host",
        Error::Workload(_) | Error::NotResumed { .. } | Error::During { .. } | Error::OfMember { .. } => {
            "workload"
        }
        Error::Identity(_) => "identity",
        Error::Refused { .. } => "refused",
        Error::Link(_) | Error::TimedOut { .. } | Error::PeerFailed { .. } => "link",
        Error::Protocol(_) => "protocol",
        Error::NotConverged(_) => "not-converged",
        Error::InDoubt(_) => "in-doubt",
        Error::Store(_) => "store",
        Error::Interrupted(_) => "interrupted",
    }
}
