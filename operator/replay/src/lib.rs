//! What a scaling policy would do with a recorded load: a model of a fleet, driven by a request trace, asks the policy at the
//! operator's pace with what the operator would scrape.
//!
//! ```text
//! trace ──▶ router ──▶ server (continuous batching, KV-cache) ──▶ latencies, accelerator-hours
//!                        │ Load, as it would be scraped      ▲
//!                        └──────────▶ scaler ────────────────┘ replicas, after a cold start
//! ```
//!
//! It is deterministic: the same trace and settings give the same outcome, bit for bit.

pub mod calibration;
pub mod engine;
pub mod fleet;
pub mod observe;
pub mod rivals;
pub mod scaler;
pub mod trace;

#[cfg(test)]
mod tests;
