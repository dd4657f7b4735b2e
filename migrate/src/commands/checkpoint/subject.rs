//! What is written down: a VM, or a container.

use super::Args;
use crate::commands::check_name;
use crate::commands::target::Target;
use crate::container::{Runtime, Wishes};
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::source::Source;
use crate::source::container::{ContainerSource, WatchPost};
use crate::source::vm::VmSource;
use crate::speed::Gauge;
use protocol::monitor::{Phase, Status};
use std::path::PathBuf;

/// One of them.
#[derive(Clone)]
pub(super) enum Subject {
    Vm(Target),
    Container(Container),
}

/// A container, and what one checkpoint leaves to the next.
#[derive(Clone)]
pub(super) struct Container {
    id: String,
    runtime: Runtime,
    runtime_dir: RuntimeDir,
    program: PathBuf,
    wishes: Wishes,
    post: WatchPost,
}

impl Subject {
    /// The one that an operator names.
    pub(super) fn find(args: &Args, runtime_dir: &RuntimeDir, name: &str) -> Result<Self> {
        if !args.container {
            return Ok(Self::Vm(Target::find(runtime_dir, name)?));
        }
        check_name(name)?;
        let program = std::env::current_exe()
            .map_err(|error| Error::Host(format!("this program's own path is not known: {error}")))?;
        Ok(Self::Container(Container {
            id: name.into(),
            runtime: args.runtime.runtime()?,
            runtime_dir: runtime_dir.clone(),
            program,
            wishes: args.wishes.wishes(),
            post: WatchPost::default(),
        }))
    }

    /// That it can be written down now. Answers its name.
    pub(super) fn check(&self) -> Result<String> {
        match self {
            Self::Vm(target) => {
                let status = target.status()?;
                check_writable(&status)?;
                Ok(status.name)
            }
            Self::Container(container) => Ok(container.id.clone()),
        }
    }

    /// Its memory in bytes.
    pub(super) fn memory_bytes(&self) -> Result<u64> {
        match self {
            Self::Vm(target) => Ok(target.status()?.memory_bytes),
            Self::Container(container) => Ok(container.source()?.workload().layout.memory_bytes()),
        }
    }

    /// Takes hold of it; and a look at how fast it is, if it says so itself.
    pub(super) fn open(&self) -> Result<(Box<dyn Source>, Option<Gauge>)> {
        match self {
            Self::Vm(target) => {
                let source = VmSource::checkpoint(&target.status()?.name, target.socket())?;
                let gauge = source.gauge();
                Ok((Box::new(source), gauge))
            }
            Self::Container(container) => Ok((Box::new(container.source()?), None)),
        }
    }
}

impl Container {
    fn source(&self) -> Result<ContainerSource> {
        let Self { id, runtime, runtime_dir, program, wishes, post } = self;
        ContainerSource::connect(id, runtime, runtime_dir, program, "", *wishes, Some(post))
    }
}

/// That a VM can be written down.
fn check_writable(status: &Status) -> Result<()> {
    if status.phase == Phase::Pledged {
        return Err(Error::Workload(format!(
            "{} stands still because the outcome of a migration is not known: settle it with migrate recover {0}",
            status.name
        )));
    }
    if let Some(pages) = status.awaiting_pages {
        return Err(Error::Workload(format!(
            "{} cannot be written down yet: it misses {pages} pages; migrate vm show tells when none is missing. If nothing arrives: {}",
            status.name,
            crate::commands::how_they_come(&status.name)
        )));
    }
    Ok(())
}
