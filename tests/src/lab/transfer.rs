//! Files into a host and out of it.

use super::access::{HostAccess, Lab, Order};
use super::{Context as _, Result};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes standard input to a file, or into a directory that is there, under a name.
const RECEIVE_FILE: &str =
    r#"to=$1; [ ! -d "$to" ] || to=$to/$2; cat >"$to.new" && chmod "$3" "$to.new" && mv "$to.new" "$to""#;

impl Lab {
    /// Puts a file or a directory into a host. A directory comes to lie in `to`, under its own name.
    ///
    /// # Errors
    /// If it is not there, or the host cannot take it.
    pub fn put(&self, host: &HostAccess, from: &Path, to: &str) -> Result<()> {
        let about = from.metadata().context(|| from.display().to_string())?;
        let (folder, name) = parts(from)?;
        if about.is_dir() {
            let mut tar = Command::new("tar");
            tar.arg("-C").arg(folder).arg("-c").arg(&name).stdin(Stdio::null()).stdout(Stdio::piped());
            let mut tar = tar.spawn().context(|| "tar".into())?;
            let archive = tar.stdout.take().ok_or("tar has no output")?;
            self.feed(host, &["tar", "-x", "-C", to], archive)?;
            let status = tar.wait().context(|| "tar".into())?;
            return if status.success() {
                Ok(())
            } else {
                Err(format!("tar of {}: {status}", from.display()))
            };
        }
        let mode = format!("{:o}", about.permissions().mode() & 0o777);
        let file = File::open(from).context(|| from.display().to_string())?;
        self.feed(host, &["sh", "-c", RECEIVE_FILE, "put", to, &name, &mode], file)
    }

    /// Gets a file or a directory out of a host, into the directory `to`.
    ///
    /// # Errors
    /// If it is not there, or cannot be written here.
    pub fn get(&self, host: &HostAccess, from: &str, to: &Path) -> Result<()> {
        let (folder, name) = parts(Path::new(from))?;
        let mut tar = Command::new("tar");
        tar.arg("-x").arg("-C").arg(to).stdin(Stdio::piped());
        let mut tar = tar.spawn().context(|| "tar".into())?;
        let mut archive = tar.stdin.take().ok_or("tar has no input")?;
        let mut said = Vec::new();
        let order = ["tar", "-c", "-C", &folder.to_string_lossy(), &name];
        let code = self.run(host, &Order::new(&order), std::io::empty(), &mut archive, &mut said);
        drop(archive);
        let status = tar.wait().context(|| "tar".into())?;
        match code? {
            0 if status.success() => Ok(()),
            0 => Err(format!("tar into {}: {status}", to.display())),
            _ => Err(format!("{from}: {}", String::from_utf8_lossy(&said).trim())),
        }
    }

    fn feed(&self, host: &HostAccess, command: &[&str], input: impl Read + Send + 'static) -> Result<()> {
        let mut said = Vec::new();
        match self.run(host, &Order::new(command), input, &mut std::io::sink(), &mut said)? {
            0 => Ok(()),
            code => Err(format!("{}: {} (exit {code})", host.name, String::from_utf8_lossy(&said).trim())),
        }
    }
}

/// The directory in which something lies, and its name.
fn parts(path: &Path) -> Result<(&Path, String)> {
    let name = path.file_name().ok_or_else(|| format!("{} has no name", path.display()))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    Ok((folder.unwrap_or(Path::new(".")), name.to_string_lossy().into_owned()))
}
