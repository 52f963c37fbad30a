//! Rotary position embedding as Hugging Face lays it out: element `i` of a head turns with element `i + head_dim / 2`.

use super::vectorized;
use crate::pool::{self, Disjoint};

/// Cosines and sines for every position below a limit.
#[derive(Clone, Debug, Default)]
pub struct RopeTable {
    half: usize,
    head_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Which way [`rope`] turns: backward is the gradient, and the inverse, of forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// By the position's angle.
    Forward,
    /// Back by the position's angle.
    Backward,
}

impl RopeTable {
    /// Angles `position · theta^(-2i / head_dim)` for positions below `positions`; `head_dim` is even.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-(i as f64) / half as f64)).collect();
        Self::from_frequencies(positions, head_dim, &frequencies, 1.0)
    }

    /// Angles `position · frequencies[i]` for positions below `positions`. Of a head's `head_dim` elements the first
    /// `2 · frequencies.len()` are turned, element `i` with element `i + frequencies.len()`, and multiplied by `scale`.
    ///
    /// Panics when a head has fewer elements than that.
    pub fn from_frequencies(positions: usize, head_dim: usize, frequencies: &[f64], scale: f32) -> Self {
        let half = frequencies.len();
        assert!(
            half > 0 && 2 * half <= head_dim,
            "{half} frequencies for a head of {head_dim}"
        );
        let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let (sin, cos) = angles
            .map(f64::sin_cos)
            .map(|(sin, cos)| ((sin * f64::from(scale)) as f32, (cos * f64::from(scale)) as f32))
            .unzip();
        Self {
            half,
            head_dim,
            cos,
            sin,
        }
    }

    /// Its limit.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }
}

vectorized! {
    fn turn_head(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (a, b, sin) = (*low, *high, sin * sign);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

/// Turns every head of `x` (`positions.len() × heads · head_dim`) in place, by its row's position.
///
/// Panics if a position is not below the table's limit.
pub fn rope(x: &mut [f32], positions: &[u32], table: &RopeTable, turn: Turn) {
    let (half, head_dim, rows) = (table.half, table.head_dim, positions.len());
    if rows == 0 {
        return;
    }
    let width = x.len() / rows;
    assert!(
        x.len() == rows * width && width.is_multiple_of(head_dim),
        "rope: shapes differ"
    );
    let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
    let x = Disjoint::new(x);
    pool::parallel_for_min(rows, 16, |range| {
        for row in range {
            let at = positions[row] as usize * half..(positions[row] as usize + 1) * half;
            let (cos, sin) = (&table.cos[at.clone()], &table.sin[at]);
            // SAFETY: each row is given to one chunk.
            for head in unsafe { x.slice_mut(row * width..(row + 1) * width) }.chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(half);
                turn_head(low, &mut high[..half], cos, sin, sign);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::numbers;
    use super::*;

    #[test]
    fn turns_like_hugging_face_and_back() {
        // transformers: q * cos + rotate_half(q) * sin with inv_freq = theta ** (-arange(0, 4, 2) / 4):
        // q = [1, 2, 3, 4], position 2, theta 100 → angles [2.0, 0.2].
        let table = RopeTable::new(3, 4, 100.0);
        let mut x = vec![1.0, 2.0, 3.0, 4.0];
        rope(&mut x, &[2], &table, Turn::Forward);
        let (a, b) = (2f32, 0.2f32);
        let expected = [
            a.cos() - 3.0 * a.sin(),
            2.0 * b.cos() - 4.0 * b.sin(),
            3.0 * a.cos() + a.sin(),
            4.0 * b.cos() + 2.0 * b.sin(),
        ];
        for (got, expected) in x.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-5, "{x:?}");
        }
        let original = numbers(1, 3 * 2 * 4, 1.0);
        let mut x = original.clone();
        rope(&mut x, &[0, 2, 1], &table, Turn::Forward);
        rope(&mut x, &[0, 2, 1], &table, Turn::Backward);
        assert!(x.iter().zip(&original).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}
