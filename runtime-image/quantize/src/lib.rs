//! The quantize stage: a model to the GGUF file that is served, judged again on what will be served.
//!
//! ```text
//! model → GGUF in the asked format → the serving engine loads that file → evaluation set of the model → gates → publish
//! ```
//!
//! The gates are evaluated on the written file with the engine, number types and cache type that serve it: what a
//! quantization loses is measured where it would hurt.

use std::collections::BTreeMap;

use strata_artifact::{Attempt, Draft, Opened, RunFolder, Verify, check_figures, open};
use strata_contract::{ArtifactKind, FailureReason, QuantizationFormat, QuantizeConfig, Report};
use strata_evaluate::{EVALUATION_FILE, EvaluateError, EvaluationSet, LanguageModel};
use strata_kernels::infer::KvDtype;
use strata_model::hf::files;
use strata_model::{Dtype, LoadedModel, ModelConfig, gguf};
use strata_serve::{Precision, Scorer};
use strata_stage::{StageContext, StageError};
use strata_train::{evaluate_error, model_error, write_evaluation, writing_error};

/// The file of the artifact that is served.
pub const MODEL_FILE: &str = "model.gguf";

/// Runs the stage to its published file.
pub fn run(config: &QuantizeConfig, context: &StageContext) -> Result<Report, StageError> {
    let run = RunFolder::new(&context.run.output, &context.volumes);
    let attempt = run.attempt(&context.attempt_id)?;
    let opened = open(&config.model, &context.volumes, Verify::Hashes)?;
    let source = LoadedModel::open(opened.path()).map_err(model_error)?;
    tracing::info!(parameters = source.config.parameters(), format = ?config.format, "quantizing");

    context.progress.start("quantizing", "models", 1);
    write(&attempt, &source, config.format, &context.run.resource.name)?;
    context.progress.add(1);
    let (set, mut metrics) = evaluate(&attempt, &opened, &source.config, context)?;
    metrics.extend(losses(&opened, &metrics));
    check_figures(&metrics).map_err(|error| {
        let message = format!(
            "gate failed: {error}; the written file would answer nonsense: the model's values are too large to be computed \
             with; train or align it again with a lower learning rate"
        );
        StageError::new(FailureReason::GateFailed, message)
    })?;
    if let Some(set) = set {
        write_evaluation(&attempt, &set, &metrics, &context.run.resource.name)?;
    }
    tracing::info!(?metrics, "evaluated as it will be served");
    let gates: Vec<_> = config.gates.iter().map(|gate| gate.judge(&metrics)).collect();
    if let Some(error) = StageError::from_gates(&gates) {
        return Err(error);
    }

    let mut facts = BTreeMap::from([("format".to_owned(), dtype(config.format).name().to_owned())]);
    let before = opened
        .manifest()
        .and_then(|manifest| manifest.content.facts.get("dequantizedFrom"));
    facts.extend(before.map(|format| ("dequantizedFrom".to_owned(), format.clone())));
    let draft = Draft {
        kind: ArtifactKind::QuantizedModel,
        run_id: context.run.id.clone(),
        inputs: vec![opened.resolved()],
        config: serde_json::to_value(config).expect("a configuration serializes to JSON"),
        metrics,
        gates,
        facts,
    };
    let manifest = attempt.publish(draft, context.run.resource.clone(), context.run.attempt)?;
    let bytes = manifest.content.bytes();
    let message = format!("{} in {:.1} MB", dtype(config.format).name(), bytes as f64 / 1e6);
    Ok(Report::published(&manifest, &context.run.output, message))
}

fn dtype(format: QuantizationFormat) -> Dtype {
    match format {
        QuantizationFormat::Q8_0 => Dtype::Q8_0,
        QuantizationFormat::Q4_K => Dtype::Q4K,
        QuantizationFormat::Q4_0 => Dtype::Q4_0,
        QuantizationFormat::F16 => Dtype::F16,
    }
}

