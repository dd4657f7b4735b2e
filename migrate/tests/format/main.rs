//! Stores of the past are read as long as the format has this version: by the reader that was written from the document alone.
//!
//! `golden/` was written once, by `BLESS=1 cargo test -p migrate --lib golden`: a full checkpoint and a delta on it, open and sealed, and
//! beside them the memory that the delta was taken of.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod reader;

use reader::Reader;
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints")
}

#[test]
fn the_golden_stores_are_read_by_a_reader_of_the_document() {
    let memory = std::fs::read(golden().join("memory.raw")).unwrap();
    for (folder, key) in [("open", None), ("sealed", Some([7; 32]))] {
        let reader = Reader::open(&golden().join(folder), key).unwrap();
        let checkpoint = reader.restore("20261123T194931Z-00000001").unwrap();
        assert!(checkpoint.spaces.concat() == memory, "{folder}");
        assert_eq!(checkpoint.machine, b"machine");
        assert_eq!(checkpoint.state, b"20261123T194931Z-00000001");
        assert!(reader.restore("20261123T194931Z-00000002").is_err());
    }
    assert!(Reader::open(&golden().join("sealed"), Some([8; 32])).is_err());
    assert!(Reader::open(&golden().join("sealed"), None).is_err());
}
