//! What can go wrong in a migration, split by whose fault it is.

use crate::report::Phase;
use protocol::ProtocolError;
use protocol::control::RefuseCode;
use std::time::Duration;

/// A `Result` whose error is an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done. The text says what happened, to what, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer sent bytes that the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// The peer will not take the workload.
    #[error("the destination refuses: {reason}")]
    Refused {
        /// The class of the refusal.
        code: RefuseCode,
        /// The peer's words, cut and cleaned.
        reason: String,
    },
    /// The peer gave up.
    #[error("the peer gave up: {reason}")]
    PeerFailed {
        /// The peer's words, cut and cleaned.
        reason: String,
    },
    /// The connection could not be made, or was lost.
    #[error("the link failed: {0}")]
    Link(String),
    /// The two ends do not trust each other.
    #[error("{0}")]
    Identity(String),
    /// Something did not happen in time.
    #[error("waited {} s for {what}", .after.as_secs_f32())]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The workload, or its VMM, did not do what it was asked.
    #[error("{0}")]
    Workload(String),
    /// This host lacks something or refused something.
    #[error("{0}")]
    Host(String),
    /// The store of checkpoints did not do what it was asked, or what lies there is damaged: names the checkpoint and the object.
    #[error("{0}")]
    Store(String),
    /// The migration did not converge within the bounds the operator set.
    #[error("{0}")]
    NotConverged(String),
    /// The operator stopped it.
    #[error("interrupted; {0}")]
    Interrupted(String),
    /// `Commit` was sent and no answer came: the source stays frozen.
    #[error("{0}")]
    InDoubt(String),
    /// Any of the others, and the phase of the migration in which it happened.
    #[error("{phase}: {error}")]
    During {
        /// What was being done.
        phase: Phase,
        /// What went wrong.
        error: Box<Error>,
    },
    /// Any of the others, and the workload of several with which it happened.
    #[error("{member}: {error}")]
    OfMember {
        /// The workload's name.
        member: String,
        /// What went wrong.
        error: Box<Error>,
    },
    /// A migration failed and its workload could not be resumed: it stands still.
    #[error("{cause}; and the workload could not be resumed: {resume}")]
    NotResumed {
        /// Why the migration failed.
        cause: Box<Error>,
        /// Why the workload stands still.
        resume: Box<Error>,
    },
    /// The command line asks for something that cannot be.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// The same error, saying in which phase it happened; the innermost phase is kept.
    #[must_use]
    pub fn during(self, phase: Phase) -> Self {
        match self {
            named @ Self::During { .. } => named,
            error => Self::During { phase, error: Box::new(error) },
        }
    }

    /// The same error, saying to which workload of several it happened.
    #[must_use]
    pub fn of_member(self, member: &str) -> Self {
        Self::OfMember { member: member.into(), error: Box::new(self) }
    }

    /// The error without the phase around it: what decides on an exit code.
    pub fn root(&self) -> &Self {
        match self {
            Self::During { error, .. } | Self::OfMember { error, .. } => error.root(),
            error => error,
        }
    }
}

/// Whose fault an error of a VMM, or of the way to one, is.
impl From<vmm::Error> for Error {
    fn from(error: vmm::Error) -> Self {
        use vmm::Error as Vmm;
        let text = error.to_string();
        match error {
            Vmm::Config(_) | Vmm::Image(_) => Self::Usage(text),
            Vmm::NoKvm(_)
            | Vmm::KvmPermission(_)
            | Vmm::KvmLacks(_)
            | Vmm::MissingFeatures(_)
            | Vmm::Host { .. }
            | Vmm::Socket { .. } => Self::Host(text),
            // What the VM or its VMM answered, or failed to.
            _ => Self::Workload(text),
        }
    }
}

/// Words of a peer, made fit for a terminal: one line, no control characters, at most 300 characters.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}
