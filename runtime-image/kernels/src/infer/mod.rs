//! Kernels of inference: matrices that stay, rows that pass.
//!
//! A forward pass multiplies few rows (one per token in the batch) by many weights. Each kernel therefore streams the weights
//! once for all rows. And each output element is summed in one fixed order that depends on nothing else in the batch, so a
//! request gets the same bits alone or among others, in one chunk or several, on one thread or many.

#![allow(
    clippy::needless_range_loop,
    reason = "an index names the same lane, row or head of several arrays"
)]

mod attention;
mod f32;
mod q8;
mod softmax;

pub use attention::{KvDtype, KvLayer, KvLayout, Sequence, attend};
pub use f32::F32Matrix;
pub use q8::{BLOCK, Q8Matrix, Q8Rows};
pub use softmax::{log_prob, log_sum_exp};

use crate::cpu::Isa;
use crate::pool::{Disjoint, Pool};

/// Output rows that one job index of a matrix computes.
const GROUP: usize = 8;

/// A weight matrix `[outputs, inputs]`, ready for multiplication.
#[derive(Debug)]
pub enum Matrix {
    /// Floats.
    F32(F32Matrix),
    /// 8-bit blocks.
    Q8(Q8Matrix),
}

impl Matrix {
    /// Outputs: rows of the stored matrix.
    pub fn rows(&self) -> usize {
        match self {
            Matrix::F32(matrix) => matrix.rows(),
            Matrix::Q8(matrix) => matrix.rows(),
        }
    }

    /// Inputs: columns of the stored matrix.
    pub fn columns(&self) -> usize {
        match self {
            Matrix::F32(matrix) => matrix.columns(),
            Matrix::Q8(matrix) => matrix.columns(),
        }
    }

    /// Bytes that one pass over the matrix reads.
    pub fn size_bytes(&self) -> usize {
        match self {
            Matrix::F32(matrix) => matrix.size_bytes(),
            Matrix::Q8(matrix) => matrix.size_bytes(),
        }
    }

    /// Row `row` as floats, into `out` (`columns` long).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Matrix::F32(matrix) => matrix.row(row, out),
            Matrix::Q8(matrix) => matrix.row(row, out),
        }
    }
}

/// Activations (`rows × columns`) as the matrices want them: floats always, 8-bit blocks where a matrix needs them.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Row-major floats.
    pub values: &'a [f32],
    /// The same rows quantized; needed if one of the matrices is [`Matrix::Q8`].
    pub quantized: &'a Q8Rows,
}

