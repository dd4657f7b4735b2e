//! `migrate ledger`: what a ledger guest says of itself, and what its memory says.

use super::target::Target;
use super::{emit, say};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::exit;
use crate::memory::GuestMemory;
use crate::paths::RuntimeDir;
use crate::source::Copied;
use crate::units;
use ledger::{DiskAccount, DiskFault, Stats, Verdict};
use protocol::layout::{Layout, SpaceKind};
use protocol::page::PAGE_SIZE;
use std::process::ExitCode;
use std::time::Duration;

/// How long the VMM may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Which VM, and how thoroughly.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate ledger web --verify")]
pub struct Args {
    /// The VM's name, or the path of its control socket.
    vm: String,
    /// Freeze the guest for a moment, compute from its parameters what every page must hold, and compare.
    #[arg(long)]
    verify: bool,
    /// Tell the longest gap that ended behind this value of the time-stamp counter, instead of since boot.
    #[arg(long, value_name = "TSC")]
    since_tsc: Option<u64>,
}

/// Runs the verb.
///
/// # Errors
/// `Workload` when there is no such VM, or its guest is no ledger.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let mut client = Target::find(&runtime, &args.vm)?.hold("migrate ledger", ANSWER_LIMIT)?;
    let name = client.welcome().name.clone();
    let wrong = |error: &dyn std::fmt::Display| Error::Workload(format!("{name}: {error}"));
    let mut description = client.describe().map_err(|error| wrong(&error))?;
    let disks = Copied::All.of(&name, &description.machine)?;
    if args.verify && description.can_copy_disks && !disks.is_empty() {
        description = client.copy_disks(disks.clone()).map_err(|error| wrong(&error))?;
    }
    let layout = description.layout;
    let memory = GuestMemory::open(&layout, description.memory, &disks)?;
    if args.verify {
        client.freeze().map_err(|error| wrong(&error))?;
    }
    let read = |gpa, buffer: &mut [u8]| read_guest(&layout, &memory, gpa, buffer);
    let stats = Stats::read(read).map_err(|error| wrong(&format!("no ledger runs in it: {error}")))?;
    let verdict = match args.verify {
        true => Some(ledger::verify(&stats, read).map_err(|error| wrong(&error))?),
        false => None,
    };
    let disk = DiskAccount::read(read)?;
    let image = layout.of_kind(SpaceKind::Disk).next();
    let disk_faults = match (&disk, image) {
        (Some(disk), Some(image)) => {
            Some(disk.verify(|offset, buffer| memory.read(image.id, offset, buffer))?)
        }
        _ => None,
    };
    if args.verify {
        client.resume(None).map_err(|error| wrong(&error))?;
    }
    let mut account = Account::new(&name, &stats, verdict.as_ref(), args.since_tsc);
    if let Some(disk) = disk {
        account.add_disk(&disk, disk_faults.as_deref());
    }
    if common.json {
        emit(&account);
    } else {
        account.show();
    }
    Ok(if account.sound { ExitCode::SUCCESS } else { ExitCode::from(exit::GUEST) })
}

fn read_guest(layout: &Layout, memory: &GuestMemory, gpa: u64, buffer: &mut [u8]) -> Result<()> {
    let space = layout.of_kind(SpaceKind::Memory).find(|space| {
        gpa >= space.guest_address && gpa - space.guest_address < space.pages * PAGE_SIZE as u64
    });
    match space {
        Some(space) => memory.read(space.id, gpa - space.guest_address, buffer),
        None => Err(Error::Workload(format!("the guest has no memory at {gpa:#x}"))),
    }
}

/// What `--json` prints.
#[derive(Debug, serde::Serialize)]
struct Account {
    event: &'static str,
    name: String,
    /// By the guest's own account and, where it was asked for, by the computation from outside.
    sound: bool,
    state: String,
    iterations: u64,
    ticks: u64,
    written_bytes: u64,
    scrubbed_pages: u64,
    guest_errors: u64,
    longest_gap_us: Option<u64>,
    last_tick_tsc: u64,
    tsc_khz: Option<u64>,
    verified: Option<Verified>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<Disk>,
    message: Option<String>,
}

/// The disk that the guest writes.
#[derive(Debug, serde::Serialize)]
struct Disk {
    written_blocks: u64,
    flushed_blocks: u64,
    guest_errors: u64,
    /// Blocks that are not as the writes must have left them, the first of them; missing where it was not looked.
    faults: Option<Vec<String>>,
}

#[derive(Debug, serde::Serialize)]
struct Verified {
    pages: u64,
    damaged_pages: u64,
    faults: Vec<String>,
}

impl Account {
    fn new(name: &str, stats: &Stats, verdict: Option<&Verdict>, since_tsc: Option<u64>) -> Self {
        let gap = match since_tsc {
            Some(tsc) => stats.longest_gap_since(tsc),
            None => Some(stats.longest_gap),
        };
        let failed = stats.state == ledger::State::Failed;
        Self {
            event: "ledger",
            name: name.into(),
            sound: !failed && stats.error_count() == 0 && verdict.is_none_or(Verdict::is_sound),
            state: format!("{:?}", stats.state).to_lowercase(),
            iterations: stats.iterations,
            ticks: stats.ticks,
            written_bytes: stats.bytes_written,
            scrubbed_pages: stats.scrubbed,
            guest_errors: stats.error_count(),
            longest_gap_us: gap.and_then(|gap| stats.us(gap.cycles)),
            last_tick_tsc: stats.tsc_last,
            tsc_khz: stats.tsc_khz,
            verified: verdict.map(|verdict| Verified {
                pages: verdict.pages_checked,
                damaged_pages: verdict.damaged(),
                faults: verdict.faults.iter().map(ToString::to_string).collect(),
            }),
            message: (!stats.message.is_empty()).then(|| stats.message.clone()),
            disk: None,
        }
    }

    fn add_disk(&mut self, disk: &DiskAccount, faults: Option<&[DiskFault]>) {
        self.sound &= disk.errors == 0 && faults.is_none_or(<[_]>::is_empty);
        self.disk = Some(Disk {
            written_blocks: disk.written,
            flushed_blocks: disk.flushed,
            guest_errors: disk.errors,
            faults: faults.map(|faults| faults.iter().map(ToString::to_string).collect()),
        });
    }

    fn show(&self) {
        let gap = self.longest_gap_us.map_or_else(|| "unknown".into(), units::show_us);
        say(&format!(
            "{}: {} iterations, {} written, longest gap {gap}, {} errors found by the guest",
            self.name,
            self.iterations,
            units::show_bytes(self.written_bytes),
            self.guest_errors
        ));
        if let Some(verified) = &self.verified {
            say(&format!(
                "{} pages compared with what they must hold, {} damaged",
                verified.pages, verified.damaged_pages
            ));
            for fault in &verified.faults {
                say(&format!("  {fault}"));
            }
        }
        if let Some(disk) = &self.disk {
            say(&format!(
                "disk: {} blocks written, {} of them safe, {} errors found by the guest",
                disk.written_blocks, disk.flushed_blocks, disk.guest_errors
            ));
            for fault in disk.faults.iter().flatten() {
                say(&format!("  {fault}"));
            }
        }
        if let Some(message) = &self.message {
            say(&format!("the guest says: {message}"));
        }
        say(if self.sound { "verdict: sound" } else { "verdict: BROKEN" });
    }
}
