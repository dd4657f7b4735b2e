//! What keeps a store in order: finding damage, collecting what nothing reaches, and copying to another store.
//!
//! Each makes a plan from what is listed, and then acts, in an order in which it may be killed anywhere.

pub mod verify;
pub mod collect;
pub mod copy;
