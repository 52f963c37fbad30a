//! `Dataset`: raw sources to a published data set.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use strata_contract::{Packing, PiiAction, QualityPreset, QualityRule, Task};

use crate::common::{exactly_one, name_rule};
use crate::{Common, DataUri, Decimal, Gate, RunStatus};

/// Raw data, curated, split, encoded and published as one artifact.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "strata.dev",
    version = "v1alpha1",
    kind = "Dataset",
    doc = "Raw data, curated, split, encoded and published as one artifact.",
    namespaced,
    status = "RunStatus",
    derive = "PartialEq",
    shortname = "dset",
    category = "strata",
    validation = name_rule(),
    printcolumn(name = "Task", type_ = "string", json_path = ".spec.task"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(
        name = "Done",
        type_ = "integer",
        json_path = ".status.progress.percent",
        description = "Progress of the running attempt in percent"
    ),
    printcolumn(
        name = "Artifact",
        type_ = "string",
        json_path = ".status.artifact.digest",
        priority = "1"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.task != 'Preference' || self.sources.all(s, has(s.preferences))")
        .message("task Preference reads sources of type preferences only: write sources: [{ name: …, preferences: { uri: … } }]"),
    validation = Rule::new("self.task == 'Preference' || self.sources.all(s, !has(s.preferences))")
        .message("a source of type preferences needs task: Preference"),
    validation = Rule::new("self.task != 'Preference' || !has(self.encode)")
        .message("encode is for task Pretraining: preferences are tokenized by the model that is aligned"),
    validation = Rule::new("self.task != 'Preference' || !has(self.curate) || !has(self.curate.quality)")
        .message("curate.quality is for task Pretraining: its rules judge running text")
)]
pub struct DatasetSpec {
    /// What a record is.
    pub task: Task,
    /// Where the raw data comes from.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub sources: Vec<Source>,
    /// How it is cleaned; without, nothing is dropped or changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curate: Option<Curate>,
    /// What is held out for evaluation; without, nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// Tokenizer and token files; a PretrainJob needs them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encode: Option<Encode>,
    /// What the card that is published with the data says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card: Option<Card>,
    /// What the result must reach to be published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub gates: Vec<Gate>,
    /// By what it is made (default `embedded`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<crate::DatasetEngine>,
    /// What all kinds share.
    #[serde(flatten)]
    pub common: Common,
}

/// One source of raw data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["documents", "webCrawl", "preferences"]))]
pub struct Source {
    /// Name of the source; a column of the published records.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Licence of the data as an SPDX expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub license: Option<String>,
    /// Documents in files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Documents>,
    /// Pages in WARC files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_crawl: Option<Location>,
    /// Preference pairs in JSON lines: transcripts `\n\nHuman: …\n\nAssistant: …` in `chosen` and `rejected`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferences: Option<Location>,
}

/// Where files are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Location {
    /// The files; `*` stands for part of a name, `**` for any folders. `.gz` is read as such.
    pub uri: DataUri,
}

/// Documents in files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.splitBytes) || self.format == 'Text'").message("splitBytes is for format: Text"),
    validation = Rule::new("!has(self.textField) || self.format == 'Jsonl'").message("textField is for format: Jsonl")
)]
pub struct Documents {
    /// The files; `*` stands for part of a name, `**` for any folders. `.gz` is read as such.
    pub uri: DataUri,
    /// Format of the files.
    pub format: DocumentFormat,
    /// Text: a document ends at the first blank line after this many bytes; without, a file is one document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64, max = 5_242_880))]
    pub split_bytes: Option<i64>,
    /// Jsonl: the field that holds the text (default `text`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub text_field: Option<String>,
}

/// Format of document files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DocumentFormat {
    /// UTF-8 text.
    #[default]
    Text,
    /// JSON lines.
    Jsonl,
    /// HTML; the main text is extracted.
    Html,
}

/// How raw data is cleaned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Curate {
    /// Languages that are kept; without, all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["code"]))]
    pub languages: Vec<Language>,
    /// Quality filters; without, none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,
    /// Duplicates; without, all are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deduplicate: Option<Deduplicate>,
    /// What should not be in the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screen: Option<Screen>,
}

/// A language to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Language {
    /// ISO 639-1 code, such as `en`.
    #[schemars(length(min = 2, max = 3), regex(pattern = r"^[a-z]{2,3}$"))]
    pub code: String,
    /// Smallest confidence of the identification (default 65).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub min_confidence_percent: Option<i32>,
}

/// Quality filters: a published preset and what differs from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quality {
    /// The preset.
    pub preset: QualityPreset,
    /// Thresholds that differ from the preset's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["rule"]))]
    pub overrides: Vec<QualityOverride>,
}

/// A threshold that differs from the preset's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["threshold", "disabled"]))]
pub struct QualityOverride {
    /// The rule.
    pub rule: QualityRule,
    /// The threshold instead, in the rule's unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<Decimal>,
    /// True switches the rule off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = [true]))]
    pub disabled: Option<bool>,
}

/// Duplicates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Deduplicate {
    /// Drop documents whose normalized text was seen before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<bool>,
    /// Drop documents that are much like one seen before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_hash: Option<MinHash>,
}

/// Near duplicates by MinHash of word 5-grams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MinHash {
    /// Similarity from which a document counts as a duplicate.
    #[schemars(range(min = 50, max = 100))]
    pub similarity_percent: i32,
}

/// What should not be in the data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Screen {
    /// E-mail addresses, phone numbers and IP addresses (default Keep; they are counted in any case).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PiiAction")]
    pub pii: Option<PiiAction>,
}

/// What is held out for evaluation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Split {
    /// Share of the documents (preference pairs: of the first human turns) that is held out.
    #[schemars(range(min = 0, max = 50))]
    pub held_out_percent: i32,
    /// Seed of the split (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub seed: Option<i64>,
}

/// Tokenizer and token files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Encode {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// How documents become sequences.
    pub sequence: Sequence,
}

/// The tokenizer of a data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tokenizer {
    /// Train one on the kept text.
    pub train: TrainTokenizer,
}

/// A tokenizer that is trained on the kept text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainTokenizer {
    /// The algorithm.
    pub algorithm: TokenizerAlgorithm,
    /// Entries of the vocabulary, special tokens included.
    #[schemars(range(min = 300, max = 65535))]
    pub vocab_size: i32,
}

/// How a tokenizer is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TokenizerAlgorithm {
    /// Byte-level byte-pair encoding.
    #[default]
    BPE,
}

/// How documents become sequences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sequence {
    /// Length of a sequence in tokens.
    #[schemars(range(min = 16, max = 131072))]
    pub length_tokens: i32,
    /// How documents are packed (default BestFit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Packing")]
    pub packing: Option<Packing>,
}

/// What the card says beyond the figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Card {
    /// Heading (default: the resource's name).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub title: Option<String>,
    /// What the data is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub description: Option<String>,
    /// What it may be used for; shown first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub notice: Option<String>,
}
