//! What the training stages share: resuming, when to save, how to stop, how fast it goes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use strata_artifact::RunFolder;
use strata_contract::{Checkpoint, FailureReason, Report};
use strata_evaluate::EvaluateError;
use strata_model::ModelError;
use strata_stage::{StageContext, StageError};

use crate::Optimizer;
use crate::checkpoint::{self, CheckpointError, Checkpoints, Resumed, State};

/// Time between two lines about the progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// One attempt at a training: its checkpoints, and the clock that says when to save.
#[derive(Debug)]
pub struct Job<'a> {
    context: &'a StageContext,
    run: &'a RunFolder,
    checkpoints: Checkpoints<'a>,
    every: Duration,
    last: Instant,
    line: Option<Instant>,
}

impl<'a> Job<'a> {
    /// A job of the context's attempt at `run` that saves as `config` says.
    pub fn new(context: &'a StageContext, run: &'a RunFolder, config: &Checkpoint) -> Self {
        Self {
            context,
            run,
            checkpoints: Checkpoints::new(run, &context.attempt_id, &context.run.id, config.keep),
            every: Duration::from_secs(config.every_seconds),
            last: Instant::now(),
            line: None,
        }
    }

    /// What an earlier attempt of the run saved last, if its parameters are as many as `parameters`.
    pub fn resume(&self, parameters: usize) -> Result<Option<Resumed>, StageError> {
        let resumed = checkpoint::resume(self.run, &self.context.run.id)?;
        if let Some(Resumed { state, .. }) = &resumed
            && state.parameters.len() != parameters
        {
            tracing::warn!(
                found = state.parameters.len(),
                parameters,
                "the checkpoint is of another model; starting anew"
            );
            return Ok(None);
        }
        Ok(resumed)
    }

    /// After each step: saves if it is time; if the stage is to stop, saves and says so.
    pub fn after_step<'s>(&mut self, state: impl Fn() -> State<'s>) -> Result<(), StageError> {
        self.within_step(&state)?;
        match self.last.elapsed() >= self.every {
            true => self.save(&state()),
            false => Ok(()),
        }
    }

    /// Between the parts of a step, which may take long: if the stage is to stop, saves `state`, which is that after the
    /// last whole step, and says so.
    pub fn within_step<'s>(&mut self, state: impl Fn() -> State<'s>) -> Result<(), StageError> {
        if !self.context.interrupt.is_set() {
            return Ok(());
        }
        self.save(&state())?;
        Err(StageError::interrupted("asked to stop; the work so far is saved"))
    }

    /// Saves now.
    pub fn save(&mut self, state: &State) -> Result<(), StageError> {
        let start = Instant::now();
        self.checkpoints.save(state)?;
        self.last = Instant::now();
        tracing::info!(
            step = state.step,
            seconds = start.elapsed().as_secs_f32(),
            "checkpoint saved"
        );
        Ok(())
    }

    /// Whether the stage may go on; looked at between parts of work that save nothing.
    pub fn check(&self) -> Result<(), StageError> {
        match self.context.interrupt.is_set() {
            true => Err(StageError::interrupted(
                "asked to stop; the next attempt goes on from the last checkpoint",
            )),
            false => Ok(()),
        }
    }

    /// True at most every few seconds: time for a line about the progress.
    pub fn is_line_due(&mut self) -> bool {
        let due = self.line.is_none_or(|line| line.elapsed() >= LINE_EVERY);
        if due {
            self.line = Some(Instant::now());
        }
        due
    }
}

impl Optimizer {
    /// The state to save, beside `parameters`.
    pub fn state<'a>(
        &'a self,
        parameters: &'a [f32],
        samples: u64,
        notes: &'a BTreeMap<String, Vec<f64>>,
    ) -> State<'a> {
        State {
            step: self.step,
            samples,
            parameters: Cow::Borrowed(parameters),
            first: Cow::Borrowed(&self.first),
            second: Cow::Borrowed(&self.second),
            notes: Cow::Borrowed(notes),
        }
    }

    /// Takes step and moments from a saved state.
    pub fn restore(&mut self, state: &mut State) {
        self.step = state.step;
        self.first = std::mem::take(&mut state.first).into_owned();
        self.second = std::mem::take(&mut state.second).into_owned();
    }
}

/// What an attempt began with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Start {
    step: Option<u64>,
    passed_over: usize,
}

impl Start {
    /// Of an attempt that goes on from `resumed`, or from nothing.
    pub fn of(resumed: Option<&Resumed>) -> Self {
        Self {
            step: resumed.map(|resumed| resumed.state.step),
            passed_over: resumed.map_or(0, |resumed| resumed.passed_over),
        }
    }

    /// Says it in the attempt's report, and how fast the attempt was. Not in the manifest: two runs with the same result are
    /// the same artifact, however they came to it.
    pub fn tell(self, report: &mut Report, tokens_per_second: Option<f64>) {
        report.resumed_from_step = self.step;
        let passed_over = (self.passed_over > 0).then_some(self.passed_over as f64);
        report
            .metrics
            .extend(passed_over.map(|count| ("checkpointsPassedOver".to_owned(), count)));
        report
            .metrics
            .extend(tokens_per_second.map(|speed| ("tokensPerSecond".to_owned(), speed)));
    }
}

/// Removes the checkpoints of a run that has its result: published, or refused by a gate.
pub fn clean_up(run: &RunFolder) {
    if let Err(error) = checkpoint::remove_all(run) {
        tracing::warn!(%error, "the checkpoints, which nothing needs any more, could not be removed");
    }
}

/// Work per second since a start.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    since: Instant,
    amount: u64,
}

impl Default for Speed {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            amount: 0,
        }
    }
}

impl Speed {
    /// Counts `amount` as done.
    pub fn add(&mut self, amount: u64) {
        self.amount += amount;
    }

    /// Amount per second; none before anything was done.
    pub fn per_second(&self) -> Option<f64> {
        (self.amount > 0).then(|| self.amount as f64 / self.since.elapsed().as_secs_f64().max(1e-9))
    }
}

impl From<CheckpointError> for StageError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Storage(error) => error.into(),
            CheckpointError::Unusable { .. } | CheckpointError::AllUnusable { .. } => {
                Self::new(FailureReason::CheckpointCorrupt, error.to_string())
            }
        }
    }
}

/// The stage's error for a model that cannot be read.
pub fn model_error(error: ModelError) -> StageError {
    let reason = match &error {
        ModelError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => FailureReason::InputNotFound,
        ModelError::Io { .. } => FailureReason::InputUnreadable,
        ModelError::Missing { .. } => FailureReason::InputNotFound,
        ModelError::Malformed { .. } | ModelError::Tokenizer(_) => FailureReason::InputCorrupt,
        ModelError::UnknownArchitecture { .. } | ModelError::Unsupported { .. } => {
            FailureReason::ArchitectureUnsupported
        }
        ModelError::InvalidRequest { .. } | ModelError::Template(_) => FailureReason::ConfigInvalid,
    };
    StageError::new(reason, error.to_string())
}

/// The stage's error for an evaluation that gave no figure.
pub fn evaluate_error(error: EvaluateError) -> StageError {
    let reason = match &error {
        EvaluateError::Interrupted => FailureReason::Interrupted,
        EvaluateError::Empty(_) => FailureReason::ConfigInvalid,
        EvaluateError::Set { .. } => FailureReason::InputCorrupt,
        EvaluateError::Model { .. } => FailureReason::Internal,
    };
    StageError::new(reason, error.to_string())
}
