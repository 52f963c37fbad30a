//! The body in candle's differentiable operations, for devices that the kernels, which are CPU code, cannot reach.
//!
//! Composed of operations that have a gradient: candle's fused norm, rope and softmax have none, and say nothing. All is F32.
//! On a GPU sums may be in another order each time, so a run there repeats to rounding, not to the bit.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{D, Device, Result, Tensor, Var};
use strata_kernels::ops::attention::Sequence;

use super::{Body, Gradients, Keep};
use crate::Batch;
use crate::parameters::{Block, Layout, Linear};

/// A model's tensors on a device, found by where they start in the layout.
#[derive(Clone, Debug)]
pub(super) struct Tensors {
    device: Device,
    by_start: HashMap<usize, Var>,
}

impl Tensors {
    /// Copies `weights`, which have the layout's order, to `device`.
    pub(super) fn new(layout: &Layout, weights: &[f32], device: &Device) -> Result<Self> {
        let place = |(tensor, range): &(strata_model::TensorSpec, Range<usize>)| {
            let var = Var::from_slice(&weights[range.clone()], tensor.shape.as_slice(), device)?;
            Ok((range.start, var))
        };
        Ok(Self {
            device: device.clone(),
            by_start: layout.tensors().iter().map(place).collect::<Result<_>>()?,
        })
    }

    fn var(&self, range: &Range<usize>) -> &Var {
        &self.by_start[&range.start]
    }
}

/// What a forward leaves: log-probabilities that remember how they were computed.
#[derive(Clone, Debug)]
pub(super) struct Graph(Tensor);

impl Graph {
    pub(super) fn log_probs(&self) -> Result<Vec<f32>> {
        self.0.to_vec1()
    }
}

/// One forward.
struct Pass<'a> {
    body: &'a Body,
    weights: &'a Tensors,
    keep: Keep,
    /// Of each row's angles; `[rows, 1, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// Each sequence's first row, its rows, and what its rows may see: 0, or minus infinity; `[rows, rows]`.
    sequences: Vec<(usize, usize, Tensor)>,
}

impl Body {
    pub(super) fn candle_forward(&self, weights: &Tensors, batch: &Batch, keep: Keep) -> Result<Graph> {
        let (config, device) = (&self.config, &weights.device);
        let half = config.head_dim / 2;
        let angle = |position: u32, i: usize| {
            f64::from(position) * f64::from(config.rope_theta).powf(-(i as f64) / half as f64)
        };
        let angles = batch
            .positions
            .iter()
            .flat_map(|&position| (0..half).map(move |i| angle(position, i) as f32));
        let angles = Tensor::from_iter(angles, device)?.reshape((batch.rows(), 1, half))?;
        let mut sequences = Vec::with_capacity(batch.sequences.len());
        let mut start = 0;
        for sequence in &batch.sequences {
            sequences.push((start, sequence.rows(), mask(sequence, device)?));
            start += sequence.rows();
        }
        let pass = Pass {
            body: self,
            weights,
            keep,
            cos: angles.cos()?,
            sin: angles.sin()?,
            sequences,
        };
        pass.log_probs(batch).map(Graph)
    }

    pub(super) fn candle_backward(
        &self,
        weights: &Tensors,
        graph: &Graph,
        coefficients: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let coefficients = Tensor::new(coefficients, &weights.device)?;
        let found = (&graph.0 * coefficients)?.sum_all()?.backward()?;
        let of = |range: &Range<usize>| {
            let missing = || candle_core::Error::Msg("a trained tensor has no gradient".into());
            found.get(weights.var(range)).ok_or_else(missing)
        };
        match gradients {
            Gradients::All(flat) => {
                for (_, range) in self.layout.tensors() {
                    add(&mut flat[range.clone()], of(range)?)?;
                }
            }
            // The chain rule through `W' = W + scale · B · A`.
            Gradients::Adapter {
                lora,
                parameters,
                gradients,
            } => {
                for adapter in lora.adapters() {
                    let place = |range: &Range<usize>, rows: usize, columns: usize| {
                        Tensor::from_slice(&parameters[range.clone()], (rows, columns), &weights.device)
                    };
                    let merged = of(&adapter.base.range)?;
                    let a = place(&adapter.a, lora.rank(), adapter.base.inputs)?;
                    let b = place(&adapter.b, adapter.base.outputs, lora.rank())?;
                    let scale = f64::from(lora.scale());
                    add(&mut gradients[adapter.b.clone()], &(merged.matmul(&a.t()?)? * scale)?)?;
                    add(&mut gradients[adapter.a.clone()], &(b.t()?.matmul(merged)? * scale)?)?;
                }
            }
        }
        Ok(())
    }
}

