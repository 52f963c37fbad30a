//! What can go wrong in an evaluation.

use std::path::PathBuf;

/// Why an evaluation gave no figure.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// The model refused the tokens.
    #[error("the model cannot score {tokens} tokens: {detail}")]
    Model {
        /// Length of the text that it was given.
        tokens: usize,
        /// What it said.
        detail: String,
    },
    /// There is nothing to measure on.
    #[error("nothing to measure on: {0}")]
    Empty(&'static str),
    /// The evaluation set cannot be read or does not fit the model.
    #[error("evaluation set {path}: {detail}; publish the model again to get a fresh one", path = path.display())]
    Set {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The evaluation was asked to stop.
    #[error("the evaluation was interrupted")]
    Interrupted,
}
