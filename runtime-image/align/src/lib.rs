//! The align stage: a model and preferences to an aligned model, by DPO on a LoRA adapter.
//!
//! ```text
//! base ─────────┐
//! preferences → pairs (rendered, tokenized, sampled by the seed)
//!               → reference: likelihoods of all pairs with the adapter off, once
//!               → train the adapter ─┬─ checkpoint by the clock, and when asked to stop
//!                                    └─ resumed from the last good one of any attempt
//!               → evaluate: reward margin on held-out pairs, bits per byte before and after → gates → publish
//! ```
//!
//! What people wrote in the preferences appears in no log, message or report: errors name the file and the row.

mod base;
mod capability;
mod card;
mod dpo;
mod pairs;
mod records;
mod train;

use std::collections::BTreeMap;

use serde_json::{Map, json};
use strata_artifact::{Attempt, Draft, Opened, RunFolder, Verify, check_figures, open};
use strata_contract::{AlignConfig, AlignMethod, ArtifactKind, FailureReason, Input, Report};
use strata_evaluate::{EvaluationSet, Pair, Preferences, TextScore, TextSet, score_text};
use strata_model::{Dtype, hf};
use strata_stage::{StageContext, StageError};
use strata_train::{
    Job, Linear, Lora, ModelFiles, Named, Scorer, clean_up, evaluate_error, write_evaluation, write_json, write_model,
    writing_error,
};

use crate::base::Base;
use crate::pairs::{Sample, TokenPair, sample};
use crate::records::Split;
use crate::train::{Trained, Trainer, likelihoods};

/// What the base makes of everything that is measured later; computed once.
pub(crate) struct Reference {
    /// Likelihoods (chosen, rejected) of each training pair.
    pub(crate) train: Vec<(f64, f64)>,
    /// Likelihoods of each held-out pair.
    pub(crate) held_out: Vec<(f64, f64)>,
    /// Score of the capability text.
    pub(crate) text: Option<TextScore>,
}

/// Everything the stage works on.
pub(crate) struct Work<'a> {
    pub(crate) config: &'a AlignConfig,
    pub(crate) context: &'a StageContext,
    pub(crate) beta: f64,
    pub(crate) base: &'a Base,
    pub(crate) lora: &'a Lora,
    pub(crate) train: &'a [TokenPair],
    pub(crate) held_out: &'a [TokenPair],
    pub(crate) text: Option<&'a TextSet>,
}

