//! Float matrices. Every output is summed over 8 lanes of columns, then across the lanes in a fixed order.

use std::ops::Range;

use super::GROUP;
use crate::cpu::Isa;
use crate::pool::Disjoint;

const LANES: usize = 8;
/// Weight rows and activation rows whose sums are kept in registers at once.
const TILE_W: usize = 4;
const TILE_X: usize = 3;

/// A row-major float matrix.
#[derive(Debug)]
pub struct F32Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl F32Matrix {
    /// A matrix of `rows × columns` row-major values. Panics when the sizes do not fit together.
    pub fn new(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), rows * columns, "values of a {rows} × {columns} matrix");
        F32Matrix { rows, columns, values }
    }

    /// Rows of the stored matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the stored matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn size_bytes(&self) -> usize {
        std::mem::size_of_val(self.values.as_slice())
    }

    /// Row `row`.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[row * self.columns..(row + 1) * self.columns]);
    }

    pub(super) fn multiply(&self, isa: Isa, groups: Range<usize>, x: &[f32], out: &Disjoint<'_, f32>) {
        let k = self.columns;
        let x_rows = x.len() / k;
        let (first, last) = (groups.start * GROUP, (groups.end * GROUP).min(self.rows));
        let mut n = first;
        while n < last {
            // A group has 8 rows, so tiles of 4 begin at the same rows whatever the chunk; a tile's content changes no sum.
            let count_w = (last - n).min(TILE_W);
            let w: [&[f32]; TILE_W] = std::array::from_fn(|i| &self.values[(n + i.min(count_w - 1)) * k..][..k]);
            let mut row = 0;
            while row < x_rows {
                let count_x = (x_rows - row).min(TILE_X);
                let sums = match count_x {
                    1 => tile::<1>(isa, w, [&x[row * k..(row + 1) * k]]),
                    2 => tile::<2>(isa, w, std::array::from_fn(|r| &x[(row + r) * k..][..k])),
                    _ => tile::<TILE_X>(isa, w, std::array::from_fn(|r| &x[(row + r) * k..][..k])),
                };
                for (r, sums) in sums.iter().enumerate().take(count_x) {
                    let at = (row + r) * self.rows + n;
                    // SAFETY: each group of columns belongs to one chunk.
                    unsafe { out.slice_mut(at..at + count_w) }.copy_from_slice(&sums[..count_w]);
                }
                row += count_x;
            }
            n += count_w;
        }
    }
}

fn tile<const R: usize>(isa: Isa, w: [&[f32]; TILE_W], x: [&[f32]; R]) -> [[f32; TILE_W]; TILE_X] {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        // SAFETY: the processor has AVX2 and FMA.
        return unsafe { tile_avx2(w, x) };
    }
    let _ = isa;
    let mut sums = [[0f32; TILE_W]; TILE_X];
    for r in 0..R {
        for n in 0..TILE_W {
            let (w_chunks, w_tail) = w[n].as_chunks::<LANES>();
            let (x_chunks, x_tail) = x[r].as_chunks::<LANES>();
            let mut lanes = [0f32; LANES];
            for (w, x) in w_chunks.iter().zip(x_chunks) {
                for lane in 0..LANES {
                    lanes[lane] += w[lane] * x[lane];
                }
            }
            sums[r][n] = across(lanes) + w_tail.iter().zip(x_tail).map(|(w, x)| w * x).sum::<f32>();
        }
    }
    sums
}

fn across(l: [f32; LANES]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn tile_avx2<const R: usize>(w: [&[f32]; TILE_W], x: [&[f32]; R]) -> [[f32; TILE_W]; TILE_X] {
    use std::arch::x86_64::*;
    let k = w[0].len();
    let whole = k - k % LANES;
    let mut lanes = [[_mm256_setzero_ps(); TILE_W]; R];
    for at in (0..whole).step_by(LANES) {
        // SAFETY: all rows have `k` columns, and `at + LANES ≤ k`.
        let xs: [__m256; R] = std::array::from_fn(|r| unsafe { _mm256_loadu_ps(x[r].as_ptr().add(at)) });
        for n in 0..TILE_W {
            // SAFETY: as above.
            let w = unsafe { _mm256_loadu_ps(w[n].as_ptr().add(at)) };
            for r in 0..R {
                lanes[r][n] = _mm256_fmadd_ps(w, xs[r], lanes[r][n]);
            }
        }
    }
    let mut sums = [[0f32; TILE_W]; TILE_X];
    for r in 0..R {
        for n in 0..TILE_W {
            let mut values = [0f32; LANES];
            // SAFETY: 8 floats are written to an array of 8.
            unsafe { _mm256_storeu_ps(values.as_mut_ptr(), lanes[r][n]) };
            sums[r][n] = across(values)
                + w[n][whole..]
                    .iter()
                    .zip(&x[r][whole..])
                    .map(|(w, x)| w * x)
                    .sum::<f32>();
        }
    }
    sums
}
