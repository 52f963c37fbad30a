//! The path for AVX2: a panel is two registers wide, each with 4 columns of 8 rows, and a tile is taken in parts of 4 rows.

use std::arch::x86_64::*;

use super::format::{BLOCK, Format, PANEL, Q4_K_SCALES, Q6_K_SCALES, SUPER};
use super::multiply::{Sums, back};
use super::rows::{BACK_32, FACTS, SCALE, SCALED_SUM};

/// Rows of the tile whose sums are kept in registers at once.
const PART: usize = 4;
const LANES: usize = PANEL / 2;

/// Half of a block of a panel in registers.
struct Block {
    quants: [__m256i; 8],
    scales: [__m256; 2],
    minimum: Option<__m256>,
}

/// See [`super::multiply::quantized`].
///
/// # Safety
/// The processor has AVX2, FMA and F16C; the panel and the tile are of `columns` columns.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantized(
    format: Format,
    panel: &[u8],
    columns: usize,
    tile: (&[i8], &[u32], usize),
    sums: &mut Sums,
) {
    let width = tile.2;
    for half in 0..2 {
        for first in (0..width).step_by(PART) {
            // SAFETY: as the function demands; the part has as many rows as are left of the tile.
            unsafe {
                match width - first {
                    1 => part::<1>(format, panel, columns, tile, half, first, sums),
                    2 => part::<2>(format, panel, columns, tile, half, first, sums),
                    _ => part::<PART>(format, panel, columns, tile, half, first, sums),
                }
            }
        }
    }
}

/// # Safety
/// As [`quantized`]; the tile has rows `first..first + R`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn part<const R: usize>(
    format: Format,
    panel: &[u8],
    columns: usize,
    (quants, facts, width): (&[i8], &[u32], usize),
    half: usize,
    first: usize,
    out: &mut Sums,
) {
    let mut sums = [_mm256_setzero_ps(); R];
    for b in 0..columns / BLOCK {
        // SAFETY: block `b` lies in the panel and in the tile.
        unsafe {
            let block = load(format, panel, columns, b, half);
            for r in 0..R {
                let x = quants.as_ptr().add((b * width + first + r) * BLOCK);
                let fact = |fact: usize| facts.as_ptr().add((b * FACTS + fact) * width + first + r);
                let start = |index: usize| fact(index).cast::<i32>().read();
                let scale = _mm256_set1_ps(fact(SCALE).cast::<f32>().read());
                let mut add = |integer: __m256i, w_scale: __m256| {
                    sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(integer), _mm256_mul_ps(w_scale, scale), sums[r]);
                };
                match format {
                    // Signed: its bytes are too large for the unsigned operand.
                    Format::Q8_0 => add(dot::<true>(_mm256_setzero_si256(), &block.quants, x), block.scales[0]),
                    Format::Q6K => {
                        for i in 0..2 {
                            let begin = _mm256_set1_epi32(start(BACK_32 + i));
                            let (w, x) = (&block.quants[4 * i..4 * i + 4], x.add(BLOCK / 2 * i));
                            add(dot::<false>(begin, w, x), block.scales[i]);
                        }
                    }
                    _ => {
                        let begin = _mm256_set1_epi32(back(format).map_or(0, start));
                        add(dot::<false>(begin, &block.quants, x), block.scales[0]);
                    }
                }
                if let Some(minimum) = block.minimum {
                    let scaled_sum = _mm256_set1_ps(fact(SCALED_SUM).cast::<f32>().read());
                    sums[r] = _mm256_fmadd_ps(minimum, scaled_sum, sums[r]);
                }
            }
        }
    }
    for r in 0..R {
        // SAFETY: 8 floats are written into one half of an array of 16.
        unsafe { _mm256_storeu_ps(out[first + r].as_mut_ptr().add(half * LANES), sums[r]) };
    }
}

/// Adds to 8 sums the products of the columns in `w` with the bytes at `x`.
///
/// # Safety
/// There are four bytes at `x` for each register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<const SIGNED: bool>(mut sum: __m256i, w: &[__m256i], x: *const i8) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    for (j, w) in w.iter().enumerate() {
        // SAFETY: as the function demands.
        let x = _mm256_set1_epi32(unsafe { x.add(4 * j).cast::<i32>().read_unaligned() });
        // |w| ≤ 128 and |x| ≤ 127: the sum of two products stays within 16 bits.
        let pairs = if SIGNED {
            _mm256_maddubs_epi16(_mm256_abs_epi8(*w), _mm256_sign_epi8(x, *w))
        } else {
            _mm256_maddubs_epi16(*w, x)
        };
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    sum
}

