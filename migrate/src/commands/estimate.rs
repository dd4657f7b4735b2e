//! `migrate estimate`: what a move would take, without moving anything.

use super::disks::DiskArgs;
use super::limits::LimitArgs;
use super::target::Target;
use super::{cancel_on_signals, emit, say, send};
use crate::cli::Common;
use crate::controls::check_limits;
use crate::converge::simulate::Path;
use crate::converge::{Decision, Limits};
use crate::error::{Error, Result};
use crate::estimate::{Contents, Forecast, Watched, Ways, forecast, watch};
use crate::history::History;
use crate::identity::{self, Identity, TrustStore};
use crate::link::Link as _;
use crate::link::quic;
use crate::paths::{self, RuntimeDir};
use crate::probe;
use crate::source::vm::VmSource;
use crate::source::{Copied, Source as _};
use crate::units::{self, show_bytes, show_rate, show_us};
use protocol::page::PAGE_SIZE;
use std::process::ExitCode;
use std::time::Duration;

/// What a round costs without bytes on a path that was not measured: measured on loopback, November 2026.
const OVERHEAD: Duration = Duration::from_millis(1);

/// What freezing costs with a host that was never seen: as `migrate send` guesses.
const FIXED: Duration = Duration::from_millis(2);

/// The links that are told of where none is named: 1, 10 and 25 Gbit/s.
const LINKS_BYTES_PER_S: [u64; 3] = [125_000_000, 1_250_000_000, 3_125_000_000];

/// Which VM, and where to.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate estimate web b.example:7700
  migrate estimate web b.example:7700 --copy-disk
  migrate estimate web --bandwidth 2Gbit/s --downtime 10ms")]
pub struct Args {
    /// The VM's name, or the path of its control socket.
    vm: String,
    /// Where migrate receive listens: HOST:PORT. The path to it is measured, for about two seconds.
    address: Option<String>,
    /// Count with this bandwidth instead of measuring one.
    #[arg(long, value_name = "RATE", value_parser = units::bandwidth)]
    bandwidth: Option<u64>,
    /// The longest interval for which the VM is watched.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::duration)]
    sample: Duration,
    /// How long to wait for a peer that says nothing.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    link_timeout: Duration,
    #[command(flatten)]
    disks: DiskArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    if !(Duration::from_millis(100)..=Duration::from_secs(60)).contains(&args.sample) {
        return Err(Error::Usage("--sample takes from 100ms to 60s".into()));
    }
    let limits = args.limits.over(&Limits::default());
    check_limits(&limits).map_err(Error::Usage)?;
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let target = Target::find(&runtime, &args.vm)?;
    let status = target.status()?;
    // The path first: the VM is not held, nor slowed by being watched, for a peer that does not answer.
    let paths = paths(common, args)?;
    let cancel = cancel_on_signals()?;
    let copied = args.disks.copied();
    let source = VmSource::watch(&status.name, target.socket(), &copied)?;
    // The receivers of this release all can, unless disks go along; one that cannot is left out of what `send` decides.
    let ways = Ways { can_throttle: source.can_throttle(), can_post_copy: copied == Copied::None };
    let watched = watch(Box::new(source), args.sample, &cancel)?;
    let forecasts: Vec<Forecast> =
        paths.iter().map(|path| forecast(&watched, *path, &limits, ways)).collect();
    if common.json {
        let mut line = serde_json::to_value(&watched).unwrap_or_default();
        line["event"] = "estimate".into();
        line["name"] = status.name.into();
        line["forecasts"] = serde_json::to_value(&forecasts).unwrap_or_default();
        emit(&line);
    } else {
        show(&status.name, &watched, &forecasts, &copied);
    }
    Ok(ExitCode::SUCCESS)
}

