//! The gated activation of Llama's feed-forward layer: `y = silu(gate) · up`, `silu(x) = x / (1 + e^-x)`.

use super::{exp, vectorized};
use crate::pool::{self, Disjoint};

/// Elements a chunk has at least.
const MIN_CHUNK: usize = 4096;

vectorized! {
    fn forward(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

vectorized! {
    fn backward(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        for ((((dgate, dup), dy), gate), up) in dgate.iter_mut().zip(dup).zip(dy).zip(gate).zip(up) {
            let sigmoid = 1.0 / (1.0 + exp(-gate));
            let silu = gate * sigmoid;
            *dup = dy * silu;
            *dgate = dy * up * (sigmoid + silu * (1.0 - sigmoid));
        }
    }
}

/// `y = silu(gate) · up`, element by element.
pub fn silu_mul(y: &mut [f32], gate: &[f32], up: &[f32]) {
    assert!(y.len() == gate.len() && y.len() == up.len(), "silu_mul: shapes differ");
    let out = Disjoint::new(y);
    pool::parallel_for_min(gate.len(), MIN_CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        let y = unsafe { out.slice_mut(range.clone()) };
        forward(y, &gate[range.clone()], &up[range]);
    });
}

vectorized! {
    fn gelu_forward(y: &mut [f32], gate: &[f32], up: &[f32]) {
        // gelu(x) = x · (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / π) · (x + 0.044715 x³)
        const TWICE: f32 = 2.0 * 0.797_884_6;
        for ((y, x), up) in y.iter_mut().zip(gate).zip(up) {
            *y = x / (1.0 + exp(-TWICE * (x + 0.044_715 * x * x * x))) * up;
        }
    }
}

vectorized! {
    fn cap(values: &mut [f32], cap: f32) {
        for value in values {
            // tanh(z) = 1 - 2 / (1 + e^2z); beyond ±9 it is ±1 in single precision.
            let z = (*value / cap).clamp(-9.0, 9.0);
            *value = cap * (1.0 - 2.0 / (1.0 + exp(2.0 * z)));
        }
    }
}

/// Replaces each value by `cap · tanh(value / cap)`: Gemma's bound of logits. Inference only.
pub fn soft_cap(values: &mut [f32], cap: f32) {
    let len = values.len();
    let out = Disjoint::new(values);
    pool::parallel_for_min(len, MIN_CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        self::cap(unsafe { out.slice_mut(range) }, cap);
    });
}

/// `y = gelu(gate) · up`, element by element, with GELU in its tanh form: Gemma's activation. Inference only.
pub fn gelu_mul(y: &mut [f32], gate: &[f32], up: &[f32]) {
    assert!(y.len() == gate.len() && y.len() == up.len(), "gelu_mul: shapes differ");
    let out = Disjoint::new(y);
    pool::parallel_for_min(gate.len(), MIN_CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        let y = unsafe { out.slice_mut(range.clone()) };
        gelu_forward(y, &gate[range.clone()], &up[range]);
    });
}

/// Sets the gradients of [`silu_mul`].
pub fn silu_mul_backward(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
    let len = dy.len();
    assert!(
        [dgate.len(), dup.len(), gate.len(), up.len()] == [len; 4],
        "silu_mul: shapes differ"
    );
    let (dgate, dup) = (Disjoint::new(dgate), Disjoint::new(dup));
    pool::parallel_for_min(len, MIN_CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        let (dgate, dup) = unsafe { (dgate.slice_mut(range.clone()), dup.slice_mut(range.clone())) };
        backward(dgate, dup, &dy[range.clone()], &gate[range.clone()], &up[range]);
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, numbers, weigh};
    use super::*;

    #[test]
    fn gelu_is_its_tanh_form() {
        // torch.nn.functional.gelu(torch.tensor([-3., -1., 0., .5, 2., 20.]), approximate="tanh")
        let x = [-3.0, -1.0, 0.0, 0.5, 2.0, 20.0];
        let expected = [-0.003_637_4, -0.158_808_01, 0.0, 0.345_714, 1.954_597_7, 20.0];
        let mut y = [0.0; 6];
        gelu_mul(&mut y, &x, &[1.0; 6]);
        for (got, expected) in y.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{y:?}");
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let (gate, up, dy) = (numbers(1, 37, 4.0), numbers(2, 37, 1.0), numbers(3, 37, 1.0));
        let value = |gate: &[f32], up: &[f32]| {
            let mut y = vec![0.0; 37];
            silu_mul(&mut y, gate, up);
            weigh(&y, &dy)
        };
        let (mut dgate, mut dup) = (vec![0.0; 37], vec![0.0; 37]);
        silu_mul_backward(&mut dgate, &mut dup, &dy, &gate, &up);
        check_gradient("dgate", &gate, &dgate, |gate| value(gate, &up));
        check_gradient("dup", &up, &dup, |up| value(&gate, up));
    }
}
