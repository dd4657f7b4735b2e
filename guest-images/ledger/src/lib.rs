//! The bare guest `ledger` and what a host needs to check on it.
pub mod model;
/// The guest image: an ELF file with a PVH entry.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ledger.elf"));
