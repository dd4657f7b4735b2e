//! Behind a checkpoint that exists: now and then one index for all of its chain, so that a long chain takes no longer to restore than a
//! short one.
//!
//! The workload runs on, and the checkpoint is what it is: whatever goes wrong here, its chain says the same.

use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::restore::plan::{Plan, Sums};
use crate::restore::planned;
use crate::store::Lease;
use crate::vault::{Committed, Vault};
use protocol::checkpoint::index::Extent;
use protocol::checkpoint::manifest::Part;
use protocol::checkpoint::merged::{Merged, Stored};
use protocol::checkpoint::name::CheckpointId;

/// What a restore may have to read of indexes behind the last merged one before there is another: some six deltas of 50 MB whose pages are
/// nobody's neighbours. A merged index of 3 GB with its sums takes some 9 MB, so that is 3 % of what these deltas take.
const MOST_READ_BYTES: u64 = 3 << 20;

/// What a link takes besides its index, as bytes that could be read meanwhile: its manifest, and finding both.
const LINK_BYTES: u64 = 32 << 10;

/// Writes a merged index of a checkpoint that exists, if it is time for one. Answers how many bytes that were.
pub(super) fn behind(vault: &Vault, lease: &dyn Lease, id: CheckpointId, cancel: &CancelFlag) -> u64 {
    let written = lease.check().and_then(|()| write_if_due(vault, id, cancel));
    written.unwrap_or_else(|error| {
        tracing::info!(%error, "there is no merged index, and the chain takes longer to restore");
        0
    })
}

/// Answers how many bytes were written: 0 if it was not time.
fn write_if_due(vault: &Vault, id: CheckpointId, cancel: &CancelFlag) -> Result<u64> {
    let newest = vault.manifest(id)?;
    let last = newest.manifest.merged.as_ref();
    let above = match last {
        Some(last) => vault.chain_above(newest.clone(), last.id)?,
        None => vault.chain(id)?,
    };
    let read: u64 = above.iter().map(|link| link.manifest.index.bytes.saturating_add(LINK_BYTES)).sum();
    if read < MOST_READ_BYTES.max(last.map_or(0, |last| last.index.bytes)) {
        return Ok(0);
    }
    write(vault, &newest, cancel)
}

/// Writes the merged index of a checkpoint. Answers its bytes, with those of its sums.
///
/// # Errors
/// `Store`, `Interrupted`.
pub(crate) fn write(vault: &Vault, newest: &Committed, cancel: &CancelFlag) -> Result<u64> {
    let id = newest.manifest.id;
    let (plan, _) = planned(vault, newest, Sums::All, None, cancel)?;
    let sums = sums(vault, &plan)?;
    let sums = vault.put_merged_sums(id, &sums)?;
    let merged = merged_of(plan, sums);
    let index = vault.put_merged(id, &newest.manifest.layout, &merged)?;
    Ok(sums.bytes + index.bytes)
}

/// What a plan says, with the object of its sums.
fn merged_of(plan: Plan, sums: Part) -> Merged {
    let runs = (0..).zip(&plan.needs).flat_map(|(extent, need)| {
        plan.parts(need).iter().map(move |part| Stored { run: part.run(), extent, page: part.page })
    });
    let runs = runs.collect();
    // An extent's segment is a position in the list of its link; that of a need, in the plan's.
    let extents = plan.needs.iter().map(|need| Extent { segment: need.segment, ..need.extent });
    let extents = extents.collect();
    Merged { sums, segments: plan.segments, extents, runs }
}

