//! The body over the kernels: forward and backward on a packed batch.
//!
//! Saved for backward, per block: its input, queries, keys, values, attention, the residual between the halves, gate and up.
//! What costs only a pass over the rows (norms, silu · up) is computed again. Logits exist only for rows that are asked for
//! something, and only in blocks.

use std::ops::Range;

use strata_kernels::ops::activation::{silu_mul, silu_mul_backward};
use strata_kernels::ops::attention::{self, Heads, Inputs, attention, attention_backward};
use strata_kernels::ops::embedding::{embed, embed_backward};
use strata_kernels::ops::log_prob::{Head, log_probs, log_probs_backward};
use strata_kernels::ops::matmul::{Write, matmul_nn, matmul_nt, matmul_tn};
use strata_kernels::ops::rms_norm::{rms_norm, rms_norm_backward};
use strata_kernels::ops::rope::{RopeTable, Turn, rope};

use super::{Body, Gradients};
use crate::Batch;
use crate::parameters::{Block, Linear, Matrix};

/// What a block saves.
#[derive(Clone, Debug, Default)]
struct Saved {
    x: Vec<f32>,
    inverse1: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    log_sums: Vec<f32>,
    middle: Vec<f32>,
    inverse2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// Buffers of a pass.
#[derive(Clone, Debug, Default)]
pub(super) struct Tape {
    saved: Vec<Saved>,
    /// For the positions seen so far: a model may know far more than it is trained on.
    rope: RopeTable,
    /// The residual stream; in backward its gradient.
    x: Vec<f32>,
    normed: Vec<f32>,
    activated: Vec<f32>,
    last: Vec<f32>,
    last_normed: Vec<f32>,
    last_inverse: Vec<f32>,
    targets: Vec<u32>,
    log_probs: Vec<f32>,
    log_sums: Vec<f32>,
    scratch: Scratch,
}

/// Gradients of a block's inner values.
#[derive(Clone, Debug, Default)]
struct Scratch {
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    activated: Vec<f32>,
    last: Vec<f32>,
    last_normed: Vec<f32>,
}

/// Sets the length; old contents stay, since every user writes before it reads.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl Body {
    /// What attention and its backward read; borrows the three buffers alone, as the others are written beside them.
    fn inputs<'a>(&self, q: &'a [f32], k: &'a [f32], v: &'a [f32], batch: &'a Batch) -> Inputs<'a> {
        let heads = Heads {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
        };
        let sequences = &batch.sequences;
        Inputs {
            q,
            k,
            v,
            heads,
            sequences,
        }
    }

