//! What the training stages share: resuming, when to save, how to stop, how fast it goes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use strata_artifact::{Attempt, RunFolder};
use strata_contract::{Checkpoint, FailureReason};
use strata_evaluate::EvaluateError;
use strata_model::ModelError;
use strata_stage::{StageContext, StageError};

use crate::Optimizer;
use crate::checkpoint::{self, CheckpointError, Checkpoints, State};

/// Time between two lines about the progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// One attempt at a training: its checkpoints, and the clock that says when to save.
#[derive(Debug)]
pub struct Job<'a> {
    context: &'a StageContext,
    checkpoints: Checkpoints,
    every: Duration,
    last: Instant,
    line: Option<Instant>,
}

impl<'a> Job<'a> {
    /// A job of `attempt` that saves as `config` says.
    pub fn new(context: &'a StageContext, attempt: &Attempt, config: &Checkpoint) -> Self {
        Self {
            context,
            checkpoints: Checkpoints::new(&attempt.dir(), &context.run.id, config.keep),
            every: Duration::from_secs(config.every_seconds),
            last: Instant::now(),
            line: None,
        }
    }

    /// What an earlier attempt of the run saved last, if its parameters are as many as `parameters`.
    pub fn resume(&self, run: &RunFolder, parameters: usize) -> Result<Option<State>, StageError> {
        let state = checkpoint::resume(run, &self.context.run.id)?;
        if let Some(state) = &state
            && state.parameters.len() != parameters
        {
            tracing::warn!(
                found = state.parameters.len(),
                parameters,
                "the checkpoint is of another model; starting anew"
            );
            return Ok(None);
        }
        Ok(state)
    }

    /// After each step: saves if it is time; if the stage is to stop, saves and says so.
    pub fn after_step(&mut self, state: impl FnOnce() -> State) -> Result<(), StageError> {
        let stopping = self.context.interrupt.is_set();
        if stopping || self.last.elapsed() >= self.every {
            self.save(&state())?;
        }
        match stopping {
            true => Err(StageError::interrupted("asked to stop; the work so far is saved")),
            false => Ok(()),
        }
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
    pub fn state(&self, parameters: &[f32], samples: u64, notes: &BTreeMap<String, Vec<f64>>) -> State {
        State {
            step: self.step,
            samples,
            parameters: parameters.to_vec(),
            first: self.first.clone(),
            second: self.second.clone(),
            notes: notes.clone(),
        }
    }

    /// Takes step and moments from a saved state.
    pub fn restore(&mut self, state: &mut State) {
        self.step = state.step;
        self.first = std::mem::take(&mut state.first);
        self.second = std::mem::take(&mut state.second);
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

    /// Amount per second; 0 before anything was done.
    pub fn per_second(&self) -> f64 {
        self.amount as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
    }
}

impl From<CheckpointError> for StageError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Storage(error) => error.into(),
            CheckpointError::Unusable { .. } => Self::new(FailureReason::Internal, error.to_string()),
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
