//! Why the server did not start, or ended.

use strata_model::ModelError;

/// Why the server did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The arguments do not fit the model or each other.
    #[error("{0}")]
    Arguments(String),
    /// The address could not be listened on.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something of the system failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The device that computes failed.
    #[error("the device: {0}")]
    Device(String),
    /// The engine's thread ended while requests could still come.
    #[error("the engine stopped unexpectedly; its panic message stands in the log")]
    EngineDied,
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl ServeError {
    /// Whether the input is at fault, so that starting again would end the same way.
    pub fn is_bad_input(&self) -> bool {
        match self {
            ServeError::Model(ModelError::Io { .. }) => false,
            ServeError::Model(_) | ServeError::Arguments(_) => true,
            ServeError::Listen { .. }
            | ServeError::System { .. }
            | ServeError::Device(_)
            | ServeError::EngineDied
            | ServeError::Metrics(_) => false,
        }
    }
}
