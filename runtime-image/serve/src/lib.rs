//! The serving engine: scheduler, paged KV-cache, OpenAI API.
//!
//! ```text
//! http ──Submission──▶ engine ──▶ schedule (which tokens) ──▶ executor (logits) ──▶ sample ──Event──▶ http
//!                         └──────▶ disk (blocks that the cache has no room for)
//! ```
//! `schedule` is pure, `engine::executor` knows matrices and blocks but no requests, `http` knows requests but no tensors.

mod adapters;
mod args;
mod connections;
pub mod engine;
mod error;
mod http;
mod metrics;
mod reload;
pub mod schedule;
mod server;
mod tls;

pub use args::{ApiKey, CacheDtype, LoraModule, ServeArgs};
pub use engine::executor::Precision;
pub use engine::{ScoreError, Scorer, Speculation};
pub use error::ServeError;
pub use metrics::Metrics;
pub use server::{Server, terminated};
