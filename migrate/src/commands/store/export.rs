//! `migrate store export`: a checkpoint as a file.

use super::StoreArgs;
use crate::cancel::CancelFlag;
use crate::cli::Common;
use crate::commands::{cancel_on_signals, emit, say};
use crate::error::{Error, Result};
use crate::export::Disk;
use crate::restore::image::Image;
use crate::units::show_bytes;
use crate::vault::Vault;
use crate::{archive, export};
use protocol::checkpoint::name::CheckpointId;
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Which checkpoint, and as what.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store export --store /var/lib/checkpoints web --raw web.raw
  migrate store export --store /var/lib/checkpoints latest --core web.core && gdb -c web.core
  migrate store export --store /var/lib/checkpoints web --disks /srv/vms
  migrate store export --store /var/lib/checkpoints web@latest --archive web.tar

In the image each byte lies at its guest-physical address; the core has the same addresses, and each vCPU as a thread with its registers. Both
are sparse and in the clear, also from a sealed store. An archive has the checkpoint and all that it stands on as they are stored, for migrate store
import. A file that is there is not written over.")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Its name or the beginning of it, a time (the newest until then), a VM's name, VM@latest or VM@TIME, or latest.
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    #[command(flatten)]
    into: Into,
    /// Say what would be written, and write nothing.
    #[arg(long)]
    dry_run: bool,
}

/// As what.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Into {
    /// Write the memory as it lies in the guest.
    #[arg(long, value_name = "FILE")]
    raw: Option<PathBuf>,
    /// Write an ELF core with the registers of all vCPUs.
    #[arg(long, value_name = "FILE")]
    core: Option<PathBuf>,
    /// Write the images of its disks into this folder, under their own names.
    #[arg(long, value_name = "FOLDER")]
    disks: Option<PathBuf>,
    /// Write an archive (tar) of the checkpoint and all that it stands on; - is the standard output.
    #[arg(long, value_name = "FILE")]
    archive: Option<PathBuf>,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let vault = args.store.open()?;
    let id = vault.resolve(&args.checkpoint)?;
    if let (true, Some(folder)) = (args.dry_run, &args.into.disks) {
        return forecast_disks(common, &vault, id, folder);
    }
    if args.dry_run {
        return forecast(common, &vault, id, &args.into);
    }
    let Into { raw, core, archive, disks } = &args.into;
    if let Some(folder) = disks {
        return disks_into(common, &vault, id, folder, &cancel);
    }
    if let Some(path) = archive {
        if path == Path::new("-") {
            // What is written there is the archive and nothing else.
            archive::export(&vault, id, &mut std::io::stdout().lock(), &cancel)?;
            return Ok(ExitCode::SUCCESS);
        }
        let done = export::new_file(path, |file: &File| {
            let mut out = BufWriter::new(file);
            let done = archive::export(&vault, id, &mut out, &cancel)?;
            out.flush()
                .map_err(|error| Error::Host(format!("{} cannot be written: {error}", path.display())))?;
            Ok(done)
        })?;
        if common.json {
            emit(&json!({
                "event": "exported", "id": id, "as": "archive", "file": path, "checkpoints": done.checkpoints,
                "objects": done.objects, "bytes": done.bytes,
            }));
        } else {
            let (checkpoints, bytes) = (done.checkpoints, show_bytes(done.bytes));
            say(&format!(
                "{}: {id} and {} that it stands on, {bytes}",
                path.display(),
                checkpoints.saturating_sub(1)
            ));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let image = Image::open(&vault, id)?;
    let (form, path, done) = match (raw, core) {
        (Some(path), _) => ("raw", path, export::raw(&image, path, &cancel)?),
        (None, Some(path)) => ("core", path, export::core(&vault, &image, path, &cancel)?),
        (None, None) => return Err(no_form()),
    };
    if common.json {
        emit(&json!({
            "event": "exported", "id": id, "as": form, "file": path, "bytes": done.bytes, "data_bytes": done.data_bytes,
        }));
    } else {
        let (bytes, data) = (show_bytes(done.bytes), show_bytes(done.data_bytes));
        say(&format!("{}: {id}, {bytes} long, {data} of it are not zeros", path.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn no_form() -> Error {
    Error::Usage("say as what: --raw, --core, --disks or --archive".into())
}

/// The disks of a checkpoint, if it has any.
fn disks(vault: &Vault, id: CheckpointId) -> Result<(Image, Vec<Disk>)> {
    let image = Image::open(vault, id)?;
    let disks = export::disks_of(vault, &image)?;
    if disks.is_empty() {
        return Err(Error::Usage(format!("checkpoint {id} has no disks: its VM wrote to none")));
    }
    Ok((image, disks))
}

fn disks_into(
    common: &Common,
    vault: &Vault,
    id: CheckpointId,
    folder: &Path,
    cancel: &CancelFlag,
) -> Result<ExitCode> {
    let (image, disks) = disks(vault, id)?;
    for disk in disks {
        let path = folder.join(&disk.name);
        let done = export::disk(&image, &disk, &path, cancel)?;
        if common.json {
            emit(&json!({
                "event": "exported", "id": id, "as": "disk", "file": path, "bytes": done.bytes, "data_bytes": done.data_bytes,
            }));
        } else {
            let (bytes, data) = (show_bytes(done.bytes), show_bytes(done.data_bytes));
            say(&format!("{}: a disk of {id}, {bytes} long, {data} of it are not zeros", path.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn forecast_disks(common: &Common, vault: &Vault, id: CheckpointId, folder: &Path) -> Result<ExitCode> {
    let (_, disks) = disks(vault, id)?;
    for Disk { name, bytes, .. } in disks {
        let path = folder.join(name);
        export::check_new(&path)?;
        if common.json {
            emit(&json!({"event": "would-export", "id": id, "as": "disk", "file": path, "bytes": bytes}));
        } else {
            say(&format!("would write a disk of {id} to {}: {}", path.display(), show_bytes(bytes)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what would be written.
fn forecast(common: &Common, vault: &Vault, id: CheckpointId, into: &Into) -> Result<ExitCode> {
    let image = || Image::open(vault, id);
    let (form, path, bytes, data_bytes) = match into {
        Into { archive: Some(path), .. } => {
            ("archive", path, archive::export_forecast(vault, id)?.bytes, None)
        }
        Into { raw: Some(path), .. } => {
            let would = export::raw_forecast(&image()?)?;
            ("raw", path, would.bytes, Some(would.data_bytes))
        }
        Into { core: Some(path), .. } => {
            let would = export::core_forecast(vault, &image()?)?;
            ("core", path, would.bytes, Some(would.data_bytes))
        }
        Into { raw: None, core: None, archive: None, .. } => return Err(no_form()),
    };
    if path != Path::new("-") {
        export::check_new(path)?;
    }
    if common.json {
        emit(&json!({
            "event": "would-export", "id": id, "as": form, "file": path, "bytes": bytes, "data_bytes": data_bytes,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let data = data_bytes.map_or(String::new(), |data| format!(", {} of it not zeros", show_bytes(data)));
    say(&format!("would write {id} to {}: {}{data}", path.display(), show_bytes(bytes)));
    Ok(ExitCode::SUCCESS)
}
