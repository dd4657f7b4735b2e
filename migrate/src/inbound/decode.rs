//! What a coded frame makes of the destination's memory.

use crate::codec::{Packing, Unpacker};
use crate::destination::PageMemory;
use crate::error::Result;
use protocol::page::PageRun;
use protocol::payload::Encoding;

/// Decodes the frames of one page stream, in their order.
pub(super) struct Decoder {
    unpacker: Unpacker,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { unpacker: Unpacker::new() }
    }

    /// Writes the pages of a run, which lies in the layout, from a payload whose checksum was right.
    ///
    /// # Errors
    /// `Protocol` when it does not stand for these pages; those of the memory.
    pub(super) fn write(
        &mut self,
        memory: &dyn PageMemory,
        run: PageRun,
        encoding: Encoding,
        payload: &[u8],
    ) -> Result<()> {
        let packing = match encoding {
            Encoding::Zero => return memory.zero(run),
            Encoding::Raw => return memory.write(run.space, run.offset(), payload),
            Encoding::Lz4 => Packing::Lz4,
            Encoding::Zstd => Packing::Zstd,
            Encoding::Delta | Encoding::Known => {
                let why = "this receiver did not say that it can".to_owned();
                return Err(crate::codec::bad(encoding, run, why).into());
            }
        };
        memory.write(run.space, run.offset(), self.unpacker.unpack(packing, run, payload)?)
    }
}
