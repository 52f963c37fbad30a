//! Reference and training.

use std::collections::BTreeMap;

use strata_contract::FailureReason;
use strata_evaluate::TextScore;
use strata_stage::StageError;
use strata_train::{Batch, Course, Gradients, Job, Keep, Optimizer, Resumed, Scorer, Speed, Start, Tape};

use crate::pairs::TokenPair;
use crate::{Reference, Work, dpo, text_score};

/// Rows that are computed at one time; bounds the memory of activations (about 0.6 MB a row for 135 M parameters).
const MICRO_ROWS: usize = 768;

/// Weights of an adapter decay by nothing: it starts at zero and is scaled by alpha.
const WEIGHT_DECAY: f64 = 0.0;

/// Trains the adapter.
pub(crate) struct Trainer<'a> {
    pub(crate) work: &'a Work<'a>,
}

/// What training leaves.
pub(crate) struct Trained {
    /// The adapter's parameters.
    pub(crate) adapter: Vec<f32>,
    /// The base with the adapter merged.
    pub(crate) merged: Vec<f32>,
    pub(crate) reference: Reference,
    pub(crate) start: Start,
    /// None if this attempt made no step.
    pub(crate) tokens_per_second: Option<f64>,
}

/// `pairs` in parts of at most [`MICRO_ROWS`] rows (or one pair).
fn parts(pairs: &[TokenPair]) -> impl Iterator<Item = &[TokenPair]> {
    let mut rest = pairs;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut rows = 0;
        let fit = rest.iter().take_while(|pair| {
            rows += pair.rows();
            rows <= MICRO_ROWS
        });
        let (part, after) = rest.split_at(fit.count().max(1));
        rest = after;
        Some(part)
    })
}

fn batch(pairs: &[TokenPair]) -> (Batch, Vec<(usize, usize)>) {
    let mut batch = Batch::default();
    pairs
        .iter()
        .for_each(|pair| batch.push_pair(&pair.prompt, &pair.chosen, &pair.rejected));
    (
        batch,
        pairs
            .iter()
            .map(|pair| (pair.chosen.len(), pair.rejected.len()))
            .collect(),
    )
}

/// Log-likelihoods (chosen, rejected) of `pairs` under `weights`; counts pairs as progress.
pub(crate) fn likelihoods(
    work: &Work,
    pairs: &[TokenPair],
    weights: &[f32],
    job: &Job,
) -> Result<Vec<(f64, f64)>, StageError> {
    let mut scorer = Scorer::new(&work.base.body, weights)?;
    let mut all = Vec::with_capacity(pairs.len());
    for part in parts(pairs) {
        job.check()?;
        let (batch, lengths) = batch(part);
        all.extend(scorer.pair_likelihoods(&batch, &lengths)?);
        work.context.progress.add(part.len() as u64);
    }
    Ok(all)
}

/// Sums of a step.
#[derive(Default)]
struct StepFigures {
    loss: f64,
    margin: f64,
    right: usize,
    rows: usize,
}

