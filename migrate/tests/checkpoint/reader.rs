//! What a restore would read, as simply as it can be said: every link from the full one on, each written over the one before.

use migrate::error::Result;
use migrate::vault::{SegmentReader, Unpacker, Vault};
use protocol::checkpoint::index::{At, Placed};
use protocol::checkpoint::name::CheckpointId;
use protocol::page::PAGE_SIZE;

/// The memory of a checkpoint, one vector for each space.
pub(crate) fn memory(vault: &Vault, id: CheckpointId) -> Result<Vec<Vec<u8>>> {
    let mut links = vault.chain(id)?;
    let layout = &links[0].manifest.layout;
    let mut memory: Vec<Vec<u8>> =
        layout.spaces.iter().map(|space| vec![0; space.pages as usize * PAGE_SIZE]).collect();
    links.reverse();
    for link in &links {
        let manifest = &link.manifest;
        let index = vault.index(manifest)?;
        for Placed { run, at } in &index.runs {
            let from = run.offset() as usize;
            let bytes = &mut memory[usize::from(run.space.0)][from..from + run.bytes()];
            match *at {
                At::Zeros => bytes.fill(0),
                At::Extent { extent, page } => {
                    let extent = &index.extents[extent as usize];
                    let segment = SegmentReader::open(vault, &manifest.segments[extent.segment as usize])?;
                    let mut unpacker = Unpacker::default();
                    let pages = segment.read(extent, &mut unpacker)?;
                    let at = usize::from(page) * PAGE_SIZE;
                    bytes.copy_from_slice(&pages[at..at + run.bytes()]);
                }
            }
        }
    }
    Ok(memory)
}
