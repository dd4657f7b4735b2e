//! What runs in a container under test and computes for long: it trains a small model whose state is large and changes a little at a time.
//!
//! ```text
//! trainer OUT STEPS PAUSE_US
//! ```
//!
//! A table of vectors is fitted to pairs that a generator makes, by Adam, whose two moments are as large as the table; a step touches a few
//! rows. The same steps lead to the same loss, bit by bit. Behind every hundredth step, and the last, it writes its record to the start of OUT,
//! of 128 bytes: steps done, and the bits of the loss of all steps together.
#![allow(clippy::expect_used, reason = "a program of tests: it fails by ending, and says why")]

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::time::Duration;

const RECORD: usize = 128;
const ROWS: usize = 16_384;
const WIDTH: usize = 128;
const RATE: f32 = 0.01;
const DECAY: (f32, f32) = (0.9, 0.999);

/// A generator of which only the sequence matters (MMIX).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments[at].parse::<u64>().expect("a number");
    let (steps, pause) = (number(2), Duration::from_micros(number(3)));
    let mut out =
        File::options().write(true).create(true).truncate(false).open(&arguments[1]).expect("its file");
    out.set_len(RECORD as u64).expect("room for its record");
    let mut random = Random(7);
    let mut table: Vec<f32> =
        (0..ROWS * WIDTH).map(|_| (random.next() % 1000) as f32 / 1000.0 - 0.5).collect();
    // Not zeros, which would be no memory yet.
    let (mut first, mut second) = (vec![1e-9_f32; ROWS * WIDTH], vec![1e-9_f32; ROWS * WIDTH]);
    let mut total = 0.0_f64;
    for step in 1..=steps {
        let (one, other) = (random.next() as usize % ROWS, random.next() as usize % ROWS);
        let wanted = (random.next() % 100) as f32 / 100.0;
        let product: f32 = (0..WIDTH).map(|at| table[one * WIDTH + at] * table[other * WIDTH + at]).sum();
        let error = product - wanted;
        total += f64::from(error * error);
        for (row, with) in [(one, other), (other, one)] {
            for at in 0..WIDTH {
                let (place, gradient) = (row * WIDTH + at, 2.0 * error * table[with * WIDTH + at]);
                first[place] = DECAY.0 * first[place] + (1.0 - DECAY.0) * gradient;
                second[place] = DECAY.1 * second[place] + (1.0 - DECAY.1) * gradient * gradient;
                table[place] -= RATE * first[place] / (second[place].sqrt() + 1e-8);
            }
        }
        if step % 100 == 0 || step == steps {
            let record = format!("{step} {:x}", total.to_bits());
            out.seek(SeekFrom::Start(0)).expect("its place");
            writeln!(out, "{record:<width$}", width = RECORD - 1).expect("it is written");
        }
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    // Somebody may want to look at it.
    std::thread::sleep(Duration::from_secs(if pause.is_zero() { 0 } else { 120 }));
}
