//! What every stage stands on: the context it runs in and the error it ends with.
//!
//! A stage is a function `run(&Config, &StageContext) -> Result<Report, StageError>`; it knows neither Kubernetes nor
//! HTTP nor signals. The `cli` crate builds the context, serves its progress and turns the result into an exit status.

mod context;
mod error;

pub use context::{Interrupt, ProgressHandle, StageContext};
pub use error::StageError;
