//! Activations as the matrices want them: rows in tiles of up to 16, laid out so that a kernel walks one pointer.

use super::format::BLOCK;
use crate::cpu::Isa;
use crate::pool::{Disjoint, Pool};

/// The most activation rows that share one pass over a panel's weights in registers.
pub(super) const TILE: usize = 16;
/// As many as have their sums in registers beside a block of weights: with more of them, the compiler keeps some in memory, and
/// half of the time goes there. AMX has registers of its own, which are of 16 rows.
const TILE_OF_SUMS: usize = 12;
/// Tile widths that kernels exist for; a tile is as wide as the smallest that holds its rows.
pub(super) const WIDTHS: [usize; 6] = [1, 2, 4, 8, 12, 16];

/// Numbers kept for each row of each block besides the quants; see [`Q8Rows`].
pub(super) const FACTS: usize = 6;
/// The scale.
pub(super) const SCALE: usize = 0;
/// −8 · (sum of the quants), an integer: takes back the offset of Q4_0.
pub(super) const BACK_8: usize = 1;
/// −128 · (sum of the quants): takes back the offset of Q8_0.
pub(super) const BACK_128: usize = 2;
/// −32 · (sum of the first 16 quants): takes back the offset of Q6_K. That of the last 16 follows.
pub(super) const BACK_32: usize = 3;
/// Scale · (sum of the quants): what a minimum is multiplied with.
pub(super) const SCALED_SUM: usize = 5;

/// The width of the tile that begins at row `first` of `rows`, where most are `most` wide.
fn tile(most: usize, rows: usize, first: usize) -> usize {
    let count = (rows - first).min(most);
    *WIDTHS
        .iter()
        .find(|width| **width >= count)
        .expect("the widest has a tile's rows")
}

/// Rows that all tiles have together, those that only fill up the last one included.
fn padded(most: usize, rows: usize) -> usize {
    let whole = rows / most * most;
    whole + if rows > whole { tile(most, rows, whole) } else { 0 }
}

/// Rows that a thread takes at least: with fewer, waking the others costs more than they save.
const MIN_ROWS: usize = 4;

/// Calls `make(row, its place)` for each row of `values`, on all threads.
pub fn for_rows(pool: &Pool, values: &mut [f32], columns: usize, make: impl Fn(usize, &mut [f32]) + Sync) {
    assert!(
        values.len().is_multiple_of(columns),
        "{} values in rows of {columns}",
        values.len()
    );
    let rows = values.len() / columns;
    let values = Disjoint::new(values);
    pool.parallel_for_min(rows, MIN_ROWS, |range| {
        for row in range {
            // SAFETY: each row belongs to one chunk.
            make(row, unsafe { values.slice_mut(row * columns..(row + 1) * columns) });
        }
    });
}

/// Adds `values` to `to`, element by element.
pub fn add(to: &mut [f32], values: &[f32]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
}

/// Rows of activations in blocks of 32 signed bytes with one float scale.
///
/// Tile after tile, and in it block after block: the quants of each row, and the facts of each row.
#[derive(Clone, Debug, Default)]
pub struct Q8Rows {
    rows: usize,
    columns: usize,
    /// Rows of a tile, but for the last one.
    tile: usize,
    quants: Vec<i8>,
    /// Floats, and integers by their bits.
    facts: Vec<u32>,
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

    /// Rows of a tile, but for the last one.
    pub(super) fn tile_rows(&self) -> usize {
        self.tile
    }

    /// Makes room for `rows` rows of `columns` columns (a multiple of [`BLOCK`]); keeps the memory.
    fn resize(&mut self, isa: Isa, rows: usize, columns: usize) {
        assert!(
            columns.is_multiple_of(BLOCK),
            "{columns} columns are no whole number of blocks"
        );
        (self.rows, self.columns) = (rows, columns);
        self.tile = if isa >= Isa::Amx { TILE } else { TILE_OF_SUMS };
        let padded = padded(self.tile, rows);
        self.quants.resize(padded * columns, 0);
        self.facts.resize(padded * columns / BLOCK * FACTS, 0);
    }

