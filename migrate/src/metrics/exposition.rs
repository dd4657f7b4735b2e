//! The families of figures, written by a library that knows the format.

use super::fleet::Fleet;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use protocol::page::PAGE_SIZE;
use protocol::steer::{End, Series, Status};
use std::fmt::Error;

/// A figure of a running migration: its name without the unit, what it is, its unit, and its value where there is one.
type Figure = (&'static str, &'static str, In, fn(&Status) -> Option<f64>);

/// What a figure is counted in.
#[derive(Clone, Copy)]
enum In {
    Numbers,
    Bytes,
    BytesPerSecond,
    Seconds,
    Ratios,
}

impl In {
    fn unit(self) -> Option<Unit> {
        match self {
            Self::Numbers => None,
            Self::Bytes => Some(Unit::Bytes),
            Self::BytesPerSecond => Some(Unit::Other("bytes_per_second".into())),
            Self::Seconds => Some(Unit::Seconds),
            Self::Ratios => Some(Unit::Ratios),
        }
    }
}

/// A figure of a series of checkpoints, as [`Figure`].
type SeriesFigure = (&'static str, &'static str, In, fn(&Series) -> Option<f64>);

/// One gauge for each, with a value for each series of checkpoints.
const SERIES_FIGURES: [SeriesFigure; 4] = [
    (
        "migrate_checkpoint_last_success_timestamp",
        "When the last checkpoint was durable, since 1970",
        In::Seconds,
        |of| of.last.as_ref().map(|last| last.durable_unix_ms as f64 / 1e3),
    ),
    (
        "migrate_checkpoint_last_pause",
        "How long the VM stood still for the last checkpoint",
        In::Seconds,
        |of| of.last.as_ref().map(|last| seconds(last.pause_us)),
    ),
    ("migrate_checkpoint_last_stored", "Bytes of the last checkpoint in the store", In::Bytes, |of| {
        of.last.as_ref().map(|last| last.stored_bytes as f64)
    }),
    (
        "migrate_checkpoint_interval",
        "From the beginning of a checkpoint to that of the next",
        In::Seconds,
        |of| of.interval_us.map(seconds),
    ),
];

/// One gauge for each, with a value for each migration that runs.
const FIGURES: [Figure; 11] = [
    ("migrate_elapsed", "Time since the migration began", In::Seconds, |of| Some(seconds(of.elapsed_us))),
    ("migrate_memory", "Memory of the VM", In::Bytes, |of| Some(of.memory_bytes as f64)),
    ("migrate_moved", "Bytes on the page streams so far", In::Bytes, |of| Some(of.moved_bytes as f64)),
    ("migrate_round", "Number of the round, from 0", In::Numbers, |of| Some(f64::from(of.round))),
    ("migrate_round_left", "What the round has still to look at", In::Bytes, |of| {
        let pages = of.dirty_pages.saturating_sub(of.done_pages);
        (of.end == End::Send).then_some(pages as f64 * PAGE_SIZE as f64)
    }),
    ("migrate_rate", "Rate of the page streams", In::BytesPerSecond, |of| Some(of.rate_bytes_per_s as f64)),
    ("migrate_dirty_rate", "Rate at which the VM writes memory anew", In::BytesPerSecond, |of| {
        of.dirty_bytes_per_s.map(|rate| rate as f64)
    }),
    ("migrate_forecast_downtime", "Downtime if it stopped now", In::Seconds, |of| {
        of.predicted_downtime_us.map(seconds)
    }),
    ("migrate_downtime_limit", "Downtime to aim at", In::Seconds, |of| of.limits.downtime_us.map(seconds)),
    ("migrate_left", "Time that is expected to be left", In::Seconds, |of| of.eta_us.map(seconds)),
    ("migrate_throttle", "How much the VM is slowed down, as a part of its time", In::Ratios, |of| {
        (of.end == End::Send).then(|| f64::from(of.throttle_percent.unwrap_or(0)) / 100.0)
    }),
];

fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

/// All figures as text, up to its `# EOF`.
pub(super) fn exposition(fleet: &Fleet) -> Result<String, Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(fleet.clone()));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