/// Runs the stage to its published model.
pub fn run(config: &AlignConfig, context: &StageContext) -> Result<Report, StageError> {
    let AlignMethod::Dpo { beta } = config.method;
    check(config, beta)?;
    let run = RunFolder::new(&context.run.output, &context.volumes);
    let attempt = run.attempt(&context.attempt_id)?;
    let opened_base = open(&config.base, &context.volumes, Verify::Hashes)?;
    let datasets = open_all(&config.datasets, context)?;
    let capability = config.evaluation.capability.as_ref();
    let capability = capability
        .map(|input| open(input, &context.volumes, Verify::Hashes))
        .transpose()?;

    let base = Base::load(opened_base.path())?;
    let lora = Lora::new(base.body.layout(), config.adapter.rank as usize, config.adapter.alpha);
    let text = capability
        .as_ref()
        .map(|dataset| capability::text(dataset, &base, config))
        .transpose()?;
    let (train, held_out) = sample_pairs(config, context, &base, &datasets)?;
    tracing::info!(
        executor = base.body.executor().name(),
        parameters = base.body.layout().len(),
        adapter_parameters = lora.len(),
        pairs = train.pairs.len(),
        held_out_pairs = held_out.pairs.len(),
        too_long = train.too_long + held_out.too_long,
        unusable = train.unusable + held_out.unusable,
        "aligning"
    );

    let work = Work {
        config,
        context,
        beta,
        base: &base,
        lora: &lora,
        train: &train.pairs,
        held_out: &held_out.pairs,
        text: text.as_ref(),
    };
    let mut job = Job::new(context, &run, &config.checkpoint);
    let Trained {
        adapter,
        merged,
        reference,
        start,
        tokens_per_second,
    } = Trainer { work: &work }.run(&mut job)?;

    let set = evaluation_set(&work, &reference);
    let mut metrics = evaluate(&work, &set, &merged, &job)?;
    metrics.extend([
        ("pairsTrained".to_owned(), train.pairs.len() as f64),
        ("pairsHeldOut".to_owned(), held_out.pairs.len() as f64),
        ("pairsTooLong".to_owned(), (train.too_long + held_out.too_long) as f64),
        ("pairsUnusable".to_owned(), (train.unusable + held_out.unusable) as f64),
    ]);
    check_figures(&metrics)?;
    let gates: Vec<_> = config.gates.iter().map(|gate| gate.judge(&metrics)).collect();
    context.progress.start("publishing", "models", 1);
    write(&attempt, &work, &adapter, &merged, &set, &metrics)?;
    if let Some(error) = StageError::from_gates(&gates) {
        clean_up(&run);
        return Err(error);
    }
    let mut facts = BTreeMap::from([
        ("method".to_owned(), format!("DPO, beta {beta}")),
        (
            "adapter".to_owned(),
            format!("LoRA, rank {}, alpha {}", config.adapter.rank, config.adapter.alpha),
        ),
    ]);
    facts.extend(
        base.quantized_from
            .clone()
            .map(|formats| ("dequantizedFrom".to_owned(), formats)),
    );
    let draft = Draft {
        kind: ArtifactKind::Model,
        run_id: context.run.id.clone(),
        inputs: std::iter::once(&opened_base)
            .chain(&datasets)
            .chain(&capability)
            .map(Opened::resolved)
            .collect(),
        config: serde_json::to_value(config).expect("a configuration serializes to JSON"),
        metrics,
        gates,
        facts,
    };
    let manifest = attempt.publish(draft, context.run.resource.clone(), context.run.attempt)?;
    context.progress.add(1);
    clean_up(&run);
    let metrics = &manifest.content.metrics;
    let message = format!(
        "reward margin {:.3} (95 % interval from {:.3}) on {} held-out pairs",
        metrics["rewardMargin"],
        metrics["rewardMarginLow"],
        held_out.pairs.len()
    );
    let mut report = Report::published(&manifest, &context.run.output, message);
    start.tell(&mut report, tokens_per_second);
    Ok(report)
}

fn check(config: &AlignConfig, beta: f64) -> Result<(), StageError> {
    let bad = [
        (config.adapter.rank == 0, "adapter.lora.rank must be at least 1"),
        (config.datasets.is_empty(), "datasets must name at least one data set"),
        (
            config.training.pairs == 0 || config.training.batch_pairs == 0,
            "training.pairs and batchPairs must be at least 1",
        ),
        (
            config.evaluation.held_out_pairs < 2,
            "evaluate.heldOutPairs must be at least 2",
        ),
        (!(beta.is_finite() && beta > 0.0), "method.dpo.beta must be above 0"),
        (!config.adapter.alpha.is_finite(), "adapter.lora.alpha must be a number"),
    ];
    match bad.iter().find(|(bad, _)| *bad) {
        Some((_, message)) => Err(StageError::new(FailureReason::ConfigInvalid, *message)),
        None => Ok(()),
    }
}

fn open_all(inputs: &[Input], context: &StageContext) -> Result<Vec<Opened>, StageError> {
    inputs
        .iter()
        .map(|input| Ok(open(input, &context.volumes, Verify::Hashes)?))
        .collect()
}

fn sample_pairs(
    config: &AlignConfig,
    context: &StageContext,
    base: &Base,
    datasets: &[Opened],
) -> Result<(Sample, Sample), StageError> {
    let of = |split: Split, count: u32| -> Result<Sample, StageError> {
        let found = sample(datasets, split, count as usize, base, &config.training, context)?;
        if found.pairs.len() < 2 {
            let message = format!(
                "the {} split has {} pairs of at most {} tokens ({} are longer, {} unusable): raise training.maxPairTokens \
                 or give more data",
                split.name(),
                found.pairs.len(),
                config.training.max_pair_tokens,
                found.too_long,
                found.unusable
            );
            return Err(StageError::new(FailureReason::ConfigInvalid, message));
        }
        if found.pairs.len() < count as usize {
            tracing::warn!(
                split = split.name(),
                asked = count,
                found = found.pairs.len(),
                "fewer pairs than asked for"
            );
        }
        Ok(found)
    };
    Ok((
        of(Split::Train, config.training.pairs)?,
        of(Split::HeldOut, config.evaluation.held_out_pairs)?,
    ))
}

