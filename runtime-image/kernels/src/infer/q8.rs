//! Q8_0: blocks of 32 signed bytes with one F16 scale, multiplied as integers with activations quantized the same way.
//!
//! The matrix is repacked at load: 8 rows side by side, 4 columns at a time, so that one vector register holds 4 products of
//! each of 8 rows and no sum ever crosses lanes. Within a block the integer sum is exact; blocks are added in order with one
//! fused multiply-add each. Hence all paths give the same bits.

use std::ops::Range;

use half::f16;

use super::GROUP;
use crate::cpu::Isa;
use crate::pool::Disjoint;

/// Elements in a block.
pub const BLOCK: usize = 32;
/// Bytes of a stored block: F16 scale, then the quants.
const STORED: usize = 34;
/// Activation rows that share one pass over a group's weights in registers.
const TILE: usize = 4;

/// One block of each of 8 rows. `quants[j]` holds columns `4j..4j + 4` of row 0, then of row 1, and so on.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Packed {
    scales: [u16; GROUP],
    quants: [[i8; 4 * GROUP]; BLOCK / 4],
}

/// A matrix of Q8_0 blocks, repacked.
#[derive(Debug)]
pub struct Q8Matrix {
    rows: usize,
    columns: usize,
    /// Group after group, block after block.
    blocks: Vec<Packed>,
}

impl Q8Matrix {
    /// Repacks `bytes`, row-major Q8_0 blocks as GGUF stores them. `columns` is a multiple of [`BLOCK`].
    ///
    /// Panics when the sizes do not fit together.
    pub fn pack(rows: usize, columns: usize, bytes: &[u8]) -> Self {
        assert!(
            columns.is_multiple_of(BLOCK),
            "{columns} columns are no whole number of blocks"
        );
        let per_row = columns / BLOCK;
        assert_eq!(
            bytes.len(),
            rows * per_row * STORED,
            "bytes of a {rows} × {columns} matrix"
        );
        let mut blocks = vec![
            Packed {
                scales: [0; GROUP],
                quants: [[0; 4 * GROUP]; BLOCK / 4]
            };
            rows.div_ceil(GROUP) * per_row
        ];
        for (at, stored) in bytes.chunks_exact(STORED).enumerate() {
            let (row, block) = (at / per_row, at % per_row);
            let packed = &mut blocks[row / GROUP * per_row + block];
            let lane = row % GROUP;
            packed.scales[lane] = u16::from_le_bytes([stored[0], stored[1]]);
            for (j, four) in stored[2..].chunks_exact(4).enumerate() {
                for (i, q) in four.iter().enumerate() {
                    packed.quants[j][lane * 4 + i] = *q as i8;
                }
            }
        }
        Q8Matrix { rows, columns, blocks }
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
        std::mem::size_of_val(self.blocks.as_slice())
    }

    /// Row `row` as floats.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "row {row} into {} elements",
            out.len()
        );
        let (per_row, lane) = (self.columns / BLOCK, row % GROUP);
        let blocks = &self.blocks[row / GROUP * per_row..][..per_row];
        for (packed, out) in blocks.iter().zip(out.chunks_exact_mut(BLOCK)) {
            let scale = f16::from_bits(packed.scales[lane]).to_f32();
            for (i, x) in out.iter_mut().enumerate() {
                *x = scale * f32::from(packed.quants[i / 4][lane * 4 + i % 4]);
            }
        }
    }

    pub(super) fn multiply(&self, isa: Isa, groups: Range<usize>, x: &Q8Rows, out: &Disjoint<'_, f32>) {
        let per_row = self.columns / BLOCK;
        for group in groups {
            let blocks = &self.blocks[group * per_row..(group + 1) * per_row];
            let columns = group * GROUP..((group + 1) * GROUP).min(self.rows);
            let mut row = 0;
            while row < x.rows {
                let count = (x.rows - row).min(TILE);
                let sums = match count {
                    1 => tile::<1>(isa, blocks, x, row),
                    2 => tile::<2>(isa, blocks, x, row),
                    3 => tile::<3>(isa, blocks, x, row),
                    _ => tile::<TILE>(isa, blocks, x, row),
                };
                for (r, sums) in sums.iter().enumerate().take(count) {
                    let at = (row + r) * self.rows;
                    // SAFETY: each group of columns belongs to one chunk.
                    let out = unsafe { out.slice_mut(at + columns.start..at + columns.end) };
                    out.copy_from_slice(&sums[..columns.len()]);
                }
                row += count;
            }
        }
    }
}

/// Rows of activations in blocks of 32 with one float scale.
#[derive(Clone, Debug, Default)]
pub struct Q8Rows {
    rows: usize,
    columns: usize,
    quants: Vec<i8>,
    scales: Vec<f32>,
}

impl Q8Rows {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Replaces the content by `values`, rows of `columns` elements (a multiple of [`BLOCK`]); keeps the memory.
    pub fn quantize(&mut self, isa: Isa, values: &[f32], columns: usize) {
        assert!(
            columns.is_multiple_of(BLOCK) && values.len().is_multiple_of(columns),
            "{} values in rows of {columns}",
            values.len()
        );
        self.rows = values.len() / columns;
        self.columns = columns;
        self.quants.resize(values.len(), 0);
        self.scales.resize(values.len() / BLOCK, 0.0);
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx2 {
            // SAFETY: the processor has AVX2 and FMA.
            return unsafe { quantize_avx2(values, &mut self.quants, &mut self.scales) };
        }
        let _ = isa;
        quantize(values, &mut self.quants, &mut self.scales);
    }

