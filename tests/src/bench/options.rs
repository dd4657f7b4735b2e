//! The command line of the benchmark.

use std::path::PathBuf;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program under test, by `MIGRATE_PROGRAM`.
    pub program: PathBuf,
    /// Against QEMU.
    pub peer: bool,
    /// Linux guests in a laboratory.
    pub lab: bool,
    /// How often.
    pub runs: u64,
    /// Cases, and parts of a comparison, whose name contains this.
    pub only: Option<String>,
    /// Two cases, one run: whether the benchmark itself works.
    pub quick: bool,
    /// The whole result on stdout, as one JSON object, instead of tables.
    pub json: bool,
    /// The whole result into this file.
    pub out: Option<PathBuf>,
    /// Where stores of checkpoints are made; else in the temporary directory.
    pub store: Option<PathBuf>,
}

impl Options {
    /// Reads a command line.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let program = std::env::var_os("MIGRATE_PROGRAM").ok_or("MIGRATE_PROGRAM must name the binary")?;
        let mut options = Self {
            program: program.into(),
            peer: false,
            lab: false,
            runs: 5,
            only: None,
            quick: false,
            json: false,
            out: None,
            store: None,
        };
        let mut runs = None;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--peer" => match value()?.as_str() {
                    "qemu" => options.peer = true,
                    other => return Err(format!("there is no peer {other}, only qemu")),
                },
                "--lab" => options.lab = true,
                "--runs" => runs = Some(value()?.parse().map_err(|_| "--runs takes a number")?),
                "--only" => options.only = Some(value()?),
                "--quick" => options.quick = true,
                "--json" => options.json = true,
                "--store" => options.store = Some(value()?.into()),
                "--out" => options.out = Some(value()?.into()),
                _ => return Err(format!("unknown option {argument}")),
            }
        }
        options.runs = runs.unwrap_or(if options.quick { 1 } else { options.runs });
        if options.runs == 0 {
            return Err("--runs takes at least 1".into());
        }
        Ok(options)
    }

    /// Whether the part of this name is wanted.
    pub(super) fn wants(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|only| name.contains(only))
    }
}