impl Collector for Fleet {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let (running, totals) = self.look();
        for (name, help, bytes) in [
            ("migrate_sent", "Bytes on the page streams of all VMs that were sent", totals.sent_bytes),
            (
                "migrate_received",
                "Bytes on the page streams of all VMs that were received",
                totals.received_bytes,
            ),
        ] {
            let counter = ConstCounter::new(bytes);
            let metric = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), counter.metric_type())?;
            counter.encode(metric)?;
        }
        let help = "Migrations that ended";
        let kind = ConstCounter::new(0_u64).metric_type();
        let mut ended = encoder.encode_descriptor("migrate_migrations", help, None, kind)?;
        for (end, outcomes) in ["send", "receive"].iter().zip(totals.migrations) {
            for (outcome, count) in ["moved", "failed", "in-doubt"].iter().zip(outcomes) {
                let labels = [("end", *end), ("outcome", *outcome)];
                ConstCounter::new(count).encode(ended.encode_family(&labels)?)?;
            }
        }
        encode_series(&self.series(), &mut encoder)?;
        let kind = ConstGauge::new(0_i64).metric_type();
        let count = ConstGauge::new(i64::try_from(running.len()).unwrap_or(i64::MAX));
        let metric = encoder.encode_descriptor("migrate_running", "Migrations that run", None, kind)?;
        count.encode(metric)?;
        for (name, help, unit, value) in FIGURES {
            let unit = unit.unit();
            let kind = ConstGauge::new(0_f64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for status in &running {
                let Some(value) = value(status) else { continue };
                let end = match status.end {
                    End::Send => "send",
                    End::Receive => "receive",
                };
                let migration = status.migration.to_string();
                let labels =
                    [("vm", status.workload.as_str()), ("end", end), ("migration", migration.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// The figures of series of checkpoints, where there are any.
fn encode_series(all: &[Series], encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
    if all.is_empty() {
        return Ok(());
    }
    let kind = ConstCounter::new(0_u64).metric_type();
    let help = "Checkpoints by what became of them: missed are those whose time went by";
    let mut counts = encoder.encode_descriptor("migrate_checkpoints", help, None, kind)?;
    for series in all {
        for (outcome, count) in
            [("committed", series.taken), ("failed", series.failed), ("missed", series.missed)]
        {
            let labels = [("vm", series.workload.as_str()), ("outcome", outcome)];
            ConstCounter::new(count).encode(counts.encode_family(&labels)?)?;
        }
    }
    let help = "Bytes that checkpoints took in the store";
    let mut stored =
        encoder.encode_descriptor("migrate_checkpoint_stored", help, Some(&Unit::Bytes), kind)?;
    for series in all {
        let labels = [("vm", series.workload.as_str())];
        ConstCounter::new(series.stored_bytes).encode(stored.encode_family(&labels)?)?;
    }
    for (name, help, unit, value) in SERIES_FIGURES {
        let unit = unit.unit();
        let kind = ConstGauge::new(0_f64).metric_type();
        let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for series in all {
            let Some(value) = value(series) else { continue };
            let labels = [("vm", series.workload.as_str())];
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::CancelFlag;
    use crate::controls::Controls;
    use crate::converge::Limits;
    use crate::report::{ArrivalReport, Event};
    use crate::steer::{Board, SeriesBoard, Subject};
    use protocol::MigrationId;
    use std::time::{Duration, Instant};

    fn board(end: End, workload: &str) -> Board {
        let subject = Subject {
            end,
            migration: MigrationId(7),
            workload: workload.into(),
            peer: "b".into(),
            memory_bytes: 1 << 30,
        };
        let controls = (end == End::Send).then(|| Controls::new(Limits::default()));
        Board::new(subject, CancelFlag::default(), controls)
    }

    #[test]
    fn the_format_is_that_of_its_specification() {
        let fleet = Fleet::default();
        let sent = fleet.add(board(End::Send, "we\"b\n"));
        let arriving = board(End::Receive, "db");
        arriving.note(&Event::Receiving { round: 2, received_bytes: 5000, rate_bytes_per_s: 100 });
        let received = fleet.add(arriving.clone());
        let series = SeriesBoard::new("web", "a store".into(), CancelFlag::default());
        fleet.add_series(series.clone());
        series.missed();
        series.waits_until(Instant::now(), Duration::from_secs(30));
        let text = exposition(&fleet).unwrap();
        assert!(text.ends_with("# EOF\n"), "{text}");
        for line in [
            "# TYPE migrate_sent_bytes counter",
            "# UNIT migrate_sent_bytes bytes",
            "migrate_sent_bytes_total 0",
            "migrate_received_bytes_total 5000",
            "migrate_running 2",
            "migrate_checkpoints_total{vm=\"web\",outcome=\"committed\"} 0",
            "migrate_checkpoints_total{vm=\"web\",outcome=\"missed\"} 1",
            "migrate_checkpoint_stored_bytes_total{vm=\"web\"} 0",
            "migrate_checkpoint_interval_seconds{vm=\"web\"} 30.0",
            "# TYPE migrate_checkpoint_last_success_timestamp_seconds gauge",
            "# UNIT migrate_rate_bytes_per_second bytes_per_second",
            "migrate_downtime_limit_seconds{vm=\"we\\\"b\\n\",end=\"send\",migration=\"00000000000000000000000000000007\"} 0.05",
            "migrate_round{vm=\"db\",end=\"receive\",migration=\"00000000000000000000000000000007\"} 2.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        // A name stands once, and every sample belongs to the family above it.
        let mut family = String::new();
        let mut families = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap().to_owned();
                assert!(families.insert(family.clone()), "{family} stands twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&family), "{line} under {family}");
            }
        }
        arriving.note(&Event::Arrived(Box::new(ArrivalReport {
            received_bytes: 9000,
            ..ArrivalReport::of("b")
        })));
        drop((sent, received));
        let text = exposition(&fleet).unwrap();
        for line in [
            "migrate_running 0",
            "migrate_received_bytes_total 9000",
            "migrate_migrations_total{end=\"receive\",outcome=\"moved\"} 1",
            "migrate_migrations_total{end=\"send\",outcome=\"failed\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