/// The sums of all pages of a plan, in the order of its needs and their parts.
fn sums(vault: &Vault, plan: &Plan) -> Result<Vec<u64>> {
    let earlier = plan.merged_sums.as_ref().map(|(id, part, pages)| vault.merged_sums(*id, part, *pages));
    let earlier = earlier.transpose()?;
    let mut sums = Vec::new();
    for part in plan.needs.iter().flat_map(|need| plan.parts(need)) {
        let known = plan
            .sums(part, earlier.as_deref())
            .ok_or_else(|| Error::Store("the sums of some pages are not known".into()))?;
        sums.extend_from_slice(known);
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::fetch::{Fetch, Scratch};
    use crate::vault::sample;
    use protocol::checkpoint::manifest::Manifest;
    use protocol::checkpoint::name;
    use protocol::page::PAGE_SIZE;

    /// A link as if it had been written behind the merged index of another.
    fn behind(vault: &Vault, link: &Committed, of: CheckpointId) -> Committed {
        let merged = vault.merged_of(of).unwrap();
        Committed { manifest: Manifest { merged, ..link.manifest.clone() }, ..link.clone() }
    }

    /// The memory that a plan leads to, read as a restore reads it.
    fn memory(vault: &Vault, plan: Plan) -> Vec<Vec<u8>> {
        let mut spaces: Vec<_> =
            sample::layout().spaces.iter().map(|space| vec![0; space.pages as usize * PAGE_SIZE]).collect();
        let fetch = Fetch::new(vault.clone(), plan, None);
        fetch.open_all().unwrap();
        fetch.bring_sums();
        for need in 0..fetch.plan().needs.len() {
            fetch
                .one(need, &mut Scratch::default(), &mut |run, bytes| {
                    let space: &mut Vec<u8> = &mut spaces[usize::from(run.space.0)];
                    space[run.offset() as usize..][..bytes.len()].copy_from_slice(bytes);
                    Ok(())
                })
                .unwrap();
        }
        spaces
    }

    fn plan(vault: &Vault, link: &Committed) -> (Plan, u64) {
        planned(vault, link, Sums::Few, None, &CancelFlag::default()).unwrap()
    }

    #[test]
    fn a_merged_index_says_what_the_chain_says() {
        let vault = sample::vault();
        let (links, images) = sample::chain(&vault, 6);
        let cancel = CancelFlag::default();
        let mut last: Option<CheckpointId> = None;
        for (number, link) in links.iter().enumerate() {
            // Each stands on the one before.
            let id = link.manifest.id;
            let link = last.map_or_else(|| link.clone(), |last| behind(&vault, link, last));
            assert!(write(&vault, &link, &cancel).unwrap() > 0);
            last = Some(id);
            for (above, image) in links.iter().zip(&images).skip(number + 1) {
                let (found, merged_links) = plan(&vault, &behind(&vault, above, id));
                assert!(merged_links <= u64::from(above.manifest.deltas - link.manifest.deltas) + 1);
                let (all, _) = plan(&vault, above);
                assert_eq!(found.data, all.data);
                assert_eq!(found.segments, all.segments);
                assert!(memory(&vault, found) == *image, "{number} of {}", above.manifest.id);
                assert!(memory(&vault, all) == *image);
            }
        }
    }

    #[test]
    fn without_it_or_its_sums_the_chain_is_read() {
        let vault = sample::vault();
        let (links, images) = sample::chain(&vault, 4);
        let [newest, of] = [&links[4], &links[2]];
        let id = of.manifest.id;
        write(&vault, of, &CancelFlag::default()).unwrap();
        let newest = &behind(&vault, newest, id);
        assert_eq!(plan(&vault, newest).1, 3);
        vault.store().delete(&name::merged_sums(id)).unwrap();
        assert!(memory(&vault, plan(&vault, newest).0) == images[4]);
        // There is another one than the manifest means.
        vault.store().delete(&name::merged_index(id)).unwrap();
        let sums = vault.put_merged_sums(id, &[]).unwrap();
        let other = Merged { sums, segments: Vec::new(), extents: Vec::new(), runs: Vec::new() };
        vault.put_merged(id, &newest.manifest.layout, &other).unwrap();
        let (found, merged_links) = plan(&vault, newest);
        assert_eq!(merged_links, 5);
        assert!(memory(&vault, found) == images[4]);
        vault.store().delete(&name::merged_index(id)).unwrap();
        assert!(memory(&vault, plan(&vault, newest).0) == images[4]);
        // Only the last of its runs cannot be: it is found when all others were taken.
        let mut wrong = merged_of(plan(&vault, of).0, sums);
        wrong.runs.last_mut().unwrap().run.first = 1 << 40;
        let index = vault.put_merged(id, &newest.manifest.layout, &wrong).unwrap();
        let mut newest = newest.clone();
        newest.manifest.merged.as_mut().unwrap().index = index;
        let (found, merged_links) = plan(&vault, &newest);
        assert_eq!(merged_links, 5);
        assert!(memory(&vault, found) == images[4]);
    }

    #[test]
    fn one_of_another_chain_is_not_taken() {
        let vault = sample::vault();
        let (links, images) = sample::chain(&vault, 3);
        write(&vault, &links[3], &CancelFlag::default()).unwrap();
        for (link, image) in links.iter().zip(&images).take(3) {
            let wrong = behind(&vault, link, links[3].manifest.id);
            assert!(memory(&vault, plan(&vault, &wrong).0) == *image);
        }
    }
}
