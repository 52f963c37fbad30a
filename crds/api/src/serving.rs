//! What serving pods load beside the model: LoRA adapters, and what guesses tokens ahead.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::exactly_one;
use crate::{DataUri, ModelSource, Reference};

/// A LoRA adapter, served beside the model under a name of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["alignmentJob", "uri"]))]
pub struct ServedAdapter {
    /// The `model` of requests that want it.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-zA-Z0-9]([-._a-zA-Z0-9]*[a-zA-Z0-9])?$")
    )]
    pub name: String,
    /// The adapter that an AlignmentJob published. Its base should be the model that is served here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_job: Option<Reference>,
    /// A folder that PEFT wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<DataUri>,
}

/// Tokens are guessed, and several are checked in one step. Answers stay the same to the bit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["ngram", "draftModel"]))]
pub struct Speculation {
    /// What followed the last tokens the last time that they stood in the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ngram: Option<NgramSpeculation>,
    /// What a smaller model with the same tokens says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft_model: Option<DraftModelSpeculation>,
}

/// Guesses from the text itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.minLookupTokens) ? self.minLookupTokens : 2) <= (has(self.maxLookupTokens) ? self.maxLookupTokens : 4)")
        .message("minLookupTokens (default 2) must not be above maxLookupTokens (default 4): raise maxLookupTokens, or lower the other")
)]
pub struct NgramSpeculation {
    /// Tokens guessed at once (default 4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub draft_tokens: Option<i32>,
    /// The longest end of the text that is looked for (default 4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 32))]
    pub max_lookup_tokens: Option<i32>,
    /// The shortest one (default 2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 32))]
    pub min_lookup_tokens: Option<i32>,
}

/// Guesses of a smaller model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DraftModelSpeculation {
    /// The smaller model, as it was published: of the same tokenizer, and for sequences as long.
    pub model: ModelSource,
    /// Tokens guessed at once (default 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub draft_tokens: Option<i32>,
}
