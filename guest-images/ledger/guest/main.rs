//! The bare guest: fills memory, overwrites a working set, checks everything, and tells what it saw.
//!
//! ```text
//! boot.s ──> main ──> start_info ──> paging ──> workload <──> block (stats), data (pages, versions)
//! CPL 0,     CPL 3    command line,  RAM above     │
//! PVH                 memory map     4 GiB         ├──> clock (ticks, pacing)
//!                                                  └──> devices (serial lines, parking, power)
//! ```
//!
//! Rust code runs at CPL 3 only, without interrupts and without anything that could handle a fault.

#![no_std]
#![no_main]

#[path = "../src/model/mod.rs"]
#[allow(dead_code, reason = "the host uses parts of the model that the guest does not")]
mod model;

mod start_info;

mod paging;

mod block;

mod data;

mod clock;

mod devices;

mod ring;

mod disk;

mod workload;

mod mem;

use core::fmt::Write;
use core::panic::PanicInfo;

use block::Block;
use devices::Devices;
use model::layout::{LayoutError, MAX_RANGES, Range, Ranges};
use model::params::{ParamError, Params};
use model::stats::{State, at};
use start_info::StartInfo;

core::arch::global_asm!(include_str!("boot.s"));

/// The exit code for a guest that could not start; 0 is sound, 1 is broken.
const EXIT_NOT_STARTED: u32 = 2;

/// Why the guest cannot start.
enum Refusal {
    StartInfo,
    Params(ParamError),
    Layout(LayoutError),
}

impl core::fmt::Display for Refusal {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Refusal::StartInfo => f.write_str("RBX does not point to a PVH start info with a memory map"),
            Refusal::Params(error) => error.fmt(f),
            Refusal::Layout(error) => error.fmt(f),
        }
    }
}

/// Entered at CPL 3 with the address of the PVH start info.
#[unsafe(no_mangle)]
extern "C" fn ledger_main(start_info: u64) -> ! {
    let tsc_boot = clock::now();
    let mut block = Block::take();
    block.reset(tsc_boot);
    let mut devices = Devices::find();
    match start(start_info, &mut block, &mut devices) {
        Ok((params, ranges)) => workload::run(params, ranges, block, devices),
        Err(refusal) => {
            let mut message = block.message();
            let _ = write!(message, "{refusal}");
            block.set_state(State::Failed);
            let _ = writeln!(devices, "ledger: cannot start: {refusal}");
            devices.flush();
            devices.power_off(EXIT_NOT_STARTED)
        }
    }
}

fn start(start_info: u64, block: &mut Block, devices: &mut Devices) -> Result<(Params, Ranges), Refusal> {
    let info = StartInfo::at(start_info).ok_or(Refusal::StartInfo)?;
    let mut line = [0; start_info::COMMAND_LINE_BYTES];
    let line = info.command_line(&mut line);
    block.put_command_line(line);
    let params: Params = line.parse().map_err(Refusal::Params)?;
    devices.choose(params.serial, params.park);

    let mut ram = [Range::default(); start_info::MAX_MAP];
    let ram = info.ram(&mut ram).ok_or(Refusal::StartInfo)?;
    devices.check_against(ram);
    let ranges = Ranges::for_data(ram, params.fill_pages()).map_err(Refusal::Layout)?;
    paging::map_high(ranges.as_slice());
    block.put_setup(&params, &ranges, devices.has_pad());
    Ok((params, ranges))
}

/// A bug in the guest: leave the reason in the stats block and on the serial line, and keep memory as it is.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut block = Block::take();
    let _ = write!(block.message(), "{info}");
    block.set_state(State::Failed);
    let mut devices = Devices::find();
    let _ = writeln!(devices, "ledger: {info}");
    devices.flush();
    loop {
        devices.park_ns(1_000_000_000);
    }
}

// Keeps the block's layout and the model's bound in step.
const _: () = assert!(at::RANGES + MAX_RANGES * 16 <= at::BEGUN);
