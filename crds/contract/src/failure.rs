//! Why a stage failed: one word each, the same in the report, in the resource's condition, in Events and in docs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_RETRY};

/// Why a stage ended without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FailureReason {
    /// The configuration cannot be carried out as written.
    ConfigInvalid,
    /// A URI names nothing.
    InputNotFound,
    /// An input is there but cannot be read: no permission, or an I/O error.
    InputUnreadable,
    /// An input is damaged: truncated, wrong checksum, not the format it claims.
    InputCorrupt,
    /// A model's architecture or weight format is not one that the engine knows.
    ArchitectureUnsupported,
    /// Curation dropped everything: nothing is left to publish.
    NothingLeft,
    /// A gate said no; the result was kept beside the artifact store's published ones, not published.
    GateFailed,
    /// The output volume is full.
    StorageFull,
    /// The output volume refuses writes for another reason than being full.
    StorageUnwritable,
    /// Training diverged: the loss is not a number.
    Diverged,
    /// Every checkpoint of the run is damaged.
    CheckpointCorrupt,
    /// The stage was asked to stop and saved its work.
    Interrupted,
    /// Anything else: a defect of ours or a passing fault.
    #[serde(other)]
    Internal,
}

impl FailureReason {
    /// Every reason, in the order of the docs.
    pub const ALL: [Self; 13] = [
        Self::ConfigInvalid,
        Self::InputNotFound,
        Self::InputUnreadable,
        Self::InputCorrupt,
        Self::ArchitectureUnsupported,
        Self::NothingLeft,
        Self::GateFailed,
        Self::StorageFull,
        Self::StorageUnwritable,
        Self::Diverged,
        Self::CheckpointCorrupt,
        Self::Interrupted,
        Self::Internal,
    ];

    /// The process's exit status for this reason.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Interrupted => EXIT_INTERRUPTED,
            // Whatever puts the data there may still be at it.
            Self::Internal
            | Self::InputNotFound
            | Self::InputUnreadable
            | Self::StorageFull
            | Self::StorageUnwritable => EXIT_RETRY,
            _ => EXIT_BAD_INPUT,
        }
    }

    /// What a person does about it; one sentence, shown in the condition's message and in the docs.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::ConfigInvalid => "Change the spec as the message says.",
            Self::InputNotFound => {
                "Put the data there, or correct the URI; when no attempt is left, raise spec.retries."
            }
            Self::InputUnreadable => {
                "Check the volume and the permissions of the data for user 65532; when no attempt is left, raise spec.retries."
            }
            Self::InputCorrupt => "Replace the damaged file, then raise spec.runGeneration.",
            Self::ArchitectureUnsupported => "Use a model of a family that the message names.",
            Self::NothingLeft => {
                "Relax spec.curate where the report shows what dropped the documents, or add data and raise spec.runGeneration."
            }
            Self::GateFailed => {
                "Improve data or training, or move the gate; the result is kept in the attempt's folder."
            }
            Self::StorageFull => {
                "Free space on the volume or give it more; the next attempt goes on from what was saved. When none is left, raise spec.retries."
            }
            Self::StorageUnwritable => {
                "Check that the volume is mounted read-write for user 65532; when no attempt is left, raise spec.retries."
            }
            Self::Diverged => "Lower the learning rate, then apply the changed spec.",
            Self::CheckpointCorrupt => "Raise spec.runGeneration to start anew; what is damaged stays where it is.",
            Self::Interrupted => {
                "Nothing: the next attempt starts by itself, from the last checkpoint where the stage has any."
            }
            Self::Internal => "Read the stage's log; if it repeats, report it with that log.",
        }
    }
}
