//! The guest's command line: `key=value` words separated by white space; unknown keys are ignored.

use core::fmt;
use core::str::FromStr;

use super::layout::{MAX_DATA_BYTES, PAGE_SIZE};
use super::mail::MAX_TOKENS;
use super::page::Content;
use super::pattern::Pattern;

/// How fast the working set is overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// No writes at all (`rate=0`).
    Idle,
    /// So many megabytes (10^6 bytes) a second.
    Paced(u32),
    /// As fast as the vCPU can (`rate=max`).
    Max,
}

/// Where the guest prints its lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serial {
    /// To the memory-mapped UART, if the pad beside it says that this VMM has one.
    Mmio,
    /// To COM1 by port I/O. Needs a VMM that lets CPL 3 do port I/O with IOPL 3: hardware
    /// virtualisation and QEMU's TCG do, a page-table based back end of KVM stops the guest.
    Port,
    /// Nowhere.
    None,
}

/// How the guest waits for what is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Park {
    /// At the pad, if there is one.
    Pad,
    /// By spinning, as it must where there is no pad: so that it costs the same in every VMM.
    Spin,
}

/// Everything the command line can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// From which order of pages and contents are derived.
    pub seed: u64,
    /// Bytes filled with content at boot; a multiple of the page size.
    pub fill_bytes: u64,
    /// Bytes of the working set, the first part of the filled ones; a multiple of the page size.
    pub ws_bytes: u64,
    /// How fast the working set is overwritten.
    pub rate: Rate,
    /// In which order.
    pub pattern: Pattern,
    /// With what.
    pub content: Content,
    /// The longest the guest parks at once, in microseconds.
    pub tick_us: u64,
    /// How often a report line is printed, in milliseconds; 0 is never.
    pub report_ms: u64,
    /// How fast all filled pages are read and checked in turn, in megabytes (10^6 bytes) a second.
    pub scrub_mb_s: u64,
    /// The guest's TSC frequency in kHz; 0 is unknown (the guest then paces itself as if it were 1 GHz).
    pub tsc_khz: u64,
    /// After so many iterations check everything, print a verdict and power off; 0 is never.
    pub stop_after: u64,
    /// The tokens it begins with in a ring of guests; `None`: it takes part in none.
    pub ring: Option<u64>,
    /// How fast the first virtio disk is written, in megabytes (10^6 bytes) a second; 0: it is not looked for.
    pub disk_mb_s: u64,
    /// How many blocks are written to it; 0 is no end.
    pub disk_stop: u64,
    /// Where lines are printed.
    pub serial: Serial,
    /// How the guest waits.
    pub park: Park,
}

/// `tick_us=` and `scrub=` of a guest that writes, if it is not told others.
const BUSY_TICK_US: u64 = 1000;
const BUSY_SCRUB_MB_S: u64 = 64;

/// The same for an idle one: each tick costs an exit and a wake-up, and an idle guest ought to cost next to nothing.
const IDLE_TICK_US: u64 = 4000;
const IDLE_SCRUB_MB_S: u64 = 16;

impl Default for Params {
    fn default() -> Self {
        Params {
            seed: 1,
            fill_bytes: 64 << 20,
            ws_bytes: 64 << 20,
            rate: Rate::Idle,
            pattern: Pattern::Uniform,
            content: Content::Random,
            tick_us: IDLE_TICK_US,
            report_ms: 1000,
            scrub_mb_s: IDLE_SCRUB_MB_S,
            tsc_khz: 0,
            stop_after: 0,
            ring: None,
            disk_mb_s: 0,
            disk_stop: 0,
            serial: Serial::Mmio,
            park: Park::Pad,
        }
    }
}

/// A command line the guest would refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamError {
    /// The key whose value is wrong.
    pub key: &'static str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Not a decimal whole number that fits 64 bits.
    NotANumber,
    /// Not a whole number with an optional K, M or G.
    NotASize,
    /// Not a whole number of pages.
    NotPages,
    /// None of the words this key knows, which are listed.
    NotAChoice(&'static str),
    /// A number outside the bounds given (both inclusive).
    OutOfRange(u64, u64),
    /// The working set is larger than what is filled.
    LargerThanFill,
}

