//! `migrate checkpoint --group`: several VMs as they were at one instant.

use super::subject::Subject;
use super::{Args, lock, show};
use crate::checkpoint::{GroupOptions, GroupReport, Joining, Options, take_group};
use crate::cli::Common;
use crate::commands::{cancel_on_signals, check_name, emit, say};
use crate::error::Result;
use crate::paths::RuntimeDir;
use crate::progress;
use crate::report::{Observer, Quiet};
use crate::seal::StoreKey;
use crate::store;
use crate::units::show_us;
use crate::vault::{Vault, new_id};
use std::process::ExitCode;
use std::sync::Arc;

/// Takes one.
pub(super) fn run(common: &Common, args: &Args, runtime: &RuntimeDir, name: &str) -> Result<ExitCode> {
    check_name(name)?;
    let cancel = cancel_on_signals()?;
    let store = store::open(&args.store)?;
    let key = args.encrypt.as_deref().map(StoreKey::load).transpose()?;
    let mut members = Vec::new();
    for vm in &args.vms {
        let subject = Subject::find(args, runtime, vm)?;
        let name = subject.check()?;
        let mut options = Options::new(new_id()?);
        args.apply(&mut options);
        options.full = args.full;
        // Shared by all: together they take no more than one would.
        options.stage_bytes = (args.stage / args.vms.len() as u64).max(1 << 20);
        let open = move || {
            let (source, _) = subject.open()?;
            let observer: Box<dyn Observer> = progress::held(Box::new(Quiet));
            Ok((source, observer))
        };
        members.push(Joining { name, open: Box::new(open), options });
    }
    let mut lease = lock(store.as_ref(), &format!("--group {name}"), args.wait, &cancel)?;
    let vault = Vault::open_or_create(Arc::clone(&store), key.as_ref())?;
    let options = GroupOptions { id: new_id()?, name: name.into(), barrier: !args.no_barrier };
    let (report, failure) = match take_group(members, &vault, &mut *lease, &options, &cancel) {
        Ok(report) => (report, None),
        Err(failed) => (failed.report, Some(failed.error)),
    };
    print(common, &report);
    if let Some(error) = failure {
        return Err(error);
    }
    let workloads: Vec<_> = report.members.iter().map(|member| member.workload.as_str()).collect();
    args.prune(common, &vault, &*lease, &workloads);
    Ok(ExitCode::SUCCESS)
}

fn print(common: &Common, report: &GroupReport) {
    if common.json {
        let mut line = serde_json::to_value(report).unwrap_or_default();
        line["event"] = "group".into();
        emit(&line);
    } else if report.committed {
        report.members.iter().for_each(|member| show::report(common, member));
        say(&format!(
            "{} of group {} in {}: {} VMs, frozen within {}, and all of them at once for {}; longest pause {}",
            report.id,
            report.name,
            report.store,
            report.members.len(),
            show_us(report.freeze_spread_us),
            show_us(report.together_us),
            show_us(report.longest_pause_us)
        ));
    }
}
