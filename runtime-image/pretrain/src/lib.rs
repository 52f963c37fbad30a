//! The pretrain stage: token files to a model.
//!
//! ```text
//! datasets → corpus (order of the samples, from the seed)
//!          → train: batches → gradients → AdamW ─┬─ checkpoint by the clock, and when asked to stop
//!                                                └─ resumed from the last good one of any attempt
//!          → evaluate on held-out text, beside a trigram model → gates → publish
//! ```

mod card;
mod corpus;
mod train;

use std::collections::BTreeMap;

use strata_artifact::{Draft, Opened, RunFolder, Verify, check_figures, open};
use strata_contract::{ArtifactKind, FailureReason, Gate, PretrainConfig, Report};
use strata_encode::TextTokenizer;
use strata_evaluate::{EvaluationSet, Trigram, score_text};
use strata_model::{Family, GenerationConfig, ModelConfig, Variant};
use strata_stage::{StageContext, StageError};
use strata_train::{
    Body, Executor, Job, ModelFiles, Named, Scorer, clean_up, evaluate_error, model_error, write_evaluation,
    write_model,
};

use crate::corpus::{Corpus, held_out};
use crate::train::{Trained, Trainer};

/// Tokens of training data that the trigram model counts at most; bounds its memory.
const TRIGRAM_TOKENS: u64 = 4 << 20;

/// Runs the stage to its published model.
pub fn run(config: &PretrainConfig, context: &StageContext) -> Result<Report, StageError> {
    let run = RunFolder::new(&context.run.output, &context.volumes);
    let attempt = run.attempt(&context.attempt_id)?;
    let datasets = open_datasets(config, context)?;
    let (tokenizer_json, tokenizer) = tokenizer(&datasets)?;
    let model = model_config(config, &tokenizer)?;
    let corpus = Corpus::open(&datasets, config.training.seed)?;
    let body = Body::new(&model, Executor::detect()?);
    tracing::info!(
        executor = body.executor().name(),
        parameters = body.layout().len(),
        sequences = corpus.sequences(),
        tokens = config.training.tokens,
        "pretraining"
    );

    let mut job = Job::new(context, &run, &config.checkpoint);
    let trained = Trainer {
        config,
        context,
        body: &body,
        corpus: &corpus,
    }
    .run(&mut job)?;
    let Trained {
        weights,
        tokens,
        loss,
        start,
        tokens_per_second,
    } = trained;

    let set = evaluation_set(&datasets, &corpus, &tokenizer, &model)?;
    let mut metrics = evaluate(&set, &body, &weights, &job, context)?;
    metrics.insert("tokensTrained".into(), tokens as f64);
    check_figures(&metrics)?;
    let gates: Vec<_> = config.gates.iter().map(|gate: &Gate| gate.judge(&metrics)).collect();
    let name = &context.run.resource.name;
    let files = ModelFiles {
        config: &model,
        weights: Named {
            layout: body.layout(),
            values: &weights,
        },
        tokenizer_json: &tokenizer_json,
        chat_template: None,
        generation: &GenerationConfig {
            eos: model.eos.clone(),
            ..GenerationConfig::default()
        },
        card: &card::text(name, config, &model, &metrics),
    };
    context.progress.start("publishing", "models", 1);
    write_model(&attempt, &files)?;
    write_evaluation(&attempt, &set, &metrics, name)?;
    if let Some(error) = StageError::from_gates(&gates) {
        clean_up(&run);
        return Err(error);
    }
    let facts = BTreeMap::from([
        ("parameters".to_owned(), body.layout().len().to_string()),
        (
            "architecture".to_owned(),
            model.family.spec().hf_architecture.to_owned(),
        ),
    ]);
    let draft = Draft {
        kind: ArtifactKind::Model,
        run_id: context.run.id.clone(),
        inputs: datasets.iter().map(Opened::resolved).collect(),
        config: serde_json::to_value(config).expect("a configuration serializes to JSON"),
        metrics,
        gates,
        facts,
    };
    let manifest = attempt.publish(draft, context.run.resource.clone(), context.run.attempt)?;
    context.progress.add(1);
    clean_up(&run);
    let bits = manifest.content.metrics["bitsPerByte"];
    let message = format!(
        "{} parameters, {bits:.3} bits per byte on held-out text",
        body.layout().len()
    );
    let mut report = Report::published(&manifest, &context.run.output, message);
    start.tell(&mut report, tokens_per_second);
    report
        .metrics
        .extend(loss.map(|loss| ("trainingLoss".to_owned(), loss)));
    Ok(report)
}

