//! `migrate cpu`: what this host can show guests of its processor, and what several hosts can.

use super::{emit, say};
use crate::cli::Common;
use crate::error::{Error, Result};
use clap::Subcommand;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use vmm::cpuid::{CpuModel, TemplateFile};
use vmm::host::Host;

/// The models that have a name.
const NAMED: [&str; 2] = ["x86-64-v2", "x86-64-v3"];

/// How many columns a list of features fills.
const COLUMNS: usize = 100;

/// Verbs for processors.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show what a guest sees of this host's processor; with --json as a template's file.
    #[command(after_help = "Example: migrate cpu show --json > host-a.json")]
    Show {
        /// The model whose guest it is: host, x86-64-v2, x86-64-v3, or the file of a template.
        #[arg(long, value_name = "MODEL", default_value = "host")]
        cpu: String,
    },
    /// Print the template of what all of these hosts have, so that a guest of it runs on each.
    #[command(after_help = "Example: migrate cpu common --name fleet host-a.json host-b.json > fleet.json
         migrate vm run --name web --cpu fleet.json --detach")]
    Common {
        /// What to call it.
        #[arg(long, default_value = "common")]
        name: String,
        /// Templates, as migrate cpu show --json prints them.
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// Say whether guests of a model can run on this host, and what it lacks if they cannot.
    #[command(after_help = "Example: migrate cpu check fleet.json")]
    Check {
        /// The model: x86-64-v2, x86-64-v3, or the file of a template.
        #[arg(value_name = "MODEL")]
        cpu: String,
    },
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, verb: &Verb) -> Result<ExitCode> {
    match verb {
        Verb::Show { cpu } => show(common, &CpuModel::parse(cpu)?)?,
        Verb::Common { name, files } => {
            let read = |file: &PathBuf| TemplateFile::read(file).map_err(Error::from);
            let files = files.iter().map(read).collect::<Result<Vec<_>>>()?;
            let template = TemplateFile::common(name, &files)?;
            if common.json {
                emit(&template);
            } else {
                let text = serde_json::to_string_pretty(&template);
                say(&text.map_err(|error| Error::Host(format!("it cannot be written: {error}")))?);
            }
        }
        Verb::Check { cpu } => {
            let model = CpuModel::parse(cpu)?;
            model.check(&Host::open()?)?;
            if common.json {
                emit(&json!({"cpu": model.name(), "runs_here": true}));
            } else {
                say(&format!("guests of CPU {} can run here", model.name()));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(common: &Common, model: &CpuModel) -> Result<()> {
    let host = Host::open()?;
    let template = model.on(&host)?;
    if common.json {
        emit(&template);
        return Ok(());
    }
    let can =
        NAMED.into_iter().filter(|name| CpuModel::parse(name).is_ok_and(|model| model.check(&host).is_ok()));
    let bits = |bits: Option<u32>| bits.map_or("unknown".into(), |bits| bits.to_string());
    say(&format!("CPU {} by {}", template.name, template.vendor.as_deref().unwrap_or("any maker")));
    say(&format!(
        "  addresses  {} bits physical, {} linear",
        bits(template.physical_bits),
        bits(template.linear_bits)
    ));
    say(&format!(
        "  nested     {}",
        if host.offers_nesting() { "guests may have it (vm run --nested)" } else { "no" }
    ));
    say(&format!("  can be     host {}", can.collect::<Vec<_>>().join(" ")));
    let mut line = String::from("  features  ");
    for feature in &template.features {
        if line.len() + feature.len() > COLUMNS {
            say(line.trim_end_matches(','));
            line = " ".repeat(12);
        }
        line.push_str(&format!(" {feature},"));
    }
    say(line.trim_end_matches(','));
    Ok(())
}
