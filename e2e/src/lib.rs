//! A real cluster, the demo and the tests that run on it.
//!
//! [`bed`] brings a one-node Kubernetes up and down, [`image`] makes images without Docker. A test runs in
//! [`with_temp_ns`], waits with [`wait`] and counts what a user wrote with [`audit`].

pub mod argocd;
pub mod audit;
pub mod bed;
pub mod bench;
pub mod chats;
pub mod demo;
mod dump;
pub mod engines;
pub mod fleet;
pub mod image;
pub mod install;
pub mod namespace;
pub mod neighbours;
pub mod operator;
pub mod prometheus;
pub mod repository;
pub mod run;
pub mod small;
pub mod strata;
pub mod wait;

pub use namespace::{Context, with_temp_ns};
