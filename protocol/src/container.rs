//! What travels of a container beside its pages: where it comes from, and at which addresses of which processes its pages lie.
//!
//! A container's address spaces are sparse and change while it runs, and a layout is dense and does not. So the pages of each process
//! that there is when the offer is made are put one behind the other, in the order of their addresses, into a space; one more
//! space, the last, takes the pages that come later, in the order in which they come. The [`Placement`] says which page is where.
//!
//! The machine blob of an offer is a [state](crate::state) with the sections [`DESCRIPTION`] (JSON) and [`CONFIG`] (the OCI
//! `config.json`, as it is). The state of a container has the section [`PLACEMENT`], and one for every image file that CRIU wrote:
//! [`IMAGE`] and the file's name.
//!
//! Where the root file system travels, too, one more space takes what is in its files, and the machine blob and the state have the sections
//! [`FILES`] and [`FILES_PLACEMENT`]: what there was when the offer was made, and what there is at the end.

pub mod pagemap;
mod placement;
pub mod rpc;
pub mod timers;
pub mod tree;

pub use placement::{MAX_RUNS, Placement, Run};
pub use tree::Tree;

use crate::control::check_name;
use crate::error::{ProtocolError, Result};
use serde::{Deserialize, Serialize};

/// The section with the [`Description`].
pub const DESCRIPTION: &str = "container";

/// The section with the OCI configuration.
pub const CONFIG: &str = "config.json";

/// The section with the [`Placement`].
pub const PLACEMENT: &str = "placement";

/// The section with the [`Tree`] of files, packed by zstd.
pub const FILES: &str = "files";

/// The section with the [`Placement`] of what is in them, packed by zstd; a run's process is the number of a file.
pub const FILES_PLACEMENT: &str = "files/placement";

/// What the name of a section with an image file begins with.
pub const IMAGE: &str = "image/";

/// The version of all of these sections but one.
pub const SECTION_VERSION: u16 = 1;

/// The version of the [`Description`] of a container whose files travel, too: who knows only the first must not take it for one whose files are
/// there already.
pub const WITH_FILES_VERSION: u16 = 2;

/// What the options of an overlay begin with that say what attributes in the upper layer mean (overlayfs.rst of the kernel).
const OVERLAY_OPTIONS: [&str; 3] = ["redirect_dir=", "metacopy=", "userxattr"];

/// The most lower directories of an overlay: `OVL_MAX_STACK` (fs/overlayfs/super.c).
const MAX_LOWER: usize = 500;

/// The longest name of an image file in bytes.
const MAX_IMAGE_NAME: usize = 200;

/// What the destination needs to know before the first page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The container's id at the source.
    pub id: String,
    /// CRIU there, as `[major, minor, patch]`: an older one may not understand what it writes.
    pub criu: [u32; 3],
    /// The root file system there, an absolute path.
    pub root: String,
    /// Whether established TCP connections go with it: the destination must have their addresses.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tcp_established: bool,
    /// How its root file system travels; without it, it is at the destination already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<Files>,
}

/// How a root file system travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// The space with what is in its files, which is no memory.
    pub space: u16,
    /// The overlay whose upper layer they are; without it, they are all that there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

/// An overlay file system, without its upper layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Its lower directories there, absolute paths, the top first.
    pub lower: Vec<String>,
    /// Options of the mount that what lies in the upper layer depends on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Overlay {
    /// Whether an option of a mount says what attributes in the upper layer mean. All others are the destination's business.
    pub fn is_option(option: &str) -> bool {
        let is_plain = option.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_=".contains(&byte));
        is_plain && OVERLAY_OPTIONS.iter().any(|known| option.starts_with(known))
    }

    fn check(&self) -> std::result::Result<(), &'static str> {
        if !(1..=MAX_LOWER).contains(&self.lower.len())
            || !self.lower.iter().all(|path| path.starts_with('/'))
        {
            return Err("the container's overlay has no lower directories that could be");
        }
        match self.options.iter().all(|option| Self::is_option(option)) {
            true => Ok(()),
            false => Err("the container's overlay has options that are not known"),
        }
    }
}

impl Description {
    /// The section's body.
    pub fn encode(&self) -> Vec<u8> {
        // A struct of strings and numbers always can.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads the section's body.
    ///
    /// # Errors
    /// `Body` or `Name`, or `Layout` for a root that is no absolute path.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let description: Self = serde_json::from_slice(bytes)
            .map_err(|error| ProtocolError::Body { what: "container description", why: error.to_string() })?;
        check_name(&description.id)?;
        if !description.root.starts_with('/') {
            return Err(ProtocolError::Layout { why: "the container's root is no absolute path".into() });
        }
        if let Some(overlay) = description.files.as_ref().and_then(|files| files.overlay.as_ref()) {
            overlay.check().map_err(|why| ProtocolError::Layout { why: why.into() })?;
        }
        Ok(description)
    }
}

/// Checks the name of an image file from outside: it becomes a file in a directory, and nothing else.
///
/// # Errors
/// `Name`.
pub fn check_image_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let fits = (1..=MAX_IMAGE_NAME).contains(&name.len()) && name.bytes().all(allowed);
    if fits && !name.starts_with('.') {
        return Ok(());
    }
    Err(ProtocolError::Name { limit: MAX_IMAGE_NAME })
}

/// The process, by its number in the container, whose pagemap an image is: `pagemap-<process>.img`.
pub fn process_of_pagemap(name: &str) -> Option<u32> {
    name.strip_prefix("pagemap-")?.strip_suffix(".img")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_file_and_no_path() {
        for good in ["pagemap-1.img", "tmpfs-dev-41.tar.gz.img", "descriptors.json"] {
            check_image_name(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "../a", ".hidden", "a\0b", &"x".repeat(201)] {
            check_image_name(bad).unwrap_err();
        }
    }

    #[test]
    fn a_description_is_read_as_it_was_written() {
        let description = Description {
            id: "web".into(),
            criu: [4, 1, 1],
            root: "/srv/web".into(),
            tcp_established: false,
            files: None,
        };
        assert_eq!(Description::decode(&description.encode()).unwrap(), description);
        let over = |lower: &[&str], options: &[&str]| {
            let words = |words: &[&str]| words.iter().copied().map(str::to_owned).collect();
            let overlay = Overlay { lower: words(lower), options: words(options) };
            Description { files: Some(Files { space: 3, overlay: Some(overlay) }), ..description.clone() }
        };
        let with_files = over(&["/lower/2", "/lower/1"], &["redirect_dir=on", "metacopy=on", "userxattr"]);
        assert_eq!(Description::decode(&with_files.encode()).unwrap(), with_files);
        for bad in [
            over(&[], &[]),
            over(&["lower"], &[]),
            over(&["/lower"], &["upperdir=/etc"]),
            over(&["/lower"], &["metacopy=on,upperdir=/etc"]),
            Description { root: "srv".into(), ..description.clone() },
            Description { id: "../web".into(), ..description },
        ] {
            Description::decode(&bad.encode()).unwrap_err();
        }
        Description::decode(b"{").unwrap_err();
    }
}
