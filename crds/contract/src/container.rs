//! A container of the user's that carries out a stage: what it is, and what it and the shim around it say to each other.
//!
//! The shim (`runtime-image/shim`) starts it inside of its own image, so that no image needs to know how a result is hashed
//! and published. Between the two there are environment variables, folders and one file; docs/stage-contract.md is the page
//! for authors of images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{CONFIG_ENV, FailureReason, Uri};

/// Environment variable with the folder whose files become the artifact.
pub const OUTPUT_ENV: &str = "STRATA_OUTPUT_DIR";
/// Environment variable with a folder that all attempts of a run share, for checkpoints.
pub const STATE_ENV: &str = "STRATA_STATE_DIR";
/// Environment variable with the folder that holds each input under its name.
pub const INPUTS_ENV: &str = "STRATA_INPUTS_DIR";
/// Environment variable with the path of the file that says what came out: a [`StageResult`].
pub const RESULT_ENV: &str = "STRATA_RESULT_FILE";
/// Environment variable with the path of the file that says how far the work is: a [`crate::Progress`].
pub const PROGRESS_ENV: &str = "STRATA_PROGRESS_FILE";
/// Environment variable with the number of this node among those of an attempt, from 0.
pub const NODE_RANK_ENV: &str = "STRATA_NODE_RANK";
/// Environment variable with the number of nodes of an attempt.
pub const NODE_COUNT_ENV: &str = "STRATA_NODE_COUNT";
/// Environment variable with the name of node 0, which the others find each other by.
pub const COORDINATOR_ENV: &str = "STRATA_COORDINATOR_ADDRESS";
/// Environment variable of a serving container: the folder or file of the model.
pub const MODEL_PATH_ENV: &str = "STRATA_MODEL_PATH";
/// Environment variable of a serving container: the digest of the model, where it is an artifact.
pub const MODEL_DIGEST_ENV: &str = "STRATA_MODEL_DIGEST";
/// Environment variable of a serving container: the name that clients call the model by.
pub const MODEL_NAME_ENV: &str = "STRATA_MODEL_NAME";
/// Environment variable of a serving container: the port to answer on.
pub const PORT_ENV: &str = "STRATA_PORT";

/// Folder of a pod where the shim is, put there from Strata's own image.
pub const SHIM_DIR: &str = "/strata/shim";
/// Name of the shim, in Strata's image and in [`SHIM_DIR`].
pub const SHIM: &str = "strata-shim";
/// Name of the dynamic loader in [`SHIM_DIR`], which starts the shim whatever the image has.
pub const SHIM_LOADER: &str = "ld.so";
/// Folder of a pod where the shim puts the link to the model that is served.
pub const MODEL_DIR: &str = "/strata/model";
/// Folder of a pod where the shim puts links to the inputs, and where the container leaves its result.
pub const EXCHANGE_DIR: &str = "/strata/exchange";

/// A container that carries out a stage. All of it determines the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StageContainer {
    /// The image.
    pub image: String,
    /// The program and its first arguments.
    pub command: Vec<String>,
    /// More arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Variables that determine the result.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// What a container leaves in the file that [`RESULT_ENV`] names; every field may be absent, and so may the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageResult {
    /// One sentence for a person: shown in the resource's condition.
    #[serde(default)]
    pub message: Option<String>,
    /// Figures of the result by name; the gates judge these.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Facts a user should know about the result's origin.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
    /// Why it failed, where the exit status is not 0.
    #[serde(default)]
    pub failure: Option<FailureReason>,
    /// Step of the checkpoint that this attempt went on from.
    #[serde(default)]
    pub resumed_from_step: Option<u64>,
}

/// Every variable of a stage's container, with what it says; the docs are checked against it.
pub const STAGE_VARIABLES: [&str; 9] = [
    CONFIG_ENV,
    INPUTS_ENV,
    OUTPUT_ENV,
    STATE_ENV,
    RESULT_ENV,
    PROGRESS_ENV,
    NODE_RANK_ENV,
    NODE_COUNT_ENV,
    COORDINATOR_ENV,
];

/// Where a stage's container finds and leaves what: variable and path, given the folder of the volumes, the folder that
/// shim and container share, the run's folder and the id of the attempt.
pub fn stage_paths(volumes: &Path, exchange: &Path, output: &Uri, attempt_id: &str) -> [(&'static str, PathBuf); 5] {
    let run = output.local_path(volumes);
    [
        (INPUTS_ENV, exchange.join("inputs")),
        (OUTPUT_ENV, run.join("attempts").join(attempt_id).join("content")),
        (STATE_ENV, run.join("state")),
        (RESULT_ENV, exchange.join("result.json")),
        (PROGRESS_ENV, exchange.join("progress.json")),
    ]
}
