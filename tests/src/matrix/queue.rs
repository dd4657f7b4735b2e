//! The cases, worked off by a few threads.

use super::case::{Case, Fault};
use super::scene::{Scene, Workshop};
use super::table::cases;
use super::verdict::Ended;
use super::{fault, verdict};
use crate::cgroup;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What to run, by the environment.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `MATRIX_SEED`
    pub seed: u64,
    /// `MATRIX_CASES`: the table is always in it.
    pub count: usize,
    /// `MATRIX_CASE`: only those whose name contains this.
    pub only: Option<String>,
    /// `MATRIX_THREADS`: cases wait more than they compute.
    pub threads: usize,
}

impl Plan {
    /// The plan of the environment's variables.
    ///
    /// # Panics
    /// If one of them is no number where it has to be one.
    pub fn of_environment() -> Self {
        let number = |name: &str, usual: u64| match std::env::var(name) {
            Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not {text}")),
            Err(_) => usual,
        };
        Self {
            seed: number("MATRIX_SEED", 1),
            count: usize::try_from(number("MATRIX_CASES", 0)).expect("a number of cases"),
            only: std::env::var("MATRIX_CASE").ok(),
            threads: usize::try_from(number("MATRIX_THREADS", 4)).expect("a number of threads"),
        }
    }
}

/// Packet sizes of the workers' cables: Ethernet, jumbo frames, and the most that veth takes.
const MTUS: [u32; 3] = [9_000, 1_500, 65_535];

/// Runs the plan and gives how many cases ended well.
///
/// # Panics
/// With every case that failed, and how to run it again.
pub fn run(program: &Path, plan: &Plan) -> usize {
    let mut all = cases(plan.seed, plan.count);
    if let Some(only) = &plan.only {
        // A whole name wins over being part of others.
        let exact = all.iter().any(|case| case.name == *only);
        all.retain(|case| if exact { case.name == *only } else { case.name.contains(only) });
    }
    if !cgroup::is_usable() {
        println!("SKIPPED: the cases in which a host's memory is used up: no memory cgroup can be made here");
        all.retain(|case| !matches!(case.fault, Fault::Starve(_)));
    }
    // Those that wait and those that compute are mixed, and the mix depends on the seed.
    all.sort_by_key(|case| case.seed);
    let (begun, next) = (Instant::now(), AtomicUsize::new(0));
    let ended = Mutex::new(BTreeMap::<String, usize>::new());
    let failed = Mutex::new(Vec::new());
    let slowest = Mutex::new((Duration::ZERO, String::new()));
    let threads = plan.threads.clamp(1, all.len().max(1));
    std::thread::scope(|scope| {
        for worker in 0..threads {
            let (all, next, ended, failed, slowest) = (&all, &next, &ended, &failed, &slowest);
            scope.spawn(move || {
                let workshop = Workshop::new(program, MTUS[worker % MTUS.len()]);
                while let Some(case) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let case_begun = Instant::now();
                    let outcome = play(case, &workshop);
                    let took = case_begun.elapsed();
                    let said = match &outcome {
                        Ok(end) => end.to_string(),
                        Err(_) => "FAILED".to_owned(),
                    };
                    println!("{} {said} ({} ms)", case.name, took.as_millis());
                    *ended.lock().expect("the lock").entry(said).or_default() += 1;
                    let mut slowest = slowest.lock().expect("the lock");
                    if took > slowest.0 {
                        *slowest = (took, case.name.clone());
                    }
                    if let Err(why) = outcome {
                        println!("{why}");
                        failed.lock().expect("the lock").push((case.name.clone(), why));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("the lock");
    let slowest = slowest.into_inner().expect("the lock");
    let ended = ended.into_inner().expect("the lock");
    println!(
        "seed {}: {} cases in {:.0} s: {:?}; the slowest was {} with {:.1} s",
        plan.seed,
        all.len(),
        begun.elapsed().as_secs_f32(),
        ended,
        slowest.1,
        slowest.0.as_secs_f32()
    );
    for (name, why) in &failed {
        let seed = plan.seed;
        let count =
            if name.starts_with("random-") { format!("MATRIX_CASES={} ", plan.count) } else { String::new() };
        println!(
            "\nFAILED {name}\n{why}\nagain: MATRIX_SEED={seed} {count}MATRIX_CASE={name} cargo test -p e2e --test matrix -- --nocapture"
        );
    }
    let resumed: usize =
        ended.iter().filter(|(said, _)| said.contains("resumed")).map(|(_, count)| count).sum();
    let meant = all.iter().filter(|case| case.is_taken_up()).count();
    // A machine that stands still for a moment may sleep through a cut, but not through half of them.
    assert!(resumed * 2 >= meant, "only {resumed} of {meant} links were lost and found again");
    assert!(failed.is_empty(), "{} of {} cases failed, seed {}", failed.len(), all.len(), plan.seed);
    all.len()
}

/// One case; what goes wrong in it is its result.
fn play(case: &Case, workshop: &Workshop) -> Result<Ended, String> {
    std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut scene = Scene::set(case, workshop);
        fault::strike(case, &mut scene);
        verdict::judge(case, scene)
    }))
    .map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
}
