//! The decoder body of the Llama family: one shape, computed by one of two executors.
//!
//! ```text
//! body::kernels   forward and backward written out over `strata-kernels`: CPU code, the same bits every time
//! body::candle    the same decoder in candle's differentiable operations: what a CUDA build trains with
//! ```
//!
//! Each is the other one's test: log-probabilities and the gradient of every parameter agree.

mod candle;
mod kernels;

use strata_contract::FailureReason;
use strata_model::ModelConfig;
use strata_stage::StageError;

use crate::Batch;
use crate::lora::Lora;
use crate::parameters::Layout;

/// What computes a body.
#[derive(Clone, Debug)]
pub enum Executor {
    /// The kernels, on the CPU.
    Kernels,
    /// candle, on any of its devices.
    Candle(candle_core::Device),
}

impl Executor {
    /// The fastest one of this build on this machine: candle on the first GPU in a CUDA build, else the kernels.
    ///
    /// # Errors
    /// There is a GPU, but it cannot be used.
    pub fn detect() -> Result<Self, ExecutorError> {
        // What NVIDIA's container runtime puts into a pod that was given a GPU.
        let has_gpu = std::path::Path::new("/dev/nvidiactl").exists();
        match cfg!(feature = "cuda") && has_gpu {
            true => Ok(Self::Candle(candle_core::Device::new_cuda(0)?)),
            false => Ok(Self::Kernels),
        }
    }

    /// What it is, in a word, for a log line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kernels => "cpu kernels",
            Self::Candle(device) if device.is_cuda() => "candle on cuda",
            Self::Candle(_) => "candle on cpu",
        }
    }
}

/// The device of an executor failed: out of memory, or a fault of its driver.
#[derive(Debug, thiserror::Error)]
#[error("the accelerator failed: {0}")]
pub struct ExecutorError(#[from] candle_core::Error);

impl From<ExecutorError> for StageError {
    fn from(error: ExecutorError) -> Self {
        Self::new(FailureReason::Internal, error.to_string())
    }
}

/// A decoder of one shape, without its weights: they are an argument, so that the same body computes policy and reference.
#[derive(Clone, Debug)]
pub struct Body {
    config: ModelConfig,
    layout: Layout,
    executor: Executor,
}

/// Weights where the executor reads them; made by [`Body::place`].
pub struct Placed<'a>(At<'a>);

enum At<'a> {
    Host(&'a [f32]),
    Device(candle::Tensors),
}

/// What a forward keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Only the log-probabilities: no backward follows.
    Nothing,
    /// What a backward with [`Gradients::Adapter`] needs.
    ForAdapters,
    /// What a backward with [`Gradients::All`] needs.
    ForAll,
}

/// Where backward adds the gradients.
pub enum Gradients<'a> {
    /// Of all weights; the buffer has the weights' layout.
    All(&'a mut [f32]),
    /// Of the adapters alone.
    Adapter {
        /// The adapters' shapes.
        lora: &'a Lora,
        /// Their parameters.
        parameters: &'a [f32],
        /// The gradients of those.
        gradients: &'a mut [f32],
    },
}

/// Buffers of a pass; kept between passes, so that memory is touched for the first time only once.
#[derive(Clone, Debug, Default)]
pub struct Tape {
    kernels: kernels::Tape,
    graph: Option<candle::Graph>,
    /// What the graph computed, on the host.
    log_probs: Vec<f32>,
    /// What the last forward kept.
    kept: Option<Keep>,
}

impl Body {
    /// The body of a model of this shape.
    pub fn new(config: &ModelConfig, executor: Executor) -> Self {
        Self {
            config: config.clone(),
            layout: Layout::new(config),
            executor,
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where its weights are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What computes it.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Brings weights, in the layout's order, to where the executor reads them: a borrow on the CPU, a copy on a GPU.
    ///
    /// Panics if they are not as many as the layout says.
    ///
    /// # Errors
    /// The device has no room for them.
    pub fn place<'a>(&self, weights: &'a [f32]) -> Result<Placed<'a>, ExecutorError> {
        assert_eq!(weights.len(), self.layout.len(), "the weights are another model's");
        Ok(Placed(match &self.executor {
            Executor::Kernels => At::Host(weights),
            Executor::Candle(device) => At::Device(candle::Tensors::new(&self.layout, weights, device)?),
        }))
    }

    /// Log-probabilities of what `batch` asks for. [`Body::backward`] can follow for what `keep` says.
    ///
    /// Panics on tokens or positions outside of the model's shape.
    ///
    /// # Errors
    /// The device failed.
    pub fn forward<'t>(
        &self,
        weights: &Placed,
        batch: &Batch,
        tape: &'t mut Tape,
        keep: Keep,
    ) -> Result<&'t [f32], ExecutorError> {
        batch.check(self.config.vocab_size, self.config.max_positions);
        tape.kept = Some(keep);
        match &weights.0 {
            At::Host(weights) => Ok(self.kernels_forward(weights, batch, &mut tape.kernels, keep != Keep::Nothing)),
            At::Device(weights) => {
                tape.graph = None; // its memory is needed for the next one
                let graph = self.candle_forward(weights, batch, keep)?;
                tape.log_probs = graph.log_probs()?;
                tape.graph = (keep != Keep::Nothing).then_some(graph);
                Ok(&tape.log_probs)
            }
        }
    }

    /// Adds the gradient of `sum of coefficients[i] · log_probs[i]`, which the last forward of `tape` computed from the same
    /// weights and batch.
    ///
    /// Panics if that forward did not keep what these gradients need.
    ///
    /// # Errors
    /// The device failed.
    pub fn backward(
        &self,
        weights: &Placed,
        batch: &Batch,
        tape: &mut Tape,
        coefficients: &[f32],
        gradients: &mut Gradients,
    ) -> Result<(), ExecutorError> {
        let needed = match gradients {
            Gradients::All(_) => Keep::ForAll,
            Gradients::Adapter { .. } => Keep::ForAdapters,
        };
        assert_eq!(
            tape.kept,
            Some(needed),
            "the forward before this backward kept something else"
        );
        match &weights.0 {
            At::Host(weights) => self.kernels_backward(weights, batch, &mut tape.kernels, coefficients, gradients),
            At::Device(weights) => {
                let graph = tape.graph.take().expect("a forward that keeps leaves a graph");
                self.candle_backward(weights, &graph, coefficients, gradients)?;
            }
        }
        Ok(())
    }
}