/// Writes the file, and beside it the tokenizer and template for those who want them without reading GGUF.
fn write(attempt: &Attempt, source: &LoadedModel, format: QuantizationFormat, name: &str) -> Result<(), StageError> {
    let texts = gguf::Texts {
        tokenizer_json: &source.tokenizer_json,
        chat_template: source.chat_template.as_ref().map(|template| template.source()),
        generation: &source.generation,
    };
    let path = attempt.place(MODEL_FILE)?;
    gguf::write(&path, name, &source.config, &*source.weights, texts, dtype(format)).map_err(writing_error)?;
    attempt.adopt(MODEL_FILE)?;
    attempt.write(files::TOKENIZER, source.tokenizer_json.to_string().as_bytes())?;
    if let Some(template) = &source.chat_template {
        attempt.write(files::CHAT_TEMPLATE, template.source().as_bytes())?;
    }
    Ok(())
}

/// Measures the written file on the evaluation set that came with the model, if one did.
fn evaluate(
    attempt: &Attempt,
    opened: &Opened,
    config: &ModelConfig,
    context: &StageContext,
) -> Result<(Option<EvaluationSet>, BTreeMap<String, f64>), StageError> {
    if !opened.has(EVALUATION_FILE) {
        return Ok((None, BTreeMap::new()));
    }
    let set = EvaluationSet::read(&opened.file(EVALUATION_FILE)?, config.vocab_size).map_err(evaluate_error)?;
    let written = LoadedModel::open(&attempt.place(MODEL_FILE)?).map_err(model_error)?;
    let scorer = Scorer::new(&written, Precision::Stored, KvDtype::F16, longest(&set));
    let mut model = Served(scorer.map_err(model_error)?);
    context
        .progress
        .start("evaluating", "pairs and windows", set.scorings());
    let measured = set.measure(&mut model, || {
        context.progress.add(1);
        !context.interrupt.is_set()
    });
    Ok((Some(set), measured.map_err(evaluate_error)?))
}

/// Tokens of the longest text that is scored. A model may have positions for millions, each with a place in the engine's cache.
fn longest(set: &EvaluationSet) -> usize {
    let windows = set.text.iter().flat_map(|text| &text.windows);
    let pairs = set.preferences.iter().flat_map(|preferences| &preferences.pairs);
    windows
        .map(|window| window.tokens.len())
        .chain(pairs.map(|pair| pair.prompt.len() + pair.chosen.len().max(pair.rejected.len())))
        .max()
        .unwrap_or(1)
}

/// What the form before had better, for the figures that both have.
fn losses(opened: &Opened, metrics: &BTreeMap<String, f64>) -> Option<(String, f64)> {
    let before = opened.manifest()?.content.metrics.get("bitsPerByte")?;
    Some((
        "bitsPerByteQuantizationLoss".to_owned(),
        metrics.get("bitsPerByte")? - before,
    ))
}

/// The serving engine as an evaluation sees it.
struct Served(Scorer);

impl LanguageModel for Served {
    fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, EvaluateError> {
        self.0
            .token_log_probs(tokens, score_from)
            .map_err(|error| EvaluateError::Model {
                tokens: tokens.len(),
                detail: error.to_string(),
            })
    }
}

#[cfg(test)]
mod tests {
    use strata_evaluate::{Pair, Preferences, TextSet};

    use super::*;

    #[test]
    fn the_scorer_has_room_for_the_longest_text_and_no_more() {
        let mut set = EvaluationSet::new(9);
        assert_eq!(longest(&set), 1);
        let mut text = TextSet::default();
        text.push(&[1; 7], 0, 32, |_| 1);
        let window = text.windows[0].tokens.len();
        set.text = Some(text);
        assert_eq!(longest(&set), window);
        let pair = |rejected: usize| Pair {
            prompt: vec![1; 5],
            chosen: vec![2; 3],
            rejected: vec![3; rejected],
            reference_chosen: 0.0,
            reference_rejected: 0.0,
        };
        set.preferences = Some(Preferences {
            beta: 0.1,
            pairs: vec![pair(20), pair(4)],
        });
        assert_eq!(longest(&set), 25);
    }
}
