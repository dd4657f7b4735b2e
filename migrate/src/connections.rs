//! How many connections carry the pages of a move.
//!
//! One connection is the work of one core at each end, so another one helps where that core is the limit and a further
//! one is idle. Both show only in a move: each remembers, for its peer, how fast its first round was and for how much of
//! it the busiest thread of the transport was busy. The next move takes one connection more where that was the limit,
//! and goes back where it did not pay. Only a few moves are remembered, so what did not pay is tried again some moves later.

use crate::report::{Connections, Event, Observer};
use protocol::control::MAX_CONNECTIONS;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The most connections that are taken unless somebody asks for more.
const MOST: u16 = 4;

/// The share of its time above which a transport thread is taken for the limit, in percent: behind the rest it waits.
const BUSY_PERCENT: u8 = 85;

/// What another connection must bring to be kept.
const GAIN: f64 = 1.1;

/// Up to so many cores the guest, the lanes and one connection have enough to do.
const FEW_CORES: usize = 4;

/// The shortest round that is measured: the kernel counts CPU time in hundredths of a second.
const SHORTEST: Duration = Duration::from_millis(500);

/// Ticks of `/proc/…/stat` in a second: `USER_HZ` of x86-64 (asm-generic/param.h).
const TICKS_PER_S: f64 = 100.0;

/// How many connections an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// As many as earlier moves say.
    Auto,
    /// So many.
    Number(u16),
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        match text.parse() {
            Ok(number) if (1..=MAX_CONNECTIONS).contains(&number) => Ok(Self::Number(number)),
            _ => Err(format!("{text:?} is no number of connections: write 1 to {MAX_CONNECTIONS}, or auto")),
        }
    }
}

/// How the first round of an earlier move went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// The connections it went over.
    pub connections: u16,
    /// How fast.
    pub bytes_per_s: u64,
    /// For how much of it the busiest transport thread here was busy.
    pub busy_percent: u8,
}

/// This host, as far as it matters.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Cores that this process may use.
    pub cores: usize,
    /// Threads that ran or wanted to, over the last minute.
    pub load: f64,
}

impl Host {
    /// This one, now.
    pub fn now() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // Fixed-point numbers with 16 bits behind the point (sysinfo(2)).
        Self { cores, load: rustix::system::sysinfo().loads[0] as f64 / 65536.0 }
    }

    /// Whether there is a core for another connection.
    fn has_idle_core(self) -> bool {
        self.cores as f64 - self.load >= 1.0
    }

    /// Whether it has cores to spare for the transport.
    pub fn has_many_cores(self) -> bool {
        self.cores > FEW_CORES
    }
}

/// What is wanted, or what the earlier moves to the same peer, the newest last, say.
pub fn choose(wanted: Wanted, past: &[Carried], host: Host) -> Connections {
    let (number, reason) = match (wanted, past.last()) {
        (Wanted::Number(number), _) => (number, "asked for".into()),
        (Wanted::Auto, Some(last)) => learned(last, past, host),
        (Wanted::Auto, None) => {
            let number = if host.has_many_cores() { 2 } else { 1 };
            (number, format!("no earlier move to this host was measured, and {} cores are here", host.cores))
        }
    };
    Connections { number, reason }
}

fn learned(last: &Carried, past: &[Carried], host: Host) -> (u16, String) {
    let rate = |number| {
        let found = past.iter().rev().find(|carried| carried.connections == number);
        found.map(|carried| carried.bytes_per_s as f64)
    };
    let (now, rate_now) = (last.connections.clamp(1, MOST), last.bytes_per_s as f64);
    if now > 1 && rate(now - 1).is_some_and(|fewer| rate_now < fewer * GAIN) {
        return (now - 1, format!("{now} were less than 10 % faster last time"));
    }
    let busy = format!("the transport was busy for {} % of the last move's first round", last.busy_percent);
    if last.busy_percent <= BUSY_PERCENT {
        return (now, busy);
    }
    match rate(now + 1) {
        _ if now == MOST => (now, format!("{busy}, and more than {MOST} are taken only when asked for")),
        Some(more) if more < rate_now * GAIN => {
            (now, format!("{busy}, but one more was less than 10 % faster"))
        }
        _ if !host.has_idle_core() => (now, format!("{busy}, but no core is idle")),
        _ => (now + 1, busy),
    }
}

