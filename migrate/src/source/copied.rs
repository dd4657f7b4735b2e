//! Which of a VM's disks go with it.

use crate::error::{Error, Result};
use std::path::Path;
use vmm::devices::virtio::Description;
use vmm::state::Machine;

/// The disks whose images are spaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Copied {
    /// None: both ends see the same images.
    None,
    /// All that the guest may write.
    All,
    /// These of them, by the paths of their images, or by what those end with.
    These(Vec<String>),
}

impl Copied {
    /// Their images, as the machine of the VM of this name has them.
    ///
    /// # Errors
    /// `Usage` for one that is not there, or is never written, with those that are; `Workload` for a machine that is not understood.
    pub(crate) fn of(&self, vm: &str, machine: &[u8]) -> Result<Vec<String>> {
        if *self == Self::None {
            return Ok(Vec::new());
        }
        let (_, devices) = Machine::decode(machine)?;
        let writable: Vec<&str> = devices.iter().filter_map(Description::writable_disk).collect();
        let Self::These(names) = self else { return Ok(writable.into_iter().map(str::to_owned).collect()) };
        let found = names.iter().map(|name| {
            let is_it = |path: &str| path == name || Path::new(path).ends_with(name);
            let mut fitting = writable.iter().filter(|path| is_it(path));
            match (fitting.next(), fitting.next()) {
                (Some(path), None) => Ok((*path).to_owned()),
                (Some(_), Some(_)) => {
                    Err(Error::Usage(format!("{vm} has several disks {name}: give the whole path of one")))
                }
                (None, _) => Err(Error::Usage(format!(
                    "{vm} has no disk {name} that it writes; those that it writes: {}",
                    if writable.is_empty() { "none".into() } else { writable.join(", ") }
                ))),
            }
        });
        found.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(names: &[&str]) -> Copied {
        Copied::These(names.iter().map(|name| (*name).into()).collect())
    }

    #[test]
    fn disks_are_found_by_what_their_paths_end_with() {
        let disk = |path: &str, readonly| Description::Block {
            path: path.into(),
            readonly,
            sectors: 8,
            features: 0,
        };
        let machine = Machine { vcpus: 1, tsc_khz: 1, xsave_words: 1024, cpuid: Vec::new() };
        let devices =
            [disk("/a/root", false), disk("/b/data", false), disk("/c/data", false), disk("/d/iso", true)];
        let machine = machine.encode(&devices).unwrap();
        let of = |copied: &Copied| copied.of("web", &machine);
        assert_eq!(of(&Copied::None).unwrap(), Vec::<String>::new());
        assert_eq!(of(&Copied::All).unwrap(), ["/a/root", "/b/data", "/c/data"]);
        assert_eq!(of(&these(&["root", "c/data"])).unwrap(), ["/a/root", "/c/data"]);
        assert!(of(&these(&["data"])).unwrap_err().to_string().contains("several"));
        for wrong in ["iso", "oot", "/a"] {
            let error = of(&these(&[wrong])).unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains("/a/root, /b/data"), "{error}");
        }
    }
}
