//! `migrate`: see `migrate --help`.

fn main() -> std::process::ExitCode {
    migrate::cli::run()
}