impl Trainer<'_> {
    /// Trains to the end, from the last good checkpoint of any attempt if there is one.
    pub(crate) fn run(&self, job: &mut Job) -> Result<Trained, StageError> {
        let Work {
            config,
            context,
            base,
            lora,
            train: pairs,
            ..
        } = *self.work;
        let training = &config.training;
        let batch_pairs = training.batch_pairs as usize;
        let steps = pairs.len().div_ceil(batch_pairs) as u64;
        let course = Course::new(
            training.learning_rate,
            training.warmup_percent,
            steps,
            training.schedule,
        );
        let mut optimizer = Optimizer::new(course, WEIGHT_DECAY, vec![(0..lora.len(), false)]);
        let mut adapter = lora.initialize(training.seed);
        let mut merged = base.weights.clone();

        let resumed = job.resume(lora.len())?;
        let resumed = resumed.and_then(|resumed| Some((self.reference_from(&resumed.state.notes)?, resumed)));
        let start = Start::of(resumed.as_ref().map(|(_, resumed)| resumed));
        let reference = match resumed {
            Some((reference, Resumed { mut state, .. })) => {
                optimizer.restore(&mut state);
                adapter = state.parameters.into_owned();
                lora.merge(&mut merged, &base.weights, &adapter);
                reference
            }
            None => {
                let reference = self.reference(job)?;
                job.save(&optimizer.state(&adapter, 0, &notes(&reference)))?;
                reference
            }
        };
        let notes = notes(&reference);
        let mut gradients = vec![0f32; lora.len()];
        let mut tape = Tape::default();
        let mut speed = Speed::default();
        let done = |step: u64| (step as usize * batch_pairs).min(pairs.len());
        context.progress.start("training", "pairs", pairs.len() as u64);
        context.progress.set(done(optimizer.step()) as u64);
        while optimizer.step() < steps {
            let range = done(optimizer.step())..done(optimizer.step() + 1);
            let sinks = (adapter.as_slice(), gradients.as_mut_slice());
            let figures = self.accumulate(
                &pairs[range.clone()],
                &reference.train[range.clone()],
                &merged,
                sinks,
                &mut tape,
                || job.within_step(|| optimizer.state(&adapter, range.start as u64, &notes)),
            )?;
            let norm = optimizer.update(&mut adapter, &mut gradients);
            let step = optimizer.step();
            if !(figures.loss.is_finite() && norm.is_finite()) {
                let message = format!("the loss is not a number at step {step} of {steps}");
                return Err(StageError::new(FailureReason::Diverged, message));
            }
            lora.merge(&mut merged, &base.weights, &adapter);
            speed.add(figures.rows as u64);
            context.progress.set(range.end as u64);
            if job.is_line_due() || step == steps {
                let pairs = range.len() as f64;
                tracing::info!(
                    step,
                    steps,
                    loss = format_args!("{:.4}", figures.loss),
                    reward_margin = format_args!("{:.4}", figures.margin / pairs),
                    reward_accuracy = format_args!("{:.2}", figures.right as f64 / pairs),
                    gradient_norm = format_args!("{norm:.3}"),
                    tokens_per_second = speed.per_second().unwrap_or_default() as u64,
                    "training"
                );
            }
            let state = || optimizer.state(&adapter, range.end as u64, &notes);
            match step == steps {
                // The evaluation may be interrupted too: it then starts from here.
                true => job.save(&state())?,
                false => job.after_step(state)?,
            }
        }
        Ok(Trained {
            adapter,
            merged,
            reference,
            start,
            tokens_per_second: speed.per_second(),
        })
    }

    /// Adds the gradient of the mean loss over `pairs`.
    fn accumulate(
        &self,
        pairs: &[TokenPair],
        reference: &[(f64, f64)],
        merged: &[f32],
        (adapter, gradients): (&[f32], &mut [f32]),
        tape: &mut Tape,
        mut between_parts: impl FnMut() -> Result<(), StageError>,
    ) -> Result<StepFigures, StageError> {
        let Work { base, lora, beta, .. } = *self.work;
        let weights = base.body.place(merged)?;
        let mut figures = StepFigures::default();
        let mut references = reference.iter();
        for (i, part) in parts(pairs).enumerate() {
            if i > 0 {
                between_parts()?;
            }
            let (batch, lengths) = batch(part);
            let mut log_probs = base.body.forward(&weights, &batch, tape, Keep::ForAdapters)?.iter();
            let mut coefficients = Vec::with_capacity(batch.scored().len());
            for (&(chosen, rejected), &reference) in lengths.iter().zip(references.by_ref()) {
                let mut sum = |count: usize| log_probs.by_ref().take(count).map(|&p| f64::from(p)).sum::<f64>();
                let loss = dpo::loss(beta, (sum(chosen), sum(rejected)), reference);
                let by_chosen = (loss.by_chosen / pairs.len() as f64) as f32;
                coefficients.extend(std::iter::repeat_n(by_chosen, chosen));
                coefficients.extend(std::iter::repeat_n(-by_chosen, rejected));
                figures.loss += loss.value / pairs.len() as f64;
                figures.margin += loss.margin;
                figures.right += usize::from(loss.margin > 0.0);
            }
            figures.rows += batch.rows();
            let mut sink = Gradients::Adapter {
                lora,
                parameters: adapter,
                gradients: &mut *gradients,
            };
            base.body.backward(&weights, &batch, tape, &coefficients, &mut sink)?;
        }
        Ok(figures)
    }

    /// What the base makes of all pairs and of the capability text.
    fn reference(&self, job: &Job) -> Result<Reference, StageError> {
        let work = self.work;
        let windows = work.text.map_or(0, |text| text.windows.len());
        let total = work.train.len() + work.held_out.len() + windows;
        work.context
            .progress
            .start("computing the reference", "pairs and windows", total as u64);
        let weights = &work.base.weights;
        Ok(Reference {
            train: likelihoods(work, work.train, weights, job)?,
            held_out: likelihoods(work, work.held_out, weights, job)?,
            text: work.text.map(|text| text_score(work, text, weights, job)).transpose()?,
        })
    }

    /// The reference that a checkpoint holds, if it is of these pairs and this text.
    fn reference_from(&self, notes: &BTreeMap<String, Vec<f64>>) -> Option<Reference> {
        let work = self.work;
        let pairs = |name: &str, count: usize| -> Option<Vec<(f64, f64)>> {
            let values = notes.get(name).filter(|values| values.len() == 2 * count)?;
            Some(
                values
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&[chosen, rejected]| (chosen, rejected))
                    .collect(),
            )
        };
        let text = match work.text {
            Some(text) => {
                let window_bits = notes
                    .get("text")
                    .filter(|bits| bits.len() == text.windows.len())?
                    .clone();
                Some(TextScore {
                    window_bits,
                    bytes: text.bytes(),
                })
            }
            None => None,
        };
        Some(Reference {
            train: pairs("train", work.train.len())?,
            held_out: pairs("held_out", work.held_out.len())?,
            text,
        })
    }
}

fn notes(reference: &Reference) -> BTreeMap<String, Vec<f64>> {
    let flat = |pairs: &[(f64, f64)]| {
        pairs
            .iter()
            .flat_map(|&(chosen, rejected)| [chosen, rejected])
            .collect()
    };
    let mut notes = BTreeMap::from([
        ("train".to_owned(), flat(&reference.train)),
        ("held_out".to_owned(), flat(&reference.held_out)),
    ]);
    notes.extend(
        reference
            .text
            .as_ref()
            .map(|text| ("text".to_owned(), text.window_bits.clone())),
    );
    notes
}
