//! A look into a running guest's memory from outside, past its control socket.

use ledger::Stats;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Where memory above the hole below 4 GiB begins, in QEMU's memory file: its microvm machine has 3 GiB below it
/// (hw/i386/microvm.c).
const LOW_BYTES: u64 = 3 << 30;

/// The first memfd of a VMM: guest memory from address 0 to 3 GiB, where the ledger keeps its stats; in QEMU all of it.
pub struct Window {
    memory: File,
}

impl Window {
    /// Opens the memory of the VMM with this process id, through its open files.
    pub fn open(vmm_pid: i32) -> Option<Self> {
        let mut descriptors: Vec<_> = std::fs::read_dir(format!("/proc/{vmm_pid}/fd"))
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:")))
            .collect();
        // Descriptors are numbered in the order in which the spaces were made.
        descriptors.sort_by_key(|path| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()));
        let memory = File::options().read(true).write(true).open(descriptors.first()?).ok()?;
        Some(Self { memory })
    }

    /// The ledger's account of itself, if one is there yet. Each field is whole, but they may be of different moments.
    pub fn stats(&self) -> Option<Stats> {
        Stats::read(|gpa, buffer: &mut [u8]| self.memory.read_exact_at(buffer, gpa)).ok()
    }

    /// Changes a byte of the last page, as a broken host would.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn damage_last_page(&self) {
        let end = self.memory.metadata().expect("its length").len();
        let mut byte = [0];
        self.memory.read_exact_at(&mut byte, end - 1).expect("its last byte");
        self.memory.write_all_at(&[!byte[0]], end - 1).expect("a memfd that can be written");
    }

    /// Computes what every page of a guest in QEMU must hold and compares; the guest must stand still.
    ///
    /// # Errors
    /// What is wrong with it, also by its own account.
    pub fn verify(&self) -> Result<(), String> {
        let read = |gpa: u64, buffer: &mut [u8]| {
            let above = gpa.checked_sub(4 << 30).map(|above| above + LOW_BYTES);
            self.memory.read_exact_at(buffer, above.unwrap_or(gpa))
        };
        let stats = Stats::read(read).map_err(|error| error.to_string())?;
        if stats.error_count() != 0 {
            return Err(format!("it found {} errors: {:?}", stats.error_count(), stats.first_errors));
        }
        let verdict = ledger::verify(&stats, read).map_err(|error| error.to_string())?;
        if verdict.is_sound() { Ok(()) } else { Err(verdict.to_string()) }
    }
}