    /// The values that the blocks stand for.
    pub fn values(&self) -> Vec<f32> {
        let blocks = self.quants.chunks_exact(BLOCK).zip(&self.scales);
        blocks
            .flat_map(|(quants, scale)| quants.iter().map(move |q| scale * f32::from(*q)))
            .collect()
    }
}

#[inline(always)]
fn quantize(values: &[f32], quants: &mut [i8], scales: &mut [f32]) {
    for ((values, quants), scale) in values
        .chunks_exact(BLOCK)
        .zip(quants.chunks_exact_mut(BLOCK))
        .zip(scales)
    {
        let mut largest = 0f32;
        for x in values {
            let x = x.abs();
            largest = if x > largest { x } else { largest };
        }
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        *scale = largest / 127.0;
        for (q, x) in quants.iter_mut().zip(values) {
            // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even; the low byte is then that integer.
            *q = (x * inverse + 12_582_912.0).to_bits() as i8;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_avx2(values: &[f32], quants: &mut [i8], scales: &mut [f32]) {
    quantize(values, quants, scales);
}

fn tile<const R: usize>(isa: Isa, blocks: &[Packed], x: &Q8Rows, row: usize) -> [[f32; GROUP]; TILE] {
    let per_row = blocks.len();
    let quants: [&[i8]; R] = std::array::from_fn(|r| &x.quants[(row + r) * per_row * BLOCK..][..per_row * BLOCK]);
    let scales: [&[f32]; R] = std::array::from_fn(|r| &x.scales[(row + r) * per_row..][..per_row]);
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: the processor has what `isa` names.
        Isa::Avx512Vnni => return unsafe { x86::tile_vnni(blocks, quants, scales) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { x86::tile_avx2(blocks, quants, scales) },
        Isa::Portable => {}
    }
    let _ = isa;
    tile_portable(blocks, quants, scales)
}

fn tile_portable<const R: usize>(blocks: &[Packed], quants: [&[i8]; R], scales: [&[f32]; R]) -> [[f32; GROUP]; TILE] {
    let mut sums = [[0f32; GROUP]; TILE];
    for (b, block) in blocks.iter().enumerate() {
        for r in 0..R {
            let x = &quants[r][b * BLOCK..(b + 1) * BLOCK];
            for lane in 0..GROUP {
                let mut sum = 0i32;
                for (j, four) in block.quants.iter().enumerate() {
                    for i in 0..4 {
                        sum += i32::from(four[lane * 4 + i]) * i32::from(x[4 * j + i]);
                    }
                }
                let scale = f16::from_bits(block.scales[lane]).to_f32() * scales[r][b];
                sums[r][lane] = (sum as f32).mul_add(scale, sums[r][lane]);
            }
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, GROUP, Packed, TILE};

    /// The loop of both paths; `$dot` adds to 8 sums the products of 4 columns of 8 rows: (sums, |w|, x with w's sign).
    macro_rules! tile_body {
        ($blocks:expr, $quants:expr, $scales:expr, $r:expr, $dot:expr) => {{
            let mut sums = [_mm256_setzero_ps(); $r];
            for (b, block) in $blocks.iter().enumerate() {
                let mut integers = [_mm256_setzero_si256(); $r];
                for (j, weights) in block.quants.iter().enumerate() {
                    // SAFETY: 32 bytes are read from an array of 32.
                    let w = unsafe { _mm256_loadu_si256(weights.as_ptr().cast()) };
                    let magnitude = _mm256_abs_epi8(w);
                    for r in 0..$r {
                        // SAFETY: block `b` has 32 quants in each row, of which the four at 4j are read.
                        let four = unsafe {
                            $quants[r]
                                .as_ptr()
                                .add(b * BLOCK + 4 * j)
                                .cast::<i32>()
                                .read_unaligned()
                        };
                        let x = _mm256_sign_epi8(_mm256_set1_epi32(four), w);
                        integers[r] = $dot(integers[r], magnitude, x);
                    }
                }
                // SAFETY: 16 bytes are read from an array of 8 halves.
                let scale = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(block.scales.as_ptr().cast()) });
                for r in 0..$r {
                    // SAFETY: there is one scale per block in each row.
                    let x_scale = _mm256_set1_ps(unsafe { *$scales[r].get_unchecked(b) });
                    sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers[r]), _mm256_mul_ps(scale, x_scale), sums[r]);
                }
            }
            let mut out = [[0f32; GROUP]; TILE];
            for r in 0..$r {
                // SAFETY: 8 floats are written to an array of 8.
                unsafe { _mm256_storeu_ps(out[r].as_mut_ptr(), sums[r]) };
            }
            out
        }};
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn tile_avx2<const R: usize>(
        blocks: &[Packed],
        quants: [&[i8]; R],
        scales: [&[f32]; R],
    ) -> [[f32; GROUP]; TILE] {
        // |w| ≤ 128 and |x| ≤ 127: the sum of two products stays within 16 bits.
        let ones = _mm256_set1_epi16(1);
        tile_body!(blocks, quants, scales, R, |sums, w, x| _mm256_add_epi32(
            sums,
            _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones)
        ))
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn tile_vnni<const R: usize>(
        blocks: &[Packed],
        quants: [&[i8]; R],
        scales: [&[f32]; R],
    ) -> [[f32; GROUP]; TILE] {
        tile_body!(blocks, quants, scales, R, |sums, w, x| _mm256_dpbusd_epi32(sums, w, x))
    }
}
