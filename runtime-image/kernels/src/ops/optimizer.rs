//! AdamW in one pass over the parameters, and the gradient norm that clipping needs.

use super::vectorized;
use crate::pool::{self, Disjoint};

/// Elements a chunk has at least; also the block whose squares are summed in f32 lanes before f64.
const BLOCK: usize = 1 << 14;

/// What a step of AdamW (Loshchilov and Hutter 2019) needs besides the parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

#[derive(Clone, Copy)]
struct Factors {
    keep: f32,
    step_size: f32,
    inverse_root_bias2: f32,
    gradient_scale: f32,
}

vectorized! {
    fn update(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], adam: AdamW, factors: Factors) {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * factors.gradient_scale;
            *m = adam.beta1 * *m + (1.0 - adam.beta1) * g;
            *v = adam.beta2 * *v + (1.0 - adam.beta2) * g * g;
            *p = *p * factors.keep - factors.step_size * *m / (v.sqrt() * factors.inverse_root_bias2 + adam.epsilon);
        }
    }
}

/// One step in place: `step` counts from 1; gradients are multiplied by `gradient_scale` first (for clipping).
pub fn adamw_step(
    parameters: &mut [f32],
    moments: (&mut [f32], &mut [f32]),
    gradients: &[f32],
    adam: AdamW,
    step: u64,
    gradient_scale: f32,
) {
    let len = parameters.len();
    assert!(
        [moments.0.len(), moments.1.len(), gradients.len()] == [len; 3],
        "adamw: shapes differ"
    );
    let bias = |beta: f32| 1.0 - f64::from(beta).powi(step.min(i32::MAX as u64) as i32);
    let factors = Factors {
        keep: 1.0 - adam.learning_rate * adam.weight_decay,
        step_size: (f64::from(adam.learning_rate) / bias(adam.beta1)) as f32,
        inverse_root_bias2: (1.0 / bias(adam.beta2).sqrt()) as f32,
        gradient_scale,
    };
    let (p, m, v) = (
        Disjoint::new(parameters),
        Disjoint::new(moments.0),
        Disjoint::new(moments.1),
    );
    pool::parallel_for_min(len, BLOCK, |range| {
        // SAFETY: chunks are disjoint.
        let (p, m, v) = unsafe {
            (
                p.slice_mut(range.clone()),
                m.slice_mut(range.clone()),
                v.slice_mut(range.clone()),
            )
        };
        update(p, m, v, &gradients[range], adam, factors);
    });
}

/// Sum of squares of `values`, the same for any number of threads.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let mut sums = vec![0f64; values.len().div_ceil(BLOCK)];
    let out = Disjoint::new(&mut sums);
    pool::parallel_for(values.len().div_ceil(BLOCK), |range| {
        for block in range {
            let block_values = &values[block * BLOCK..values.len().min((block + 1) * BLOCK)];
            // SAFETY: each block is given to one chunk.
            let sum = unsafe { out.slice_mut(block..block + 1) };
            sum[0] = block_values.chunks(256).map(|x| f64::from(square(x))).sum();
        }
    });
    sums.iter().sum()
}

vectorized! {
    fn square(x: &[f32]) -> f32 {
        super::dot(x, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_equal_pytorch() {
        // torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), p = [1, -2],
        // gradients [0.5, -1], then [0.1, 0.3]. By hand: with m̂ = m/(1-β1^t), v̂ = v/(1-β2^t):
        // step 1: p = p·0.99 - 0.1·sign(g) → [0.89, -1.88];
        // step 2: m = [0.055, -0.06], v = [0.012375, 0.052]; m̂ = m/0.19, v̂ = v/0.0975;
        //         p = [0.8811 - 0.1·0.289474/0.356263, -1.8612 + 0.1·0.315789/0.730297].
        let adam = AdamW {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
        };
        let (mut p, mut m, mut v) = (vec![1.0, -2.0], vec![0.0; 2], vec![0.0; 2]);
        adamw_step(&mut p, (&mut m, &mut v), &[1.0, -2.0], adam, 1, 0.5);
        assert!((p[0] - 0.89).abs() < 1e-6 && (p[1] + 1.88).abs() < 1e-6, "{p:?}");
        adamw_step(&mut p, (&mut m, &mut v), &[0.1, 0.3], adam, 2, 1.0);
        assert!(
            (p[0] - 0.799_847).abs() < 1e-5 && (p[1] + 1.817_959).abs() < 1e-5,
            "{p:?}"
        );
    }

    #[test]
    fn squares_are_summed_exactly_over_blocks() {
        assert_eq!(sum_of_squares(&vec![2.0; 3 * BLOCK + 5]), 4.0 * (3 * BLOCK + 5) as f64);
    }
}
