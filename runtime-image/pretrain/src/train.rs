//! The training loop.

use std::f64::consts::LN_2;

use strata_contract::{FailureReason, PretrainConfig};
use strata_stage::{StageContext, StageError};
use strata_train::{Batch, Body, Course, Gradients, Job, Keep, Optimizer, Resumed, Speed, Start, Tape, initialize};

use crate::corpus::{Corpus, Pieces, Position};

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
    /// Tokens that were trained on, repetitions included.
    pub(crate) tokens: u64,
    /// Loss of the last step in nats per token, if this attempt made one.
    pub(crate) loss: Option<f64>,
    pub(crate) start: Start,
    /// None if this attempt made no step.
    pub(crate) tokens_per_second: Option<f64>,
}

impl Trainer<'_> {
    /// Trains to the end, from the last good checkpoint of any attempt if there is one.
    pub(crate) fn run(&self, job: &mut Job) -> Result<Trained, StageError> {
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
        let mut position = Position::default();
        let mut last_loss = None;
        let resumed = job.resume(layout.len())?;
        let start = Start::of(resumed.as_ref());
        if let Some(Resumed { mut state, .. }) = resumed {
            position = Position::from_notes(state.samples, &state.notes);
            optimizer.restore(&mut state);
            weights = state.parameters.into_owned();
        }
        let mut pieces = self
            .corpus
            .pieces(position, self.config.model.context_tokens as usize)?;
        let progress = &self.context.progress;
        progress.start("training", "tokens", training.tokens);
        progress.set(position.tokens.min(training.tokens));
        let mut speed = Speed::default();
        let mut notes = position.notes();
        while optimizer.step() < steps {
            let until = (optimizer.step() + 1) * training.batch_tokens;
            let (batches, asked) = self.next_batches(&mut pieces, until)?;
            let mut loss = 0f64;
            let placed = self.body.place(&weights)?;
            for (part, batch) in batches.iter().enumerate() {
                if part > 0 {
                    job.within_step(|| optimizer.state(&weights, position.sample, &notes))?;
                }
                let log_probs = self.body.forward(&placed, batch, &mut tape, Keep::ForAll)?;
                loss -= log_probs.iter().map(|&p| f64::from(p)).sum::<f64>() / asked as f64;
                let coefficients = vec![-1.0 / asked as f32; batch.scored().len()];
                let mut sink = Gradients::All(&mut gradients);
                self.body
                    .backward(&placed, batch, &mut tape, &coefficients, &mut sink)?;
            }
            drop(placed);
            let norm = optimizer.update(&mut weights, &mut gradients);
            let step = optimizer.step();
            if !(loss.is_finite() && norm.is_finite()) {
                let message = format!("the loss is not a number at step {step} of {steps}");
                return Err(StageError::new(FailureReason::Diverged, message));
            }
            position = pieces.position();
            notes = position.notes();
            last_loss = Some(loss);
            speed.add(asked as u64);
            progress.set(position.tokens.min(training.tokens));
            if job.is_line_due() || step == steps {
                tracing::info!(
                    step,
                    steps,
                    loss = format_args!("{loss:.4}"),
                    bits_per_token = format_args!("{:.3}", loss / LN_2),
                    gradient_norm = format_args!("{norm:.3}"),
                    tokens_per_second = speed.per_second().unwrap_or_default() as u64,
                    "training"
                );
            }
            let state = || optimizer.state(&weights, position.sample, &notes);
            match step == steps {
                // The evaluation may be interrupted too: it then starts from here.
                true => job.save(&state())?,
                false => job.after_step(state)?,
            }
        }
        Ok(Trained {
            weights,
            tokens: position.tokens,
            loss: last_loss,
            start,
            tokens_per_second: speed.per_second(),
        })
    }

    /// The next step's pieces, until `until` tokens are taken in all, in parts that are computed one after another, and the
    /// number of tokens asked for.
    fn next_batches(&self, pieces: &mut Pieces, until: u64) -> Result<(Vec<Batch>, usize), StageError> {
        let vocab_size = self.body.config().vocab_size;
        let mut batches = vec![Batch::default()];
        let mut asked = 0;
        while asked == 0 || pieces.position().tokens < until {
            let piece = pieces.take()?;
            if let Some(token) = piece.iter().find(|&&token| token as usize >= vocab_size) {
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
        batches.retain(|batch| batch.rows() > 0);
        Ok((batches, asked))
    }
}
