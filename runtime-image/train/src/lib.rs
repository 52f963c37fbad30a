//! The training executor: one decoder body, forward and backward, over the kernels or over candle.
//!
//! ```text
//! parameters   a model's tensors in one flat buffer, found by name
//! body         forward and backward of the decoder on a packed batch
//! lora         low-rank adapters: merged into the weights for the forward, gradients from the body's backward
//! optimizer    schedule, clipping, AdamW on the flat buffer
//! checkpoint   saved state: verified when read, found across attempts
//! random       the seed's streams: initialization, order of the data
//! scorer       the body as an `evaluate::LanguageModel`
//! job          what the training stages share: resume, cadence of checkpoints, interruption, errors
//! publish      a trained model as files of an artifact
//! ```
//!
//! The body knows two kinds of gradients: of all weights (pretraining), or of the adapters alone, where the frozen matrices
//! cost only the gradient of their input. On a CPU everything is a function of weights, batch and seed: a run repeats bit for
//! bit.

mod batch;
mod body;
mod checkpoint;
mod job;
mod lora;
mod optimizer;
mod parameters;
mod publish;
mod random;
mod scorer;

pub use batch::{Batch, Scored};
pub use body::{Body, Executor, ExecutorError, Gradients, Keep, Placed, Tape};
pub use checkpoint::{CheckpointError, Resumed, State};
pub use job::{Job, Speed, Start, clean_up, evaluate_error, model_error};
pub use lora::Lora;
pub use optimizer::{Course, Optimizer};
pub use parameters::{Layout, Linear, Named, initialize, load};
pub use publish::{ModelFiles, write_evaluation, write_json, write_model, writing_error};
pub use random::Random;
pub use scorer::Scorer;
