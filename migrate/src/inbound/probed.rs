//! A visitor who measures the path: its bytes are counted and dropped.

use super::desk::Probing;
use super::visitor::{Visitor, tell};
use crate::error::{Error, Result};
use crate::link::PageReceiver;
use crate::report::micros;
use protocol::control::{MAX_PROBE_BYTES, RefuseCode, Upstream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// The longest that one may take: a prober sends for less than two seconds.
const LIMIT: Duration = Duration::from_secs(10);

/// Counts what comes. `greeting` bounds the wait for its stream; `probing` is let go of before the answer.
///
/// # Errors
/// `Refused` for more bytes than are allowed; `TimedOut`; those of the link.
pub(super) fn serve(
    mut visitor: Visitor,
    bytes: u64,
    greeting: Duration,
    probing: Probing<'_>,
) -> Result<()> {
    if bytes > MAX_PROBE_BYTES {
        drop(probing);
        let reason =
            format!("{bytes} bytes are more than a path is measured with: {MAX_PROBE_BYTES} are allowed");
        visitor.refuse(RefuseCode::BadOffer, &reason);
        return Err(Error::Refused { code: RefuseCode::BadOffer, reason });
    }
    let stream = visitor.talk.link()?.accept_page_stream(greeting)?;
    let (counted, result) = channel();
    // A read of a page stream has no limit of its own; hanging up ends it.
    std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || counted.send(count(stream, bytes)))
        .map_err(|error| Error::Host(format!("could not start a thread: {error}")))?;
    let outcome = match result.recv_timeout(LIMIT) {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::TimedOut { what: "the end of a path's measurement", after: LIMIT }),
    };
    // Before the answer: whoever has that may come again at once.
    drop(probing);
    match outcome {
        Ok((bytes, took)) => {
            tell(&mut visitor.talk, &Upstream::Probed { bytes, duration_us: micros(took) });
            // The prober hangs up when it has read that; until then its answer must not be lost.
            let _ = visitor.talk.hear("the prober to hang up", greeting, &mut || Ok(0));
            visitor.talk.hang_up("measured");
            Ok(())
        }
        Err(error) => {
            visitor.talk.hang_up("the path could not be measured");
            Err(error)
        }
    }
}

/// Bytes until the end of the stream, and the time from the first of them to the last.
fn count(mut stream: Box<dyn PageReceiver>, most: u64) -> Result<(u64, Duration)> {
    let (mut bytes, mut begun, mut last) = (0_u64, None, Duration::ZERO);
    while let Some(chunk) = stream.read()? {
        let begun = *begun.get_or_insert_with(Instant::now);
        bytes += chunk.len() as u64;
        last = begun.elapsed();
        if bytes > most {
            return Err(Error::Refused {
                code: RefuseCode::BadOffer,
                reason: format!("more than the {most} bytes that were announced came"),
            });
        }
    }
    Ok((bytes, last))
}