/// An observer that measures the transport's threads over the first round.
pub struct Meter<'a> {
    begun: Option<(Instant, BTreeMap<u32, u64>)>,
    carried: Option<Carried>,
    inner: &'a mut dyn Observer,
}

impl<'a> Meter<'a> {
    /// Tells everything on.
    pub fn new(inner: &'a mut dyn Observer) -> Self {
        Self { begun: None, carried: None, inner }
    }

    /// How the first round went over so many connections, if it was long enough to say.
    pub fn carried(&self, connections: u16) -> Option<Carried> {
        self.carried.map(|carried| Carried { connections, ..carried })
    }
}

impl Observer for Meter<'_> {
    fn event(&mut self, event: &Event) {
        match event {
            Event::RoundBegin { round: 0, .. } => self.begun = Some((Instant::now(), transport_ticks())),
            Event::RoundEnd(round) if round.round == 0 && !round.frozen => {
                let begun = self.begun.take().filter(|(since, _)| since.elapsed() >= SHORTEST);
                self.carried = begun.map(|(since, before)| Carried {
                    connections: 1,
                    bytes_per_s: round.rate_bytes_per_s,
                    busy_percent: busy_percent(&before, &transport_ticks(), since.elapsed()),
                });
            }
            _ => {}
        }
        self.inner.event(event);
    }
}

/// For how much of the time the busiest thread was busy.
fn busy_percent(before: &BTreeMap<u32, u64>, now: &BTreeMap<u32, u64>, elapsed: Duration) -> u8 {
    let spent =
        now.iter().map(|(thread, ticks)| ticks.saturating_sub(before.get(thread).copied().unwrap_or(0)));
    let share = spent.max().unwrap_or(0) as f64 / (TICKS_PER_S * elapsed.as_secs_f64()).max(1.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    let percent = (share * 100.0).clamp(0.0, 100.0) as u8;
    percent
}

/// The CPU time of each transport thread of this process, in ticks; empty where the kernel does not tell.
fn transport_ticks() -> BTreeMap<u32, u64> {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return BTreeMap::new() };
    let of_one = |thread: std::fs::DirEntry| {
        let number = thread.file_name().to_str()?.parse().ok()?;
        Some((number, ticks(&std::fs::read_to_string(thread.path().join("stat")).ok()?)?))
    };
    threads.flatten().filter_map(of_one).collect()
}

