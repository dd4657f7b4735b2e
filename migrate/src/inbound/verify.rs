//! Digests over all memory, compared before the workload may start: see `outbound/verify.rs` for the other end.

use super::Inbound;
use super::streams::Course;
use crate::conversation::out_of_order;
use crate::destination::PageMemory;
use crate::digest::{Difference, Digest, digests, stripes};
use crate::error::{Error, Result};
use crate::memory::PageReader;
use protocol::ProtocolError;
use protocol::control::{Downstream, MAX_VERIFY_STRIPES, STRIPE_DIGEST_BYTES, Upstream};
use protocol::page::PageRun;

/// The first digests that the sender says.
pub(super) struct Digests {
    pub(super) last_round: u32,
    pub(super) blob: Vec<u8>,
}

impl Inbound<'_> {
    /// Compares memory with the sender's digests, part by part as they come, until the state comes.
    pub(super) fn verify(&mut self, course: &Course, first: Digests) -> Result<Vec<u8>> {
        let Digests { last_round, mut blob } = first;
        let idle = self.options.idle;
        {
            let (streams, mut watch) = self.watching();
            streams.await_end(last_round, idle, &mut watch)?;
        }
        let stripes = stripes(&course.layout);
        let mut left = stripes.as_slice();
        let mut found = Difference::default();
        loop {
            left = compare(course.memory.as_ref(), left, &blob, &mut found)?;
            if let Some(difference) = found.describe().filter(|_| left.is_empty()) {
                return Err(Error::Host(difference));
            }
            self.talk.say(&Upstream::Verified { stripes: found.compared }, &[], idle)?;
            match self.hear("the sender's next digests, or its state")? {
                (Downstream::Verify { last_round: round, first }, next)
                    if round == last_round && first == found.compared =>
                {
                    blob = next;
                }
                (Downstream::State { last_round: round }, state)
                    if round == last_round && left.is_empty() =>
                {
                    return Ok(state);
                }
                (other, _) if left.is_empty() => {
                    return Err(out_of_order("State of this round", other.name()));
                }
                (other, _) => return Err(out_of_order("Verify of the stripes that follow", other.name())),
            }
        }
    }
}

/// Compares the first of `left` with the digests in `blob`; answers those behind.
fn compare<'a>(
    memory: &dyn PageMemory,
    left: &'a [PageRun],
    blob: &[u8],
    found: &mut Difference,
) -> Result<&'a [PageRun]> {
    let (theirs, rest): (&[Digest], _) = blob.as_chunks::<STRIPE_DIGEST_BYTES>();
    let part = left.split_at_checked(theirs.len());
    let Some((part, left)) =
        part.filter(|(part, _)| rest.is_empty() && (1..=MAX_VERIFY_STRIPES).contains(&part.len()))
    else {
        let (what, found) = ("the length of the digests", blob.len() as u64);
        return Err(ProtocolError::Value { what, found }.into());
    };
    let memory: &dyn PageReader = memory;
    found.compare(part, &digests(memory, part)?, theirs);
    Ok(left)
}
