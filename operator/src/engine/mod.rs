//! The only code that talks to the API server: `CR → gather → check → plan → apply → report → status`.

pub mod apply;
pub mod ask;
pub mod backoff;
pub mod cache;
pub mod events;
pub mod gather;
pub mod guard;
pub mod index;
pub mod jobsets;
pub mod kind;
pub mod kueue;
pub mod nodes;
pub mod progress;
pub mod provision;
pub mod queue;
pub mod reconcile;
pub mod same;
pub mod status;
pub mod watch;
pub mod work;

#[cfg(test)]
pub(crate) mod tests;
