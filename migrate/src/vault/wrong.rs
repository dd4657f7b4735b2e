//! What is wrong with an object, in words that name it.

use crate::error::Error;
use crate::store::Store;
use protocol::ProtocolError;
use protocol::checkpoint::name::{CHECKPOINTS, CheckpointId, DATA, GROUPS, MERGED, PRUNED, TOUCHED};
use std::fmt::Display;

/// An object with which something is wrong.
#[derive(Clone, Copy)]
pub(crate) struct Wrong<'a> {
    pub(crate) store: &'a dyn Store,
    pub(crate) object: &'a str,
}

impl Wrong<'_> {
    /// It is there, and is not what was written.
    pub(crate) fn damaged(&self, why: &(impl Display + ?Sized)) -> Error {
        Error::Store(format!(
            "{} is damaged: {why}; `migrate store verify` says what else is, `migrate store list` which checkpoints there are",
            self.named()
        ))
    }

    /// It is there, and its header is not one that this release reads.
    pub(crate) fn undecodable(&self, why: &ProtocolError) -> Error {
        let ProtocolError::Version { found, supported, .. } = why else { return self.damaged(why) };
        Error::Store(format!(
            "{} has version {found} of the format, and this release reads version {supported}: use the release that wrote it, or if that is \
             this one, it is damaged",
            self.named()
        ))
    }

    /// It cannot be written.
    pub(crate) fn unwritable(&self, why: &(impl Display + ?Sized)) -> Error {
        Error::Store(format!("{} cannot be written: {why}", self.named()))
    }

    /// The object, its checkpoint if its name has one, and its store.
    fn named(&self) -> String {
        let place = self.store.place();
        match checkpoint_of(self.object) {
            Some(id) => format!("checkpoint {id}: object {} of {place}", self.object),
            None => format!("object {} of {place}", self.object),
        }
    }
}

/// The checkpoint that an object belongs to.
pub(crate) fn checkpoint_of(object: &str) -> Option<CheckpointId> {
    let folders = [CHECKPOINTS, DATA, GROUPS, MERGED, PRUNED, TOUCHED];
    let rest = folders.iter().find_map(|folder| object.strip_prefix(folder))?;
    rest.split('/').next()?.parse().ok()
}
