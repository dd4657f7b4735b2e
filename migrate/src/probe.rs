//! How fast a path is, measured with bytes that nobody keeps.
//!
//! ```text
//! prober                          receiver
//!   Probe {bytes} ─────────────────▶
//!   one page stream of nothing ════▶ counts and drops
//!                 ◀──────────────── Probed {bytes, duration}
//! ```

use crate::conversation::{self, out_of_order};
use crate::error::{Error, Result, clean};
use crate::link::Link;
use bytes::Bytes;
use protocol::control::{Downstream, MAX_PROBE_BYTES, Upstream};
use protocol::handshake::{Hello, PROBE};
use std::time::{Duration, Instant};

/// How long bytes are sent: long enough for a congestion window to open, short enough to ask for twice.
const SENDS_FOR: Duration = Duration::from_millis(1500);

/// Bytes of one write.
const CHUNK_BYTES: usize = 1 << 20;

/// What a path did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    /// Bytes a second, from the first that arrived to the last.
    pub(crate) bandwidth_bytes_per_s: u64,
    /// Smoothed round-trip time.
    pub(crate) rtt_us: u64,
}

/// Measures the path to the other end of `link`; each answer is waited for no longer than `limit`.
///
/// # Errors
/// `Refused` when the receiver does not take probes, or not now; those of the link.
pub(crate) fn measure(link: Box<dyn Link>, limit: Duration) -> Result<Path> {
    let nothing = &mut || Ok(0);
    let mut talk = conversation::Sender::new(link, 0);
    talk.introduce(&Downstream::Hello(Hello::ours()), limit)?;
    talk.preamble(limit, nothing)?;
    let agreed = match talk.hear("the destination's greeting", limit, nothing)?.0 {
        Upstream::Hello(hello) => hello.agree()?,
        other => return Err(out_of_order("Hello", other.name())),
    };
    if !agreed.contains(&PROBE) {
        return Err(Error::Refused {
            code: protocol::control::RefuseCode::Version,
            reason: "that receiver is older and cannot measure a path: name one with --bandwidth".into(),
        });
    }
    talk.say(&Downstream::Probe { bytes: MAX_PROBE_BYTES }, &[], limit)?;
    let mut stream = talk.link()?.open_page_stream()?;
    let chunk = Bytes::from(vec![0; CHUNK_BYTES]);
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < SENDS_FOR && sent + CHUNK_BYTES as u64 <= MAX_PROBE_BYTES {
        if let Err(error) = stream.write(&mut [chunk.clone()]) {
            // Why the peer went away explains more.
            return Err(refusal(&mut talk).unwrap_or(error));
        }
        sent += CHUNK_BYTES as u64;
    }
    drop(stream);
    let answer = talk.hear("the destination to have counted", limit, nothing)?.0;
    let rtt_us = talk.stats().rtt_us;
    talk.hang_up("measured");
    match answer {
        Upstream::Probed { bytes, duration_us } if bytes <= sent => {
            let seconds = duration_us.max(1) as f64 / 1e6;
            Ok(Path { bandwidth_bytes_per_s: (bytes as f64 / seconds) as u64, rtt_us })
        }
        Upstream::Refuse { code, reason } => Err(Error::Refused { code, reason: clean(&reason) }),
        other => Err(out_of_order("Probed with no more bytes than were sent", other.name())),
    }
}

fn refusal(talk: &mut conversation::Sender) -> Option<Error> {
    match talk.hear("the peer's last word", Duration::from_millis(500), &mut || Ok(0)).ok()?.0 {
        Upstream::Refuse { code, reason } => Some(Error::Refused { code, reason: clean(&reason) }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbound::{Desk, Limits, MemoryLedger, Notice};
    use crate::link::duplex::{Network, Profile};
    use protocol::control::RefuseCode;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    const SECOND: Duration = Duration::from_secs(1);

    /// A receiver, and why it turned visitors away.
    fn desk(network: &Network) -> (Desk, Receiver<String>) {
        let network = network.clone();
        let (turned_away, reasons) = channel();
        let notices = Box::new(move |notice| {
            if let Notice::TurnedAway { error, .. } = notice {
                turned_away.send(error.to_string()).ok();
            }
        });
        let accept = Box::new(move |limit| network.accept(limit));
        let ledger = Arc::new(MemoryLedger::default());
        let desk = Desk::open(accept, ledger, Limits::one(1 << 30), 5 * SECOND, notices).unwrap();
        (desk, reasons)
    }

    fn greeted(network: &Network) -> conversation::Sender {
        let mut talk = conversation::Sender::new(network.dial().unwrap(), 0);
        let nothing = &mut || Ok(0);
        talk.introduce(&Downstream::Hello(Hello::ours()), SECOND).unwrap();
        talk.preamble(SECOND, nothing).unwrap();
        talk.hear("the greeting", 5 * SECOND, nothing).unwrap();
        talk
    }

    #[test]
    fn a_path_is_measured_again_and_again() {
        let network = Network::new(Profile { bytes_per_s: 40_000_000, ..Profile::default() }, None);
        let (_desk, _) = desk(&network);
        for _ in 0..2 {
            let path = measure(network.dial().unwrap(), 10 * SECOND).unwrap();
            let bandwidth = path.bandwidth_bytes_per_s;
            assert!((15_000_000..80_000_000).contains(&bandwidth), "{bandwidth}");
        }
    }

    #[test]
    fn more_than_is_allowed_or_announced_is_not_counted() {
        let network = Network::new(Profile::default(), None);
        let (_desk, reasons) = desk(&network);
        let mut talk = greeted(&network);
        talk.say(&Downstream::Probe { bytes: MAX_PROBE_BYTES + 1 }, &[], SECOND).unwrap();
        let answer = talk.hear("a refusal", 5 * SECOND, &mut || Ok(0)).unwrap().0;
        assert!(matches!(answer, Upstream::Refuse { code: RefuseCode::BadOffer, .. }), "{answer:?}");
        assert!(reasons.recv_timeout(5 * SECOND).unwrap().contains("more than"));

        let mut talk = greeted(&network);
        talk.say(&Downstream::Probe { bytes: 10 }, &[], SECOND).unwrap();
        let mut stream = talk.link().unwrap().open_page_stream().unwrap();
        stream.write(&mut [Bytes::from_static(&[0; 11])]).ok();
        assert!(reasons.recv_timeout(5 * SECOND).unwrap().contains("announced"));
        // And the next one is served.
        assert!(measure(network.dial().unwrap(), 10 * SECOND).is_ok());
    }

    #[test]
    fn one_at_a_time_and_whoever_is_gone_holds_nobody_up() {
        let network = Network::new(Profile::default(), None);
        let (_desk, reasons) = desk(&network);
        let mut first = greeted(&network);
        first.say(&Downstream::Probe { bytes: 10 }, &[], SECOND).unwrap();
        let _stream = first.link().unwrap().open_page_stream().unwrap();
        std::thread::sleep(SECOND / 5);
        let mut second = greeted(&network);
        second.say(&Downstream::Probe { bytes: 10 }, &[], SECOND).unwrap();
        let answer = second.hear("a refusal", 5 * SECOND, &mut || Ok(0)).unwrap().0;
        assert!(matches!(answer, Upstream::Refuse { code: RefuseCode::Busy, .. }), "{answer:?}");
        assert!(reasons.recv_timeout(5 * SECOND).unwrap().contains("another path"));
        first.hang_up("gone");
        reasons.recv_timeout(5 * SECOND).unwrap();
        assert!(measure(network.dial().unwrap(), 10 * SECOND).is_ok());
    }
}
