//! Which LoRA adapters are loaded, by name. Bounded: no more than `--max-loras` are in memory, those that are unloaded but still
//! used by running requests among them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use strata_model::{ModelConfig, ModelError};

use crate::engine::Adapter;
use crate::http::unix_seconds;

/// Longest name of an adapter, in bytes.
const MAX_NAME_BYTES: usize = 256;

/// Why an adapter was not loaded or unloaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdapterError {
    #[error("{0:?} is no name for an adapter: 1 to {MAX_NAME_BYTES} printable characters are")]
    Name(String),
    #[error("the name {0:?} is taken; unload the adapter of that name first, or choose another one")]
    Taken(String),
    #[error("no adapter {0:?} is loaded")]
    Unknown(String),
    #[error("{0} adapters are in memory, as many as --max-loras allows: unload one, and wait for its requests to end")]
    Full(usize),
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A loaded adapter.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub(crate) adapter: Arc<Adapter>,
    pub(crate) path: PathBuf,
    /// When it was loaded, in Unix seconds.
    pub(crate) created: u64,
}

/// The adapters of a model.
pub(crate) struct Adapters {
    config: ModelConfig,
    /// Names of the model itself.
    taken: Vec<String>,
    most: usize,
    max_rank: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    loaded: BTreeMap<String, Loaded>,
    loading: BTreeSet<String>,
    /// All that were loaded and may still be alive.
    alive: Vec<Weak<Adapter>>,
}

impl Adapters {
    pub(crate) fn new(config: &ModelConfig, taken: &[String], most: usize, max_rank: usize) -> Self {
        Adapters {
            config: config.clone(),
            taken: taken.to_vec(),
            most,
            max_rank,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Reads an adapter and makes it available under `name`. Requests go on meanwhile.
    pub(crate) fn load(&self, name: &str, path: &Path) -> Result<(), AdapterError> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            return Err(AdapterError::Name(name.to_owned()));
        }
        {
            let mut state = self.state();
            if self.taken.iter().any(|taken| taken == name) || state.loaded.contains_key(name) {
                return Err(AdapterError::Taken(name.to_owned()));
            }
            state.alive.retain(|adapter| adapter.strong_count() > 0);
            if state.alive.len() + state.loading.len() >= self.most {
                return Err(AdapterError::Full(self.most));
            }
            if !state.loading.insert(name.to_owned()) {
                return Err(AdapterError::Taken(name.to_owned()));
            }
        }
        let read = Adapter::load(name, path, &self.config, self.max_rank).map(Arc::new);
        let mut state = self.state();
        state.loading.remove(name);
        let adapter = read?;
        state.alive.push(Arc::downgrade(&adapter));
        let loaded = Loaded {
            adapter,
            path: path.to_owned(),
            created: unix_seconds(),
        };
        state.loaded.insert(name.to_owned(), loaded);
        tracing::info!(name, path = %path.display(), "adapter loaded");
        Ok(())
    }

    /// No new request gets the adapter; those that have it go on with it, and its memory is free after the last one.
    pub(crate) fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let removed = self.state().loaded.remove(name);
        removed.ok_or_else(|| AdapterError::Unknown(name.to_owned()))?;
        tracing::info!(name, "adapter unloaded");
        Ok(())
    }

    /// The adapter of that name.
    pub(crate) fn get(&self, name: &str) -> Option<Loaded> {
        self.state().loaded.get(name).cloned()
    }

    /// Names of all of them.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state().loaded.keys().cloned().collect()
    }
}
