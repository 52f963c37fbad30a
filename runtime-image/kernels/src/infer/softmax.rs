//! Probabilities of tokens from logits.

use crate::ops::{exp, vectorized};

const LANES: usize = 16;

vectorized! {
    fn largest(values: &[f32]) -> f32 {
        let (chunks, tail) = values.as_chunks::<LANES>();
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
            }
        }
        lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

vectorized! {
    fn sum_exp(values: &[f32], largest: f32) -> f32 {
        let (chunks, tail) = values.as_chunks::<LANES>();
        let mut lanes = [0f32; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] += exp(chunk[lane] - largest);
            }
        }
        lanes.iter().sum::<f32>() + tail.iter().map(|x| exp(x - largest)).sum::<f32>()
    }
}

/// `ln Σ e^x` of the logits.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let largest = largest(logits);
    largest + sum_exp(logits, largest).ln()
}

/// The log-probability of token `token`.
pub fn log_prob(logits: &[f32], token: usize) -> f32 {
    logits[token] - log_sum_exp(logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_to_one_for_small_and_large_logits() {
        for offset in [0.0, 1e4, -1e4] {
            let logits: Vec<f32> = (0..1001).map(|i| ((i * 37) % 101) as f32 * 0.1 + offset).collect();
            let sum: f64 = (0..logits.len())
                .map(|token| f64::from(log_prob(&logits, token)).exp())
                .sum();
            assert!((sum - 1.0).abs() < 3e-3, "{offset}: {sum}");
        }
        assert!((log_prob(&[0.0, 3f32.ln()], 1) - 0.75f32.ln()).abs() < 1e-6);
    }
}
