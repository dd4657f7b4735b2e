//! The verbs of the command line, one a file.

pub mod bench_pipe;
pub mod keys;
