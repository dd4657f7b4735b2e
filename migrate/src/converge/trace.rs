//! A migration's decisions on file: everything that each of them looked at.
//!
//! One JSON object a line. The first says what the file is; each of the others is one decision. What a policy would
//! have decided can so be asked long after the migration.

use super::measure::Measured;
use super::policy::{Decision, Limits, Situation};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::time::Duration;

/// The version of the file.
pub const VERSION: u32 = 1;

/// The most bytes of a trace: rounds are bounded, and a decision is less than a KiB.
pub const MAX_BYTES: u64 = 16 << 20;

/// The most decisions of a trace.
pub const MAX_DECISIONS: usize = 10_000;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`].
    pub migrate_trace: u32,
    /// The workload's name.
    pub workload: String,
}

/// One decision, and what it looked at beyond the rounds before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The round that was just over.
    pub round: Measured,
    /// What freezing costs when nothing remains.
    #[serde(rename = "fixed_us", with = "super::micros")]
    pub fixed: Duration,
    /// Since the first round began.
    #[serde(rename = "elapsed_us", with = "super::micros")]
    pub elapsed: Duration,
    /// Whether the source can slow the workload down.
    pub can_throttle: bool,
    /// Whether both ends can do post-copy.
    pub can_post_copy: bool,
    /// What the operator allowed then.
    pub limits: Limits,
    /// What was decided.
    pub decided: Decision,
}

/// Everything that was decided in one migration.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// The workload's name.
    pub workload: String,
    /// The decisions in order.
    pub entries: Vec<Entry>,
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    /// `Usage` that says which line is wrong, and why.
    pub fn read(from: impl Read) -> Result<Self> {
        let mut lines = BufReader::new(from.take(MAX_BYTES)).lines().enumerate();
        let wrong = |line: usize, why: &str| Error::Usage(format!("line {} of the trace: {why}", line + 1));
        let header = match lines.next() {
            Some((_, Ok(line))) => serde_json::from_str::<Header>(&line).ok(),
            _ => None,
        };
        let Some(header) = header else {
            return Err(Error::Usage("this is no trace: migrate send --trace FILE writes one".into()));
        };
        if header.migrate_trace != VERSION {
            let found = header.migrate_trace;
            return Err(Error::Usage(format!(
                "the trace is of version {found}, and {VERSION} is known here"
            )));
        }
        let mut entries = Vec::new();
        for (number, line) in lines {
            let line = line.map_err(|error| wrong(number, &error.to_string()))?;
            if line.trim().is_empty() {
                continue;
            }
            if entries.len() >= MAX_DECISIONS {
                return Err(wrong(number, &format!("more than {MAX_DECISIONS} decisions are not looked at")));
            }
            entries.push(serde_json::from_str(&line).map_err(|error| wrong(number, &error.to_string()))?);
        }
        if entries.is_empty() {
            return Err(Error::Usage(
                "the trace has no decisions: its migration failed before its first".into(),
            ));
        }
        Ok(Self { workload: header.workload, entries })
    }

    /// What `decide` says at each point, up to and with its first word that ends the rounds.
    pub fn replay(
        &self,
        limits: impl Fn(&Limits) -> Limits,
        decide: impl Fn(&Situation<'_>) -> Decision,
    ) -> Vec<Decision> {
        let rounds: Vec<Measured> = self.entries.iter().map(|entry| entry.round).collect();
        let mut decisions = Vec::new();
        for (number, entry) in self.entries.iter().enumerate() {
            let Entry { fixed, elapsed, can_throttle, can_post_copy, .. } = *entry;
            let limits = limits(&entry.limits);
            let rounds = rounds.get(..=number).unwrap_or(&rounds);
            let decision =
                decide(&Situation { rounds, fixed, elapsed, can_throttle, can_post_copy, limits: &limits });
            decisions.push(decision);
            if decision.ends_rounds() {
                break;
            }
        }
        decisions
    }
}

/// Writes a trace as a migration goes.
#[derive(Debug)]
pub struct Recorder<W> {
    to: W,
    left: usize,
}

impl<W: Write> Recorder<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// Of the writer.
    pub fn begin(mut to: W, workload: &str) -> std::io::Result<Self> {
        write_line(&mut to, &Header { migrate_trace: VERSION, workload: workload.into() })?;
        Ok(Self { to, left: MAX_DECISIONS })
    }

    /// Adds a decision, as long as there is room.
    ///
    /// # Errors
    /// Of the writer.
    pub fn add(&mut self, entry: &Entry) -> std::io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        write_line(&mut self.to, entry)
    }
}

fn write_line(to: &mut impl Write, value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value).map_err(std::io::Error::other)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::super::policy::decide;
    use super::*;

    fn trace() -> (Vec<u8>, Vec<Entry>) {
        let mut bytes = Vec::new();
        let mut recorder = Recorder::begin(&mut bytes, "web").unwrap();
        let mut entries = Vec::new();
        let limits = Limits { post_copy_after: Some(9), ..Limits::default() };
        let mut rounds = Vec::new();
        for (number, remaining_pages) in [(1, 90_000), (2, 40_000), (3, 10)] {
            let duration = Duration::from_micros(1_000_001 / number);
            rounds.push(Measured { sent_bytes: 1 << 30, duration, remaining_pages, ..Measured::default() });
            let (fixed, elapsed) = (Duration::from_micros(2345), Duration::from_secs(number));
            let (can_throttle, can_post_copy) = (true, false);
            let now =
                Situation { rounds: &rounds, fixed, elapsed, can_throttle, can_post_copy, limits: &limits };
            let entry = Entry {
                round: rounds[rounds.len() - 1],
                fixed,
                elapsed,
                can_throttle,
                can_post_copy,
                limits: limits.clone(),
                decided: decide(&now),
            };
            recorder.add(&entry).unwrap();
            entries.push(entry);
        }
        (bytes, entries)
    }

    #[test]
    fn what_was_recorded_is_read_and_decided_again() {
        let (bytes, entries) = trace();
        let trace = Trace::read(&bytes[..]).unwrap();
        assert_eq!((trace.workload.as_str(), &trace.entries), ("web", &entries));
        let decided: Vec<Decision> = entries.iter().map(|entry| entry.decided).collect();
        assert_eq!(trace.replay(Limits::clone, decide), decided);
        assert!(decided[2].ends_rounds());
        let looser = |limits: &Limits| Limits { downtime: Duration::from_secs(9), ..limits.clone() };
        assert_eq!(trace.replay(looser, decide)[0].name(), "round", "in the budget, and it still pays");
    }

    #[test]
    fn a_damaged_trace_says_where() {
        let (bytes, _) = trace();
        let text = String::from_utf8(bytes).unwrap();
        let says = |text: &str, what: &str| {
            let error = Trace::read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        says("", "no trace");
        says("\u{0}garbage", "no trace");
        says(&text.replacen("\"migrate_trace\":1", "\"migrate_trace\":2", 1), "version 2");
        says(text.lines().next().unwrap(), "no decisions");
        says(&text.replacen("\"elapsed_us\":2000000", "\"elapsed_us\":-2", 1), "line 3");
        says(&text[..text.len() - 20], "line 4");
        says(&text.replacen("\"duration_us\":", "\"duration\":", 1), "line 2");
        assert!(Trace::read(&[0xff_u8; 100][..]).is_err());
    }
}