fn evaluation_set(work: &Work, reference: &Reference) -> EvaluationSet {
    let pairs = work
        .held_out
        .iter()
        .zip(&reference.held_out)
        .map(|(pair, &(reference_chosen, reference_rejected))| Pair {
            prompt: pair.prompt.clone(),
            chosen: pair.chosen.clone(),
            rejected: pair.rejected.clone(),
            reference_chosen,
            reference_rejected,
        });
    EvaluationSet {
        text: work.text.cloned(),
        text_before: reference.text.clone(),
        preferences: Some(Preferences {
            beta: work.beta,
            pairs: pairs.collect(),
        }),
        ..EvaluationSet::new(work.base.body.config().vocab_size)
    }
}

fn evaluate(work: &Work, set: &EvaluationSet, merged: &[f32], job: &Job) -> Result<BTreeMap<String, f64>, StageError> {
    let progress = &work.context.progress;
    progress.start("evaluating", "pairs and windows", set.scorings());
    let after = likelihoods(work, work.held_out, merged, job)?;
    let mut metrics: BTreeMap<_, _> = set
        .preference_metrics(&after)
        .map_err(evaluate_error)?
        .into_iter()
        .collect();
    if let Some(text) = work.text {
        metrics.extend(set.text_metrics(&text_score(work, text, merged, job)?));
    }
    tracing::info!(?metrics, "evaluated on held-out pairs and text");
    Ok(metrics)
}

/// Score of `weights` on the capability text.
pub(crate) fn text_score(work: &Work, text: &TextSet, weights: &[f32], job: &Job) -> Result<TextScore, StageError> {
    let score = score_text(&mut Scorer::new(&work.base.body, weights)?, text, |_| {
        work.context.progress.add(1);
        job.check().is_ok()
    });
    score.map_err(evaluate_error)
}

/// Writes the merged model, the adapter as PEFT has it, and the evaluation.
fn write(
    attempt: &Attempt,
    work: &Work,
    adapter: &[f32],
    merged: &[f32],
    set: &EvaluationSet,
    metrics: &BTreeMap<String, f64>,
) -> Result<(), StageError> {
    let (base, lora, name) = (work.base, work.lora, &work.context.run.resource.name);
    // F32: BF16 keeps 8 bits of a weight, and this adapter moves most weights by less than that.
    let files = ModelFiles {
        config: base.body.config(),
        weights: Named {
            layout: base.body.layout(),
            values: merged,
        },
        tokenizer_json: &base.tokenizer_json,
        chat_template: Some(base.template.source()),
        generation: &base.generation,
        card: &card::text(name, work.config, base, metrics),
    };
    write_model(attempt, &files)?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": work.config.base.uri,
        "r": work.config.adapter.rank,
        "lora_alpha": work.config.adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "target_modules": Linear::ALL.map(|linear| linear.part().rsplit('.').next().unwrap_or_default()),
    });
    write_json(attempt, "adapter/adapter_config.json", &config)?;
    let relative = "adapter/adapter_model.safetensors";
    let mut ranges = Vec::new();
    let tensors = lora.tensors().into_iter().map(|(name, shape, range)| {
        ranges.push(range);
        (name, shape)
    });
    let tensors: Vec<(String, Vec<usize>)> = tensors.collect();
    let path = attempt.place(relative)?;
    // The writer asks once for each tensor, in their order.
    let mut ranges = ranges.into_iter();
    let written = hf::write_safetensors(&path, &tensors, Dtype::F32, &Map::new(), |_| {
        Ok(&adapter[ranges.next().unwrap_or_default()])
    });
    written.map_err(writing_error)?;
    attempt.adopt(relative)?;
    write_evaluation(attempt, set, metrics, name)
}
