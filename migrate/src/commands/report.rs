//! `migrate report`: draw a report as a page.

use super::say;
use crate::cli::Common;
use crate::error::Result;
use crate::report::Document;
use std::path::PathBuf;
use std::process::ExitCode;

/// Which report, and where the page goes.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example: migrate send web b.example:7700 --json > move.json; migrate report move.json -o move.html

It reads what send --json or receive --json printed, or what --report FILE.json wrote, and draws the last report in it as one
page that needs nothing else: no network, no scripts."
)]
pub struct Args {
    /// The file with the report.
    file: PathBuf,
    /// Where the page goes [default: the file's name with .html].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the verb.
///
/// # Errors
/// `Usage` when there is no report in the file, `Host` when a file cannot be read or written.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let document = Document::read(&args.file)?;
    let output = args.output.clone().unwrap_or_else(|| args.file.with_extension("html"));
    document.write(&output)?;
    if common.json {
        super::emit(&serde_json::json!({"event": "drawn", "file": output}));
    } else {
        say(&format!("drawn as {}", output.display()));
    }
    Ok(ExitCode::SUCCESS)
}
