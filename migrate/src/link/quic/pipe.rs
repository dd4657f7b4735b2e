//! What the transport alone carries: the yardstick for the engine's bulk rate.

use super::{QuicLink, Settings};
use crate::error::{Error, Result};
use crate::link::Link as _;
use bytes::Bytes;
use std::time::{Duration, Instant};

/// Bytes of one write: a frame's largest payload.
const CHUNK_BYTES: usize = 1 << 20;

/// Small messages that go there and back, before and during the bulk.
const PINGS: usize = 200;

/// Between two pings while the bulk runs.
const PING_PAUSE: Duration = Duration::from_millis(2);

/// How long any step may take.
const STEP: Duration = Duration::from_secs(60);

/// Sends end the pings with this, which no ping is.
const LAST: u64 = u64::MAX;

/// What the sending end measured.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PipeReport {
    /// Payload bytes.
    pub bytes: u64,
    /// Page streams.
    pub streams: u16,
    /// From the first write to the receiver's word that it has all, in seconds.
    pub seconds: f64,
    /// Payload bytes a second.
    pub bytes_per_second: f64,
    /// Round trip of a control message on the idle link: median, in microseconds.
    pub idle_round_trip_us_p50: f64,
    /// 99th percentile.
    pub idle_round_trip_us_p99: f64,
    /// The same right behind one chunk of bulk, up to the receiver's answer that it has read both.
    pub burst_round_trip_us_p50: f64,
    /// The same while the bulk runs.
    pub busy_round_trip_us_p50: f64,
    /// 99th percentile.
    pub busy_round_trip_us_p99: f64,
    /// What the transport counted.
    pub link: crate::link::LinkStats,
    /// This process's peak memory in bytes (`VmHWM`).
    pub peak_rss_bytes: u64,
    /// This process's CPU time in seconds.
    pub cpu_seconds: f64,
}

/// Sends `bytes` over `streams` page streams, measuring rate and round trips. The peer runs [`receive`].
///
/// # Errors
/// As the link's.
pub fn send(mut link: QuicLink, bytes: u64, streams: u16) -> Result<PipeReport> {
    let streams = streams.max(1);
    link.write(&streams.to_le_bytes(), STEP)?;
    let chunk = Bytes::from(vec![0x5a_u8; CHUNK_BYTES]);
    let mut senders = Vec::new();
    for _ in 0..streams {
        let mut sender = link.open_page_stream()?;
        // A stream is there for the peer once something is written to it.
        sender.write(&mut [chunk.slice(..1)])?;
        senders.push(sender);
    }
    for _ in 0..PINGS / 4 {
        ping(&mut link, 0)?;
    }
    let idle = (0..PINGS).map(|_| ping(&mut link, 0)).collect::<Result<Vec<_>>>()?;
    let mut burst = Vec::new();
    for _ in 0..PINGS / 10 {
        let begun = Instant::now();
        if let Some(sender) = senders.first_mut() {
            sender.write(&mut [chunk.clone()])?;
        }
        ping(&mut link, 0)?;
        burst.push(begun.elapsed());
    }
    let begun = Instant::now();
    let each = bytes / u64::from(streams);
    let writers: Vec<_> = senders
        .into_iter()
        .map(|mut sender| {
            let chunk = chunk.clone();
            std::thread::spawn(move || -> Result<()> {
                let mut left = each;
                while left > 0 {
                    let now = left.min(CHUNK_BYTES as u64);
                    sender.write(&mut [chunk.slice(..usize::try_from(now).unwrap_or(CHUNK_BYTES))])?;
                    left -= now;
                }
                Ok(())
            })
        })
        .collect();
    let mut busy = Vec::new();
    while writers.iter().any(|writer| !writer.is_finished()) {
        busy.push(ping(&mut link, 0)?);
        std::thread::sleep(PING_PAUSE);
    }
    for writer in writers {
        writer.join().map_err(|_| Error::Host("a writing thread ended early".into()))??;
    }
    // The receiver answers this one when it has read every stream to its end.
    ping(&mut link, LAST)?;
    let seconds = begun.elapsed().as_secs_f64();
    let stats = link.stats();
    Box::new(link).close("measured");
    let (idle, burst, busy) = (Sorted::new(idle), Sorted::new(burst), Sorted::new(busy));
    Ok(PipeReport {
        bytes: each * u64::from(streams),
        streams,
        seconds,
        bytes_per_second: bytes as f64 / seconds,
        idle_round_trip_us_p50: idle.quantile(0.5),
        idle_round_trip_us_p99: idle.quantile(0.99),
        burst_round_trip_us_p50: burst.quantile(0.5),
        busy_round_trip_us_p50: busy.quantile(0.5),
        busy_round_trip_us_p99: busy.quantile(0.99),
        link: stats,
        peak_rss_bytes: peak_rss_bytes(),
        cpu_seconds: cpu_seconds(),
    })
}

