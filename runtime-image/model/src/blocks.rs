//! Rounding floats to the block formats: for each block the scale that loses least, not the first that fits.
//!
//! A format's scale is usually taken from the block's largest number. Trying scales around it, and for each the one that least
//! squares give to the rounded numbers, lowers the error of 4-bit blocks by about a fifth for a cost that is paid once.

use half::f16;

use crate::dtype::{BLOCK, SUPER_BLOCK};

/// Scales tried on each side of the one that the largest number gives.
const TRIES: i32 = 8;

/// How much an error counts: large numbers more, none nothing.
fn weights<const N: usize>(x: &[f32; N]) -> [f32; N] {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / N as f32;
    x.map(|x| x * x + mean)
}

/// The scale with which numbers from `low` to `-low - 1`, times the scale, come nearest to `x`.
fn symmetric<const N: usize>(x: &[f32; N], low: i32) -> f32 {
    let largest = x
        .iter()
        .fold(0f32, |largest, x| if x.abs() > largest.abs() { *x } else { largest });
    if largest == 0.0 {
        return 0.0;
    }
    let weights = weights(x);
    let (mut best, mut scale) = (0f32, 0f32);
    for i in -TRIES..=TRIES {
        let inverse = (low as f32 + 0.1 * i as f32) / largest;
        let (mut product, mut square) = (0f32, 0f32);
        for (x, weight) in x.iter().zip(&weights) {
            let q = (x * inverse).round_ties_even().clamp(low as f32, (-low - 1) as f32);
            product += weight * x * q;
            square += weight * q * q;
        }
        // With the least squares' scale the error is Σx² − product²/square.
        if square > 0.0 && product * product > best * square {
            (best, scale) = (product * product / square, product / square);
        }
    }
    scale
}

/// The scale and the minimum (at least 0) with which `scale · q − minimum`, `q` from 0 to 15, comes nearest to `x`.
fn with_minimum(x: &[f32; BLOCK]) -> (f32, f32) {
    let low = x.iter().fold(0f32, |low, x| low.min(*x));
    let high = x.iter().fold(low, |high, x| high.max(*x));
    if high == low {
        return (0.0, -low);
    }
    let weights = weights(x);
    let (mut least, mut found) = (f32::INFINITY, (0f32, -low));
    for i in -TRIES..=2 * TRIES {
        let inverse = (15.0 + 0.1 * i as f32) / (high - low);
        let q = x.map(|x| ((x - low) * inverse).round_ties_even().clamp(0.0, 15.0));
        let (mut w, mut wq, mut wqq, mut wx, mut wqx) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for ((x, q), weight) in x.iter().zip(&q).zip(&weights) {
            w += weight;
            wq += weight * q;
            wqq += weight * q * q;
            wx += weight * x;
            wqx += weight * q * x;
        }
        let determinant = w * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut minimum) = ((w * wqx - wq * wx) / determinant, (wq * wqx - wqq * wx) / determinant);
        if minimum < 0.0 {
            (scale, minimum) = (wqx / wqq, 0.0);
        }
        let error = |(x, q): (&f32, &f32)| scale * q - minimum - x;
        let sum: f32 = x
            .iter()
            .zip(&q)
            .zip(&weights)
            .map(|(pair, weight)| weight * error(pair).powi(2))
            .sum();
        if sum < least {
            (least, found) = (sum, (scale, minimum));
        }
    }
    found
}

