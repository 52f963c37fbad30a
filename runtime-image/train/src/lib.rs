//! The training executor: candle tensors and custom ops over the kernels, own optimizer.
