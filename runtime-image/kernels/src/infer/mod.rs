//! Kernels of inference: matrices that stay, rows that pass.
//!
//! A forward pass multiplies few rows (one per token in the batch) by many weights. Each kernel therefore streams the weights
//! once for all rows. And each output element is summed in one fixed order that depends on nothing else in the batch, so a
//! request gets the same bits alone or among others, in one chunk or several, on one thread or many.

#![allow(
    clippy::needless_range_loop,
    reason = "an index names the same lane, row or head of several arrays"
)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod format;
mod multiply;
mod rows;
mod softmax;

pub use attention::{KvDtype, KvLayer, KvLayout, Scoring, Sequence, attend};
pub use format::{BLOCK, Format};
pub use rows::{FloatRows, Q8Rows, add, for_rows};
pub use softmax::{log_prob, log_sum_exp};

use crate::arena::{Arena, ArenaSlice};
use crate::cpu::Isa;
use crate::pool::{Disjoint, Pool};
use format::PANEL;
use rows::TILE;

/// A weight matrix `[outputs, inputs]`, ready for multiplication.
#[derive(Debug)]
pub struct Matrix {
    format: Format,
    rows: usize,
    columns: usize,
    /// Panel after panel; lanes after the last row are zero.
    panels: ArenaSlice,
}

impl Matrix {
    /// Repacks `stored`, row-major as GGUF stores `format`, into memory of `arena`, on all threads of `pool`.
    ///
    /// Panics when the sizes do not fit together.
    pub fn pack(pool: &Pool, arena: &Arena, format: Format, rows: usize, columns: usize, stored: &[u8]) -> Self {
        let (unit, bytes) = format.stored();
        assert!(
            columns.is_multiple_of(unit),
            "{columns} columns are no whole number of blocks of {unit}"
        );
        let row_bytes = columns / unit * bytes;
        assert_eq!(stored.len(), rows * row_bytes, "bytes of a {rows} × {columns} matrix");
        let size = format.panel_bytes(columns);
        let mut panels = arena.take(rows.div_ceil(PANEL) * size);
        let out = Disjoint::new(&mut panels);
        pool.parallel_for(rows.div_ceil(PANEL), |range| {
            for panel in range {
                // SAFETY: each panel belongs to one chunk.
                let out = unsafe { out.slice_mut(panel * size..(panel + 1) * size) };
                for (lane, row) in stored[panel * PANEL * row_bytes..]
                    .chunks_exact(row_bytes)
                    .take(PANEL)
                    .enumerate()
                {
                    format.pack_row(out, lane, columns, row);
                }
            }
        });
        Matrix {
            format,
            rows,
            columns,
            panels,
        }
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs: rows of the stored matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs: columns of the stored matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that one pass over the matrix reads.
    pub fn size_bytes(&self) -> usize {
        self.panels.len()
    }

    /// Row `row` as floats, into `out` (`columns` long): bit-equal to what the stored row stands for.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "row {row} into {} elements",
            out.len()
        );
        self.format
            .unpack_row(self.panel(row / PANEL), row % PANEL, self.columns, out);
    }

    fn panel(&self, index: usize) -> &[u8] {
        let size = self.format.panel_bytes(self.columns);
        &self.panels[index * size..(index + 1) * size]
    }
}

/// Activations as the matrices want them. Either is needed only if one of the matrices wants it; see [`Format::is_quantized`].
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// For matrices of floats.
    pub floats: &'a FloatRows,
    /// The same rows quantized, for the other ones.
    pub quantized: &'a Q8Rows,
}

impl Input<'_> {
    fn shape(&self, format: Format) -> (usize, usize) {
        match format.is_quantized() {
            true => (self.quantized.rows(), self.quantized.columns()),
            false => (self.floats.rows(), self.floats.columns()),
        }
    }
}