/// The paths to forecast for.
fn paths(common: &Common, args: &Args) -> Result<Vec<Path>> {
    let path = |bytes_per_s: u64, overhead: Duration, fixed: Duration| Path {
        bandwidth_bytes_per_s: bytes_per_s as f64,
        overhead_s: overhead.as_secs_f64(),
        fixed_s: fixed.as_secs_f64(),
    };
    let Some(address) = &args.address else {
        let links = args.bandwidth.map_or(LINKS_BYTES_PER_S.to_vec(), |bandwidth| vec![bandwidth]);
        return Ok(links.iter().map(|bytes_per_s| path(*bytes_per_s, OVERHEAD, FIXED)).collect());
    };
    let keys = identity::directory(common.keys.as_deref())?;
    let (identity, trust) = (Identity::load(&keys)?, TrustStore::load(&keys)?);
    let settings = send::settings(args.link_timeout);
    let link = quic::dial(address, &identity, &trust, &settings, args.link_timeout)?;
    let key = link.peer_key().to_string();
    let history = paths::state_dir(common.state_dir.as_deref()).map(|dir| History::in_dir(&dir));
    let known = history.and_then(|history| history.fixed(&key)).map_or(FIXED, |(fixed, _)| fixed);
    let (bandwidth, rtt_us) = match args.bandwidth {
        Some(bandwidth) => (bandwidth, link.stats().rtt_us),
        None => {
            let measured = probe::measure(Box::new(link), args.link_timeout)?;
            (measured.bandwidth_bytes_per_s, measured.rtt_us)
        }
    };
    let trip = Duration::from_micros(rtt_us);
    Ok(vec![path(bandwidth, OVERHEAD + trip, known + trip)])
}

fn show(name: &str, watched: &Watched, forecasts: &[Forecast], copied: &Copied) {
    let bytes = show_bytes(watched.present_pages * PAGE_SIZE as u64);
    let it = if *copied == Copied::None { "memory" } else { "memory and disks" };
    say(&format!("{name} has touched {bytes} of its {it}, and dirties"));
    for interval in &watched.intervals {
        let bytes = show_bytes(interval.dirty_pages * PAGE_SIZE as u64);
        let (length, per_s) = (show_us(interval.interval_us), show_rate(interval.dirty_bytes_per_s));
        say(&format!("  {bytes:>10} in {length:>8}  ({per_s})"));
    }
    let total: u64 = watched.regions.iter().map(|region| region.dirty_pages).sum();
    for region in &watched.regions {
        let part = region.dirty_pages * 100 / total.max(1);
        if part >= 10 {
            let at = show_bytes(region.first_page * PAGE_SIZE as u64);
            let bytes = show_bytes(region.pages * PAGE_SIZE as u64);
            say(&format!("  {part:>3} % of it in the {bytes} at {at} of space {}", region.space));
        }
    }
    let (all, dirtied) = (format!("of its {it}"), "of what it dirties".to_owned());
    for (what, contents) in [(all, &watched.memory), (dirtied, &watched.dirtied)] {
        if contents.sampled_pages > 0 {
            say(&format!("  {what}, {}", packs(contents)));
        }
    }
    for forecast in forecasts {
        say(&format!("at {}: {}", show_rate(forecast.bandwidth_bytes_per_s), told(forecast)));
    }
}

fn packs(contents: &Contents) -> String {
    let Contents { sampled_pages, zero_pages, known_pages, lz4_part, zstd_part, delta_part, .. } = *contents;
    let percent = |part: f64| format!("{:.0} %", part * 100.0);
    let of_all = |pages: u64| percent(pages as f64 / sampled_pages as f64);
    let differs = if delta_part < 1.0 {
        format!(", and differences are {}", percent(delta_part))
    } else {
        String::new()
    };
    format!(
        "by {sampled_pages} pages: {} are zero, {} are there already; LZ4 leaves {} of the rest, Zstandard {}{differs}",
        of_all(zero_pages),
        of_all(known_pages),
        percent(lz4_part),
        percent(zstd_part),
    )
}

fn told(forecast: &Forecast) -> String {
    let Forecast { rounds, sent_bytes, total_us, downtime_us, throttle_percent, follow_us, .. } = *forecast;
    let takes = format!("{rounds} rounds, {}, {}", show_bytes(sent_bytes), show_us(total_us));
    let downtime = show_us(downtime_us);
    let slowed = match throttle_percent {
        0 => String::new(),
        percent => format!(", slowed down by up to {percent} %"),
    };
    match forecast.decided {
        Decision::Freeze { .. } => format!("converges in {takes}, with a downtime of {downtime}{slowed}"),
        Decision::Minimum { .. } | Decision::Force { .. } => {
            format!("does not fit the budget: moves in {takes}, with a downtime of {downtime}{slowed}")
        }
        Decision::PostCopy { .. } => format!(
            "goes to post-copy: {takes}, with a downtime of {downtime}; its last page comes {} behind its start there{slowed}",
            show_us(follow_us)
        ),
        _ => format!("does not converge: stays here behind {takes}{slowed}"),
    }
}
