//! The benchmark: see `scripts/bench --help` and `e2e::bench`.

fn main() -> std::process::ExitCode {
    let options = match e2e::bench::Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("bench: {why}: see scripts/bench --help");
            return std::process::ExitCode::from(2);
        }
    };
    match e2e::bench::run(&options) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            std::process::ExitCode::from(3)
        }
    }
}
