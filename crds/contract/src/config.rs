//! The configuration of a stage, as the operator writes it and the pod reads it.
//!
//! A run's id is the hash of its stage's configuration as JSON. So a field that is added here is left out of the JSON where
//! it has its default (`skip_serializing_if`): otherwise every run there is would be computed again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ArtifactKind, Gate, StageContainer, Uri};

/// The configuration file of one attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StageConfig {
    /// [`crate::CONTRACT_VERSION`] of the writer.
    pub contract_version: u32,
    /// Whose run this is and where it publishes.
    pub run: Run,
    /// What to do.
    pub stage: Stage,
    /// The user's container that does it; absent: the stage of `strata-runtime`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<StageContainer>,
}

/// The run and the attempt that a configuration is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Run {
    /// Hash of everything that determines the result; the same id means the same result.
    pub id: String,
    /// Number of this attempt, from 1.
    pub attempt: u32,
    /// The resource that asked for it.
    pub resource: Resource,
    /// The run's folder: its manifest is published there; attempts write under `attempts/ATTEMPT_ID`.
    pub output: Uri,
}

/// A resource, by kind and name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// Kind, such as `Dataset`.
    pub kind: String,
    /// Namespace; empty outside of a cluster.
    #[serde(default)]
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Something that a stage reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Input {
    /// What it is to the stage: a source's or dataset's name, `base`, `model`, `capability`.
    pub name: String,
    /// Where it is: an artifact's run folder, or a file that no manifest describes.
    pub uri: Uri,
    /// Digest: of an artifact, handed in and verified; of a plain file (`sha256:HEX`), computed by the stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Size in bytes, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The resource that published it, where it is an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<Resource>,
}

/// One stage and its parameters.
#[allow(clippy::large_enum_variant, reason = "a process holds one of them")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// Raw sources to a published data set.
    Curate(CurateConfig),
    /// Token files to a model.
    Pretrain(PretrainConfig),
    /// A model and preferences to an aligned model.
    Align(AlignConfig),
    /// A model to the file that is served.
    Quantize(QuantizeConfig),
}

impl Stage {
    /// The subcommand of `strata-runtime` that carries it out.
    pub fn command(&self) -> &'static str {
        match self {
            Self::Curate(_) => "curate",
            Self::Pretrain(_) => "pretrain",
            Self::Align(_) => "align",
            Self::Quantize(_) => "quantize",
        }
    }

    /// What it publishes.
    pub fn artifact(&self) -> ArtifactKind {
        match self {
            Self::Curate(_) => ArtifactKind::Dataset,
            Self::Pretrain(_) | Self::Align(_) => ArtifactKind::Model,
            Self::Quantize(_) => ArtifactKind::QuantizedModel,
        }
    }

    /// What it reads from others. The sources of raw data are no inputs: they may hold wildcards.
    pub fn inputs(&self) -> Vec<&Input> {
        match self {
            Self::Curate(_) => Vec::new(),
            Self::Pretrain(config) => config.datasets.iter().collect(),
            Self::Align(config) => {
                let capability = config.evaluation.capability.iter();
                [&config.base]
                    .into_iter()
                    .chain(capability)
                    .chain(&config.datasets)
                    .collect()
            }
            Self::Quantize(config) => vec![&config.model],
        }
    }

    /// What its result must reach.
    pub fn gates(&self) -> &[Gate] {
        match self {
            Self::Curate(config) => &config.gates,
            Self::Pretrain(config) => &config.gates,
            Self::Align(config) => &config.gates,
            Self::Quantize(config) => &config.gates,
        }
    }
}

/// What a record of a data set is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// A document of running text, column `text`.
    Pretraining,
    /// A pair of conversations, columns `prompt`, `chosen`, `rejected` (lists of messages).
    Preference,
}

/// Parameters of the curate stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CurateConfig {
    /// What a record is.
    pub task: Task,
    /// Where the raw data comes from; names are unique.
    pub sources: Vec<Source>,
    /// Keep a document only if it is in one of these languages; empty keeps all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub languages: Vec<Language>,
    /// Quality filters; absent filters nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,
    /// Drop documents whose normalized text was seen before.
    pub deduplicate_exact: bool,
    /// Drop documents at least this similar (Jaccard of word 5-grams, estimated) to one kept before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_hash_similarity_percent: Option<u8>,
    /// What to do about personal data (e-mail addresses, phone numbers, IP addresses).
    pub pii: PiiAction,
    /// Share of records held out for evaluation. Split by document (preferences: by first human turn) before
    /// deduplication and tokenizer training, by a hash of the group and `seed`.
    pub held_out_percent: u8,
    /// Seed of the split.
    pub seed: u64,
    /// Tokenizer and token files; only for [`Task::Pretraining`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encode: Option<EncodeConfig>,
    /// What the data set's card says.
    pub card: Card,
    /// What the result must reach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Gate>,
}

