//! What a Linux guest in the laboratory is busy with, and who asks it from outside: see `e2e::lab::load`.

use e2e::lab::load::{ask, check_memory, dirty, serve};
use std::process::ExitCode;

const USAGE: &str = "lab-load serve PORT | ask ADDRESS:PORT SEED | memory MIB SEED | dirty MIB MB_PER_S";

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse().map_err(|_| format!("{word} is no number: {USAGE}"));
    let done = match words[..] {
        ["serve", port] => port.parse().map_err(|_| format!("{port} is no port: {USAGE}")).and_then(serve),
        ["ask", address, seed] => number(seed).and_then(|seed| ask(address, seed)),
        ["memory", mib, seed] => {
            number(mib).and_then(|mib| number(seed).and_then(|seed| check_memory(mib, seed)))
        }
        ["dirty", mib, rate] => {
            let both = number(mib).and_then(|mib| number(rate).map(|rate| (mib, rate)));
            both.and_then(|(mib, rate)| dirty(mib, rate)).map(|never| match never {})
        }
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("BROKEN {why}");
            ExitCode::FAILURE
        }
    }
}
