//! `migrate send`: move a running VM to another host.

use super::target::Target;
use super::{cancel_on_signals, emit};
use crate::cli::Common;
use crate::controls::check_limits;
use crate::converge::{Limits, OnStall, OnTimeout};
use crate::error::{Error, Result};
use crate::identity::{self, Identity, TrustStore};
use crate::link::Link;
use crate::link::quic::{self, Settings};
use crate::outbound::{self, Options};
use crate::paths::RuntimeDir;
use crate::progress;
use crate::source::vm::VmSource;
use crate::units;
use protocol::monitor::Phase;
use std::process::ExitCode;
use std::time::Duration;

/// What to send where, and within which limits.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate send web b.example:7700 --downtime 20ms")]
pub struct Args {
    /// The VM's name, or the path of its control socket.
    vm: String,
    /// Where migrate receive listens: HOST:PORT.
    address: String,
    #[command(flatten)]
    limits: LimitArgs,
    /// How long to wait for a peer that says nothing.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    link_timeout: Duration,
    /// How long to look for another link when one is lost before the commit; the VM runs on meanwhile. 0s to give up at once.
    #[arg(long, value_name = "TIME", default_value = "9m", value_parser = units::duration)]
    retry_for: Duration,
    /// How long to ask for the answer when the link breaks behind the commit.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    ask_timeout: Duration,
}

/// When to freeze, and how long to try.
#[derive(Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// The downtime to aim at.
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = units::duration)]
    downtime: Duration,
    /// The longest downtime of a move that stalled: see --on-stall.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::duration)]
    max_downtime: Duration,
    /// The most rounds before --on-timeout decides.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: u32,
    /// The longest time before --on-timeout decides.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::duration)]
    timeout: Duration,
    /// What to do when rounds or time are used up: leave the VM here, move it whatever the downtime, or move it and
    /// let its memory follow.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "cancel")]
    on_timeout: OnTimeout,
    /// What to do when what remains no longer falls: the first that is possible of freezing at a minimum within
    /// --max-downtime, slowing the VM down, letting its memory follow, and leaving the VM here.
    #[arg(
        long,
        value_enum,
        value_name = "WHAT,…",
        value_delimiter = ',',
        default_value = "minimum,throttle,post-copy,cancel"
    )]
    on_stall: Vec<OnStall>,
    /// The most that a stalled VM is slowed down, as the share of time in which it stands still.
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(0..=99))]
    max_throttle: u8,
    /// Start the VM at the destination behind N rounds that were not enough, and let its memory follow.
    #[arg(
        long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    post_copy: Option<u32>,
}

impl LimitArgs {
    /// As the engine takes them.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            downtime: self.downtime,
            max_downtime: self.max_downtime,
            max_rounds: self.max_rounds,
            timeout: self.timeout,
            on_timeout: self.on_timeout,
            on_stall: self.on_stall.clone(),
            max_throttle_percent: self.max_throttle,
            post_copy_after: self.post_copy,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let target = Target::find(&runtime, &args.vm)?;
    let status = target.status()?;
    if status.phase == Phase::Pledged {
        return Err(Error::Workload(format!(
            "{} stands still because the outcome of a migration is not known: settle it with migrate recover {0}",
            args.vm
        )));
    }
    let keys = identity::directory(common.keys.as_deref())?;
    let identity = Identity::load(&keys)?;
    let settings = settings(args.link_timeout);
    let mut dial = || -> Result<Box<dyn Link>> {
        // Read anew for every connection, so that a key revoked meanwhile is not trusted.
        let trust = TrustStore::load(&keys)?;
        Ok(Box::new(quic::dial(&args.address, &identity, &trust, &settings, args.link_timeout)?))
    };
    let cancel = cancel_on_signals()?;
    let source = VmSource::connect(&status.name, target.socket(), &args.address)?;
    let link = dial()?;
    let mut options = Options::new(outbound::new_migration_id()?);
    let limits = args.limits.limits();
    check_limits(&limits).map_err(Error::Usage)?;
    options.controls.change(|now| *now = limits);
    options.stall = args.link_timeout;
    options.ask = args.ask_timeout;
    options.retry = args.retry_for;
    let mut observer = progress::observer(common);
    let sent = outbound::send(Box::new(source), link, &mut dial, &options, &cancel, observer.as_mut());
    let (report, failure) = match sent {
        Ok(report) => (report, None),
        Err(failed) => (failed.report, Some(failed.error)),
    };
    if common.json {
        let mut line = serde_json::to_value(&report).unwrap_or_default();
        line["event"] = "report".into();
        emit(&line);
    } else if failure.is_none() {
        progress::show_report(&report);
    }
    failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// The link's settings for a limit on a peer's silence.
pub(super) fn settings(link_timeout: Duration) -> Settings {
    let mut settings = Settings::default();
    settings.idle_timeout = link_timeout;
    settings.keep_alive = (link_timeout / 5).min(settings.keep_alive);
    settings.stall_timeout = link_timeout;
    settings
}
