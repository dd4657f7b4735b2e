//! `migrate store list`: the checkpoints of a store as trees.

use super::{StoreArgs, count, show_age, show_sum};
use crate::chains::{Chains, Line, Link};
use crate::cli::Common;
use crate::commands::{emit, say};
use crate::error::Result;
use crate::units::show_bytes;
use crate::vault::{Damaged, now_unix_ms};
use std::process::ExitCode;

/// Of which store.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store list --store /var/lib/checkpoints
  migrate store list --store /var/lib/checkpoints --workload web --json

A line is a checkpoint: what it stands on is the line above it, or where it says so. Sizes are what it added, and what restoring it
may need in all. One that is damaged is told and does not hide the rest.")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Only the checkpoints of this workload.
    #[arg(long, value_name = "NAME")]
    workload: Option<String>,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let vault = args.store.open()?;
    let mut listing = vault.manifests()?;
    let is_meant = |workload: &str| args.workload.as_deref().is_none_or(|name| name == workload);
    listing.committed.retain(|found| is_meant(&found.manifest.workload));
    listing.orphans.retain(|found| is_meant(&found.manifest.workload));
    let chains = Chains::of(&listing);
    if common.json {
        chains.links().for_each(|link| emit(&object(link)));
        listing.damaged.iter().for_each(|damaged| emit(&damaged_object(damaged)));
        return Ok(ExitCode::SUCCESS);
    }
    if chains.links().next().is_none() && listing.damaged.is_empty() {
        say(&format!("there is no checkpoint in {}: `migrate checkpoint` takes one", vault.place()));
        return Ok(ExitCode::SUCCESS);
    }
    let lines = chains.draw();
    let width = lines.iter().map(|line| line.branches.chars().count()).max().unwrap_or(0) + ID_WIDTH;
    for line in &lines {
        if let Some(link) = chains.get(line.id) {
            say(&text(line, link, width));
        }
    }
    for Damaged { error, .. } in &listing.damaged {
        say(&format!("DAMAGED   {error}"));
    }
    let sum = show_sum(chains.links().map(|link| link.own_bytes));
    say(&format!("{} in {}, {sum}", count(lines.len(), "checkpoint"), vault.place()));
    Ok(ExitCode::SUCCESS)
}

/// Characters of a checkpoint's name.
const ID_WIDTH: usize = 25;

fn text(line: &Line, link: &Link, width: usize) -> String {
    let manifest = &link.committed.manifest;
    let pad = width.saturating_sub(line.branches.chars().count());
    let kind = if manifest.parent.is_none() { "full" } else { "delta" };
    let age = show_age(manifest.taken_unix_ms);
    let (own, chain) = (show_bytes(link.own_bytes), show_bytes(link.chain_bytes));
    let mut text = format!(
        "{}{:<pad$}  {kind:<5}  {:<12}  {age:>7}  {own:>10}  {chain:>10} in all",
        line.branches,
        line.id.to_string(),
        manifest.workload,
    );
    if let Some(on) = line.stands_on {
        text.push_str(&format!("  on {on}"));
    }
    if let Some(group) = manifest.group {
        text.push_str(&format!("  group {group}"));
    }
    if let Some(wrong) = &link.wrong {
        text.push_str(&format!("  CANNOT BE RESTORED: {wrong}"));
    }
    text
}

fn object(link: &Link) -> serde_json::Value {
    let manifest = &link.committed.manifest;
    serde_json::json!({
        "id": manifest.id,
        "workload": manifest.workload,
        "taken_unix_ms": manifest.taken_unix_ms,
        "age_ms": now_unix_ms().saturating_sub(manifest.taken_unix_ms),
        "parent": manifest.parent.as_ref().map(|parent| parent.id),
        "deltas": manifest.deltas,
        "group": manifest.group,
        "memory_bytes": manifest.layout.memory_bytes(),
        "own_bytes": link.own_bytes,
        "chain_bytes": link.chain_bytes,
        "wrong": link.wrong,
    })
}

fn damaged_object(damaged: &Damaged) -> serde_json::Value {
    serde_json::json!({
        "id": damaged.id,
        "object": damaged.object,
        "wrong": damaged.error.to_string(),
    })
}