/// One source of raw data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// Unique name; a column of the published records.
    pub name: String,
    /// SPDX licence expression, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// Where and in which format; a path may hold wildcards.
    pub uri: Uri,
    /// How it is read.
    pub format: SourceFormat,
}

/// How a source is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum SourceFormat {
    /// WARC (plain or gzip), HTTP responses with HTML: main text is extracted.
    WebCrawl,
    /// UTF-8 text: one document a file, or documents of about `split_bytes`, cut at blank lines only.
    Text {
        /// Size at which a document ends at the next blank line, in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        split_bytes: Option<u64>,
    },
    /// JSON lines; the text is in this field.
    Jsonl {
        /// Name of the field.
        text_field: String,
    },
    /// HTML files: main text is extracted.
    Html,
    /// JSON lines (plain or gzip) of transcripts `\n\nHuman: …\n\nAssistant: …` in fields `chosen` and `rejected`.
    PreferenceTranscripts,
}

/// A language to keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Language {
    /// ISO 639-1 code.
    pub code: String,
    /// Smallest confidence of the identification.
    pub min_confidence_percent: u8,
}

/// Which published set of quality filters is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QualityPreset {
    /// FineWeb's chain: Gopher repetition and quality, C4 without the terminal-punctuation rule, FineWeb's own.
    FineWeb,
    /// Gopher's repetition and quality rules.
    Gopher,
    /// C4's rules without the terminal-punctuation rule.
    C4,
}

/// Quality filters: a preset and what differs from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quality {
    /// The preset.
    pub preset: QualityPreset,
    /// Thresholds that differ from the preset's, by name; the stage knows the names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<QualityOverride>,
}

/// A threshold that differs from the preset's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QualityOverride {
    /// Name of the rule, such as `FineWebDuplicateLineCharacters`.
    pub rule: QualityRule,
    /// The threshold in the rule's unit; absent switches the rule off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

/// The quality rules by name; each drops a document (or, `C4ShortLine` and so on, a line) beyond its threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum QualityRule {
    /// Gopher: fewest words in a document (50).
    GopherMinWords,
    /// Gopher: most words in a document (100,000).
    GopherMaxWords,
    /// Gopher: smallest mean word length in characters (3).
    GopherMinMeanWordLength,
    /// Gopher: largest mean word length in characters (10).
    GopherMaxMeanWordLength,
    /// Gopher: most hash signs or ellipses per word (0.1).
    GopherSymbolWordRatio,
    /// Gopher: largest share of lines that start with a bullet (0.9).
    GopherBulletLines,
    /// Gopher: largest share of lines that end in an ellipsis (0.3).
    GopherEllipsisLines,
    /// Gopher: smallest share of words with a letter (0.8).
    GopherAlphabeticWords,
    /// Gopher: fewest different stop words (2).
    GopherStopWords,
    /// Gopher repetition: largest share of duplicate lines (0.30).
    GopherDuplicateLines,
    /// Gopher repetition: largest share of characters in duplicate lines (0.20).
    GopherDuplicateLineCharacters,
    /// Gopher repetition: largest share of duplicate paragraphs (0.30).
    GopherDuplicateParagraphs,
    /// Gopher repetition: largest share of characters in duplicate paragraphs (0.20).
    GopherDuplicateParagraphCharacters,
    /// Gopher repetition: scale on the limits for the most frequent 2- to 4-grams (1 = .20, .18, .16).
    GopherTopNgrams,
    /// Gopher repetition: scale on the limits for duplicate 5- to 10-grams (1 = .15 … .10).
    GopherDuplicateNgrams,
    /// C4: fewest sentences (5).
    C4MinSentences,
    /// C4: a line with fewer words is dropped (3).
    C4ShortLine,
    /// C4: a line with a longer word, in characters, is dropped (1,000).
    C4LongWord,
    /// C4: lines about javascript and policies, documents with "lorem ipsum" or a curly bracket (1 = on).
    C4Boilerplate,
    /// FineWeb: smallest share of lines that end in punctuation (0.12).
    FineWebPunctuatedLines,
    /// FineWeb: largest share of lines of at most 30 characters (0.67).
    FineWebShortLines,
    /// FineWeb: largest share of characters in duplicate lines (0.01).
    FineWebDuplicateLineCharacters,
    /// FineWeb: most newlines per word (0.3).
    FineWebNewlinesPerWord,
}

/// What to do about personal data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PiiAction {
    /// Leave it, and count it.
    Keep,
    /// Replace each span by a tag of its type.
    Redact,
    /// Drop the document.
    Drop,
}

/// What the data set's card says beyond the figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Card {
    /// Heading.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub title: String,
    /// What it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What it may be used for; shown first.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub notice: String,
}

