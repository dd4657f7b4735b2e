//! The benchmark behind `scripts/bench`: figures as JSON, medians and spread over runs taken in turn.
//!
//! ```text
//! options ─▶ cases ─▶ runs in turn: ours, theirs, ours, theirs … ─▶ figures: medians, targets, table, JSON
//!                          │ guest, touched memory, account: the same for all
//!                          ├ ours (and the raw pipe)
//!                          ├ qemu (qmp, certificates)
//!                          ├ first_write: what tracking costs a guest
//!                          ├ container: its pause, by rounds and by hand
//!                          ├ checkpoints: taken and restored
//!                          └ laboratory: Linux guests, ours and QEMU's, in an emulated host
//! ```

mod options;
mod cases;
mod memory;
mod turns;
mod account;
mod pipe;
mod ours;
mod certificates;
mod qemu;
mod ceiling;
mod harvest;
mod first_write;
mod container;
mod checkpoints;
mod figures;
mod targets;
mod alone;
mod peer;
mod laboratory;

pub use options::Options;

/// Measures what the options ask for.
///
/// # Errors
/// With what cannot be written. What goes wrong is a panic: a guest that is not sound, or a VMM that does not start. A move that
/// does not arrive is a figure.
pub fn run(options: &Options) -> std::io::Result<()> {
    // What an interrupted benchmark left would be measured along.
    crate::network::sweep();
    let result = if options.lab {
        laboratory::run(options)
    } else if options.peer {
        peer::run(options)
    } else {
        alone::run(options)
    };
    if let Some(out) = &options.out {
        std::fs::write(out, format!("{result:#}\n"))?;
    }
    if options.json {
        println!("{result}");
    }
    Ok(())
}