/// `out[r][n] = Σ_k x[r][k] · w[n][k]` for each of several matrices that share the input, as one job.
///
/// Panics when the sizes do not fit together.
pub fn matmul(pool: &Pool, isa: Isa, x: Input<'_>, products: &mut [(&Matrix, &mut [f32])]) {
    let groups: usize = products.iter().map(|(matrix, _)| matrix.rows().div_ceil(GROUP)).sum();
    let outs: Vec<(&Matrix, Disjoint<'_, f32>)> = products
        .iter_mut()
        .map(|(matrix, out)| {
            let rows = out.len() / matrix.rows();
            assert_eq!(out.len(), rows * matrix.rows(), "the output is no whole number of rows");
            match matrix {
                Matrix::F32(matrix) => {
                    assert_eq!(x.values.len(), rows * matrix.columns(), "input and matrix do not fit")
                }
                Matrix::Q8(matrix) => assert_eq!(
                    (x.quantized.rows(), x.quantized.columns()),
                    (rows, matrix.columns()),
                    "quantized input and matrix do not fit"
                ),
            }
            (*matrix, Disjoint::new(out))
        })
        .collect();
    pool.parallel_for(groups, |range| {
        let mut first = 0;
        for (matrix, out) in &outs {
            let count = matrix.rows().div_ceil(GROUP);
            let (start, end) = (range.start.max(first), range.end.min(first + count));
            if start < end {
                let groups = start - first..end - first;
                match matrix {
                    Matrix::F32(matrix) => matrix.multiply(isa, groups, x.values, out),
                    Matrix::Q8(matrix) => matrix.multiply(isa, groups, x.quantized, out),
                }
            }
            first += count;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::numbers;

    fn quantized_bytes(values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for block in values.chunks_exact(BLOCK) {
            let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            bytes.extend(half::f16::from_f32(largest / 127.0).to_le_bytes());
            bytes.extend(block.iter().map(|x| (x * 127.0 / largest).round() as i8 as u8));
        }
        bytes
    }

    fn dequantize(bytes: &[u8]) -> Vec<f32> {
        bytes
            .chunks_exact(34)
            .flat_map(|block| {
                let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
                block[2..].iter().map(move |q| scale * f32::from(*q as i8))
            })
            .collect()
    }

    fn reference(w: &[f32], x: &[f32], columns: usize) -> Vec<f32> {
        let dot =
            |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32;
        x.chunks_exact(columns)
            .flat_map(|x| w.chunks_exact(columns).map(move |w| dot(w, x)))
            .collect()
    }

    #[test]
    fn q8_agrees_with_a_plain_reference_and_its_paths_bit_for_bit_whatever_the_batch() {
        let pool = Pool::new(2);
        for (rows, columns) in [(8, 32), (21, 96), (64, 576)] {
            let bytes = quantized_bytes(&numbers(1, rows * columns, 1.0));
            let w = dequantize(&bytes);
            let matrix = Matrix::Q8(Q8Matrix::pack(rows, columns, &bytes));
            let mut row = vec![0.0; columns];
            for n in 0..rows {
                matrix.row(n, &mut row);
                assert_eq!(row, w[n * columns..(n + 1) * columns], "row {n}");
            }
            let batch = 7;
            let x = numbers(2, batch * columns, 3.0);
            let run = |isa, values: &[f32]| {
                let mut quantized = Q8Rows::default();
                quantized.quantize(isa, values, columns);
                let mut out = vec![f32::NAN; values.len() / columns * rows];
                matmul(
                    &pool,
                    isa,
                    Input {
                        values,
                        quantized: &quantized,
                    },
                    &mut [(&matrix, &mut out)],
                );
                (out, quantized)
            };
            let (portable, quantized) = run(Isa::Portable, &x);
            // Exact up to rounding on what is really multiplied; near the floats it stands for.
            for (got, expected) in portable.iter().zip(reference(&w, &quantized.values(), columns)) {
                assert!((got - expected).abs() <= 2e-5 * (columns as f32), "{got} {expected}");
            }
            for (got, expected) in portable.iter().zip(reference(&w, &x, columns)) {
                assert!(
                    (got - expected).abs() <= 0.012 * (columns as f32).sqrt() * 3.0,
                    "{got} {expected}"
                );
            }
            for isa in Isa::available() {
                assert_eq!(run(isa, &x).0, portable, "{}", isa.name());
                for (r, alone) in x.chunks_exact(columns).enumerate() {
                    assert_eq!(
                        run(isa, alone).0,
                        portable[r * rows..(r + 1) * rows],
                        "{} row {r} alone",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn f32_agrees_with_a_plain_reference_and_does_not_depend_on_the_batch() {
        let pool = Pool::new(2);
        for (rows, columns) in [(8, 32), (19, 37), (64, 192)] {
            let w = numbers(3, rows * columns, 1.0);
            let matrix = Matrix::F32(F32Matrix::new(rows, columns, w.clone()));
            let x = numbers(4, 7 * columns, 1.0);
            for isa in Isa::available() {
                let run = |values: &[f32]| {
                    let mut out = vec![f32::NAN; values.len() / columns * rows];
                    let input = Input {
                        values,
                        quantized: &Q8Rows::default(),
                    };
                    matmul(&pool, isa, input, &mut [(&matrix, &mut out)]);
                    out
                };
                let all = run(&x);
                for (got, expected) in all.iter().zip(reference(&w, &x, columns)) {
                    assert!(
                        (got - expected).abs() <= 1e-5 * (columns as f32).sqrt(),
                        "{got} {expected}"
                    );
                }
                for (r, alone) in x.chunks_exact(columns).enumerate() {
                    assert_eq!(
                        run(alone),
                        all[r * rows..(r + 1) * rows],
                        "{} row {r} alone",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn several_matrices_share_one_job() {
        let pool = Pool::new(2);
        let x = numbers(5, 3 * 64, 1.0);
        let mut quantized = Q8Rows::default();
        quantized.quantize(crate::cpu::isa(), &x, 64);
        let input = Input {
            values: &x,
            quantized: &quantized,
        };
        let a = Matrix::Q8(Q8Matrix::pack(40, 64, &quantized_bytes(&numbers(6, 40 * 64, 1.0))));
        let b = Matrix::F32(F32Matrix::new(13, 64, numbers(7, 13 * 64, 1.0)));
        let (mut alone_a, mut alone_b) = (vec![0.0; 3 * 40], vec![0.0; 3 * 13]);
        matmul(&pool, crate::cpu::isa(), input, &mut [(&a, &mut alone_a)]);
        matmul(&pool, crate::cpu::isa(), input, &mut [(&b, &mut alone_b)]);
        let (mut both_a, mut both_b) = (vec![0.0; 3 * 40], vec![0.0; 3 * 13]);
        matmul(
            &pool,
            crate::cpu::isa(),
            input,
            &mut [(&a, &mut both_a), (&b, &mut both_b)],
        );
        assert_eq!((alone_a, alone_b), (both_a, both_b));
    }
}
