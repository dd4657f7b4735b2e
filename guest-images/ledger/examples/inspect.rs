//! Reads a raw guest memory file (guest-physical address = file offset, so at most 3 GiB), prints what the
//! guest says of itself and whether its memory is what it must be. The guest must not run meanwhile.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use ledger::{Stats, verify};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: inspect MEMORY-FILE")?;
    let file = File::open(path)?;
    let mut read = |gpa, bytes: &mut [u8]| file.read_exact_at(bytes, gpa);
    let stats = Stats::read(&mut read)?;
    print(&stats);
    let verdict = verify(&stats, &mut read)?;
    println!("{verdict}");
    Ok(if verdict.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(stats: &Stats) {
    println!("command line   {}", stats.command_line);
    println!("state          {:?} {}", stats.state, stats.message);
    println!("pages          {} filled, {} scrubbed", stats.filled, stats.scrubbed);
    println!("iterations     {} done, {} begun", stats.iterations, stats.begun);
    let us = |cycles| stats.us(cycles).unwrap_or(0);
    let run_us = us(stats.tsc_last.saturating_sub(stats.tsc_start));
    if stats.tsc_start != 0 && run_us != 0 {
        let boot_us = us(stats.tsc_start.saturating_sub(stats.tsc_boot));
        println!("time           {boot_us} us to fill, then {run_us} us");
        println!(
            "written        {} MB, {} MB/s",
            stats.bytes_written / 1_000_000,
            stats.bytes_written / run_us
        );
        println!("scrubbed       {} MB/s", stats.scrubbed * ledger::PAGE_SIZE / run_us);
    }
    println!("ticks          {}, {} parks", stats.ticks, stats.parks);
    let longest = us(stats.longest_gap.cycles);
    println!("longest gap    {longest} us; {} longer than two ticks", stats.gap_count);
    println!("guest errors   {:?} (lost, stale, torn, foreign)", stats.errors);
    for error in &stats.first_errors {
        println!("  {error:?}");
    }
}