fn open_datasets(config: &PretrainConfig, context: &StageContext) -> Result<Vec<Opened>, StageError> {
    if config.datasets.is_empty() {
        return Err(StageError::new(
            FailureReason::ConfigInvalid,
            "no data set is named in spec.datasets",
        ));
    }
    let opened = config
        .datasets
        .iter()
        .map(|input| Ok(open(input, &context.volumes, Verify::Hashes)?));
    opened.collect()
}

/// The tokenizer that all data sets share.
fn tokenizer(datasets: &[Opened]) -> Result<(serde_json::Value, TextTokenizer), StageError> {
    let read = |dataset: &Opened| -> Result<Vec<u8>, StageError> {
        let path = dataset.file(corpus::TOKENIZER)?;
        std::fs::read(&path).map_err(|error| strata_artifact::ArtifactError::reading(&path, error).into())
    };
    let json = read(&datasets[0])?;
    for other in &datasets[1..] {
        if read(other)? != json {
            let message = format!(
                "data sets {} and {} have different tokenizers: encode one with the other's",
                datasets[0].resolved().name,
                other.resolved().name
            );
            return Err(StageError::new(FailureReason::ConfigInvalid, message));
        }
    }
    let corrupt =
        |detail: String| StageError::new(FailureReason::InputCorrupt, format!("{}: {detail}", corpus::TOKENIZER));
    let value = serde_json::from_slice(&json).map_err(|error| corrupt(error.to_string()))?;
    let tokenizer = TextTokenizer::from_json(&json).map_err(|error| corrupt(error.to_string()))?;
    Ok((value, tokenizer))
}

fn model_config(config: &PretrainConfig, tokenizer: &TextTokenizer) -> Result<ModelConfig, StageError> {
    let shape = &config.model;
    if shape.heads == 0 || !shape.hidden_size.is_multiple_of(shape.heads) {
        let message = format!(
            "hiddenSize {} is no multiple of {} heads",
            shape.hidden_size, shape.heads
        );
        return Err(StageError::new(FailureReason::ConfigInvalid, message));
    }
    let model = ModelConfig {
        family: Family::Llama,
        hidden_size: shape.hidden_size as usize,
        layers: shape.layers as usize,
        heads: shape.heads as usize,
        kv_heads: shape.kv_heads as usize,
        head_dim: (shape.hidden_size / shape.heads) as usize,
        intermediate_size: shape.intermediate_size as usize,
        vocab_size: tokenizer.vocab_size() as usize,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        tie_embeddings: shape.tie_embeddings,
        max_positions: shape.context_tokens as usize,
        bos: Some(tokenizer.end_of_text()),
        eos: vec![tokenizer.end_of_text()],
        variant: Variant::PLAIN,
    };
    let checked = model.check("spec.model".as_ref());
    checked.map_err(|error| StageError::new(FailureReason::ConfigInvalid, model_error(error).message))?;
    Ok(model)
}

fn evaluation_set(
    datasets: &[Opened],
    corpus: &Corpus,
    tokenizer: &TextTokenizer,
    model: &ModelConfig,
) -> Result<EvaluationSet, StageError> {
    let text = held_out(datasets, tokenizer, model.max_positions)?;
    let mut trigram = Trigram::new(model.vocab_size);
    let mut counted = 0;
    let mut tokens = Vec::new();
    for index in 0..corpus.sequences() {
        if counted >= TRIGRAM_TOKENS {
            break;
        }
        corpus.read(index, &mut tokens)?;
        trigram.count(&tokens);
        counted += tokens.len() as u64;
    }
    let text_trigram = Some(trigram.score(&text).map_err(evaluate_error)?);
    Ok(EvaluationSet {
        text: Some(text),
        text_trigram,
        ..EvaluationSet::new(model.vocab_size)
    })
}

fn evaluate(
    set: &EvaluationSet,
    body: &Body,
    weights: &[f32],
    job: &Job,
    context: &StageContext,
) -> Result<BTreeMap<String, f64>, StageError> {
    let text = set.text.as_ref().expect("the pretrain stage's set has text");
    context.progress.start("evaluating", "tokens", text.tokens());
    let mut scorer = Scorer::new(body, weights)?;
    let score = score_text(&mut scorer, text, |tokens| {
        context.progress.add(tokens as u64);
        job.check().is_ok()
    });
    let metrics: BTreeMap<_, _> = set.text_metrics(&score.map_err(evaluate_error)?).into_iter().collect();
    tracing::info!(?metrics, bytes = text.bytes(), "evaluated on held-out text");
    Ok(metrics)
}