/// The other end of [`send`]: reads everything, keeps nothing. Answers how many bytes came.
///
/// # Errors
/// As the link's.
pub fn receive(mut link: QuicLink) -> Result<u64> {
    let mut two = [0; 2];
    link.read_exact(&mut two, "the number of streams", STEP)?;
    let streams = u16::from_le_bytes(two).min(protocol::frame::MAX_PAGE_STREAMS);
    let mut readers = Vec::new();
    for _ in 0..streams {
        let mut receiver = link.accept_page_stream(STEP)?;
        readers.push(std::thread::spawn(move || -> Result<u64> {
            let mut got = 0;
            while let Some(bytes) = receiver.read()? {
                got += bytes.len() as u64;
            }
            Ok(got)
        }));
    }
    let mut word = [0; 8];
    loop {
        link.read_exact(&mut word, "a ping", STEP)?;
        if u64::from_le_bytes(word) == LAST {
            break;
        }
        link.write(&word, STEP)?;
    }
    let mut got = 0;
    for reader in readers {
        got += reader.join().map_err(|_| Error::Host("a reading thread ended early".into()))??;
    }
    link.write(&word, STEP)?;
    // The peer closes; the wait for its end keeps the answer from being cut off.
    let _ = link.read_exact(&mut [0], "the end", Duration::from_secs(2));
    Ok(got)
}

/// Both ends in this process, over loopback: the rate in payload bytes a second. `keys` is a directory to make
/// two throw-away identities in.
///
/// # Errors
/// As the link's.
pub fn raw_pipe(keys: &std::path::Path, bytes: u64, streams: u16, settings: &Settings) -> Result<PipeReport> {
    use crate::identity::{Identity, TrustStore};
    let (one, other) = (keys.join("pipe-a"), keys.join("pipe-b"));
    let a = Identity::init(&one, "pipe-a", true)?;
    let b = Identity::init(&other, "pipe-b", true)?;
    TrustStore::load(&one)?.add("pipe-b", b.fingerprint())?;
    TrustStore::load(&other)?.add("pipe-a", a.fingerprint())?;
    let mut listener = super::Listener::bind(([127, 0, 0, 1], 0).into(), &other, settings.clone())?;
    let address = listener.local_addr().to_string();
    let receiver = std::thread::spawn(move || receive(listener.accept(STEP)?));
    let link = super::dial(&address, &a, &TrustStore::load(&one)?, settings, STEP)?;
    let report = send(link, bytes, streams)?;
    receiver.join().map_err(|_| Error::Host("the receiving thread ended early".into()))??;
    Ok(report)
}

fn ping(link: &mut QuicLink, word: u64) -> Result<Duration> {
    let begun = Instant::now();
    link.write(&word.to_le_bytes(), STEP)?;
    link.read_exact(&mut [0; 8], "the answer to a ping", STEP)?;
    Ok(begun.elapsed())
}

struct Sorted(Vec<Duration>);

impl Sorted {
    fn new(mut values: Vec<Duration>) -> Self {
        values.sort_unstable();
        Self(values)
    }

    /// In microseconds; 0 when nothing was measured.
    fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        // Truncation is wanted, and the product lies within the list.
        #[allow(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "0 <= share <= 1")]
        let index = (last as f64 * share) as usize;
        self.0.get(index).map_or(0.0, |value| value.as_secs_f64() * 1e6)
    }
}

/// The largest resident set so far; 0 where /proc does not say.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// CPU time of all threads so far.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