/// `out[r][n] = Σ_k x[r][k] · w[n][k]` for each of several matrices that share the input, as one job.
///
/// Panics when the sizes do not fit together.
pub fn matmul(pool: &Pool, isa: Isa, x: Input<'_>, products: &mut [(&Matrix, &mut [f32])]) {
    let panels: usize = products.iter().map(|(matrix, _)| matrix.rows.div_ceil(PANEL)).sum();
    let outs: Vec<(&Matrix, usize, Disjoint<'_, f32>)> = products
        .iter_mut()
        .map(|(matrix, out)| {
            let rows = out.len() / matrix.rows;
            assert_eq!(out.len(), rows * matrix.rows, "the output is no whole number of rows");
            assert_eq!(
                x.shape(matrix.format),
                (rows, matrix.columns),
                "input and matrix do not fit"
            );
            (*matrix, rows, Disjoint::new(out))
        })
        .collect();
    pool.parallel_for(panels, |range| {
        let mut first = 0;
        for (matrix, rows, out) in &outs {
            let count = matrix.rows.div_ceil(PANEL);
            for panel in range.start.max(first)..range.end.min(first + count) {
                multiply_panel(isa, matrix, panel - first, *rows, x, out);
            }
            first += count;
        }
    });
}

/// All rows of `x` with one panel: its weights stay near while the activations pass.
fn multiply_panel(isa: Isa, matrix: &Matrix, index: usize, rows: usize, x: Input<'_>, out: &Disjoint<'_, f32>) {
    let panel = matrix.panel(index);
    let (start, end) = (index * PANEL, ((index + 1) * PANEL).min(matrix.rows));
    let give = |first: usize, sums: &multiply::Sums| {
        for (row, sums) in (first..rows).zip(sums) {
            // SAFETY: each panel's outputs belong to one chunk.
            let out = unsafe { out.slice_mut(row * matrix.rows + start..row * matrix.rows + end) };
            // Of a known size a copy is one instruction.
            match out.as_mut_array::<PANEL>() {
                Some(out) => *out = *sums,
                None => out.copy_from_slice(&sums[..end - start]),
            }
        }
    };
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Amx && rows >= TILE && amx::takes(matrix.format) {
        let tile = |first| x.quantized.tile(first);
        // SAFETY: the processor has what `isa` names; `matmul` saw that matrix and input fit.
        unsafe { amx::tiles(matrix.format, panel, matrix.columns, rows, tile, give) };
        done = rows / TILE * TILE;
    }
    let mut sums = [[0f32; PANEL]; TILE];
    let is_quantized = matrix.format.is_quantized();
    let step = if is_quantized { x.quantized.tile_rows() } else { TILE };
    for first in (done..rows).step_by(step) {
        match is_quantized {
            true => multiply::quantized(isa, matrix.format, panel, x.quantized, first, &mut sums),
            false => multiply::floats(isa, matrix.format, panel, x.floats, first, &mut sums),
        }
        give(first, &sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::numbers;

    /// Stored rows with random bits and scales that keep sums moderate.
    fn stored(format: Format, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
        let (unit, bytes) = format.stored();
        let mut out: Vec<u8> = numbers(seed, rows * columns / unit * bytes, 128.0)
            .iter()
            .map(|x| *x as i8 as u8)
            .collect();
        let scales: &[usize] = match format {
            Format::F32 | Format::F16 | Format::BF16 => &[],
            Format::Q8_0 | Format::Q4_0 => &[0],
            Format::Q4_1 | Format::Q4K => &[0, 2],
            Format::Q6K => &[208],
        };
        let values = numbers(seed + 1, out.len(), 0.05);
        for (block, values) in out.chunks_exact_mut(bytes).zip(values.chunks_exact(bytes)) {
            match format {
                Format::F32 => block.copy_from_slice(&values[0].to_le_bytes()),
                Format::F16 => block.copy_from_slice(&half::f16::from_f32(values[0]).to_le_bytes()),
                Format::BF16 => block.copy_from_slice(&half::bf16::from_f32(values[0]).to_le_bytes()),
                _ => scales
                    .iter()
                    .for_each(|at| block[*at..at + 2].copy_from_slice(&half::f16::from_f32(values[*at]).to_le_bytes())),
            }
        }
        out
    }

    fn run(pool: &Pool, isa: Isa, matrix: &Matrix, x: &[f32]) -> (Vec<f32>, Q8Rows) {
        let (mut quantized, mut floats) = (Q8Rows::default(), FloatRows::default());
        if matrix.format().is_quantized() {
            quantized.fill(pool, isa, matrix.columns(), &mut x.to_vec(), |_, _| ());
        } else {
            floats.fill(pool, matrix.columns(), x);
        }
        let input = Input {
            floats: &floats,
            quantized: &quantized,
        };
        let mut out = vec![f32::NAN; x.len() / matrix.columns() * matrix.rows()];
        matmul(pool, isa, input, &mut [(matrix, &mut out)]);
        (out, quantized)
    }

    #[test]
    fn every_format_agrees_with_a_plain_reference_and_its_paths_bit_for_bit_whatever_the_batch() {
        let (pool, arena) = (Pool::new(2), Arena::default());
        for format in Format::ALL {
            for (rows, columns) in [(16, 256), (21, 768), (40, 256)] {
                let stored = stored(format, rows, columns, 1);
                let matrix = Matrix::pack(&pool, &arena, format, rows, columns, &stored);
                let mut w = vec![0.0; rows * columns];
                for (row, out) in w.chunks_exact_mut(columns).enumerate() {
                    matrix.row(row, out);
                }
                for batch in [1, 2, 3, 7, 11, 16, 21] {
                    let x = numbers(2, batch * columns, 3.0);
                    let (portable, quantized) = run(&pool, Isa::Portable, &matrix, &x);
                    let multiplied = if format.is_quantized() {
                        quantized.values()
                    } else {
                        x.clone()
                    };
                    // The sizes of the terms bound what their rounding can sum up to.
                    let magnitude = |values: &[f32]| values.iter().map(|x| x.abs()).collect::<Vec<_>>();
                    let expected = reference(&w, &multiplied, columns);
                    let bounds = reference(&magnitude(&w), &magnitude(&multiplied), columns);
                    for ((got, expected), bound) in portable.iter().zip(&expected).zip(&bounds) {
                        assert!((got - expected).abs() <= 2e-6 * bound, "{format:?}: {got} {expected}");
                    }
                    for isa in Isa::available() {
                        assert_eq!(
                            run(&pool, isa, &matrix, &x).0,
                            portable,
                            "{format:?} {} {batch}",
                            isa.name()
                        );
                    }
                    let alone = run(&Pool::new(1), crate::cpu::isa(), &matrix, &x[(batch - 1) * columns..]).0;
                    assert_eq!(
                        alone,
                        portable[(batch - 1) * rows..],
                        "{format:?}: the last of {batch} rows alone"
                    );
                }
            }
        }
    }

    #[test]
    fn activations_lose_no_more_than_their_rounding() {
        let (pool, columns) = (Pool::new(2), 64);
        let x = numbers(3, 37 * columns, 2.0);
        let mut rows = Q8Rows::default();
        rows.fill(
            &pool,
            crate::cpu::isa(),
            columns,
            &mut vec![0.0; x.len()],
            |row, out| {
                out.copy_from_slice(&x[row * columns..(row + 1) * columns]);
            },
        );
        for (block, got) in x.chunks_exact(BLOCK).zip(rows.values().chunks_exact(BLOCK)) {
            let largest = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (x, got) in block.iter().zip(got) {
                assert!((x - got).abs() <= largest / 127.0 * 0.5001, "{x} {got}");
            }
        }
    }

    fn reference(w: &[f32], x: &[f32], columns: usize) -> Vec<f32> {
        let dot =
            |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32;
        x.chunks_exact(columns)
            .flat_map(|x| w.chunks_exact(columns).map(move |w| dot(w, x)))
            .collect()
    }

    #[test]
    fn several_matrices_share_one_job() {
        let (pool, arena, isa) = (Pool::new(2), Arena::default(), crate::cpu::isa());
        let x = numbers(5, 3 * 64, 1.0);
        let a = Matrix::pack(&pool, &arena, Format::Q8_0, 40, 64, &stored(Format::Q8_0, 40, 64, 6));
        let b = Matrix::pack(&pool, &arena, Format::F32, 13, 64, &stored(Format::F32, 13, 64, 7));
        let (mut quantized, mut floats) = (Q8Rows::default(), FloatRows::default());
        quantized.fill(&pool, isa, 64, &mut x.clone(), |_, _| ());
        floats.fill(&pool, 64, &x);
        let input = Input {
            floats: &floats,
            quantized: &quantized,
        };
        let (mut both_a, mut both_b) = (vec![0.0; 3 * 40], vec![0.0; 3 * 13]);
        matmul(&pool, isa, input, &mut [(&a, &mut both_a), (&b, &mut both_b)]);
        let alone = (run(&pool, isa, &a, &x).0, run(&pool, isa, &b, &x).0);
        assert_eq!(alone, (both_a, both_b));
    }
}
