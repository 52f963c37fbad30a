//! What can be wrong with a model's files, each with the place and the remedy.

use std::path::{Path, PathBuf};

/// Why a model could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file system said no.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nothing is there that could be read as a model, or a part of it is absent.
    #[error("{path}: {what} is missing; {remedy}", path = path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What is missing.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// The file is not what its format demands: truncated, corrupt, or hostile.
    #[error("{path}: {what}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        what: String,
    },
    /// A model family that this engine does not have.
    #[error("{path}: unknown architecture {found:?}; this engine knows {known}", path = path.display())]
    UnknownArchitecture {
        /// The file that names it.
        path: PathBuf,
        /// The name in the file.
        found: String,
        /// The names that would have been accepted.
        known: String,
    },
    /// Well formed, but it asks for something that this engine does not do.
    #[error("{path}: {what}", path = path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is asked for, and what to use instead.
        what: String,
    },
    /// What was asked for cannot be done with this model, and something else can.
    #[error("{path}: {what}", path = path.display())]
    InvalidRequest {
        /// The file or folder.
        path: PathBuf,
        /// What stands against it, and what to ask for instead.
        what: String,
    },
    /// A chat template that does not parse or refuses the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        ModelError::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn malformed(path: &Path, what: impl Into<String>) -> Self {
        ModelError::Malformed {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        ModelError::Unsupported {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn missing(path: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        ModelError::Missing {
            path: path.to_owned(),
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;
