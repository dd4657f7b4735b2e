//! The directories of a store: where things lie, and what of it is durable.

use super::super::{ObjectInfo, name};
use super::is_missing;
use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, Metadata};
use std::io::Result;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// Mode of a store's directory that we make: what is in it was in the memory of guests.
const ROOT_MODE: u32 = 0o700;

/// The directory of a store.
pub(super) struct Root {
    path: PathBuf,
    place: String,
    /// Directories, relative to the root, whose entries in those above them are known to be durable.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Root {
    pub(super) fn new(path: &Path) -> Self {
        let place = path.display().to_string();
        Self { path: path.to_owned(), place, durable: Mutex::default() }
    }

    /// What an operator calls it.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Where an object or a leftover lies whose name was checked.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes the directory of a store, if there is none, and the one below it for unfinished objects. Answers the mode of new files:
    /// whoever may read the directory may read what is in it.
    pub(super) fn make(&self) -> Result<u32> {
        if !self.path.is_dir() {
            DirBuilder::new().recursive(true).mode(ROOT_MODE).create(&self.path)?;
            // It may have made those above, too. Which, is not known: all of them are made durable as far as they can be opened.
            let absolute = fs::canonicalize(&self.path)?;
            absolute
                .ancestors()
                .skip(1)
                .filter_map(|above| File::open(above).ok())
                .try_for_each(|above| above.sync_all())?;
        }
        let mode = self.mode()?;
        self.make_below(Path::new(name::TEMPORARY), mode)?;
        Ok(mode & 0o666)
    }

    fn mode(&self) -> Result<u32> {
        Ok(fs::metadata(&self.path)?.permissions().mode() & 0o777)
    }

    fn make_below(&self, relative: &Path, mode: u32) -> Result<()> {
        DirBuilder::new().recursive(true).mode(mode).create(self.path.join(relative))
    }

    /// Makes the directory in which this object is to lie.
    pub(super) fn make_parent(&self, name: &str) -> Result<()> {
        match Path::new(name).parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.make_below(parent, self.mode()?),
            _ => Ok(()),
        }
    }

    /// Makes the entry of an object durable, and those of all directories above it.
    pub(super) fn settle(&self, name: &str) -> Result<()> {
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entry = Path::new(name);
        while let Some(above) = entry.parent().filter(|_| !durable.contains(entry)) {
            File::open(self.path.join(above))?.sync_all()?;
            if entry != Path::new(name) {
                durable.insert(entry.to_owned());
            }
            entry = above;
        }
        Ok(())
    }

    /// Removes an object or a leftover durably, and the directories above it that it leaves empty; it is no error if there is none.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.path(name)) {
            Ok(()) => {}
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut kept = Path::new(name).parent();
        // Only directories two levels down belong to something that ends, such as `data/ID`.
        while let Some(parent) = kept.filter(|parent| parent.components().count() > 1) {
            let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
            // One that is not empty, or was removed meanwhile, stays as it is.
            if fs::remove_dir(self.path.join(parent)).is_err() {
                break;
            }
            durable.remove(parent);
            kept = parent.parent();
        }
        match File::open(self.path.join(kept.unwrap_or(Path::new("")))) {
            Ok(directory) => directory.sync_all(),
            // Somebody else removed the last object in it, and made that durable.
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The objects whose names begin so, in the order of their names.
    pub(super) fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let (directory, _) = prefix.rsplit_once('/').unwrap_or_default();
        let mut found = Vec::new();
        let mut open = vec![directory.to_owned()];
        while let Some(directory) = open.pop() {
            self.each(&directory, |name, metadata| {
                if metadata.is_dir() && name.starts_with(prefix) {
                    open.push(name);
                } else if metadata.is_file() && name.starts_with(prefix) && name::check(&name).is_ok() {
                    found.push(info(name, metadata));
                }
            })?;
        }
        found.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// What lies among the unfinished objects.
    pub(super) fn list_leftovers(&self) -> Result<Vec<ObjectInfo>> {
        let mut found = Vec::new();
        self.each(name::TEMPORARY, |name, metadata| {
            if metadata.is_file() && name::check_leftover(&name).is_ok() {
                found.push(info(name, metadata));
            }
        })?;
        found.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// Calls with the name and the metadata of everything in a directory; what goes away meanwhile, or has no name that an object could
    /// have, is left out.
    fn each(&self, directory: &str, mut call: impl FnMut(String, &Metadata)) -> Result<()> {
        let entries = match fs::read_dir(self.path.join(directory)) {
            Err(error) if is_missing(&error) => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Ok(own) = entry.file_name().into_string() else { continue };
            let name = if directory.is_empty() { own } else { format!("{directory}/{own}") };
            let whole_name = name::check_prefix(&name).is_ok();
            match entry.metadata() {
                Ok(metadata) if whole_name => call(name, &metadata),
                Ok(_) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn info(name: String, metadata: &Metadata) -> ObjectInfo {
    ObjectInfo { name, bytes: metadata.len(), written: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH) }
}
