//! What a coded frame makes of the destination's memory.

use crate::codec::{Packing, Unpacker, delta, known};
use crate::destination::PageMemory;
use crate::error::Result;
use protocol::frame::check_stream;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun};
use protocol::payload::Encoding;
use std::sync::Arc;

/// Decodes the frames of one page stream, in their order.
pub(super) struct Decoder {
    layout: Arc<Layout>,
    streams: u16,
    /// The number of this stream.
    pub(super) stream: u16,
    unpacker: Unpacker,
    pages: Vec<u8>,
}

impl Decoder {
    /// A stream out of `streams`, carrying pages of `layout`.
    pub(super) fn new(layout: Arc<Layout>, streams: u16) -> Self {
        Self { layout, streams, stream: 0, unpacker: Unpacker::new(), pages: Vec::new() }
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
            Encoding::Delta => return self.change(memory, run, payload),
            Encoding::Known => return self.copy(memory, run, payload),
        };
        memory.write(run.space, run.offset(), self.unpacker.unpack(packing, run, payload)?)
    }

    fn change(&mut self, memory: &dyn PageMemory, run: PageRun, payload: &[u8]) -> Result<()> {
        // A run was checked to be of 1 MiB at most.
        self.pages.resize(run.bytes(), 0);
        memory.read(run.space, run.offset(), &mut self.pages)?;
        delta::apply(&mut self.unpacker, run, &mut self.pages, payload)?;
        memory.write(run.space, run.offset(), &self.pages)
    }

    fn copy(&mut self, memory: &dyn PageMemory, run: PageRun, payload: &[u8]) -> Result<()> {
        let mut page = [0; PAGE_SIZE];
        for (number, known) in (run.first..).zip(known::named(run, payload)?) {
            let from = PageRun { space: run.space, first: known.page, count: 1 };
            self.layout.check(&from)?;
            check_stream(&from, self.stream, self.streams)?;
            memory.read(from.space, from.offset(), &mut page)?;
            known::check(run, &known, &page)?;
            if known.page != number {
                memory.write(run.space, number * PAGE_SIZE as u64, &page)?;
            }
        }
        Ok(())
    }
}