impl fmt::Display for ParamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}= ", self.key)?;
        match self.problem {
            Problem::NotANumber => f.write_str("takes a whole decimal number"),
            Problem::NotASize => {
                f.write_str("takes a size: a whole number, optionally followed by K, M or G")
            }
            Problem::NotPages => write!(f, "takes whole pages: make it a multiple of {PAGE_SIZE}"),
            Problem::NotAChoice(choices) => write!(f, "takes one of {choices}"),
            Problem::OutOfRange(least, most) => write!(f, "must lie between {least} and {most}"),
            Problem::LargerThanFill => f.write_str("must not be larger than fill="),
        }
    }
}

impl core::error::Error for ParamError {}

fn number(key: &'static str, value: &str, least: u64, most: u64) -> Result<u64, ParamError> {
    // `parse` alone would also take a leading plus sign.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse::<u64>().ok().filter(|_| digits);
    let number = number.ok_or(ParamError { key, problem: Problem::NotANumber })?;
    if (least..=most).contains(&number) {
        Ok(number)
    } else {
        Err(ParamError { key, problem: Problem::OutOfRange(least, most) })
    }
}

fn size(key: &'static str, value: &str) -> Result<u64, ParamError> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (value.get(..value.len() - 1), 10),
        Some(b'M' | b'm') => (value.get(..value.len() - 1), 20),
        Some(b'G' | b'g') => (value.get(..value.len() - 1), 30),
        _ => (Some(value), 0),
    };
    let wrong = ParamError { key, problem: Problem::NotASize };
    let count = number(key, digits.unwrap_or(""), 0, u64::MAX).map_err(|_| wrong)?;
    let bytes = count.checked_mul(1 << shift).ok_or(wrong)?;
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(ParamError { key, problem: Problem::NotPages });
    }
    if !(PAGE_SIZE..=MAX_DATA_BYTES).contains(&bytes) {
        return Err(ParamError { key, problem: Problem::OutOfRange(PAGE_SIZE, MAX_DATA_BYTES) });
    }
    Ok(bytes)
}

/// The most megabytes a second that `rate=` and `scrub=` take.
const MAX_MB_S: u64 = 1_000_000;

impl FromStr for Params {
    type Err = ParamError;

