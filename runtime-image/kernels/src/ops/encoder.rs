//! Operators of encoders (BERT): layer normalization, GELU, and attention that looks both ways. Forward only.
//!
//! Each row's result depends on its own text alone and is summed in one order, so a text gives the same bits alone or among
//! others, on one thread or many.

use super::{dot, exp, maximum, vectorized};
use crate::pool::{self, Disjoint};

/// Elements a chunk has at least.
const MIN_CHUNK: usize = 4096;

/// Sum in lanes, as [`dot`]'s.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
    }
    lanes.iter().sum::<f32>() + tail
}

vectorized! {
    fn layer_norm_row(x: &mut [f32], gain: &[f32], bias: &[f32], eps: f32) {
        let count = x.len() as f32;
        let mean = sum(x) / count;
        x.iter_mut().for_each(|x| *x -= mean);
        let inverse = 1.0 / (dot(x, x) / count + eps).sqrt();
        for ((x, gain), bias) in x.iter_mut().zip(gain).zip(bias) {
            *x = *x * inverse * gain + bias;
        }
    }
}

/// `x = (x − mean) / sqrt(variance + eps) · gain + bias`, for each row of `gain.len()` elements.
pub fn layer_norm(x: &mut [f32], gain: &[f32], bias: &[f32], eps: f32) {
    let width = gain.len();
    assert!(
        bias.len() == width && x.len().is_multiple_of(width),
        "layer_norm: shapes differ"
    );
    let rows = x.len() / width;
    let x = Disjoint::new(x);
    pool::parallel_for_min(rows, 16, |range| {
        for row in range {
            // SAFETY: each row is given to one chunk.
            let x = unsafe { x.slice_mut(row * width..(row + 1) * width) };
            layer_norm_row(x, gain, bias, eps);
        }
    });
}

