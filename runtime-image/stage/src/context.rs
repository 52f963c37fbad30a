//! Where a stage runs: its run and attempt, its folders, its progress and the flag that asks it to stop.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use strata_contract::{Progress, Run};

/// Everything that a stage is given besides its configuration.
#[derive(Clone, Debug)]
pub struct StageContext {
    /// Whose run this is and where it publishes.
    pub run: Run,
    /// Folder under which claims are mounted; see [`strata_contract::Uri::local_path`].
    pub volumes: PathBuf,
    /// Unique id of this attempt; names its output folder.
    pub attempt_id: String,
    /// How far the stage is; shared with whoever serves it.
    pub progress: ProgressHandle,
    /// Set when the stage is asked to stop.
    pub interrupt: Interrupt,
}

/// Progress of a stage, cheap to advance from the working thread and to read from another.
#[derive(Clone, Debug, Default)]
pub struct ProgressHandle(Arc<State>);

#[derive(Debug, Default)]
struct State {
    done: AtomicU64,
    total: AtomicU64,
    words: Mutex<(String, String)>,
}

impl ProgressHandle {
    /// Starts counting something new: `activity` in a few words, `total` in `unit`, of which nothing is done.
    pub fn start(&self, activity: &str, unit: &str, total: u64) {
        *self.0.words.lock().unwrap_or_else(PoisonError::into_inner) = (activity.into(), unit.into());
        self.0.done.store(0, Ordering::Relaxed);
        self.0.total.store(total, Ordering::Relaxed);
        tracing::info!(activity, unit, total, "stage goes on");
    }

    /// Counts `amount` more as done.
    pub fn add(&self, amount: u64) {
        self.0.done.fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets what is done, for work that goes on from a checkpoint.
    pub fn set(&self, done: u64) {
        self.0.done.store(done, Ordering::Relaxed);
    }

    /// The state of affairs.
    pub fn read(&self) -> Progress {
        let (activity, unit) = self.0.words.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Progress {
            done: self.0.done.load(Ordering::Relaxed),
            total: self.0.total.load(Ordering::Relaxed),
            unit,
            activity,
        }
    }
}

/// The flag that asks a stage to save its work and end with [`strata_contract::FailureReason::Interrupted`].
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks the stage to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the stage is to stop; a stage looks at least once a second.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