    /// Log-probabilities of what `batch` asks for. With `keep`, each block saves for itself, so that backward can follow.
    pub(super) fn kernels_forward<'t>(
        &self,
        weights: &[f32],
        batch: &Batch,
        tape: &'t mut Tape,
        keep: bool,
    ) -> &'t [f32] {
        let (rows, hidden) = (batch.rows(), self.config.hidden_size);
        let positions = batch.positions.iter().max().map_or(0, |&most| most as usize + 1);
        if tape.rope.positions() < positions {
            let positions = positions.next_power_of_two().min(self.config.max_positions);
            tape.rope = RopeTable::new(positions, self.config.head_dim, f64::from(self.config.rope_theta));
        }
        tape.saved
            .resize_with(if keep { self.config.layers } else { 1 }, Saved::default);
        embed(
            sized(&mut tape.x, rows * hidden),
            &weights[self.layout.embedding.clone()],
            &batch.tokens,
            hidden,
        );
        for (layer, block) in self.layout.blocks.iter().enumerate() {
            self.block_forward(weights, block, batch, if keep { layer } else { 0 }, tape);
        }
        let asked = batch.scored.len();
        let last = sized(&mut tape.last, asked * hidden);
        for (last, scored) in last.chunks_exact_mut(hidden).zip(&batch.scored) {
            let row = scored.row as usize;
            last.copy_from_slice(&tape.x[row * hidden..(row + 1) * hidden]);
        }
        let normed = sized(&mut tape.last_normed, asked * hidden);
        let gain = &weights[self.layout.final_norm.clone()];
        rms_norm(
            normed,
            sized(&mut tape.last_inverse, asked),
            last,
            gain,
            self.config.norm_eps,
        );
        tape.targets.clear();
        tape.targets.extend(batch.scored.iter().map(|scored| scored.target));
        let head = Head {
            hidden: normed,
            weight: &weights[self.layout.head.clone()],
            width: hidden,
            targets: &tape.targets,
        };
        log_probs(
            sized(&mut tape.log_probs, asked),
            sized(&mut tape.log_sums, asked),
            head,
        );
        &tape.log_probs
    }

    fn block_forward(&self, weights: &[f32], block: &Block, batch: &Batch, slot: usize, tape: &mut Tape) {
        let Tape {
            saved,
            rope: table,
            x,
            normed,
            activated,
            ..
        } = tape;
        let saved = &mut saved[slot];
        let (rows, eps) = (batch.rows(), self.config.norm_eps);
        let linear = |y: &mut Vec<f32>, input: &[f32], which: Linear| {
            let matrix = block.linear(which);
            let shape = [rows, matrix.outputs, matrix.inputs];
            matmul_nt(
                sized(y, rows * matrix.outputs),
                input,
                &weights[matrix.range.clone()],
                shape,
                Write::Set,
            );
        };
        let add_linear = |x: &mut [f32], input: &[f32], which: Linear| {
            let matrix = block.linear(which);
            matmul_nt(
                x,
                input,
                &weights[matrix.range.clone()],
                [rows, matrix.outputs, matrix.inputs],
                Write::Add,
            );
        };
        sized(&mut saved.x, x.len()).copy_from_slice(x);
        let gain = &weights[block.input_norm.clone()];
        rms_norm(sized(normed, x.len()), sized(&mut saved.inverse1, rows), x, gain, eps);
        linear(&mut saved.q, normed, Linear::Q);
        linear(&mut saved.k, normed, Linear::K);
        linear(&mut saved.v, normed, Linear::V);
        rope(&mut saved.q, &batch.positions, table, Turn::Forward);
        rope(&mut saved.k, &batch.positions, table, Turn::Forward);
        let inputs = self.inputs(&saved.q, &saved.k, &saved.v, batch);
        attention(
            sized(&mut saved.out, saved.q.len()),
            sized(&mut saved.log_sums, rows * self.config.heads),
            inputs,
        );
        add_linear(x, &saved.out, Linear::O);
        sized(&mut saved.middle, x.len()).copy_from_slice(x);
        let gain = &weights[block.post_norm.clone()];
        rms_norm(sized(normed, x.len()), sized(&mut saved.inverse2, rows), x, gain, eps);
        linear(&mut saved.gate, normed, Linear::Gate);
        linear(&mut saved.up, normed, Linear::Up);
        silu_mul(sized(activated, saved.gate.len()), &saved.gate, &saved.up);
        add_linear(x, activated, Linear::Down);
    }

    /// Adds the gradient of `sum of coefficients[i] · log_probs[i]`, which the last forward of `tape` computed and kept.
    pub(super) fn kernels_backward(
        &self,
        weights: &[f32],
        batch: &Batch,
        tape: &mut Tape,
        coefficients: &[f32],
        gradients: &mut Gradients,
    ) {
        let (rows, hidden, asked) = (batch.rows(), self.config.hidden_size, batch.scored.len());
        let head = Head {
            hidden: &tape.last_normed,
            weight: &weights[self.layout.head.clone()],
            width: hidden,
            targets: &tape.targets,
        };
        let dnormed = sized(&mut tape.scratch.last_normed, asked * hidden);
        log_probs_backward(
            dnormed,
            all(gradients, &self.layout.head),
            coefficients,
            &tape.log_sums,
            head,
        );
        let dlast = sized(&mut tape.scratch.last, asked * hidden);
        dlast.fill(0.0);
        let gain = &weights[self.layout.final_norm.clone()];
        rms_norm_backward(
            dlast,
            all(gradients, &self.layout.final_norm),
            dnormed,
            &tape.last,
            gain,
            &tape.last_inverse,
        );
        // From here on `x` is the gradient of the residual stream.
        let dx = sized(&mut tape.x, rows * hidden);
        dx.fill(0.0);
        for (dlast, scored) in dlast.chunks_exact(hidden).zip(&batch.scored) {
            let row = scored.row as usize;
            dx[row * hidden..(row + 1) * hidden]
                .iter_mut()
                .zip(dlast)
                .for_each(|(dx, d)| *dx += d);
        }
        for (layer, block) in self.layout.blocks.iter().enumerate().rev() {
            self.block_backward(weights, (layer, block), batch, tape, gradients);
        }
        if let Some(dembedding) = all(gradients, &self.layout.embedding) {
            embed_backward(dembedding, &tape.x, &batch.tokens, hidden);
        }
    }

    fn block_backward(
        &self,
        weights: &[f32],
        (layer, block): (usize, &Block),
        batch: &Batch,
        tape: &mut Tape,
        gradients: &mut Gradients,
    ) {
        let Tape {
            saved,
            rope: table,
            x: dx,
            normed,
            activated,
            scratch,
            ..
        } = tape;
        let saved = &saved[layer];
        let (rows, eps) = (batch.rows(), self.config.norm_eps);
        let input_gradient = |dinput: &mut [f32], dy: &[f32], which: Linear, write: Write| {
            let Matrix { range, outputs, inputs } = block.linear(which);
            matmul_nn(dinput, dy, &weights[range.clone()], [rows, *inputs, *outputs], write);
        };

        // x = middle + down(silu(gate) · up), gate and up from norm(middle).
        let gain = &weights[block.post_norm.clone()];
        rms_norm(
            sized(normed, dx.len()),
            sized(&mut scratch.last, rows),
            &saved.middle,
            gain,
            eps,
        );
        silu_mul(sized(activated, saved.gate.len()), &saved.gate, &saved.up);
        let dactivated = sized(&mut scratch.activated, saved.gate.len());
        input_gradient(dactivated, dx, Linear::Down, Write::Set);
        weight_gradient(gradients, (layer, block), Linear::Down, dx, activated, rows);
        let (dgate, dup) = (
            sized(&mut scratch.gate, saved.gate.len()),
            sized(&mut scratch.up, saved.up.len()),
        );
        silu_mul_backward(dgate, dup, dactivated, &saved.gate, &saved.up);
        weight_gradient(gradients, (layer, block), Linear::Gate, dgate, normed, rows);
        weight_gradient(gradients, (layer, block), Linear::Up, dup, normed, rows);
        let dnormed = sized(&mut scratch.normed, dx.len());
        input_gradient(dnormed, dgate, Linear::Gate, Write::Set);
        input_gradient(dnormed, dup, Linear::Up, Write::Add);
        rms_norm_backward(
            dx,
            all(gradients, &block.post_norm),
            dnormed,
            &saved.middle,
            gain,
            &saved.inverse2,
        );

        // middle = x + o(attention(q, k, v)), all three from norm(x).
        let dout = sized(&mut scratch.out, saved.out.len());
        input_gradient(dout, dx, Linear::O, Write::Set);
        weight_gradient(gradients, (layer, block), Linear::O, dx, &saved.out, rows);
        let inputs = self.inputs(&saved.q, &saved.k, &saved.v, batch);
        let (dq, dk, dv) = (
            sized(&mut scratch.q, saved.q.len()),
            sized(&mut scratch.k, saved.k.len()),
            sized(&mut scratch.v, saved.v.len()),
        );
        attention_backward(
            attention::Gradients { dq, dk, dv },
            dout,
            &saved.out,
            &saved.log_sums,
            inputs,
        );
        rope(dq, &batch.positions, table, Turn::Backward);
        rope(dk, &batch.positions, table, Turn::Backward);
        let gain = &weights[block.input_norm.clone()];
        rms_norm(normed, sized(&mut scratch.last, rows), &saved.x, gain, eps);
        weight_gradient(gradients, (layer, block), Linear::Q, dq, normed, rows);
        weight_gradient(gradients, (layer, block), Linear::K, dk, normed, rows);
        weight_gradient(gradients, (layer, block), Linear::V, dv, normed, rows);
        if layer == 0 && matches!(gradients, Gradients::Adapter { .. }) {
            return; // below are only frozen embeddings
        }
        input_gradient(dnormed, dq, Linear::Q, Write::Set);
        input_gradient(dnormed, dk, Linear::K, Write::Add);
        input_gradient(dnormed, dv, Linear::V, Write::Add);
        rms_norm_backward(
            dx,
            all(gradients, &block.input_norm),
            dnormed,
            &saved.x,
            gain,
            &saved.inverse1,
        );
    }
}

/// The gradients' part for a tensor, if all weights are trained.
fn all<'g>(gradients: &'g mut Gradients, range: &Range<usize>) -> Option<&'g mut [f32]> {
    match gradients {
        Gradients::All(flat) => Some(&mut flat[range.clone()]),
        Gradients::Adapter { .. } => None,
    }
}

/// Adds the gradient of a linear layer's own parameters, from its input and the gradient of its output.
fn weight_gradient(
    gradients: &mut Gradients,
    (layer, block): (usize, &Block),
    which: Linear,
    dy: &[f32],
    input: &[f32],
    rows: usize,
) {
    let Matrix { range, outputs, inputs } = block.linear(which);
    match gradients {
        Gradients::All(flat) => matmul_tn(
            &mut flat[range.clone()],
            dy,
            input,
            [*outputs, *inputs, rows],
            Write::Add,
        ),
        Gradients::Adapter {
            lora,
            parameters,
            gradients,
        } => {
            lora.add_gradient((layer, which), parameters, gradients, dy, input, rows);
        }
    }
}
