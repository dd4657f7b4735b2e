//! Merged indexes: what the indexes of a chain say, in one. Whatever is wrong with one, the chain has it all.

use super::Vault;
use crate::error::Result;
use protocol::checkpoint::manifest::{HexDigest, MergedIndex, Part};
use protocol::checkpoint::merged::{Merged, MergedRows, decode_sums, encode_sums};
use protocol::checkpoint::name::{self, CheckpointId};
use protocol::checkpoint::object::{Digest, HEADER_BYTES, Kind};
use protocol::layout::Layout;

impl Vault {
    /// The merged index that a manifest names, read into a buffer, all of it checked but its runs, which are as they come.
    ///
    /// # Errors
    /// `Store` when there is none, or it is damaged.
    pub(crate) fn merged_rows<'a>(
        &self,
        layout: &Layout,
        named: &MergedIndex,
        buffer: &'a mut Vec<u8>,
    ) -> Result<MergedRows<'a>> {
        let name = name::merged_index(named.id);
        self.load(Kind::Merged, &name, Some(&named.index), buffer)?;
        let (start, _) = self.check_object(Kind::Merged, &name, buffer, Some(&named.index))?;
        let body = buffer.get(start..).unwrap_or_default();
        MergedRows::open(layout, body).map_err(|error| self.wrong(&name).damaged(&error))
    }

    /// The sums of so many pages that a merged index names.
    ///
    /// # Errors
    /// `Store` when there are none, or they are damaged.
    pub(crate) fn merged_sums(&self, id: CheckpointId, part: &Part, pages: u64) -> Result<Vec<u64>> {
        let name = name::merged_sums(id);
        let body = self.get(Kind::Sums, &name, part)?;
        decode_sums(pages, &body).map_err(|error| self.wrong(&name).damaged(&error))
    }

    /// Writes the sums that a merged index speaks of.
    ///
    /// # Errors
    /// `Store`.
    pub(crate) fn put_merged_sums(&self, id: CheckpointId, sums: &[u64]) -> Result<Part> {
        self.put(Kind::Sums, &name::merged_sums(id), &encode_sums(sums))
    }

    /// Writes a merged index, whose sums are durable, for a checkpoint that exists.
    ///
    /// # Errors
    /// `Store`.
    pub(crate) fn put_merged(&self, id: CheckpointId, layout: &Layout, merged: &Merged) -> Result<Part> {
        self.put(Kind::Merged, &name::merged_index(id), &merged.encode(layout))
    }

    /// What a manifest can say of a checkpoint's own merged index, if it has one. Its digest is taken from where it stands: whoever reads
    /// all of it finds out whether it is right.
    ///
    /// # Errors
    /// `Store`.
    pub(crate) fn merged_of(&self, id: CheckpointId) -> Result<Option<MergedIndex>> {
        let name = name::merged_index(id);
        if !self.store.contains(&name)? {
            return Ok(None);
        }
        let reader = self.store.open(&name)?;
        let mut header = [0; HEADER_BYTES];
        reader.read_at(0, &mut header)?;
        let mut digest = Digest::default();
        digest.copy_from_slice(&header[HEADER_BYTES - 32..]);
        Ok(Some(MergedIndex { id, index: Part { bytes: reader.bytes(), digest: HexDigest(digest) } }))
    }
}