/// Half `half` of block `b`; the quants of Q8_0 signed.
///
/// # Safety
/// The block lies in the panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(format: Format, panel: &[u8], columns: usize, b: usize, half: usize) -> Block {
    // SAFETY: each register is half of 64 bytes of the block.
    let register = |i: usize| unsafe {
        let at = format.scale_bytes(columns) + b * format.quant_bytes() + 64 * i + 32 * half;
        _mm256_loadu_si256(panel.as_ptr().add(at).cast())
    };
    let mut quants = [_mm256_setzero_si256(); 8];
    if format == Format::Q8_0 {
        for (j, w) in quants.iter_mut().enumerate() {
            *w = _mm256_xor_si256(register(j), _mm256_set1_epi8(-128));
        }
    } else {
        let nibble = _mm256_set1_epi8(15);
        for j in 0..4 {
            let both = register(j);
            quants[j] = _mm256_and_si256(both, nibble);
            quants[j + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
        }
    }
    if format == Format::Q6K {
        let mask = _mm256_set1_epi8(0x30);
        for k in 0..2 {
            let high = register(4 + k);
            let parts = [
                _mm256_slli_epi16::<4>(high),
                _mm256_slli_epi16::<2>(high),
                high,
                _mm256_srli_epi16::<2>(high),
            ];
            for (n, part) in parts.into_iter().enumerate() {
                quants[4 * k + n] = _mm256_or_si256(quants[4 * k + n], _mm256_and_si256(part, mask));
            }
        }
    }
    // SAFETY: the offsets are those of the layout (see `format`), and of this half.
    let halves = |at: usize| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(panel.as_ptr().add(at + half * PANEL).cast())) };
    // SAFETY: as above.
    let eight = |at: usize| unsafe { _mm_loadl_epi64(panel.as_ptr().add(at + half * LANES).cast()) };
    let unsigned = |at: usize| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(at)));
    let signed = |at: usize| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(at)));
    let (scales, minimum) = match format {
        Format::Q4_1 => ([halves(b * 4 * PANEL); 2], Some(halves(b * 4 * PANEL + 2 * PANEL))),
        Format::Q4K => {
            let (at, inner) = (b / SUPER * Q4_K_SCALES, 64 + b % SUPER * 32);
            let minimum = _mm256_mul_ps(halves(at + 32), unsigned(at + inner + PANEL));
            (
                [_mm256_mul_ps(halves(at), unsigned(at + inner)); 2],
                Some(_mm256_sub_ps(_mm256_setzero_ps(), minimum)),
            )
        }
        Format::Q6K => {
            let (at, inner) = (b / SUPER * Q6_K_SCALES, 64 + b % SUPER * 32);
            let scale = |i: usize| _mm256_mul_ps(halves(at), signed(at + inner + i * PANEL));
            ([scale(0), scale(1)], None)
        }
        _ => ([halves(b * 2 * PANEL); 2], None),
    };
    Block {
        quants,
        scales,
        minimum,
    }
}

/// See [`super::multiply::floats`].
///
/// # Safety
/// As [`quantized`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn floats(format: Format, panel: &[u8], (x, width): (&[f32], usize), out: &mut Sums) {
    let unit = format.quant_bytes();
    for half in 0..2 {
        for first in (0..width).step_by(PART) {
            let rows = (width - first).min(PART);
            let mut sums = [_mm256_setzero_ps(); PART];
            for (column, x) in x.chunks_exact(width).enumerate() {
                // SAFETY: the panel has as many columns as the tile.
                let w = unsafe {
                    let at = panel.as_ptr().add(column * unit + half * unit / 2);
                    match format {
                        Format::F32 => _mm256_loadu_ps(at.cast()),
                        Format::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                        _ => {
                            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                        }
                    }
                };
                for (sum, x) in sums.iter_mut().zip(&x[first..first + rows]) {
                    *sum = _mm256_fmadd_ps(w, _mm256_set1_ps(*x), *sum);
                }
            }
            for (r, sum) in sums.iter().enumerate().take(rows) {
                // SAFETY: 8 floats are written into one half of an array of 16.
                unsafe { _mm256_storeu_ps(out[first + r].as_mut_ptr().add(half * LANES), *sum) };
            }
        }
    }
}
