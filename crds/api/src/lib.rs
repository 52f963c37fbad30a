//! The four kinds of `strata.dev/v1alpha1`, which are the whole interface of Strata.
//!
//! These types read leniently (an older operator reads newer objects). What a user may write is bounded by the CRD's
//! schema and its CEL rules, made from these types by [`crds`]; what the types cannot say, the operator's `check` does.

#![allow(
    clippy::duplicated_attributes,
    reason = "printer columns each have a type_, which the lint takes for a repetition"
)]

mod alignment_job;
mod autoscale;
mod common;
mod condition;
mod crd;
mod dataset;
mod engine;
mod hardware;
mod inference_service;
mod pretrain_job;
mod serving;
mod status;

pub use alignment_job::*;
pub use autoscale::*;
pub use common::*;
pub use condition::*;
pub use crd::{CRD_LIMIT_BYTES, crds, to_yaml};
pub use dataset::*;
pub use engine::*;
pub use hardware::*;
pub use inference_service::*;
pub use pretrain_job::*;
pub use serving::*;
pub use status::*;

/// API group of the four kinds.
pub const GROUP: &str = "strata.dev";
/// Their version.
pub const VERSION: &str = "v1alpha1";
