//! The laboratory: complete hosts with hardware virtualisation, on a machine that has none.
//!
//! ```text
//!  this machine                      a host: QEMU under software emulation, with nested SVM
//!  ┌────────────────────────┐        ┌───────────────────────────────────────┐
//!  │ lab run HOST -- CMD    │  TCP   │ lab agent ── CMD                      │
//!  │   access ◀─────────────┼────────┼──▶          migrate vm run ─ kvm-amd  │
//!  │                        │        │                                       │
//!  │ lab keep               │        │ eth0 control   eth1 10.78.0.N         │
//!  │   machine  switch ◀────┼────────┼──────────────────▶                    │
//!  └────────────────────────┘        └───────────────────────────────────────┘
//! ```
//!
//! Kernel, modules and busybox are Debian's ([`packages`]), packed together with our programs into an [`image`]. One process,
//! the [`keeper`], holds all machines of a laboratory and the [`switch`] between them, and whatever ends it ends them. What
//! runs in a host is started by its [`agent`] and ends when the program that asked for it goes away ([`access`]).

pub mod packages;
pub mod cpio;
pub mod image;
mod clock;
pub mod machine;
pub mod switch;
pub mod keeper;
pub mod wire;
pub mod agent;
pub mod access;
pub mod transfer;
pub mod load;

pub use access::Lab;

/// What went wrong, and what to do about it, in words.
pub type Result<T> = std::result::Result<T, String>;

/// Adds what was tried to what went wrong.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| format!("{}: {error}", what()))
    }
}
