//! Reports for tests.

use crate::link::LinkStats;
use crate::report::{
    ArrivalReport, FixedPart, GuestSpeed, Outcome, Phase, PhaseTime, REPORT_VERSION, Report, RoundReport,
    RoundSpeed,
};
use protocol::MigrationId;

/// A busy VM that moved in six rounds.
pub(crate) fn busy() -> Report {
    let round = |round, dirty_pages: u64, duration_us: u64, remaining_pages| RoundReport {
        round,
        dirty_pages,
        sent_pages: dirty_pages - dirty_pages / 8,
        zero_pages: dirty_pages / 16,
        skipped_pages: if round == 0 { dirty_pages / 16 } else { 0 },
        sent_bytes: dirty_pages * 3600,
        duration_us,
        rate_bytes_per_s: dirty_pages * 3600 * 1_000_000 / duration_us,
        remaining_pages,
        predicted_downtime_us: 2_500 + remaining_pages * 7,
        ..RoundReport::default()
    };
    let mut rounds = vec![
        round(0, 262_144, 1_480_000, 61_000),
        round(1, 61_000, 352_000, 15_100),
        round(2, 15_100, 91_000, 4_100),
        round(3, 4_100, 26_000, 1_150),
        round(4, 1_150, 9_000, 400),
    ];
    rounds.push(RoundReport {
        frozen: true,
        remaining_pages: 0,
        predicted_downtime_us: 0,
        ..round(5, 420, 3_100, 0)
    });
    let total = |count: fn(&RoundReport) -> u64| rounds.iter().map(count).sum();
    let (sent_pages, zero_pages) = (total(|round| round.sent_pages), total(|round| round.zero_pages));
    let (skipped_pages, sent_bytes) = (total(|round| round.skipped_pages), total(|round| round.sent_bytes));
    let phases = [
        (Phase::Greet, 1_900),
        (Phase::Offer, 48_000),
        (Phase::Track, 700),
        (Phase::Rounds, 1_958_000),
        (Phase::Freeze, 2_300),
        (Phase::State, 600),
        (Phase::Ready, 1_900),
        (Phase::Pledge, 60),
        (Phase::Commit, 700),
        (Phase::Settle, 12_000),
    ];
    Report {
        version: REPORT_VERSION,
        migration: MigrationId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
        workload: "web-1".into(),
        peer: "192.0.2.7:7700 (SHA256:q1w2e3r4t5z6u7i8o9p0)".into(),
        outcome: Outcome::Moved,
        tracking: "manual-initially-set".into(),
        memory_bytes: 1 << 30,
        disk_bytes: 0,
        page_streams: 2,
        connections: crate::report::Connections::default(),
        phases: phases.map(|(phase, duration_us)| PhaseTime { phase, duration_us }).to_vec(),
        sent_pages,
        packed_pages: 0,
        zero_pages,
        skipped_pages,
        seeded_pages: 0,
        sent_bytes,
        rounds,
        state_bytes: 21_504,
        resumes: 0,
        downtime_us: 5_560,
        verify_us: 0,
        fixed: FixedPart { assumed_us: 2_500, known_from: 3, actual_us: 2_700, pause_us: 900, save_us: 500 },
        total_us: 2_026_160,
        post_copy: None,
        link: LinkStats {
            rtt_us: 310,
            sent_wire_bytes: sent_bytes / 50 * 51,
            lost_packets: 12,
            mtu_bytes: 8952,
        },
        guest: Some(GuestSpeed {
            before_bytes_per_s: 120_000_000,
            rounds: [(0, 96_000_000), (1, 101_000_000), (2, 99_000_000), (3, 104_000_000)]
                .map(RoundSpeed::from)
                .to_vec(),
        }),
        warnings: vec!["the socket buffers are small: see docs/operating.md".into()],
    }
}

/// The same at its destination.
pub(crate) fn arrival() -> ArrivalReport {
    ArrivalReport {
        migration: Some(busy().migration),
        workload: "web-1".into(),
        error: None,
        phases: busy().phases,
        rounds: 6,
        received_bytes: busy().sent_bytes,
        state_bytes: 21_504,
        total_us: 2_020_000,
        ..ArrivalReport::of("192.0.2.6:41234 (SHA256:…)")
    }
}
