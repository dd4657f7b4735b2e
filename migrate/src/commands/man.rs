//! `migrate man`: manual pages.

use super::{emit, say};
use crate::cli::{self, Common};
use crate::error::{Error, Result};
use clap_mangen::Man;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Where the pages go.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate man /usr/local/share/man/man1

Without a directory it prints the first page: migrate man | man -l -")]
pub struct Args {
    /// Write one page for each verb into this directory, which is made when it is missing.
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Runs the verb.
///
/// # Errors
/// `Host` when a page cannot be written.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cannot = |error: std::io::Error| Error::Host(format!("the manual cannot be written: {error}"));
    let Some(directory) = &args.directory else {
        let mut page = Vec::new();
        Man::new(cli::command()).render(&mut page).map_err(cannot)?;
        if common.json {
            emit(&serde_json::json!({"event": "man", "page": String::from_utf8_lossy(&page)}));
        } else {
            // A reader that went away needs none.
            std::io::stdout().write_all(&page).ok();
        }
        return Ok(ExitCode::SUCCESS);
    };
    std::fs::create_dir_all(directory).map_err(cannot)?;
    let mut pages = 0;
    for (name, command) in all(&cli::command()) {
        let file = directory.join(format!("{name}.1"));
        let mut page = Vec::new();
        Man::new(command.clone()).render(&mut page).map_err(cannot)?;
        std::fs::write(&file, page).map_err(cannot)?;
        pages += 1;
    }
    if common.json {
        emit(&serde_json::json!({"event": "man", "directory": directory, "pages": pages}));
    } else {
        say(&format!("{pages} pages are in {}", directory.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// A command and those below it, each with its whole name: `migrate-vm-run`.
fn all(command: &clap::Command) -> Vec<(String, &clap::Command)> {
    let mut found = vec![(command.get_display_name().unwrap_or(command.get_name()).to_owned(), command)];
    for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help")
    {
        found.extend(all(below));
    }
    found
}