    /// Reads a command line; of a key given twice the last counts.
    fn from_str(line: &str) -> Result<Self, ParamError> {
        let mut params = Params::default();
        let mut ws_bytes = None;
        let (mut hot_pages, mut hot_writes) = (10, 90);
        let mut pattern = "uniform";
        let (mut tick_us, mut scrub_mb_s) = (None, None);
        for word in line.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else { continue };
            match key {
                "seed" => params.seed = number("seed", value, 0, u64::MAX)?,
                "fill" => params.fill_bytes = size("fill", value)?,
                "ws" => ws_bytes = Some(size("ws", value)?),
                "rate" if value == "max" => params.rate = Rate::Max,
                "rate" => {
                    params.rate = match number("rate", value, 0, MAX_MB_S)? {
                        0 => Rate::Idle,
                        // Bounded by MAX_MB_S just above.
                        mb_s => Rate::Paced(mb_s as u32),
                    }
                }
                "pattern" => pattern = value,
                "hot_pages" => hot_pages = number("hot_pages", value, 1, 100)?,
                "hot_writes" => hot_writes = number("hot_writes", value, 0, 100)?,
                "content" => {
                    let problem = Problem::NotAChoice("random, text, zero");
                    params.content =
                        Content::from_name(value).ok_or(ParamError { key: "content", problem })?;
                }
                "tick_us" => tick_us = Some(number("tick_us", value, 10, 1_000_000)?),
                "report_ms" => params.report_ms = number("report_ms", value, 0, 3_600_000)?,
                "scrub" => scrub_mb_s = Some(number("scrub", value, 0, MAX_MB_S)?),
                "tsc_khz" => params.tsc_khz = number("tsc_khz", value, 0, 100_000_000)?,
                "stop_after" => params.stop_after = number("stop_after", value, 0, u64::MAX)?,
                "ring" => params.ring = Some(number("ring", value, 0, MAX_TOKENS)?),
                "disk" => params.disk_mb_s = number("disk", value, 0, MAX_MB_S)?,
                "disk_stop" => params.disk_stop = number("disk_stop", value, 0, u32::MAX.into())?,
                "serial" => {
                    params.serial = match value {
                        "mmio" => Serial::Mmio,
                        "port" => Serial::Port,
                        "none" => Serial::None,
                        _ => {
                            let problem = Problem::NotAChoice("mmio, port, none");
                            return Err(ParamError { key: "serial", problem });
                        }
                    }
                }
                "park" => {
                    params.park = match value {
                        "pad" => Park::Pad,
                        "spin" => Park::Spin,
                        _ => {
                            let problem = Problem::NotAChoice("pad, spin");
                            return Err(ParamError { key: "park", problem });
                        }
                    }
                }
                _ => {}
            }
        }
        let (tick, scrub) = match params.rate {
            Rate::Idle => (IDLE_TICK_US, IDLE_SCRUB_MB_S),
            Rate::Paced(_) | Rate::Max => (BUSY_TICK_US, BUSY_SCRUB_MB_S),
        };
        params.tick_us = tick_us.unwrap_or(tick);
        params.scrub_mb_s = scrub_mb_s.unwrap_or(scrub);
        params.pattern = match pattern {
            "seq" => Pattern::Seq,
            "uniform" => Pattern::Uniform,
            // Both bounded by 100 above.
            "hot" => Pattern::Hot { pages_percent: hot_pages as u8, writes_percent: hot_writes as u8 },
            _ => {
                let problem = Problem::NotAChoice("seq, uniform, hot");
                return Err(ParamError { key: "pattern", problem });
            }
        };
        params.ws_bytes = ws_bytes.unwrap_or(params.fill_bytes);
        if params.ws_bytes > params.fill_bytes {
            return Err(ParamError { key: "ws", problem: Problem::LargerThanFill });
        }
        Ok(params)
    }
}

impl fmt::Display for Params {
    /// Writes the command line that [`FromStr`] reads back as the same parameters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed={} fill={} ws={}", self.seed, self.fill_bytes, self.ws_bytes)?;
        match self.rate {
            Rate::Idle => f.write_str(" rate=0")?,
            Rate::Paced(mb_s) => write!(f, " rate={mb_s}")?,
            Rate::Max => f.write_str(" rate=max")?,
        }
        match self.pattern {
            Pattern::Seq => f.write_str(" pattern=seq")?,
            Pattern::Uniform => f.write_str(" pattern=uniform")?,
            Pattern::Hot { pages_percent, writes_percent } => {
                write!(f, " pattern=hot hot_pages={pages_percent} hot_writes={writes_percent}")?;
            }
        }
        write!(f, " content={}", self.content.name())?;
        write!(f, " tick_us={} report_ms={} scrub={}", self.tick_us, self.report_ms, self.scrub_mb_s)?;
        let serial = match self.serial {
            Serial::Mmio => "mmio",
            Serial::Port => "port",
            Serial::None => "none",
        };
        let park = match self.park {
            Park::Pad => "pad",
            Park::Spin => "spin",
        };
        write!(f, " tsc_khz={} stop_after={} serial={serial} park={park}", self.tsc_khz, self.stop_after)?;
        if self.disk_mb_s != 0 || self.disk_stop != 0 {
            write!(f, " disk={} disk_stop={}", self.disk_mb_s, self.disk_stop)?;
        }
        self.ring.map_or(Ok(()), |tokens| write!(f, " ring={tokens}"))
    }
}

impl Params {
    /// How many pages are filled.
    pub fn fill_pages(&self) -> u64 {
        self.fill_bytes / PAGE_SIZE
    }

    /// How many of them are overwritten again and again.
    pub fn ws_pages(&self) -> u64 {
        self.ws_bytes / PAGE_SIZE
    }
}
