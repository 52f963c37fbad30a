//! One panel times one tile of activations, on the processor's best path.
//!
//! In quantized formats the integer sum of a block (half a block in Q6_K) is exact, and blocks are added in order, each with one
//! fused multiply-add (and one more for its minimum). Floats are added column by column, each fused. Hence every path gives
//! the same bits, and none looks at another row.

use super::format::{BLOCK, Format, PANEL};
use super::rows::{BACK_8, BACK_32, BACK_128, FACTS, FloatRows, Q8Rows, SCALE, SCALED_SUM, TILE};
use crate::cpu::Isa;

/// Sums of a tile: for each of its rows, one for each lane of the panel.
pub(super) type Sums = [[f32; PANEL]; TILE];

/// Multiplies a quantized panel with the tile of `x` that begins at row `first`.
pub(super) fn quantized(isa: Isa, format: Format, panel: &[u8], x: &Q8Rows, first: usize, sums: &mut Sums) {
    let tile = x.tile(first);
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: the processor has what `isa` names; panel and tile are of `x.columns()` columns.
        Isa::Avx512Vnni | Isa::Amx => {
            return unsafe { super::avx512::quantized(format, panel, x.columns(), tile, sums) };
        }
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { super::avx2::quantized(format, panel, x.columns(), tile, sums) },
        Isa::Portable => {}
    }
    let _ = isa;
    quantized_portable(format, panel, x.columns(), tile, sums);
}

/// Multiplies a panel of floats with the tile of `x` that begins at row `first`.
pub(super) fn floats(isa: Isa, format: Format, panel: &[u8], x: &FloatRows, first: usize, sums: &mut Sums) {
    let tile = x.tile(first);
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: the processor has what `isa` names; panel and tile are of `x.columns()` columns.
        Isa::Avx512Vnni | Isa::Amx => return unsafe { super::avx512::floats(format, panel, tile, sums) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { super::avx2::floats(format, panel, tile, sums) },
        Isa::Portable => {}
    }
    let _ = isa;
    let columns = x.columns();
    let mut weights = vec![0.0; columns];
    for lane in 0..PANEL {
        format.unpack_row(panel, lane, columns, &mut weights);
        let (values, width) = tile;
        for row in 0..width {
            let mut sum = 0f32;
            for (column, w) in weights.iter().enumerate() {
                sum = w.mul_add(values[column * width + row], sum);
            }
            sums[row][lane] = sum;
        }
    }
}

/// Which fact of a row takes back a format's offset, if it has one for the whole block.
pub(super) const fn back(format: Format) -> Option<usize> {
    match format {
        Format::Q8_0 => Some(BACK_128),
        Format::Q4_0 => Some(BACK_8),
        _ => None,
    }
}

fn quantized_portable(format: Format, panel: &[u8], columns: usize, tile: (&[i8], &[u32], usize), sums: &mut Sums) {
    let (quants, facts, width) = tile;
    for row in sums.iter_mut() {
        *row = [0.0; PANEL];
    }
    for b in 0..columns / BLOCK {
        let stored = &panel[format.scale_bytes(columns) + b * format.quant_bytes()..][..format.quant_bytes()];
        let mut w = [[0u8; 64]; 8];
        for (j, register) in w.iter_mut().enumerate() {
            for (i, q) in register.iter_mut().enumerate() {
                *q = format.quant(stored, j, i);
            }
        }
        for lane in 0..PANEL {
            let scales = format.scales(panel, columns, b, lane);
            let minimum = format.minimum(panel, columns, b, lane);
            for (row, sums) in sums.iter_mut().enumerate().take(width) {
                let x = &quants[(b * width + row) * BLOCK..][..BLOCK];
                let fact = |fact: usize| facts[(b * FACTS + fact) * width + row];
                let part = |from: usize| -> i32 {
                    let products = (from..from + BLOCK / 2)
                        .map(|column| i32::from(w[column / 4][lane * 4 + column % 4]) * i32::from(x[column]));
                    products.sum()
                };
                let (low, high) = (part(0), part(BLOCK / 2));
                let scale = f32::from_bits(fact(SCALE));
                let mut add = |integer: i32, w_scale: f32| {
                    sums[lane] = (integer as f32).mul_add(w_scale * scale, sums[lane]);
                };
                if format == Format::Q6K {
                    add(low + fact(BACK_32) as i32, scales[0]);
                    add(high + fact(BACK_32 + 1) as i32, scales[1]);
                } else {
                    add(low + high + back(format).map_or(0, |back| fact(back) as i32), scales[0]);
                }
                if let Some(minimum) = minimum {
                    sums[lane] = minimum.mul_add(f32::from_bits(fact(SCALED_SUM)), sums[lane]);
                }
            }
        }
    }
}
