//! The fault matrix: who or what fails × when × how, over real processes and guests, on two hosts that are network
//! namespaces. After every case exactly one VM runs, or is got back by `migrate recover` and then runs, and its ledger
//! is sound.
//!
//! ```text
//! case ─▶ (queue) ─▶ scene ─▶ fault ─▶ verdict
//! a table,           two hosts,        recover, count,
//! then a seed        a migration       verify
//! ```

mod case;
mod table;
mod queue;
mod scene;
mod fault;
mod verdict;

pub use case::Case;
pub use queue::{Plan, run};
pub use table::cases;
