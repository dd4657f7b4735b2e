//! What runs in a container under test: it writes memory, and knows what it has written.
//!
//! ```text
//! tenant OUT MIB RATE [CHILDREN [NUMBER]]
//! ```
//!
//! It fills MIB of memory, writes RATE of its pages a second (0: none), and grows and shrinks a little meanwhile. Each page tells which page it
//! is and how often it was written; a table apart from them says how often it should have been. It looks through some of it all the time, and ten
//! times a second it writes its record to the file OUT, which is as long as it will ever be from the beginning, at 128 bytes times its NUMBER: ticks,
//! longest gap between two ticks in microseconds, pages that were written, looks through all of the memory, and pages that were not as they
//! should be. Its children do the same.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a program of tests: it fails by ending, and says why"
)]

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::process::Command;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// Bytes of one process's record.
const RECORD: usize = 128;

const TICK: Duration = Duration::from_millis(2);
const SAY: Duration = Duration::from_millis(100);

/// What a word of a page holds that was written so often.
fn word(page: usize, version: u64, at: usize) -> u64 {
    ((page as u64) << 32 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(at as u64)
}

fn write(pages: &mut [u64], page: usize, version: u64) {
    for at in 0..WORDS {
        pages[page * WORDS + at] = word(page, version, at);
    }
}

fn is_right(pages: &[u64], page: usize, version: u64) -> bool {
    (0..WORDS).all(|at| pages[page * WORDS + at] == word(page, version, at))
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments.get(at).map_or(0, |text| text.parse().expect("a number"));
    let (path, mib, rate, children, own) = (&arguments[1], number(2), number(3), number(4), number(5));
    let mut out =
        File::options().write(true).create(true).truncate(false).open(path).expect("the file to write to");
    if own == 0 {
        out.set_len(((1 + children) * RECORD) as u64).expect("room for all records");
    }
    let start = |child: usize| {
        let child = child.to_string();
        Command::new(&arguments[0]).args(&arguments[1..4]).args(["0", &child]).spawn().expect("a child")
    };
    let mut children: Vec<_> = (1..=children).map(start).collect();
    let count = mib * (1 << 20) / PAGE;
    let mut pages = vec![0_u64; count * WORDS];
    let mut versions = vec![0_u64; count];
    for page in 0..count {
        write(&mut pages, page, 0);
    }
    let (mut ticks, mut written, mut looks, mut wrong, mut longest) =
        (0_u64, 0_u64, 0_u64, 0_u64, Duration::ZERO);
    let (begun, mut last, mut said) = (Instant::now(), Instant::now(), Instant::now());
    let (mut due, mut next, mut looked) = (0.0, 1_usize, 0_usize);
    // Memory that comes and goes.
    let mut grown: Vec<Vec<u64>> = Vec::new();
    while begun.elapsed() < Duration::from_secs(600) {
        std::thread::sleep(TICK);
        let gap = last.elapsed();
        last = Instant::now();
        longest = longest.max(gap);
        ticks += 1;
        due += rate as f64 * gap.as_secs_f64().min(0.05);
        while due >= 1.0 && count > 0 {
            due -= 1.0;
            next = (next * 25_173 + 13_849) % count.next_power_of_two();
            let page = next % count;
            versions[page] += 1;
            write(&mut pages, page, versions[page]);
            written += 1;
        }
        for _ in 0..64.min(count) {
            wrong += u64::from(!is_right(&pages, looked, versions[looked]));
            looked += 1;
            if looked == count {
                looked = 0;
                looks += 1;
            }
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            let size = 1 << (12 + ticks % 5);
            grown.push(vec![ticks; size]);
            if grown.len() > 4 {
                let old = grown.remove((ticks % 3) as usize);
                wrong += u64::from(old.iter().any(|value| *value != old[0]));
            }
            let longest = longest.as_micros();
            let record = format!("{ticks} {longest} {written} {looks} {wrong}");
            out.seek(SeekFrom::Start((own * RECORD) as u64)).expect("its place");
            writeln!(out, "{record:<width$}", width = RECORD - 1).expect("it is written");
        }
    }
    for child in &mut children {
        child.wait().expect("it ends as well");
    }
}