/// Tokenizer and token files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EncodeConfig {
    /// Entries of the byte-level BPE vocabulary that is trained on the kept text, special tokens included.
    pub vocab_size: u32,
    /// Length of a packed sequence in tokens.
    pub sequence_length_tokens: u32,
    /// How documents are packed into sequences.
    pub packing: Packing,
}

/// How documents are packed into sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Packing {
    /// One stream with an end-of-text token after each document, cut every sequence length.
    Concatenate,
    /// Documents are cut only when longer than a sequence; each goes to the fullest sequence that it fits in.
    BestFit,
}

/// Parameters of the pretrain stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PretrainConfig {
    /// Data sets with token files; the first one's tokenizer is the model's, and all must share it.
    pub datasets: Vec<Input>,
    /// Shape of the model.
    pub model: LlamaShape,
    /// How it is trained.
    pub training: PretrainTraining,
    /// What is saved on the way.
    pub checkpoint: Checkpoint,
    /// What the result must reach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Gate>,
}

/// Shape of a Llama model; the vocabulary comes from the data set's tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LlamaShape {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the feed-forward layer.
    pub intermediate_size: u32,
    /// Number of layers.
    pub layers: u32,
    /// Number of query heads; divides the hidden size.
    pub heads: u32,
    /// Number of key and value heads; divides the heads.
    pub kv_heads: u32,
    /// Longest sequence in tokens.
    pub context_tokens: u32,
    /// Whether input and output embeddings are one matrix.
    pub tie_embeddings: bool,
}

/// How a model is pretrained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PretrainTraining {
    /// Tokens to train on; data is repeated, reshuffled, if it has fewer.
    pub tokens: u64,
    /// Tokens per optimizer step.
    pub batch_tokens: u64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps that warm up linearly.
    pub warmup_percent: u8,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Decoupled weight decay on matrices.
    pub weight_decay: f64,
    /// Seed of initialization and of the order of the data.
    pub seed: u64,
}

/// Course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    /// Half a cosine down to a tenth of the peak.
    Cosine,
    /// Stays at the peak.
    Constant,
}

/// What is saved on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Checkpoint {
    /// Time between two checkpoints in seconds.
    pub every_seconds: u64,
    /// Checkpoints kept.
    pub keep: u32,
}

/// Parameters of the align stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AlignConfig {
    /// The model to start from: a published model, or a GGUF file or HF folder.
    pub base: Input,
    /// Preference data sets.
    pub datasets: Vec<Input>,
    /// How.
    pub method: AlignMethod,
    /// The adapter that is trained.
    pub adapter: Lora,
    /// How it is trained.
    pub training: AlignTraining,
    /// What is measured.
    pub evaluation: AlignEvaluation,
    /// What is saved on the way.
    pub checkpoint: Checkpoint,
    /// What the result must reach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Gate>,
}

/// How a model is aligned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum AlignMethod {
    /// Direct preference optimization (Rafailov et al. 2023), sigmoid loss.
    Dpo {
        /// Strength of the pull towards the reference model.
        beta: f64,
    },
}

/// A low-rank adapter on all linear layers of the blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lora {
    /// Rank of the update.
    pub rank: u32,
    /// The update is scaled by `alpha / rank`.
    pub alpha: f64,
}

/// How an adapter is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AlignTraining {
    /// Pairs to train on, each once.
    pub pairs: u32,
    /// Longest conversation of a pair in tokens; longer pairs are left out and counted.
    pub max_pair_tokens: u32,
    /// Pairs per optimizer step.
    pub batch_pairs: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps that warm up linearly.
    pub warmup_percent: u8,
    /// How the learning rate goes on after the warm-up.
    pub schedule: Schedule,
    /// Seed of initialization and of the order of the pairs.
    pub seed: u64,
}

/// What is measured before and after an alignment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AlignEvaluation {
    /// Held-out pairs on which the reward margin is measured.
    pub held_out_pairs: u32,
    /// Data set whose held-out text the alignment tax is measured on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<Input>,
    /// Tokens of held-out text that are used.
    pub capability_tokens: u32,
}

/// Parameters of the quantize stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QuantizeConfig {
    /// The model: a published model, or a GGUF file or HF folder.
    pub model: Input,
    /// Format of the matrices in the result.
    pub format: QuantizationFormat,
    /// What the quantized model must reach on the evaluation set that came with the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Gate>,
}

/// Format of a served model's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(
    non_camel_case_types,
    reason = "the formats' names, as GGUF and every serving engine write them"
)]
pub enum QuantizationFormat {
    /// 8 bits in blocks of 32 with one F16 scale.
    Q8_0,
    /// 4 bits in blocks of 32 with a scale and a minimum, embeddings in 6 bits: near to Q8_0 at little more than half its size.
    /// For matrices whose columns are no multiple of 256, Q8_0.
    Q4_K,
    /// 4 bits in blocks of 32 with one F16 scale, embeddings in Q8_0: the fastest.
    Q4_0,
    /// 16-bit floats.
    F16,
}
