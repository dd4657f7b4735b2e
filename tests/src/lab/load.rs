//! Programs for Linux guests that move: a key-value server and the client that knows what it must answer, and a checker of memory.

use super::{Context as _, Result};
use crate::random::Random;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many keys there are.
const KEYS: u64 = 500;

/// What a client waits between two requests.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection that says nothing for so long is lost: the longest downtime a test allows, and a TCP that has backed off.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// How many pages a checker looks at before it rests.
const PAGES_AT_ONCE: usize = 64;

const REST: Duration = Duration::from_millis(20);

/// One page of so many gets new content in each pass: an emulated host moves few megabytes a second.
const REWRITTEN_IN: u64 = 16;

/// 64-bit words of a page of 4 KiB.
const PAGE_WORDS: usize = 512;

type Values = Arc<Mutex<HashMap<String, String>>>;

/// Serves `set KEY VALUE`, `get KEY` and `count`, a line each, to any number of connections.
///
/// # Errors
/// If it cannot listen.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context(|| format!("port {port}"))?;
    let values = Values::default();
    for stream in listener.incoming().flatten() {
        let values = values.clone();
        std::thread::spawn(move || answer(&stream, &values));
    }
    Ok(())
}

fn answer(mut stream: &TcpStream, values: &Values) {
    stream.set_nodelay(true).ok();
    for line in BufReader::new(stream).lines().map_while(std::io::Result::ok) {
        let mut values = values.lock().unwrap_or_else(PoisonError::into_inner);
        let words: Vec<_> = line.split(' ').collect();
        let said = match words[..] {
            ["set", key, value] => {
                let before = values.insert(key.to_owned(), value.to_owned());
                before.unwrap_or_else(|| "none".to_owned())
            }
            ["get", key] => values.get(key).cloned().unwrap_or_else(|| "none".to_owned()),
            ["count"] => values.len().to_string(),
            _ => "what?".to_owned(),
        };
        if stream.write_all(format!("{said}\n").as_bytes()).is_err() {
            return;
        }
    }
}

/// Sets and gets keys over one connection until standard input ends, looks at all of them once more, and says `asked N, waited MS at
/// most`.
///
/// # Errors
/// If the connection is lost, or an answer is not what was set last.
pub fn ask(address: &str, seed: u64) -> Result<()> {
    static ENOUGH: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        std::io::stdin().lock().read_to_end(&mut Vec::new()).ok();
        ENOUGH.store(true, Ordering::Relaxed);
    });
    let failed = || format!("the connection to {address}");
    let stream = connect(address).context(failed)?;
    stream.set_nodelay(true).context(failed)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT)).context(failed)?;
    let mut lines = BufReader::new(&stream).lines();
    let mut longest = Duration::ZERO;
    let mut asked = 0_u64;
    let mut exchange = |question: &str, expected: &str| {
        let begun = Instant::now();
        (&stream).write_all(format!("{question}\n").as_bytes()).context(failed)?;
        let said = lines.next().ok_or_else(|| format!("{address} hung up"))?.context(failed)?;
        longest = longest.max(begun.elapsed());
        asked += 1;
        if said == expected { Ok(()) } else { Err(format!("{question}: {said:?}, not {expected:?}")) }
    };
    let mut random = Random::new(seed);
    let mut known: HashMap<String, String> = HashMap::new();
    while !ENOUGH.load(Ordering::Relaxed) {
        let key = format!("{seed}-{}", random.below(KEYS));
        let held = known.get(&key).map_or("none", String::as_str).to_owned();
        if random.below(2) == 0 {
            exchange(&format!("get {key}"), &held)?;
        } else {
            let value = format!("{:x}", random.bits());
            exchange(&format!("set {key} {value}"), &held)?;
            known.insert(key, value);
        }
        std::thread::sleep(PAUSE);
    }
    for (key, value) in &known {
        exchange(&format!("get {key}"), value)?;
    }
    println!("asked {asked}, waited {} ms at most", longest.as_millis());
    Ok(())
}

/// Connects, also where nobody listens yet.
fn connect(address: &str) -> std::io::Result<TcpStream> {
    let until = Instant::now() + ANSWER_LIMIT;
    loop {
        match TcpStream::connect(address) {
            Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
}

/// Fills so much memory, checks it again and again, each time with new content for a part of it, and says `checked N` for each time.
///
/// # Errors
/// If a page does not hold what it must.
pub fn check_memory(mib: u64, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let words = usize::try_from(mib << 17).map_err(|_| format!("{mib} MiB are too many"))?;
    let mut memory = vec![0_u64; words];
    let mut seeds: Vec<u64> = memory.chunks_exact(PAGE_WORDS).map(|_| random.bits()).collect();
    for (page, seed) in memory.chunks_exact_mut(PAGE_WORDS).zip(&seeds) {
        fill(page, *seed);
    }
    for pass in 1_u64.. {
        for (index, (page, seed)) in memory.chunks_exact_mut(PAGE_WORDS).zip(&mut seeds).enumerate() {
            if index % PAGES_AT_ONCE == 0 {
                std::thread::sleep(REST);
            }
            let wrong = page.iter().enumerate().find(|(at, held)| **held != word(*seed, *at));
            if let Some((at, held)) = wrong {
                let wanted = word(*seed, at);
                return Err(format!("memory: word {at} of page {index} holds {held:x}, not {wanted:x}"));
            }
            if random.below(REWRITTEN_IN) == 0 {
                *seed = random.bits();
                fill(page, *seed);
            }
        }
        println!("checked {pass}");
    }
    Ok(())
}

/// Writes so much memory a second, each time a word of some page of a region, for ever. It says `dirtying` when it begins.
///
/// # Errors
/// If the region does not fit.
pub fn dirty(mib: u64, mb_per_s: u64) -> Result<Infallible> {
    const TICK: Duration = Duration::from_millis(10);
    let words = usize::try_from(mib << 17).map_err(|_| format!("{mib} MiB are too many"))?;
    let mut memory = vec![1_u64; words];
    let mut random = Random::new(mib);
    println!("dirtying");
    let begun = Instant::now();
    let mut written = 0_u128;
    loop {
        let due = begun.elapsed().as_micros() * u128::from(mb_per_s) / 4096;
        while written < due {
            let page = random.below((words / PAGE_WORDS) as u64);
            let at = usize::try_from(page).unwrap_or_default() * PAGE_WORDS;
            memory[at] = std::hint::black_box(memory[at].wrapping_add(1));
            written += 1;
        }
        std::thread::sleep(TICK);
    }
}

/// What a word of a page with this seed holds.
fn word(seed: u64, at: usize) -> u64 {
    seed.rotate_left(u32::try_from(at % 64).unwrap_or_default()) ^ at as u64
}

fn fill(page: &mut [u64], seed: u64) {
    for (at, held) in page.iter_mut().enumerate() {
        *held = word(seed, at);
    }
}
