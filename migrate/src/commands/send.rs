//! `migrate send`: move a running VM to another host.

use super::target::Target;
use super::{cancel_on_signals, emit};
use crate::cli::Common;
use crate::converge::OnTimeout;
use crate::error::{Error, Result};
use crate::identity::{self, Identity, TrustStore};
use crate::link::Link;
use crate::link::quic::{self, Settings};
use crate::outbound::{self, Options};
use crate::paths::RuntimeDir;
use crate::progress;
use crate::source::vm::VmSource;
use crate::units;
use clap::ValueEnum;
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
    /// The downtime to aim at.
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = units::duration)]
    downtime: Duration,
    /// The most rounds before --on-timeout decides.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: u32,
    /// The longest time before --on-timeout decides.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::duration)]
    timeout: Duration,
    /// What to do when rounds or time are used up: leave the VM here, or move it whatever the downtime.
    #[arg(long, value_enum, default_value = "cancel")]
    on_timeout: Choice,
    /// Start the VM at the destination without its last pages, which follow on demand, if it cannot be stopped within
    /// the downtime after N rounds.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1", require_equals = true,
        value_parser = clap::value_parser!(u32).range(1..))]
    post_copy: Option<u32>,
    /// How long to wait for a peer that says nothing.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    link_timeout: Duration,
    /// How long to ask for the answer when the link breaks behind the commit.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    ask_timeout: Duration,
}

/// The words for [`OnTimeout`].
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Choice {
    Cancel,
    Force,
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
    options.limits.downtime = args.downtime;
    options.limits.max_rounds = args.max_rounds;
    options.limits.timeout = args.timeout;
    options.limits.on_timeout = match args.on_timeout {
        Choice::Cancel => OnTimeout::Cancel,
        Choice::Force => OnTimeout::Force,
    };
    options.stall = args.link_timeout;
    options.ask = args.ask_timeout;
    options.post_copy_after = args.post_copy;
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
