//! Which of a VM's disks go with it, as an operator says it.

use crate::source::Copied;

/// The disks that go along.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct DiskArgs {
    /// Let the images of the VM's disks go with it: of all that it writes, or of those that are named; they are new files in the
    /// first folder that migrate receive allows with --disks. The others must be there. May be given several times. Not together
    /// with --post-copy.
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true, default_missing_value = "", conflicts_with = "post_copy")]
    copy_disk: Vec<String>,
}

impl DiskArgs {
    /// As the engine wants it.
    pub(super) fn copied(&self) -> Copied {
        match self.copy_disk.as_slice() {
            [] => Copied::None,
            names if names.iter().any(String::is_empty) => Copied::All,
            names => Copied::These(names.to_vec()),
        }
    }
}
