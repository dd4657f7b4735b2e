//! `migrate store verify`: read everything and say what is damaged.

use super::{StoreArgs, count};
use crate::cli::Common;
use crate::commands::{cancel_on_signals, emit, say};
use crate::error::{Error, Result};
use crate::exit;
use crate::units::show_bytes;
use crate::upkeep::verify::{Damage, verify};
use indicatif::{ProgressBar, ProgressStyle};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often `--json` tells how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Which store.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  migrate store verify --store /var/lib/checkpoints

Every object, extent and chain link is read and compared with its digest. Exit code 12 when anything is damaged. Nothing is
changed, and others may write meanwhile.")]
pub(super) struct Args {
    #[command(flatten)]
    store: StoreArgs,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let vault = args.store.open()?;
    let watch = Watch::new(common.json);
    let verified = verify(&vault, &|done, total| {
        if cancel.is_set() {
            return Err(Error::Interrupted("what was read so far is not told".into()));
        }
        watch.tell(done, total);
        Ok(())
    });
    watch.bar.finish_and_clear();
    let verified = verified?;
    if common.json {
        for damage in &verified.damages {
            let Damage { object, checkpoints, what } = damage;
            emit(
                &serde_json::json!({"event": "damaged", "object": object, "checkpoints": checkpoints, "what": what}),
            );
        }
        emit(&serde_json::json!({
            "event": "verified",
            "store": vault.place(),
            "checkpoints": verified.checkpoints,
            "objects": verified.objects,
            "extents": verified.extents,
            "data_bytes": verified.bytes,
            "damaged_objects": verified.damages.len(),
            "lost": verified.lost,
        }));
    } else {
        for Damage { object, checkpoints, what } in &verified.damages {
            let needed = checkpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let needed = if needed.is_empty() { "no checkpoint".into() } else { needed };
            say(&format!("DAMAGED   {object}, needed by {needed}: {what}"));
        }
        for id in &verified.lost {
            say(&format!("LOST      {id} cannot be restored"));
        }
        let damages = match verified.damages.len() {
            0 => "nothing is damaged".into(),
            number => format!(
                "{} damaged, {} lost",
                count(number, "object"),
                count(verified.lost.len(), "checkpoint")
            ),
        };
        let (objects, checkpoints) = (verified.objects as usize, verified.checkpoints as usize);
        let read = format!("{} and {} of page data", count(objects, "object"), show_bytes(verified.bytes));
        say(&format!("{damages}: {} in {}, {read}", count(checkpoints, "checkpoint"), vault.place()));
    }
    Ok(if verified.damages.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(exit::STORE) })
}

/// Tells how far it is: a bar on a terminal, lines for scripts.
struct Watch {
    bar: ProgressBar,
    json: bool,
    told: Mutex<Instant>,
}

impl Watch {
    fn new(json: bool) -> Self {
        let style =
            ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
        let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(0) };
        // A template that is wrong is no reason to verify nothing.
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self { bar, json, told: Mutex::new(Instant::now()) }
    }

    fn tell(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        if !self.json {
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= TELL_EVERY {
            *told = Instant::now();
            emit(&serde_json::json!({"event": "verifying", "done_bytes": done, "total_bytes": total}));
        }
    }
}
