//! When to freeze and how long to try, as an operator says it.

use crate::converge::{Limits, OnStall, OnTimeout};
use crate::units;
use std::time::Duration;

/// Changes to [`Limits`]; what is not named stays as it is.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "When to stop")]
pub(super) struct LimitArgs {
    /// The downtime to aim at [default: 50ms].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    downtime: Option<Duration>,
    /// The longest downtime of a move that stalled: see --on-stall [default: 300ms].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    max_downtime: Option<Duration>,
    /// The most rounds before --on-timeout decides [default: 30].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: Option<u32>,
    /// The longest time before --on-timeout decides [default: 10m].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// What to do when rounds or time are used up: leave the VM here, move it whatever the downtime, or move it and
    /// let its memory follow [default: cancel].
    #[arg(long, value_enum, value_name = "WHAT")]
    on_timeout: Option<OnTimeout>,
    /// What to do when what remains no longer falls: the first that is possible of freezing at a minimum within
    /// --max-downtime, slowing the VM down, letting its memory follow, and leaving the VM here
    /// [default: minimum,throttle,post-copy,cancel].
    #[arg(long, value_enum, value_name = "WHAT,…", value_delimiter = ',')]
    on_stall: Option<Vec<OnStall>>,
    /// The most that a stalled VM is slowed down, as the share of time in which it stands still [default: 80].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    max_throttle: Option<u8>,
    /// Start the VM at the destination behind N rounds (1 if no number is given) that were not enough, and let its
    /// memory follow.
    #[arg(
        long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    post_copy: Option<u32>,
}

impl LimitArgs {
    /// These limits with the changes in them.
    pub(super) fn over(&self, limits: &Limits) -> Limits {
        let limits = limits.clone();
        Limits {
            downtime: self.downtime.unwrap_or(limits.downtime),
            max_downtime: self.max_downtime.unwrap_or(limits.max_downtime),
            max_rounds: self.max_rounds.unwrap_or(limits.max_rounds),
            timeout: self.timeout.unwrap_or(limits.timeout),
            on_timeout: self.on_timeout.unwrap_or(limits.on_timeout),
            on_stall: self.on_stall.clone().unwrap_or(limits.on_stall),
            max_throttle_percent: self.max_throttle.unwrap_or(limits.max_throttle_percent),
            post_copy_after: self.post_copy.or(limits.post_copy_after),
        }
    }
}
