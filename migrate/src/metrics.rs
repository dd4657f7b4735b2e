//! Migrations in figures for a monitoring system, as [OpenMetrics](https://prometheus.io/docs/specs/om/open_metrics_spec/).
//!
//! ```text
//! boards of running migrations ─▶ fleet ─▶ exposition ─▶ HTTP server at /metrics
//! ```
//!
//! Nothing is kept up to date for a scrape that may never come: it looks at the boards when it is made.

mod fleet;
mod exposition;
mod server;

pub use fleet::{Entry, Fleet};
pub use server::Server;
