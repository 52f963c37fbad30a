//! What computes a model, as the engine sees it: batches in, logits out.

use super::candle::CandleExecutor;
use super::executor::{Batch, Executor};
use crate::error::ServeError;

/// Computes a model over a cache of blocks. What fails is the device, not a request: the engine ends, and a new one starts clean.
pub trait Forward: Send {
    /// Copies all of block `from` over block `to`.
    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ServeError>;

    /// Computes a batch. `logits` gets, for each row that wants them and in order, the row's index and its logits.
    fn forward(&mut self, batch: &Batch, logits: &mut dyn FnMut(usize, &[f32])) -> Result<(), ServeError>;

    /// Bytes of weights that computing one token reads.
    fn weight_bytes(&self) -> usize;

    /// Itself, where its blocks are in memory and can be copied out of the cache and back.
    fn on_cpu(&mut self) -> Option<&mut Executor>;
}

impl Forward for Executor {
    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ServeError> {
        Executor::copy_block(self, from, to);
        Ok(())
    }

    fn forward(&mut self, batch: &Batch, logits: &mut dyn FnMut(usize, &[f32])) -> Result<(), ServeError> {
        Executor::forward(self, batch, logits);
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        Executor::weight_bytes(self)
    }

    fn on_cpu(&mut self) -> Option<&mut Executor> {
        Some(self)
    }
}

impl Forward for CandleExecutor {
    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ServeError> {
        CandleExecutor::copy_block(self, from, to).map_err(failed)
    }

    fn forward(&mut self, batch: &Batch, logits: &mut dyn FnMut(usize, &[f32])) -> Result<(), ServeError> {
        CandleExecutor::forward(self, batch, logits).map_err(failed)
    }

    fn weight_bytes(&self) -> usize {
        CandleExecutor::weight_bytes(self)
    }

    fn on_cpu(&mut self) -> Option<&mut Executor> {
        None
    }
}

fn failed(error: candle_core::Error) -> ServeError {
    ServeError::Device(error.to_string())
}
