//! Solves Poisson's equation on a square grid, writes itself down as it goes, and goes on from there when it was killed.
//!
//! ```sh
//! cargo run --release --example solver -- --store /tmp/solver --kill-after 30
//! cargo run --release --example solver -- --store /tmp/solver
//! migrate store list --store /tmp/solver
//! ```
//!
//! Gauss and Seidel's relaxation, a band of rows a step: what a step changes is a small part of the grid, so a checkpoint every few
//! steps is a delta of a small part of it. The last line is a digest of the whole grid: it does not depend on whether, where and how
//! often the program was killed.

use clap::Parser;
use migrate::program::Program;
use migrate::vault::Vault;
use migrate::{Error, Result};

/// Solves Poisson's equation on a grid of a million points, and survives being killed.
#[derive(Debug, Parser)]
struct Args {
    /// Where the checkpoints lie.
    #[arg(long)]
    store: String,
    /// Steps in all.
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Steps from one checkpoint to the next.
    #[arg(long, default_value_t = 5)]
    every: u64,
    /// Points on each side of the grid.
    #[arg(long, default_value_t = 1024)]
    side: usize,
    /// Die as by `kill -9` behind so many steps of this run.
    #[arg(long)]
    kill_after: Option<u64>,
}

/// Rows that a step relaxes.
const BAND_ROWS: usize = 32;

/// Sweeps over a band in a step.
const SWEEPS: usize = 4;

fn main() -> Result<()> {
    let args = Args::parse();
    let side = args.side.max(BAND_ROWS + 2);
    let vault = Vault::open_or_create(migrate::store::open(&args.store)?, None)?;
    let mut solver = Program::new("solver", &[side * side * size_of::<f64>()])?;
    if let Err(why) = solver.tracking() {
        eprintln!("every checkpoint is a full one: {why}");
    }
    let mut step = match solver.restore(&vault)? {
        None => {
            begin(solver.values_mut(0), side);
            0
        }
        Some(state) => {
            let step = state.try_into().map(u64::from_le_bytes);
            step.map_err(|_| Error::Store("the checkpoint is of another version of this program".into()))?
        }
    };
    println!("begins at step {step}");
    let first = step;
    while step < args.steps {
        relax(solver.values_mut(0), side, step);
        step += 1;
        if step % args.every.max(1) == 0 || step == args.steps {
            let report = solver.checkpoint(&vault, &step.to_le_bytes())?;
            println!("step {step} checkpoint deltas={} stored_bytes={}", report.deltas, report.stored_bytes);
        }
        if args.kill_after.is_some_and(|steps| step - first >= steps) {
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::KILL)
                .map_err(|error| Error::Host(format!("this process cannot end itself: {error}")))?;
        }
    }
    println!("result {}", digest(&solver.values::<f64>(0)[..side * side]));
    Ok(())
}

/// Noise inside, warm on one edge: noise does not pack, so that checkpoints are as large as what they have.
fn begin(grid: &mut [f64], side: usize) {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for (at, value) in grid.iter_mut().take(side * side).enumerate() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *value = if at < side { 100.0 } else { (random >> 11) as f64 / (1_u64 << 53) as f64 };
    }
}

/// Relaxes the band of this step.
fn relax(grid: &mut [f64], side: usize, step: u64) {
    let rows = side - 2;
    let bands = rows.div_ceil(BAND_ROWS) as u64;
    let first = 1 + (step % bands) as usize * BAND_ROWS;
    for _ in 0..SWEEPS {
        for row in first..(first + BAND_ROWS).min(side - 1) {
            for at in row * side + 1..row * side + side - 1 {
                let source = if at % 97 == 0 { 0.01 } else { 0.0 };
                grid[at] = (grid[at - 1] + grid[at + 1] + grid[at - side] + grid[at + side] + source) / 4.0;
            }
        }
    }
}

fn digest(grid: &[f64]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    grid.iter().for_each(|value| {
        hasher.update(&value.to_bits().to_le_bytes());
    });
    hasher.finalize()
}