fn to_half(x: f32) -> (f32, [u8; 2]) {
    let half = f16::from_f32(x);
    (half.to_f32(), half.to_le_bytes())
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// See [`crate::Dtype::Q4_0`].
pub(crate) fn q4_0(x: &[f32; BLOCK], out: &mut Vec<u8>) {
    let (scale, bytes) = to_half(symmetric(x, -8));
    let inverse = inverse(scale);
    let q = x.map(|x| (x * inverse).round_ties_even().clamp(-8.0, 7.0) as i32 + 8);
    out.extend(bytes);
    out.extend((0..BLOCK / 2).map(|i| (q[i] | (q[i + BLOCK / 2] << 4)) as u8));
}

/// See [`crate::Dtype::Q4K`].
pub(crate) fn q4_k(x: &[f32; SUPER_BLOCK], out: &mut Vec<u8>) {
    let blocks = x.as_chunks::<BLOCK>().0;
    let fits: Vec<(f32, f32)> = blocks.iter().map(with_minimum).collect();
    let largest = |of: fn(&(f32, f32)) -> f32| fits.iter().map(of).fold(0f32, f32::max);
    let (d, d_bytes) = to_half(largest(|fit| fit.0) / 63.0);
    let (dmin, dmin_bytes) = to_half(largest(|fit| fit.1) / 63.0);
    let six = |x: f32, unit: f32| (x * inverse(unit)).round_ties_even().clamp(0.0, 63.0) as u8;
    let scales: Vec<u8> = fits.iter().map(|fit| six(fit.0, d)).collect();
    let minimums: Vec<u8> = fits.iter().map(|fit| six(fit.1, dmin)).collect();
    out.extend(d_bytes);
    out.extend(dmin_bytes);
    // Six bits each: the first four of both with the upper two bits of the last four on top, then the rest of the last four.
    out.extend((0..4).map(|i| scales[i] | (scales[i + 4] >> 4 << 6)));
    out.extend((0..4).map(|i| minimums[i] | (minimums[i + 4] >> 4 << 6)));
    out.extend((4..8).map(|i| (scales[i] & 15) | (minimums[i] << 4)));
    let quants = |block: usize| {
        let (scale, minimum) = (d * f32::from(scales[block]), dmin * f32::from(minimums[block]));
        let inverse = inverse(scale);
        blocks[block].map(|x| ((x + minimum) * inverse).round_ties_even().clamp(0.0, 15.0) as u8)
    };
    for pair in 0..4 {
        let (low, high) = (quants(2 * pair), quants(2 * pair + 1));
        out.extend(low.iter().zip(&high).map(|(low, high)| low | (high << 4)));
    }
}

/// See [`crate::Dtype::Q6K`].
pub(crate) fn q6_k(x: &[f32; SUPER_BLOCK], out: &mut Vec<u8>) {
    let blocks = x.as_chunks::<16>().0;
    let fits: Vec<f32> = blocks.iter().map(|block| symmetric(block, -32)).collect();
    let largest = fits.iter().fold(
        0f32,
        |largest, fit| if fit.abs() > largest.abs() { *fit } else { largest },
    );
    // The largest scale becomes -128: the range of a signed byte is used whole.
    let (d, d_bytes) = to_half(largest / -128.0);
    let scales: Vec<i8> = fits
        .iter()
        .map(|fit| (fit * inverse(d)).round_ties_even().clamp(-128.0, 127.0) as i8)
        .collect();
    let mut q = [0u8; SUPER_BLOCK];
    for ((block, scale), q) in blocks.iter().zip(&scales).zip(q.chunks_exact_mut(16)) {
        let inverse = inverse(d * f32::from(*scale));
        for (x, q) in block.iter().zip(q) {
            *q = ((x * inverse).round_ties_even().clamp(-32.0, 31.0) as i32 + 32) as u8;
        }
    }
    for half in q.as_chunks::<128>().0 {
        out.extend((0..64).map(|l| (half[l] & 15) | (half[l + 64] << 4)));
    }
    for half in q.as_chunks::<128>().0 {
        out.extend((0..32).map(|l| (0..4).map(|i| (half[l + 32 * i] >> 4) << (2 * i)).sum::<u8>()));
    }
    out.extend(scales.iter().map(|scale| *scale as u8));
    out.extend(d_bytes);
}

#[cfg(test)]
mod tests {
    use crate::Dtype;

    /// Numbers as weights are: most small, a few large.
    fn numbers(len: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        (0..len)
            .map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.05)
            .collect()
    }

    fn error(dtype: Dtype, x: &[f32]) -> f32 {
        let (mut bytes, mut back) = (Vec::new(), vec![0.0; x.len()]);
        dtype.from_f32(x, &mut bytes).unwrap();
        dtype.to_f32(&bytes, &mut back);
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        (square(&mut x.iter().zip(&back).map(|(a, b)| a - b)) / square(&mut x.iter().copied())).sqrt()
    }

    #[test]
    fn each_format_loses_no_more_than_its_bits_allow_and_nothing_of_what_it_can_hold() {
        let x = numbers(256 * 64);
        for (dtype, most) in [
            (Dtype::Q8_0, 0.0055),
            (Dtype::Q6K, 0.018),
            (Dtype::Q4K, 0.073),
            (Dtype::Q4_0, 0.082),
        ] {
            let lost = error(dtype, &x);
            assert!(lost < most, "{}: {lost}", dtype.name());
            // What was rounded once is kept.
            let (mut bytes, mut once) = (Vec::new(), vec![0.0; x.len()]);
            dtype.from_f32(&x, &mut bytes).unwrap();
            dtype.to_f32(&bytes, &mut once);
            assert!(error(dtype, &once) < 1e-6, "{}: {}", dtype.name(), error(dtype, &once));
        }
        for dtype in [Dtype::Q4_0, Dtype::Q4K, Dtype::Q6K] {
            assert!(
                error(dtype, &[[0.0; 255].as_slice(), &[3.0]].concat()) < 0.01,
                "{}",
                dtype.name()
            );
            let (mut bytes, mut back) = (Vec::new(), vec![1.0; 256]);
            dtype.from_f32(&[0.0; 256], &mut bytes).unwrap();
            dtype.to_f32(&bytes, &mut back);
            assert!(back.iter().all(|x| *x == 0.0), "{}", dtype.name());
        }
    }
}
