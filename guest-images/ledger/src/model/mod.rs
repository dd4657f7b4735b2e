//! What guest and host must agree on, bit for bit.
//!
//! The same source is compiled twice: into this library, and (by `#[path]`) into the guest image. So it is
//! `no_std`, uses nothing but `core`, holds no `unsafe`, and every function in it is pure.
//!
//! ```text
//! params ──> layout ──> pattern ──> page ──> stats
//! what to    where it   which page  what is  what the guest
//! do         lies       comes next  in it    says it did
//! ```

pub mod params;

pub mod layout;

pub mod pattern;

pub mod page;

pub mod stats;

pub mod mail;

pub mod disk;
