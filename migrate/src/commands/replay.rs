//! `migrate replay`: decide a recorded migration again, by our rules and by others'.

use super::limits::LimitArgs;
use super::{emit, say};
use crate::cli::Common;
use crate::converge::Decision;
use crate::converge::policies::Policy;
use crate::converge::trace::Trace;
use crate::error::{Error, Result};
use crate::units::{show_bytes, show_us};
use protocol::page::PAGE_SIZE;
use std::path::PathBuf;
use std::process::ExitCode;

/// What to decide again, and how.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate send web b.example:7700 --trace web.trace
  migrate replay web.trace --downtime 10ms
  migrate replay web.trace --policy migrate --policy threshold --json")]
pub struct Args {
    /// What migrate send --trace wrote.
    trace: PathBuf,
    /// Whose rules to ask; may be named more than once.
    #[arg(long, value_enum, value_name = "NAME", default_values = ["migrate"])]
    policy: Vec<Policy>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Runs the verb.
///
/// # Errors
/// `Usage` when the file is no trace.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let shown = args.trace.display();
    let file = std::fs::File::open(&args.trace)
        .map_err(|error| Error::Usage(format!("{shown} cannot be opened: {error}")))?;
    let trace = Trace::read(file)?;
    for policy in &args.policy {
        let decisions = trace.replay(|limits| args.limits.over(limits), |now| policy.decide(now));
        if !common.json {
            say(&format!("{} by the policy {policy}", trace.workload));
        }
        for (number, (decision, entry)) in decisions.iter().zip(&trace.entries).enumerate() {
            if common.json {
                let mut line = serde_json::to_value(decision).unwrap_or_default();
                line["event"] = "decision".into();
                line["policy"] = policy.to_string().into();
                line["round"] = number.into();
                emit(&line);
                continue;
            }
            let left = show_bytes(entry.round.remaining_pages * PAGE_SIZE as u64);
            let took = show_us(crate::report::micros(entry.round.duration));
            say(&format!("round {number:>3}  {took:>9}  {left:>10} left  {}", told(decision)));
        }
        if !common.json && decisions.last().is_some_and(|last| !last.ends_rounds()) {
            say("the trace ends here, and this policy would have gone on");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn told(decision: &Decision) -> String {
    let predicted = show_us(crate::report::micros(decision.predicted()));
    match decision {
        Decision::Throttle { percent, .. } => {
            format!("throttle {percent} %, a freeze would cost {predicted}")
        }
        Decision::Freeze { .. } | Decision::Minimum { .. } | Decision::Force { .. } => {
            format!("{} with {predicted}", decision.name())
        }
        other => format!("{}, a freeze would cost {predicted}", other.name()),
    }
}