    /// Replaces the content by `rows` rows of `columns` columns (a multiple of [`BLOCK`]), each made by `make(row, out)` and then
    /// quantized, tile by tile on all threads; keeps the memory. `make` gets the row's place in `values`, to leave the floats in.
    pub fn fill(
        &mut self,
        pool: &Pool,
        isa: Isa,
        columns: usize,
        values: &mut [f32],
        make: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        assert!(
            values.len().is_multiple_of(columns),
            "{} values in rows of {columns}",
            values.len()
        );
        let rows = values.len() / columns;
        self.resize(isa, rows, columns);
        let most = self.tile;
        let per_row = columns / BLOCK * FACTS;
        let (values, quants, facts) = (
            Disjoint::new(values),
            Disjoint::new(&mut self.quants),
            Disjoint::new(&mut self.facts),
        );
        pool.parallel_for_min(rows, MIN_ROWS, |range| {
            for row in range {
                // SAFETY: each row belongs to one chunk.
                let x = unsafe { values.slice_mut(row * columns..(row + 1) * columns) };
                make(row, x);
                let (first, lane) = (row / most * most, row % most);
                let width = tile(most, rows, first);
                for (b, x) in x.chunks_exact(BLOCK).enumerate() {
                    let at = first * columns + (b * width + lane) * BLOCK;
                    // SAFETY: each row has its own place in its tile.
                    let block = quantize(isa, x, unsafe { quants.slice_mut(at..at + BLOCK) });
                    let at = first * per_row + b * width * FACTS + lane;
                    for (i, fact) in block.into_iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { facts.slice_mut(at + i * width..at + i * width + 1)[0] = fact };
                    }
                }
            }
        });
    }

    /// Quants and facts of the tile that begins at row `first`.
    pub(super) fn tile(&self, first: usize) -> (&[i8], &[u32], usize) {
        let width = tile(self.tile, self.rows, first);
        let per_row = self.columns / BLOCK * FACTS;
        (
            &self.quants[first * self.columns..][..width * self.columns],
            &self.facts[first * per_row..][..width * per_row],
            width,
        )
    }

    /// The values that the blocks stand for.
    #[cfg(test)]
    pub(super) fn values(&self) -> Vec<f32> {
        let mut out = Vec::new();
        for row in 0..self.rows {
            let (quants, facts, width) = self.tile(row / self.tile * self.tile);
            for b in 0..self.columns / BLOCK {
                let at = b * width + row % self.tile;
                let scale = f32::from_bits(facts[b * width * FACTS + row % self.tile]);
                out.extend(
                    quants[at * BLOCK..(at + 1) * BLOCK]
                        .iter()
                        .map(|q| scale * f32::from(*q)),
                );
            }
        }
        out
    }
}

fn quantize(isa: Isa, x: &[f32], quants: &mut [i8]) -> [u32; FACTS] {
    let (x, quants): (&[f32; BLOCK], &mut [i8; BLOCK]) = match (x.try_into(), quants.try_into()) {
        (Ok(x), Ok(quants)) => (x, quants),
        _ => unreachable!("a block of 32"),
    };
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: the processor has what `isa` names.
        Isa::Avx512Vnni | Isa::Amx => return unsafe { super::avx512::quantize(x, quants) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { quantize_avx2(x, quants) },
        Isa::Portable => {}
    }
    let _ = isa;
    quantize_block(x, quants)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_avx2(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [u32; FACTS] {
    quantize_block(x, quants)
}

#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [u32; FACTS] {
    let mut lanes = [0f32; 8];
    for x in x.as_chunks::<8>().0 {
        for (largest, x) in lanes.iter_mut().zip(x) {
            let x = x.abs();
            *largest = if x > *largest { x } else { *largest };
        }
    }
    let largest = lanes
        .iter()
        .fold(0f32, |largest, x| if *x > largest { *x } else { largest });
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (q, x) in quants.iter_mut().zip(x) {
        // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even; the low byte is then that integer.
        *q = (x * inverse + 12_582_912.0).to_bits() as i8;
    }
    let sum = |quants: &[i8]| quants.iter().map(|q| i32::from(*q)).sum::<i32>();
    facts(largest / 127.0, [sum(&quants[..BLOCK / 2]), sum(&quants[BLOCK / 2..])])
}

/// The facts of a block with that scale, whose first and last 16 quants have those sums.
#[inline(always)]
pub(super) fn facts(scale: f32, [first, second]: [i32; 2]) -> [u32; FACTS] {
    [
        scale.to_bits(),
        (-8 * (first + second)) as u32,
        (-128 * (first + second)) as u32,
        (-32 * first) as u32,
        (-32 * second) as u32,
        (scale * (first + second) as f32).to_bits(),
    ]
}

/// Rows of float activations: tile after tile, and in it column after column the number of each row.
#[derive(Clone, Debug, Default)]
pub struct FloatRows {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl FloatRows {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Replaces the content by `values`, row-major rows of `columns` columns; keeps the memory.
    pub fn fill(&mut self, pool: &Pool, columns: usize, values: &[f32]) {
        assert!(
            values.len().is_multiple_of(columns),
            "{} values in rows of {columns}",
            values.len()
        );
        let rows = values.len() / columns;
        (self.rows, self.columns) = (rows, columns);
        self.values.resize(padded(TILE, rows) * columns, 0.0);
        let out = Disjoint::new(&mut self.values);
        pool.parallel_for(rows.div_ceil(TILE), |range| {
            for first in range.map(|tile| tile * TILE) {
                let width = tile(TILE, rows, first);
                // SAFETY: each tile belongs to one chunk.
                let out = unsafe { out.slice_mut(first * columns..(first + width) * columns) };
                for (lane, row) in values[first * columns..].chunks_exact(columns).take(width).enumerate() {
                    row.iter()
                        .enumerate()
                        .for_each(|(column, x)| out[column * width + lane] = *x);
                }
            }
        });
    }

    /// The numbers of the tile that begins at row `first`, and its width.
    pub(super) fn tile(&self, first: usize) -> (&[f32], usize) {
        let width = tile(TILE, self.rows, first);
        (&self.values[first * self.columns..][..width * self.columns], width)
    }
}
