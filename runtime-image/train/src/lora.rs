//! Low-rank adapters (Hu et al. 2021) on every linear layer of the blocks: `W' = W + alpha / rank · B · A`.
//!
//! The policy is computed with merged weights: one product a layer instead of three, and what is evaluated is exactly what
//! is published. Merging costs one pass over the matrices per optimizer step. The reference is the base weights themselves.

use std::ops::Range;

use strata_kernels::ops::matmul::{Write, matmul_nn, matmul_nt, matmul_tn};

use crate::Random;
use crate::parameters::{Layout, Linear, Matrix};

/// One adapter: `a` is `[rank, inputs]`, `b` is `[outputs, rank]`.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    layer: usize,
    linear: Linear,
    pub(crate) base: Matrix,
    pub(crate) a: Range<usize>,
    pub(crate) b: Range<usize>,
}

/// The adapters of a model; their parameters are one flat buffer.
#[derive(Clone, Debug)]
pub struct Lora {
    rank: usize,
    scale: f32,
    adapters: Vec<Adapter>,
}

impl Lora {
    /// Adapters of `rank` (at least 1) on all linear layers, scaled by `alpha / rank`.
    pub fn new(layout: &Layout, rank: usize, alpha: f64) -> Self {
        let mut end = 0;
        let mut take = |len: usize| {
            end += len;
            end - len..end
        };
        let mut adapters = Vec::with_capacity(layout.blocks.len() * Linear::ALL.len());
        for (layer, block) in layout.blocks.iter().enumerate() {
            for linear in Linear::ALL {
                let base = block.linear(linear).clone();
                let (a, b) = (take(rank * base.inputs), take(base.outputs * rank));
                adapters.push(Adapter {
                    layer,
                    linear,
                    base,
                    a,
                    b,
                });
            }
        }
        Self {
            rank,
            scale: (alpha / rank as f64) as f32,
            adapters,
        }
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.adapters.last().map_or(0, |adapter| adapter.b.end)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// `alpha / rank`.
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    pub(crate) fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// Fresh parameters: `A` uniform in ±1/sqrt(inputs) as in PEFT, `B` zero, so that the policy starts as the reference.
    pub fn initialize(&self, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed, 1);
        let mut parameters = vec![0f32; self.len()];
        for adapter in &self.adapters {
            let bound = 1.0 / (adapter.base.inputs as f64).sqrt();
            parameters[adapter.a.clone()]
                .iter_mut()
                .for_each(|a| *a = ((2.0 * random.uniform() - 1.0) * bound) as f32);
        }
        parameters
    }

    /// Sets `merged` to `base` plus the adapters; `merged` was a copy of `base` once, of which only the adapted matrices
    /// have changed since.
    pub fn merge(&self, merged: &mut [f32], base: &[f32], parameters: &[f32]) {
        let mut scaled = Vec::new();
        for Adapter {
            base: Matrix { range, outputs, inputs },
            a,
            b,
            ..
        } in &self.adapters
        {
            scaled.clear();
            scaled.extend(parameters[b.clone()].iter().map(|b| b * self.scale));
            let matrix = &mut merged[range.clone()];
            matrix.copy_from_slice(&base[range.clone()]);
            matmul_nn(
                matrix,
                &scaled,
                &parameters[a.clone()],
                [*outputs, *inputs, self.rank],
                Write::Add,
            );
        }
    }

    /// Adds the gradient of one adapter's parameters: with `u = x · Aᵀ` and `v = dy · B`, `dB = scale · dyᵀ · u` and
    /// `dA = scale · vᵀ · x`. The full `dyᵀ · x` is never formed.
    pub(crate) fn add_gradient(
        &self,
        (layer, linear): (usize, Linear),
        parameters: &[f32],
        gradients: &mut [f32],
        dy: &[f32],
        input: &[f32],
        rows: usize,
    ) {
        let adapter = &self.adapters[layer * Linear::ALL.len() + linear as usize];
        let Matrix { outputs, inputs, .. } = adapter.base;
        let rank = self.rank;
        let (mut u, mut v) = (vec![0f32; rows * rank], vec![0f32; rows * rank]);
        matmul_nt(
            &mut u,
            input,
            &parameters[adapter.a.clone()],
            [rows, rank, inputs],
            Write::Set,
        );
        matmul_nn(
            &mut v,
            dy,
            &parameters[adapter.b.clone()],
            [rows, rank, outputs],
            Write::Set,
        );
        u.iter_mut().chain(&mut v).for_each(|value| *value *= self.scale);
        matmul_tn(
            &mut gradients[adapter.b.clone()],
            dy,
            &u,
            [outputs, rank, rows],
            Write::Add,
        );
        matmul_tn(
            &mut gradients[adapter.a.clone()],
            &v,
            input,
            [rank, inputs, rows],
            Write::Add,
        );
    }

    /// Every tensor with its name in PEFT's `adapter_model.safetensors`, its shape and its place.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>, Range<usize>)> {
        let name = |adapter: &Adapter, part: &str| {
            format!(
                "base_model.model.model.layers.{}.{}.{part}.weight",
                adapter.layer,
                adapter.linear.part()
            )
        };
        let both = self.adapters.iter().flat_map(|adapter| {
            [
                (
                    name(adapter, "lora_A"),
                    vec![self.rank, adapter.base.inputs],
                    adapter.a.clone(),
                ),
                (
                    name(adapter, "lora_B"),
                    vec![adapter.base.outputs, self.rank],
                    adapter.b.clone(),
                ),
            ]
        });
        both.collect()
    }
}
