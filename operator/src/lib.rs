//! The operator: one loop, four pure kinds.
//!
//! ```text
//! CR → gather → check → plan → apply → report → status
//! ```
//!
//! [`engine`] is the only code that talks to the API server. A kind's folder ([`dataset`], [`pretrain`],
//! [`alignment`], [`inference`]) and what all runs share ([`run`]) are pure functions; [`workload`] builds objects.

pub mod alignment;
pub mod autoscale;
pub mod dataset;
pub mod engine;
#[cfg(test)]
mod fixtures;
pub mod inference;
pub mod leader;
pub mod metrics;
pub mod placement;
pub mod pretrain;
pub mod run;
pub mod server;
pub mod workload;