/// The CPU time in a thread's `stat`, in ticks, if it is one of the transport (proc_pid_stat(5)).
fn ticks(stat: &str) -> Option<u64> {
    let (head, rest) = stat.rsplit_once(") ")?;
    if head.split_once(" (")?.1 != crate::link::quic::THREAD_NAME {
        return None;
    }
    // The fields 14 and 15, user and system time; `rest` begins with the third.
    let mut times = rest.split(' ').skip(11);
    Some(times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Quiet, RoundReport};

    const IDLE: Host = Host { cores: 8, load: 2.0 };

    fn auto(past: &[(u16, u64, u8)], host: Host) -> u16 {
        let carried =
            |&(connections, bytes_per_s, busy_percent)| Carried { connections, bytes_per_s, busy_percent };
        choose(Wanted::Auto, &past.iter().map(carried).collect::<Vec<_>>(), host).number
    }

    #[test]
    fn one_more_is_taken_where_the_transport_is_the_limit_and_kept_where_it_pays() {
        assert_eq!(auto(&[], Host { cores: 4, load: 0.0 }), 1);
        assert_eq!(auto(&[], Host { cores: 5, load: 0.0 }), 2);
        assert_eq!(auto(&[(1, 100, 85)], IDLE), 1, "it waited for others");
        assert_eq!(auto(&[(1, 100, 86)], IDLE), 2);
        assert_eq!(auto(&[(1, 100, 99)], Host { cores: 8, load: 7.5 }), 1, "no core is idle");
        assert_eq!(auto(&[(1, 100, 99), (2, 111, 50)], IDLE), 2, "it paid");
        assert_eq!(auto(&[(1, 100, 99), (2, 109, 99)], IDLE), 1, "it did not");
        assert_eq!(auto(&[(1, 100, 99), (2, 109, 99), (1, 100, 99)], IDLE), 1, "nor would it now");
        assert_eq!(auto(&[(1, 100, 99), (2, 180, 99)], IDLE), 3);
        assert_eq!(auto(&[(4, 100, 99)], IDLE), MOST);
        assert_eq!(auto(&[(8, 100, 99)], IDLE), MOST, "somebody asked for more once");
        assert_eq!(auto(&[(0, 0, 255)], IDLE), 2, "whatever the file says");
    }

    #[test]
    fn it_settles_whatever_the_moves_measure() {
        for limit in 1..=6_u64 {
            let mut past = vec![];
            let mut taken = vec![];
            for _ in 0..12 {
                let number = choose(Wanted::Auto, &past, IDLE).number;
                let bytes_per_s = 100 * u64::from(number).min(limit);
                let busy_percent = if u64::from(number) <= limit { 99 } else { 60 };
                past.push(Carried { connections: number, bytes_per_s, busy_percent });
                taken.push(number);
            }
            // Where it begins with two and they wait for others, there is nothing to gain from one.
            let expected = u16::try_from(limit).unwrap().clamp(2, MOST);
            assert!(taken[6..].iter().all(|number| *number == expected), "{limit}: {taken:?}");
        }
    }

    #[test]
    fn an_operator_is_obeyed() {
        assert_eq!(
            choose("3".parse().unwrap(), &[], IDLE),
            Connections { number: 3, reason: "asked for".into() }
        );
        assert_eq!("auto".parse(), Ok(Wanted::Auto));
        for bad in ["0", "9", "-1", "two", ""] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_threads_of_the_transport_are_counted() {
        let stat = "77 (quic) S 1 1 1 0 -1 64 0 0 0 0 40 2 0 0 20 0 3 0 500 0 0";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks(&stat.replace("quic", "a) (quic")), None);
        for bad in ["", "77 (quic", "77 (quic) S 1", &stat.replace("40", "x")] {
            assert_eq!(ticks(bad), None, "{bad}");
        }
        let (before, now) = (BTreeMap::from([(1, 10)]), BTreeMap::from([(1, 60), (2, 90)]));
        assert_eq!(busy_percent(&before, &now, Duration::from_secs(1)), 90);
        assert_eq!(busy_percent(&now, &before, Duration::ZERO), 0);
    }

    #[test]
    fn the_first_round_is_measured_if_it_is_long_enough() {
        let busy = Duration::from_millis(600);
        let thread = std::thread::Builder::new().name(crate::link::quic::THREAD_NAME.into());
        let worker = thread.spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < 2 * busy {
                std::hint::spin_loop();
            }
        });
        let mut quiet = Quiet;
        let mut meter = Meter::new(&mut quiet);
        let end = Event::RoundEnd(RoundReport { rate_bytes_per_s: 5, ..RoundReport::default() });
        meter.event(&Event::RoundBegin { round: 0, dirty_pages: 1 });
        meter.event(&end);
        assert_eq!(meter.carried(2), None, "that was too short");
        meter.event(&Event::RoundBegin { round: 0, dirty_pages: 1 });
        std::thread::sleep(busy);
        meter.event(&end);
        let carried = meter.carried(2).unwrap();
        assert!(
            carried.connections == 2 && carried.bytes_per_s == 5 && carried.busy_percent > 0,
            "{carried:?}"
        );
        worker.unwrap().join().unwrap();
    }
}
