//! `migrate store prune`: give up checkpoints that no rule keeps.

use super::{StoreArgs, count, show_age, show_sum};
use crate::chains::Chains;
use crate::cli::Common;
use crate::commands::{emit, say};
use crate::error::{Error, Result};
use crate::retention::{Keep, Plan, Reason, prune};
use crate::units;
use protocol::checkpoint::name::CheckpointId;
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

/// What to keep.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store prune --store /var/lib/checkpoints --keep-last 10 --keep-daily 7 --dry-run
  migrate store prune --store /var/lib/checkpoints --keep-hourly 24 --keep-weekly 4

The rules hold for each workload, and what one of them keeps stays, with all that it stands on and all of its group; so does the newest in
any case. Hours, days and weeks are those of UTC, and the newest of each stays. The space is given back by migrate store gc, when the
grace period is over.")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    keep: KeepArgs,
    /// Only the checkpoints of this workload.
    #[arg(long, value_name = "NAME")]
    workload: Option<String>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for whoever else writes to the store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
}

/// Which checkpoints stay.
#[derive(Debug, Clone, clap::Args)]
pub(in crate::commands) struct KeepArgs {
    /// Keep the newest so many checkpoints.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,
    /// Keep the newest checkpoint of each of the last so many hours that have one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_hourly: u32,
    /// Keep the newest checkpoint of each of the last so many days that have one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: u32,
    /// Keep the newest checkpoint of each of the last so many weeks that have one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: u32,
}

impl KeepArgs {
    /// The rules.
    pub(in crate::commands) fn keep(&self) -> Keep {
        let Self { keep_last, keep_hourly, keep_daily, keep_weekly } = *self;
        Keep { last: keep_last, hourly: keep_hourly, daily: keep_daily, weekly: keep_weekly }
    }
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let keep = args.keep.keep();
    if keep.is_empty() {
        return Err(Error::Usage(
            "nothing says what to keep: name --keep-last, --keep-hourly, --keep-daily or --keep-weekly"
                .into(),
        ));
    }
    let vault = args.store.open()?;
    let lease =
        if args.dry_run { None } else { Some(vault.store().lock_within("migrate store prune", args.wait)?) };
    let listing = vault.manifests()?;
    let chains = Chains::of(&listing);
    let plan = Plan::new(&chains, &keep, args.workload.as_deref().as_slice());
    for damaged in &listing.damaged {
        tracing::warn!("{}; it is left alone", damaged.error);
    }
    for (id, reasons) in &plan.retention.kept {
        tell(common, &chains, *id, "kept", Some(reasons));
    }
    for id in &plan.left_alone {
        tell(common, &chains, *id, "left alone", None);
    }
    let word = if args.dry_run { "would go" } else { "given up" };
    // None is told as gone before it is.
    let gone = match &lease {
        Some(lease) => prune(&vault, lease.as_ref(), &plan)?,
        None => plan.retention.dropped.clone(),
    };
    for id in &gone {
        tell(common, &chains, *id, word, None);
    }
    let (kept, left_alone) = (plan.retention.kept.len(), plan.left_alone.len());
    if common.json {
        emit(&serde_json::json!({
            "event": "pruned",
            "dry_run": args.dry_run,
            "pruned": gone,
            "kept": kept,
            "left_alone": left_alone,
        }));
    } else {
        let sum = show_sum(gone.iter().filter_map(|id| chains.get(*id)).map(|link| link.own_bytes));
        let what = format!("{} {word} ({sum})", count(gone.len(), "checkpoint"));
        let dry = if args.dry_run { "; nothing was changed" } else { "" };
        say(&format!("{what}, {kept} kept{dry}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(common: &Common, chains: &Chains, id: CheckpointId, word: &str, reasons: Option<&BTreeSet<Reason>>) {
    let reasons: Vec<String> = reasons.into_iter().flatten().map(Reason::to_string).collect();
    let link = chains.get(id);
    if common.json {
        emit(&serde_json::json!({
            "event": word.replace(' ', "-"),
            "id": id,
            "workload": link.map(|link| &link.committed.manifest.workload),
            "reasons": reasons,
        }));
        return;
    }
    let age = link.map_or(String::new(), |link| show_age(link.committed.manifest.taken_unix_ms));
    let workload = link.map_or("", |link| link.committed.manifest.workload.as_str());
    say(&format!("{word:<10}  {id}  {workload:<12}  {age:>7}  {}", reasons.join(", ")));
}
