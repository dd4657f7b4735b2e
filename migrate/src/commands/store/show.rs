//! `migrate store show`: everything that is known of one checkpoint.

use super::{StoreArgs, count, show_age};
use crate::chains::Chains;
use crate::cli::Common;
use crate::commands::{emit, say};
use crate::error::{Error, Result};
use crate::units::{show_bytes, show_us};
use protocol::checkpoint::name::CheckpointId;
use protocol::page::PAGE_SIZE;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

/// Which one.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store show --store /var/lib/checkpoints latest
  migrate store show --store /var/lib/checkpoints 20261123T194831Z-3f9a1c07 --json")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Its name or the beginning of it, a time, a VM's name, VM@latest or VM@TIME, or latest.
    #[arg(value_name = "CHECKPOINT", default_value = "latest")]
    checkpoint: String,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let vault = args.store.open()?;
    let id = vault.resolve(&args.checkpoint)?;
    let chains = Chains::of(&vault.manifests()?);
    let Some(link) = chains.get(id) else {
        // It went while this looked: the store says what is wrong.
        vault.manifest(id)?;
        return Err(Error::Store(format!("checkpoint {id} has just come into {}: ask again", vault.place())));
    };
    let manifest = &link.committed.manifest;
    let children = chains.children(id);
    if common.json {
        let digest = protocol::checkpoint::manifest::HexDigest(link.committed.digest);
        emit(&serde_json::json!({
            "event": "checkpoint-shown",
            "manifest": manifest,
            "digest": digest,
            "store": vault.place(),
            "children": children,
            "own_bytes": link.own_bytes,
            "chain_bytes": link.chain_bytes,
            "wrong": link.wrong,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let pages = |pages: u64| show_bytes(pages * PAGE_SIZE as u64);
    let taken = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(manifest.taken_unix_ms));
    say(&format!("{id} of {}, {:?}, in {}", manifest.workload, manifest.kind, vault.place()));
    say(&format!("taken     {taken}, {} ago, by {}", show_age(manifest.taken_unix_ms), manifest.software));
    say(&format!("pause     {}", show_us(manifest.pause_us)));
    match &manifest.parent {
        None => say("kind      full"),
        Some(parent) => {
            say(&format!("kind      a delta on {}, number {} of its chain", parent.id, manifest.deltas));
        }
    }
    if let Some(group) = manifest.group {
        say(&format!("group     {group}"));
    }
    say(&format!(
        "memory    {} in {}",
        show_bytes(manifest.layout.memory_bytes()),
        count(manifest.layout.spaces.len(), "space")
    ));
    say(&format!(
        "pages     {} with data, {} stored already, {} zeros",
        pages(manifest.data_pages),
        pages(manifest.shared_pages),
        pages(manifest.zero_pages)
    ));
    say(&format!(
        "size      {} of its own, {} in all: {}, {} of index, {} of state",
        show_bytes(link.own_bytes),
        show_bytes(link.chain_bytes),
        count(manifest.segments.len(), "segment"),
        show_bytes(manifest.index.bytes),
        show_bytes(manifest.state.bytes)
    ));
    if !children.is_empty() {
        let names: Vec<_> = children.iter().map(CheckpointId::to_string).collect();
        say(&format!("needed by {}", names.join(", ")));
    }
    if let Some(wrong) = &link.wrong {
        say(&format!("CANNOT BE RESTORED: {wrong}"));
    }
    Ok(ExitCode::SUCCESS)
}
