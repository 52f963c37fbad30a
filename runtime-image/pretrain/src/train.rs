//! The training loop.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;

use strata_artifact::RunFolder;
use strata_contract::{FailureReason, PretrainConfig};
use strata_stage::{StageContext, StageError};
use strata_train::{Batch, Body, Course, Gradients, Job, Keep, Optimizer, Speed, Tape, initialize};

use crate::corpus::{Corpus, Samples};

/// Rows that are computed at one time; a larger batch is summed up from several. Bounds the memory of activations.
const MICRO_ROWS: usize = 4096;

/// What one training needs.
pub(crate) struct Trainer<'a> {
    pub(crate) config: &'a PretrainConfig,
    pub(crate) context: &'a StageContext,
    pub(crate) body: &'a Body,
    pub(crate) corpus: &'a Corpus,
}

/// What it leaves.
pub(crate) struct Trained {
    pub(crate) weights: Vec<f32>,
    /// Loss of the last step in nats per token, if this attempt made one.
    pub(crate) loss: Option<f64>,
    pub(crate) resumed_from_step: Option<u64>,
    pub(crate) tokens_per_second: f64,
}

impl Trainer<'_> {
    /// Trains to the end, from the last good checkpoint of any attempt if there is one.
    pub(crate) fn run(&self, job: &mut Job, run: &RunFolder) -> Result<Trained, StageError> {
        let training = &self.config.training;
        let steps = training.tokens.div_ceil(training.batch_tokens.max(1)).max(1);
        let course = Course::new(
            training.learning_rate,
            training.warmup_percent,
            steps,
            training.schedule,
        );
        let layout = self.body.layout();
        let mut optimizer = Optimizer::new(course, training.weight_decay, layout.decayed());
        let mut weights = initialize(self.body.config(), layout, training.seed);
        let mut gradients = vec![0f32; layout.len()];
        let mut tape = Tape::default();
        let mut samples = self.corpus.samples(0);
        let mut last_loss = None;
        let resumed = job.resume(run, layout.len())?;
        let resumed_from_step = resumed.as_ref().map(|state| state.step);
        if let Some(mut state) = resumed {
            samples = self.corpus.samples(state.samples);
            optimizer.restore(&mut state);
            weights = state.parameters;
        }
        let progress = &self.context.progress;
        progress.start("training", "tokens", training.tokens);
        progress.set((optimizer.step() * training.batch_tokens).min(training.tokens));
        let mut speed = Speed::default();
        while optimizer.step() < steps {
            let (batches, asked) = self.next_batches(&mut samples)?;
            let mut loss = 0f64;
            let placed = self.body.place(&weights)?;
            for batch in &batches {
                let log_probs = self.body.forward(&placed, batch, &mut tape, Keep::ForAll)?;
                loss -= log_probs.iter().map(|&p| f64::from(p)).sum::<f64>() / asked as f64;
                let coefficients = vec![-1.0 / asked as f32; batch.scored().len()];
                let mut sink = Gradients::All(&mut gradients);
                self.body
                    .backward(&placed, batch, &mut tape, &coefficients, &mut sink)?;
            }
            let norm = optimizer.update(&mut weights, &mut gradients);
            let step = optimizer.step();
            if !(loss.is_finite() && norm.is_finite()) {
                let message = format!("the loss is not a number at step {step} of {steps}");
                return Err(StageError::new(FailureReason::Diverged, message));
            }
            last_loss = Some(loss);
            speed.add(asked as u64);
            progress.set((step * training.batch_tokens).min(training.tokens));
            if job.is_line_due() || step == steps {
                tracing::info!(
                    step,
                    steps,
                    loss = format_args!("{loss:.4}"),
                    bits_per_token = format_args!("{:.3}", loss / LN_2),
                    gradient_norm = format_args!("{norm:.3}"),
                    tokens_per_second = speed.per_second() as u64,
                    "training"
                );
            }
            let taken = samples.taken();
            let state = || optimizer.state(&weights, taken, &BTreeMap::new());
            match step == steps {
                // The evaluation may be interrupted too: it then starts from here.
                true => job.save(&state())?,
                false => job.after_step(state)?,
            }
        }
        Ok(Trained {
            weights,
            loss: last_loss,
            resumed_from_step,
            tokens_per_second: speed.per_second(),
        })
    }

    /// The next step's samples, in parts that are computed one after another, and the number of tokens asked for.
    fn next_batches(&self, samples: &mut Samples) -> Result<(Vec<Batch>, usize), StageError> {
        let wanted = self.config.training.batch_tokens.max(1) as usize;
        let context = self.config.model.context_tokens as usize;
        let mut batches = vec![Batch::default()];
        let (mut taken, mut asked) = (0, 0);
        let mut tokens = Vec::new();
        while taken < wanted || asked == 0 {
            samples.take(&mut tokens)?;
            taken += tokens.len().max(1);
            // A sequence of the data may be longer than this model's context.
            for piece in tokens.chunks(context + 1).filter(|piece| piece.len() > 1) {
                if let Some(token) = piece
                    .iter()
                    .find(|&&token| token as usize >= self.body.config().vocab_size)
                {
                    let message = format!("the token files hold token {token}, which the tokenizer does not have");
                    return Err(StageError::new(FailureReason::InputCorrupt, message));
                }
                if batches[batches.len() - 1].rows() + piece.len() > MICRO_ROWS {
                    batches.push(Batch::default());
                }
                let last = batches.len() - 1;
                batches[last].push_text(piece, 1);
                asked += piece.len() - 1;
            }
        }
        batches.retain(|batch| batch.rows() > 0);
        Ok((batches, asked))
    }
}