impl Pass<'_> {
    fn log_probs(&self, batch: &Batch) -> Result<Tensor> {
        let (layout, device) = (&self.body.layout, &self.weights.device);
        let mut x = self
            .weight(&layout.embedding)
            .index_select(&Tensor::new(batch.tokens.as_slice(), device)?, 0)?;
        for block in &layout.blocks {
            x = self.block(block, x)?;
        }
        let rows = Tensor::from_iter(batch.scored.iter().map(|scored| scored.row), device)?;
        let targets = Tensor::from_iter(batch.scored.iter().map(|scored| scored.target), device)?;
        let x = self.norm(&x.index_select(&rows, 0)?, &layout.final_norm)?;
        let logits = x.matmul(&self.weight(&layout.head).t()?)?;
        let chosen = logits.gather(&targets.unsqueeze(1)?, 1)?;
        let most = logits.max_keepdim(1)?.detach();
        let log_sums = logits.broadcast_sub(&most)?.exp()?.sum_keepdim(1)?.log()?;
        (chosen - (log_sums + most)?)?.squeeze(1)
    }

    fn block(&self, block: &Block, x: Tensor) -> Result<Tensor> {
        let config = &self.body.config;
        let (rows, heads, kv_heads, dim) = (x.dim(0)?, config.heads, config.kv_heads, config.head_dim);
        let linear = |x: &Tensor, which: Linear| x.matmul(&self.linear(block, which).t()?);
        let normed = self.norm(&x, &block.input_norm)?;
        let q = self.rope(&linear(&normed, Linear::Q)?.reshape((rows, heads, dim))?)?;
        let k = self.rope(&linear(&normed, Linear::K)?.reshape((rows, kv_heads, dim))?)?;
        let v = linear(&normed, Linear::V)?.reshape((rows, kv_heads, dim))?;
        let out = self.sequences.iter().map(|(start, rows, mask)| {
            let part = |x: &Tensor| x.narrow(0, *start, *rows);
            self.attention(&part(&q)?, &part(&k)?, &part(&v)?, mask)
        });
        let out = Tensor::cat(&out.collect::<Result<Vec<_>>>()?, 0)?;
        let x = (x + linear(&out, Linear::O)?)?;
        let normed = self.norm(&x, &block.post_norm)?;
        let gate = linear(&normed, Linear::Gate)?;
        let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
        let activated = (silu * linear(&normed, Linear::Up)?)?;
        x + linear(&activated, Linear::Down)?
    }

    /// Attention within one sequence: `q` is `[rows, heads, dim]`, `k` and `v` are `[rows, kv_heads, dim]`.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (rows, heads, dim) = q.dims3()?;
        let kv_heads = k.dim(1)?;
        let group = heads / kv_heads;
        // Heads that share keys follow one another: `[heads, rows, dim]`.
        let shared = |x: &Tensor| {
            let x = x.transpose(0, 1)?.unsqueeze(1)?;
            x.broadcast_as((kv_heads, group, rows, dim))?
                .contiguous()?
                .reshape((heads, rows, dim))
        };
        let q = q.transpose(0, 1)?.contiguous()?;
        let scores = (q.matmul(&shared(k)?.transpose(1, 2)?.contiguous()?)? / (dim as f64).sqrt())?;
        let scores = scores.broadcast_add(mask)?;
        let shares = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let shares = shares.broadcast_div(&shares.sum_keepdim(D::Minus1)?)?;
        shares
            .matmul(&shared(v)?)?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((rows, heads * dim))
    }

    fn norm(&self, x: &Tensor, gain: &Range<usize>) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let deviation = (mean_square + f64::from(self.body.config.norm_eps))?.sqrt()?;
        x.broadcast_div(&deviation)?.broadcast_mul(&self.weight(gain))
    }

    /// Turns the halves of each head against one another, as Hugging Face's Llama does.
    fn rope(&self, x: &Tensor) -> Result<Tensor> {
        let half = self.body.config.head_dim / 2;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let low = (a.broadcast_mul(&self.cos)? - b.broadcast_mul(&self.sin)?)?;
        let high = (b.broadcast_mul(&self.cos)? + a.broadcast_mul(&self.sin)?)?;
        Tensor::cat(&[low, high], 2)
    }

    /// A tensor that only the training of all weights changes.
    fn weight(&self, range: &Range<usize>) -> Tensor {
        self.leaf(range, self.keep == Keep::ForAll)
    }

    /// A matrix that adapters change too.
    fn linear(&self, block: &Block, which: Linear) -> Tensor {
        self.leaf(&block.linear(which).range, self.keep != Keep::Nothing)
    }

    /// What is not trained is detached: no gradient is computed for it, and nothing kept.
    fn leaf(&self, range: &Range<usize>, trained: bool) -> Tensor {
        let var = self.weights.var(range);
        match trained {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        }
    }
}

/// 0 where a row (first index) sees another (second), else minus infinity: rows see what is before them in the trunk and
/// in their own branch.
fn mask(sequence: &Sequence, device: &Device) -> Result<Tensor> {
    let branches = sequence.branches.iter().enumerate();
    let part_of_row: Vec<usize> = std::iter::repeat_n(0, sequence.trunk)
        .chain(branches.flat_map(|(branch, &rows)| std::iter::repeat_n(branch + 1, rows)))
        .collect();
    let rows = sequence.rows();
    let sees =
        |row: usize, other: usize| other <= row && (part_of_row[other] == 0 || part_of_row[other] == part_of_row[row]);
    let values = (0..rows * rows).map(|i| {
        if sees(i / rows, i % rows) {
            0.0
        } else {
            f32::NEG_INFINITY
        }
    });
    Tensor::from_iter(values, device)?.reshape((rows, rows))
}

/// Adds a tensor's values to a buffer on the host.
fn add(buffer: &mut [f32], tensor: &Tensor) -> Result<()> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    buffer.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    Ok(())
}
