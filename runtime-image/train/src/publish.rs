//! A trained model as files of an artifact: Hugging Face's layout, the frozen evaluation set, results as lm-eval writes them.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use strata_artifact::{ArtifactError, Attempt};
use strata_evaluate::{EVALUATION_FILE, EvaluationSet};
use strata_model::hf::{self, Folder, files};
use strata_model::{Dtype, GenerationConfig, ModelConfig, ModelError};
use strata_stage::StageError;

use crate::model_error;
use crate::parameters::Named;

/// File of the evaluation's results.
const RESULTS_FILE: &str = "evaluation/results.json";

/// What a published model consists of besides its evaluation.
pub struct ModelFiles<'a> {
    /// Its shape.
    pub config: &'a ModelConfig,
    /// Its weights; stored in F32, exactly as they were evaluated.
    pub weights: Named<'a>,
    /// The object of `tokenizer.json`.
    pub tokenizer_json: &'a Value,
    /// The chat template's source.
    pub chat_template: Option<&'a str>,
    /// Defaults for generation.
    pub generation: &'a GenerationConfig,
    /// Text of the card, `README.md`.
    pub card: &'a str,
}

/// Writes the model's files into the attempt's content.
pub fn write_model(attempt: &Attempt, model: &ModelFiles) -> Result<(), StageError> {
    let place = attempt.place(files::CONFIG)?;
    let folder = place.parent().expect("a file of the content has a folder");
    let written = hf::write(
        folder,
        &Folder {
            config: model.config,
            weights: &model.weights,
            dtype: Dtype::F32,
            tokenizer_json: model.tokenizer_json,
            chat_template: model.chat_template,
            generation: model.generation,
        },
    );
    written.map_err(writing_error)?;
    for name in [
        files::WEIGHTS,
        files::CONFIG,
        files::GENERATION_CONFIG,
        files::TOKENIZER,
        files::TOKENIZER_CONFIG,
    ] {
        attempt.adopt(name)?;
    }
    if model.chat_template.is_some() {
        attempt.adopt(files::CHAT_TEMPLATE)?;
    }
    attempt.write("README.md", model.card.as_bytes())?;
    Ok(())
}

/// The stage's error for a model that cannot be written: an I/O error is the output volume's.
pub fn writing_error(error: ModelError) -> StageError {
    match error {
        ModelError::Io { path, source } => ArtifactError::writing(&path, source).into(),
        other => model_error(other),
    }
}

/// Writes the frozen evaluation set and the results on it, in the shape of lm-eval's result files.
pub fn write_evaluation(
    attempt: &Attempt,
    set: &EvaluationSet,
    metrics: &BTreeMap<String, f64>,
    model_name: &str,
) -> Result<(), StageError> {
    attempt.write(EVALUATION_FILE, &set.to_json())?;
    let figures: serde_json::Map<String, Value> = std::iter::once(("alias".to_owned(), json!("strata_held_out")))
        .chain(
            metrics
                .iter()
                .map(|(name, value)| (format!("{name},none"), json!(value))),
        )
        .collect();
    let samples = set.scorings();
    let results = json!({
        "results": { "strata_held_out": figures },
        "configs": { "strata_held_out": { "task": "strata_held_out", "output_type": "loglikelihood_rolling", "num_fewshot": 0 } },
        "versions": { "strata_held_out": set.version },
        "n-shot": { "strata_held_out": 0 },
        "n-samples": { "strata_held_out": { "original": samples, "effective": samples } },
        "model_name": model_name,
    });
    write_json(attempt, RESULTS_FILE, &results)
}

/// Writes an indented JSON file of the artifact.
pub fn write_json(attempt: &Attempt, relative: &str, value: &Value) -> Result<(), StageError> {
    attempt.write(relative, format!("{value:#}\n").as_bytes())?;
    Ok(())
}
