//! The example program `solver`, killed at moments that nobody chose, comes to the same result as one that was left alone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a whole run may take: it takes about a second.
const LIMIT: Duration = Duration::from_secs(120);

fn solver(store: &Path) -> Command {
    let tests = std::env::current_exe().unwrap();
    let example: PathBuf = tests.parent().unwrap().parent().unwrap().join("examples/solver");
    // Cargo builds the examples with all tests of a package, but not with one of them alone.
    assert!(example.exists(), "{} is missing: cargo build -p migrate --example solver", example.display());
    let mut command = Command::new(example);
    command.arg("--store").arg(store).stdout(Stdio::piped());
    command
}

/// Waits for a run, and answers its lines.
fn finish(mut child: Child) -> (Output, Vec<String>) {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("waited {} s for the solver to end", LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let lines = String::from_utf8(output.stdout.clone()).unwrap().lines().map(str::to_owned).collect();
    (output, lines)
}

fn result(lines: &[String]) -> &str {
    lines
        .last()
        .and_then(|line| line.strip_prefix("result "))
        .unwrap_or_else(|| panic!("no result: {lines:?}"))
}

/// Numbers of a line such as `step 5 checkpoint deltas=0 stored_bytes=8408000`.
fn checkpoint(line: &str) -> Option<(u32, u64)> {
    let number = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name));
    Some((number("deltas=")?.parse().ok()?, number("stored_bytes=")?.parse().ok()?))
}

#[test]
fn deltas_are_small_and_what_was_killed_by_itself_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let (alone, lines) = finish(solver(&directory.path().join("alone")).spawn().unwrap());
    assert!(alone.status.success());
    let undisturbed = result(&lines).to_owned();
    let taken: Vec<_> = lines.iter().filter_map(|line| checkpoint(line)).collect();
    assert_eq!(taken.len(), 40, "{lines:?}");
    assert_eq!(taken[0].0, 0);
    for (number, (deltas, stored_bytes)) in taken.iter().enumerate() {
        assert_eq!(*deltas as usize, number, "one full checkpoint, and deltas on it: {lines:?}");
        // Five bands of 32 rows of 1024 are written between two.
        assert!(number == 0 || stored_bytes * 4 < taken[0].1, "{stored_bytes} of {}", taken[0].1);
    }
    let store = directory.path().join("killed");
    let (killed, lines) = finish(solver(&store).args(["--kill-after", "33"]).spawn().unwrap());
    assert!(!killed.status.success() && lines.len() == 7, "{lines:?}");
    let (whole, lines) = finish(solver(&store).spawn().unwrap());
    assert!(whole.status.success());
    assert_eq!(lines[0], "begins at step 30");
    assert_eq!(
        checkpoint(&lines[1]).unwrap().0,
        6,
        "the first checkpoint is a delta on the one it began from"
    );
    assert_eq!(result(&lines), undisturbed);
}

#[test]
fn killed_at_any_moment_it_comes_to_the_same_result() {
    let directory = tempfile::tempdir().unwrap();
    let (_, lines) = finish(solver(&directory.path().join("alone")).spawn().unwrap());
    let undisturbed = result(&lines).to_owned();
    let mut seed = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() | 1;
    println!("seed {seed}");
    let store = directory.path().join("killed");
    for attempt in 0.. {
        assert!(attempt < 100, "it never came to an end");
        let mut child = solver(&store).spawn().unwrap();
        let mut first = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut first).unwrap();
        assert!(first.starts_with("begins at step "), "{first:?}");
        let mut lines = Vec::new();
        // The last attempt is left alone. The others get to their first checkpoints, so that each has something to go on from, and die
        // in a step or, more often, in the middle of a checkpoint.
        if attempt < 8 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            lines.extend((&mut output).lines().take(1 + (seed >> 28) as usize % 4).map(Result::unwrap));
            std::thread::sleep(Duration::from_micros(u64::from(seed >> 8) % 40_000));
            child.kill().unwrap();
        }
        lines.extend(output.lines().map(Result::unwrap));
        let status = child.wait().unwrap();
        if status.success() {
            assert!(attempt > 0 && first.trim() != "begins at step 0", "it was never killed");
            assert_eq!(result(&lines), undisturbed);
            break;
        }
        println!("attempt {attempt}: {} and then {} lines", first.trim(), lines.len());
    }
}
