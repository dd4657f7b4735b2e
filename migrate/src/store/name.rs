//! What an object may be called: names become paths and parts of URLs, so they are checked before they are used.

use crate::error::{Error, Result};

/// The longest name, in bytes: far more than any of `protocol::checkpoint::name`.
const MAX_BYTES: usize = 255;

/// Where unfinished objects lie in a directory.
pub(super) const TEMPORARY: &str = "tmp";

/// What says who writes.
pub(super) const LOCK: &str = "lock";

/// Checks the name of an object.
pub(super) fn check(name: &str) -> Result<()> {
    let reserved = matches!(name.split('/').next(), Some(TEMPORARY | LOCK));
    if is_relative(name) && !reserved && !name.ends_with('/') {
        return Ok(());
    }
    Err(Error::Store(format!("{name:?} cannot be an object's name")))
}

/// Checks what names are to begin with; nothing at all is allowed.
pub(super) fn check_prefix(prefix: &str) -> Result<()> {
    if prefix.is_empty() || is_relative(prefix) {
        return Ok(());
    }
    Err(Error::Store(format!("no object's name can begin with {prefix:?}")))
}

/// Checks the name of something that a crash left.
pub(super) fn check_leftover(name: &str) -> Result<()> {
    let own = name.strip_prefix(TEMPORARY).and_then(|rest| rest.strip_prefix('/'));
    if own.is_some_and(|own| is_relative(own) && !own.contains('/')) {
        return Ok(());
    }
    Err(Error::Store(format!("{name:?} is nothing that a crash left")))
}

/// Whether these are words with a slash between each and the next: letters, digits, dots, hyphens and underscores, no dot first.
fn is_relative(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let word = |word: &str| !word.is_empty() && !word.starts_with('.') && word.bytes().all(fits);
    name.len() <= MAX_BYTES && name.strip_suffix('/').unwrap_or(name).split('/').all(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::checkpoint::name::{self, CheckpointId};

    #[test]
    fn every_name_of_the_format_is_one_and_no_other_path_is() {
        let id = CheckpointId::new(1, 2);
        for name in [
            name::STORE.to_owned(),
            name::manifest(id),
            name::index(id),
            name::state(id),
            name::segment(id, u32::MAX),
            name::group(id),
            name::pruned(id),
            name::touched(id, u64::MAX),
            name::merged_index(id),
            name::merged_sums(id),
        ] {
            check(&name).unwrap();
        }
        for prefix in [
            name::CHECKPOINTS,
            name::DATA,
            name::GROUPS,
            name::MERGED,
            name::PRUNED,
            name::TOUCHED,
            "",
            "data/x",
        ] {
            check_prefix(prefix).unwrap();
        }
        for wrong in [
            "",
            "/",
            "/etc/passwd",
            "a/../b",
            "..",
            "a//b",
            ".hidden",
            "a/",
            "a b",
            "a\0",
            "ä",
            "lock",
            "tmp/x",
        ] {
            check(wrong).unwrap_err();
        }
        check(&"a".repeat(MAX_BYTES + 1)).unwrap_err();
        check_leftover("tmp/0123").unwrap();
        for wrong in ["tmp", "tmp/", "tmp/..", "tmp/a/b", "store.json", "tmpx/a"] {
            check_leftover(wrong).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_name_leads_out_of_the_store(name in "[a/.]{0,8}") {
            if check(&name).is_ok() {
                let normal = |part| matches!(part, std::path::Component::Normal(_));
                prop_assert!(std::path::Path::new(&name).components().all(normal));
            }
        }
    }
}
