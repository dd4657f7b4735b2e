//! What can be wrong with bytes.

/// A `Result` whose error is a [`ProtocolError`].
pub type Result<T> = std::result::Result<T, ProtocolError>;

/// Bytes that are not what the protocol says they must be: always the sender's fault, never the reader's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not ours.
    #[error("these bytes do not begin with {expected}: the other end does not speak this protocol")]
    Magic {
        /// What was expected there.
        expected: &'static str,
    },
    /// The peer speaks another major version.
    #[error(
        "the other end speaks {what} version {found}, this one speaks {supported}: use the same release on both"
    )]
    Version {
        /// Which format.
        what: &'static str,
        /// The major version found.
        found: u16,
        /// The major version this build speaks.
        supported: u16,
    },
    /// The peer requires a capability that this build does not have.
    #[error(
        "the other end requires the capability {name:?}, which this release does not have: use a newer one"
    )]
    Capability {
        /// The capability's name, as the peer wrote it.
        name: String,
    },
    /// A length or count over its bound.
    #[error("{what} is {found}, the limit is {limit}")]
    TooLarge {
        /// What was measured.
        what: &'static str,
        /// What was found.
        found: u64,
        /// The most that is taken.
        limit: u64,
    },
    /// Fewer bytes than the format needs.
    #[error("{what} ends after {found} bytes, it needs {needed}")]
    Truncated {
        /// Which structure.
        what: &'static str,
        /// How many bytes there were.
        found: u64,
        /// How many it needs.
        needed: u64,
    },
    /// A field with a value it cannot have.
    #[error("{what} cannot be {found}")]
    Value {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// Pages that the layout does not have.
    #[error("pages {first}+{count} of space {space} lie outside the layout")]
    OutsideLayout {
        /// The space named.
        space: u16,
        /// First page of the run.
        first: u64,
        /// Length of the run in pages.
        count: u64,
    },
    /// A layout that contradicts itself.
    #[error("the memory layout is not usable: {why}")]
    Layout {
        /// What is wrong with it.
        why: String,
    },
    /// A listing of files that contradicts itself.
    #[error("entry {entry} of a container's files is not usable: {why}")]
    Tree {
        /// Which one, from 0 on.
        entry: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A name that could not stand in a path or on a command line.
    #[error(
        "a workload's name has 1 to {limit} letters, digits, '.', '_' and '-', and begins with a letter or a digit"
    )]
    Name {
        /// The longest name in bytes.
        limit: usize,
    },
    /// A message body that is not the JSON it should be.
    #[error("a {what} message could not be understood: {why}")]
    Body {
        /// Which kind of message.
        what: &'static str,
        /// The parser's words.
        why: String,
    },
    /// A payload that does not stand for its pages.
    #[error("the {encoding} payload of pages {first}+{count} of space {space} cannot be decoded: {why}")]
    Payload {
        /// How it is written.
        encoding: &'static str,
        /// The space named.
        space: u16,
        /// First page of the run.
        first: u64,
        /// Length of the run in pages.
        count: u32,
        /// What is wrong with it.
        why: String,
    },
    /// A checksum that does not match.
    #[error("{what} does not match its checksum: it was damaged between the two ends")]
    Checksum {
        /// What was summed.
        what: &'static str,
    },
    /// A valid message at the wrong time.
    #[error("{found} arrived where {expected} was due")]
    OutOfOrder {
        /// What was due.
        expected: &'static str,
        /// What came.
        found: String,
    },
}