vectorized! {
    fn gelu_chunk(x: &mut [f32]) {
        for x in x {
            *x = 0.5 * *x * (1.0 + erf(*x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

/// The error function to 2e-7 (Abramowitz and Stegun, 7.1.26), without branches.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let p = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    (1.0 - p * exp(-x * x)).copysign(x)
}

/// `x = x · Φ(x)`, Φ the normal distribution: GELU as BERT has it, not its approximation by tanh.
pub fn gelu(x: &mut [f32]) {
    let len = x.len();
    let x = Disjoint::new(x);
    pool::parallel_for_min(len, MIN_CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        gelu_chunk(unsafe { x.slice_mut(range) });
    });
}

/// The rows of the texts in one matrix of activations: text after text, without padding.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    /// The text's first row and the row after its last, for each row.
    bounds: Vec<(usize, usize)>,
}

impl Texts {
    /// Texts of these lengths.
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut bounds = Vec::new();
        for length in lengths {
            let first = bounds.len();
            bounds.extend(std::iter::repeat_n((first, first + length), length));
        }
        Texts { bounds }
    }

    /// Rows of all texts.
    pub fn rows(&self) -> usize {
        self.bounds.len()
    }
}

vectorized! {
    /// One row's heads: `out = softmax(q · kᵀ / sqrt(d)) · v` over the rows of its text.
    fn attend_row(out: &mut [f32], queries: &[f32], keys: &[f32], values: &[f32], head: usize, scores: &mut [f32]) {
        let width = out.len();
        let scale = 1.0 / (head as f32).sqrt();
        for at in (0..width).step_by(head) {
            for (score, key) in scores.iter_mut().zip(keys.chunks_exact(width)) {
                *score = dot(&queries[at..at + head], &key[at..at + head]) * scale;
            }
            let most = maximum(scores);
            let mut sum = 0.0;
            for score in scores.iter_mut() {
                *score = exp(*score - most);
                sum += *score;
            }
            let out = &mut out[at..at + head];
            out.fill(0.0);
            for (score, value) in scores.iter().zip(values.chunks_exact(width)) {
                let weight = score / sum;
                for (out, value) in out.iter_mut().zip(&value[at..at + head]) {
                    *out += weight * value;
                }
            }
        }
    }
}

/// Attention of every row to all rows of its text, in heads of `head` columns.
///
/// `out`, `queries`, `keys` and `values` have a row for each of `texts`' and the same width. Panics when they do not.
pub fn attend_both_ways(out: &mut [f32], queries: &[f32], keys: &[f32], values: &[f32], texts: &Texts, head: usize) {
    let rows = texts.rows();
    if rows == 0 {
        return;
    }
    let width = out.len() / rows;
    assert!(width.is_multiple_of(head), "heads of {head} in rows of {width}");
    for matrix in [queries, keys, values] {
        assert_eq!(matrix.len(), rows * width, "attention: shapes differ");
    }
    assert_eq!(out.len(), rows * width, "attention: shapes differ");
    let out = Disjoint::new(out);
    pool::parallel_for_min(rows, 4, |range| {
        let mut scores = Vec::new();
        for row in range {
            let (first, end) = texts.bounds[row];
            scores.resize(end - first, 0.0);
            // SAFETY: each row is given to one chunk.
            let out = unsafe { out.slice_mut(row * width..(row + 1) * width) };
            let text = first * width..end * width;
            let own = &queries[row * width..(row + 1) * width];
            attend_row(out, own, &keys[text.clone()], &values[text], head, &mut scores);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::numbers;
    use super::*;

    #[test]
    fn gelu_is_the_normal_distributions() {
        // scipy: x * scipy.stats.norm.cdf(x)
        let expected = [
            (-6.0, -5.919e-9),
            (-2.5, -0.015_524_16),
            (-1.0, -0.158_655_25),
            (-0.1, -0.046_017_22),
            (0.0, 0.0),
            (0.3, 0.185_373_5),
            (1.0, 0.841_344_8),
            (4.0, 3.999_873_3),
        ];
        let mut x: Vec<f32> = expected.iter().map(|(x, _)| *x).collect();
        gelu(&mut x);
        for (got, (x, expected)) in x.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "gelu({x}) = {got}, not {expected}");
        }
    }

    #[test]
    fn rows_are_normalized_and_attend_to_their_own_text_alone() {
        let (width, head) = (24, 8);
        let lengths = [3, 1, 17];
        let texts = Texts::new(lengths);
        let size = texts.rows() * width;
        let [queries, keys, values] = [1, 2, 3].map(|seed| numbers(seed, size, 2.0));
        let mut out = vec![f32::NAN; size];
        attend_both_ways(&mut out, &queries, &keys, &values, &texts, head);
        let mut first = 0;
        for length in lengths {
            let part = first * width..(first + length) * width;
            let mut alone = vec![0.0; part.len()];
            let own = Texts::new([length]);
            attend_both_ways(
                &mut alone,
                &queries[part.clone()],
                &keys[part.clone()],
                &values[part.clone()],
                &own,
                head,
            );
            assert_eq!(alone, out[part.clone()], "alone and among others the same bits");
            let (q, k, v) = (&queries[part.clone()], &keys[part.clone()], &values[part]);
            for row in 0..length {
                for at in 0..width {
                    let columns = at / head * head..(at / head + 1) * head;
                    let score = |key: usize| -> f64 {
                        let product = |i: usize| f64::from(q[row * width + i]) * f64::from(k[key * width + i]);
                        (columns.clone().map(product).sum::<f64>() / (head as f64).sqrt()).exp()
                    };
                    let sum: f64 = (0..length).map(score).sum();
                    let expected: f64 = (0..length)
                        .map(|key| score(key) / sum * f64::from(v[key * width + at]))
                        .sum();
                    let got = f64::from(alone[row * width + at]);
                    assert!((got - expected).abs() < 1e-5, "{got} {expected}");
                }
            }
            first += length;
        }
        let (gain, bias) = (numbers(4, width, 1.0), numbers(5, width, 1.0));
        let mut normed = values.clone();
        layer_norm(&mut normed, &gain, &bias, 1e-12);
        for (row, x) in values.chunks_exact(width).enumerate() {
            let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / width as f64;
            for (i, x) in x.iter().enumerate() {
                let expected = (f64::from(*x) - mean) / variance.sqrt() * f64::from(gain[i]) + f64::from(bias[i]);
                let got = f64::from(normed[row * width + i]);
                assert!((got - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
    }
}
