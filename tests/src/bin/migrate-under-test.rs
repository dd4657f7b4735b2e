//! The program under test: `migrate` itself, built together with the tests that run it.

fn main() -> std::process::ExitCode {
    migrate::cli::run()
}
