//! Root-mean-square normalization with a gain: `y = x / sqrt(mean(x²) + eps) · w`.

use super::{dot, vectorized};
use crate::pool::{self, Disjoint};

vectorized! {
    fn forward_row(y: &mut [f32], x: &[f32], weight: &[f32], eps: f32) -> f32 {
        let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * w;
        }
        inverse
    }
}

vectorized! {
    fn backward_row(dx: &mut [f32], dy: &[f32], x: &[f32], weight: &[f32], inverse: f32) {
        let mut lanes = [0f32; 8];
        for ((dy, x), w) in dy.chunks(8).zip(x.chunks(8)).zip(weight.chunks(8)) {
            for (((lane, dy), x), w) in lanes.iter_mut().zip(dy).zip(x).zip(w) {
                *lane += dy * w * x;
            }
        }
        let projection = lanes.iter().sum::<f32>() * inverse * inverse * inverse / x.len() as f32;
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
            *dx += dy * w * inverse - x * projection;
        }
    }
}

vectorized! {
    fn add_scaled_product(sum: &mut [f32], a: &[f32], b: &[f32], scale: f32) {
        for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
            *sum += a * b * scale;
        }
    }
}

/// Normalizes each row of `x` (`rows × weight.len()`) into `y`; saves `1 / rms` of each row in `inverse`.
pub fn rms_norm(y: &mut [f32], inverse: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    assert!(
        y.len() == x.len() && x.len() == inverse.len() * width,
        "rms_norm: shapes differ"
    );
    let (y, saved) = (Disjoint::new(y), Disjoint::new(inverse));
    pool::parallel_for_min(x.len() / width, 16, |rows| {
        for row in rows {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is given to one chunk.
            let (y, saved) = unsafe { (y.slice_mut(at.clone()), saved.slice_mut(row..row + 1)) };
            saved[0] = forward_row(y, &x[at], weight, eps);
        }
    });
}

/// Adds the gradients of [`rms_norm`] to `dx` and, if wanted, to `dweight`.
pub fn rms_norm_backward(
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    inverse: &[f32],
) {
    let width = weight.len();
    let rows = inverse.len();
    assert!(
        dx.len() == x.len() && dy.len() == x.len() && x.len() == rows * width,
        "rms_norm: shapes differ"
    );
    let dx = Disjoint::new(dx);
    pool::parallel_for_min(rows, 16, |range| {
        for row in range {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is given to one chunk.
            let dx = unsafe { dx.slice_mut(at.clone()) };
            backward_row(dx, &dy[at.clone()], &x[at], weight, inverse[row]);
        }
    });
    let Some(dweight) = dweight else { return };
    let dweight = Disjoint::new(dweight);
    pool::parallel_for_min(width, 64, |columns| {
        // SAFETY: each column is given to one chunk.
        let sum = unsafe { dweight.slice_mut(columns.clone()) };
        for (row, inverse) in inverse.iter().enumerate() {
            let at = row * width + columns.start..row * width + columns.end;
            add_scaled_product(sum, &dy[at.clone()], &x[at], *inverse);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, numbers, weigh};
    use super::*;

    #[test]
    fn gradients_equal_finite_differences_and_are_added() {
        let (rows, width, eps) = (3, 21, 1e-5);
        let (x, weight, dy) = (
            numbers(1, rows * width, 1.0),
            numbers(2, width, 1.0),
            numbers(3, rows * width, 1.0),
        );
        let forward = |x: &[f32], weight: &[f32]| {
            let (mut y, mut inverse) = (vec![0.0; x.len()], vec![0.0; rows]);
            rms_norm(&mut y, &mut inverse, x, weight, eps);
            (y, inverse)
        };
        let (_, inverse) = forward(&x, &weight);
        let (mut dx, mut dweight) = (vec![0.5; x.len()], vec![0.25; width]);
        rms_norm_backward(&mut dx, Some(&mut dweight), &dy, &x, &weight, &inverse);
        dx.iter_mut().for_each(|d| *d -= 0.5);
        dweight.iter_mut().for_each(|d| *d -= 0.25);
        check_gradient("dx", &x, &dx, |x| weigh(&forward(x, &weight).0, &dy));
        check_gradient("dweight", &weight, &dweight, |weight| {
            weigh(&forward(&x, weight).0, &dy)
        });
    }
}
