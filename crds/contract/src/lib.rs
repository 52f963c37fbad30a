//! What the operator hands a pod, and what the pod hands back.
//!
//! The operator writes one [`StageConfig`] per attempt into a ConfigMap; the pod answers with one [`Report`] in its
//! termination message and, when it succeeded, one [`Manifest`] in the artifact store. Both sides depend on this crate
//! and on nothing of each other. What the operator writes is read strictly (unknown fields are errors); what a pod
//! writes is read leniently, so that an older operator understands a newer pod.

mod config;
mod container;
mod evaluation;
mod failure;
mod manifest;
mod report;
mod uri;

pub use config::*;
pub use container::*;
pub use evaluation::*;
pub use failure::FailureReason;
pub use manifest::*;
pub use report::*;
pub use uri::{Uri, UriError};

/// Version of everything in this crate; a pod refuses a configuration of a newer one.
pub const CONTRACT_VERSION: u32 = 1;

/// Environment variable with the path of the configuration file.
pub const CONFIG_ENV: &str = "STRATA_CONFIG";
/// Environment variable with the attempt's unique id (in a cluster: the UID of its Job). Names the output folder.
pub const ATTEMPT_ENV: &str = "STRATA_ATTEMPT_ID";
/// Environment variable that overrides [`VOLUMES_DIR`], for runs outside of a cluster.
pub const VOLUMES_ENV: &str = "STRATA_VOLUMES";
/// Folder under which a pod finds every claim that a `pvc://CLAIM/…` URI of its configuration names.
pub const VOLUMES_DIR: &str = "/strata/volumes";
/// Path of the configuration file inside a pod.
pub const CONFIG_PATH: &str = "/strata/config/stage.json";
/// Port of a stage's `/metrics` and `/progress`.
pub const STAGE_PORT: u16 = 9090;
/// Port of the OpenAI API in a serving pod.
pub const SERVE_PORT: u16 = 8000;

/// Exit status of a stage: done, and the report says what was published.
pub const EXIT_DONE: i32 = 0;
/// Exit status of a stage: the input or a gate says no; running it again would end the same way.
pub const EXIT_BAD_INPUT: i32 = 64;
/// Exit status of a stage: something passing went wrong; counts against the retries.
pub const EXIT_RETRY: i32 = 70;
/// Exit status of a stage that was asked to stop and saved its work; does not count against the retries.
pub const EXIT_INTERRUPTED: i32 = 75;
