//! When to stop copying: the rules that decide behind every round.
//!
//! ```text
//! rounds ─▶ measure ─▶ forecast ─▶ stall ─▶ policy ─▶ decision
//!           (what was) (what a      (does it  (what the
//!                       freeze      still     operator
//!                       costs now)  fall?)    allows)
//! ```
//!
//! While a round of duration *T* is sent, the workload dirties pages; those are what remains. Freezing now costs
//!
//! ```text
//! downtime = fixed + overhead + remaining bytes / bandwidth
//! ```
//!
//! - *fixed*: stopping, saving, loading and starting, and the two round trips of the handshake.
//! - *bandwidth*: see [`measure`].
//! - *overhead*: what the last round took beyond its bytes: harvesting, waking threads, latency.
//!
//! As long as the downtime is over the budget there is no choice: another round, until what remains no longer falls
//! or the operator's bounds say otherwise. Within the budget it goes on only *while another round pays*. Rounds shrink
//! geometrically as long as the link is faster than the workload, until the fixed part outweighs the rest and no round
//! pays any more: an idle workload freezes after one or two rounds at little more than the fixed cost, a busy one goes
//! down to its floor instead of stopping as soon as it would just do.
//!
//! A workload that dirties faster than the link carries never gets there. [`stall`] finds that out, and
//! [`Limits::on_stall`] says what may be done about it, in which order: freeze at a local minimum, slow the workload
//! down, go to post-copy, or leave it where it is.
//!
//! Everything here is a pure function of recorded numbers, so a migration can be decided again from its trace.

mod micros;
pub mod measure;
pub mod forecast;
pub mod stall;
pub mod policy;
pub mod policies;
pub mod trace;
pub mod simulate;
pub mod fit;
#[cfg(test)]
mod compare;

pub use measure::{Measured, bandwidth_bytes_per_s};
pub use policy::{Bound, Decision, Limits, OnStall, OnTimeout, Situation, decide};
