//! The path for AVX-512 with VNNI: a register holds 4 columns of a panel's 16 rows.

use std::arch::x86_64::*;

use super::format::{BLOCK, Format, PANEL, Q4_K_SCALES, Q6_K_SCALES, SUPER};
use super::multiply::{Sums, back};
use super::rows::{BACK_32, FACTS, SCALE, SCALED_SUM, facts};

/// How far ahead of its use a panel is fetched, in bytes: the hardware stops at the end of each 4 KiB page.
const AHEAD: usize = 2048;

/// A format as a type, so that each gets a loop of its own.
pub(super) trait Kind {
    /// The format.
    const FORMAT: Format;
}

macro_rules! kinds {
    ($($name:ident)*) => {$(
        pub(super) struct $name;
        impl Kind for $name {
            const FORMAT: Format = Format::$name;
        }
    )*};
}
kinds!(Q8_0 Q4_0 Q4_1 Q4K Q6K F32 F16 BF16);

/// Repeats a block for each `$r` below `$count`, at most 16. A loop over an array of registers stays a loop when its body is
/// large, and then the registers live in memory.
macro_rules! unroll {
    ($r:ident < $count:ident, $body:block) => {
        unroll!(@ $r, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $r:ident, $count:ident, $body:block, $($index:literal)*) => {$(
        if $index < $count {
            let $r = $index;
            $body
        }
    )*};
}
pub(super) use unroll;

/// A block of a panel in registers.
pub(super) struct Block {
    pub(super) quants: [__m512i; 8],
    pub(super) scales: [__m512; 2],
    pub(super) minimum: __m512,
}

/// See [`super::multiply::quantized`].
///
/// # Safety
/// The processor has AVX-512 F, BW, VL and VNNI; the panel and the tile are of `columns` columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn quantized(
    format: Format,
    panel: &[u8],
    columns: usize,
    tile: (&[i8], &[u32], usize),
    sums: &mut Sums,
) {
    debug_assert_eq!(panel.len(), format.panel_bytes(columns));
    // SAFETY: as the function demands.
    unsafe {
        match format {
            Format::Q8_0 => widths::<Q8_0>(panel, columns, tile, sums),
            Format::Q4_0 => widths::<Q4_0>(panel, columns, tile, sums),
            Format::Q4_1 => widths::<Q4_1>(panel, columns, tile, sums),
            Format::Q4K => widths::<Q4K>(panel, columns, tile, sums),
            Format::Q6K => widths::<Q6K>(panel, columns, tile, sums),
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("floats have a path of their own"),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn widths<K: Kind>(panel: &[u8], columns: usize, tile: (&[i8], &[u32], usize), sums: &mut Sums) {
    let (quants, facts, width) = tile;
    // SAFETY: as the caller promises.
    unsafe {
        match width {
            1 => blocks::<K, 1>(panel, columns, quants, facts, sums),
            2 => blocks::<K, 2>(panel, columns, quants, facts, sums),
            4 => blocks::<K, 4>(panel, columns, quants, facts, sums),
            8 => blocks::<K, 8>(panel, columns, quants, facts, sums),
            12 => blocks::<K, 12>(panel, columns, quants, facts, sums),
            _ => blocks::<K, 16>(panel, columns, quants, facts, sums),
        }
    }
}

/// # Safety
/// As [`quantized`]; the tile is `R` wide.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn blocks<K: Kind, const R: usize>(panel: &[u8], columns: usize, x: &[i8], facts: &[u32], out: &mut Sums) {
    let blocks = columns / BLOCK;
    debug_assert!(x.len() == R * columns && facts.len() == R * blocks * FACTS);
    let scales = panel.as_ptr();
    let quants = scales.wrapping_add(K::FORMAT.scale_bytes(columns));
    let (mut x, mut facts) = (x.as_ptr(), facts.as_ptr());
    let mut sums = [_mm512_setzero_ps(); R];
    for b in 0..blocks {
        // SAFETY: block `b` lies in the panel and in the tile.
        unsafe {
            let block = load::<K>(scales, quants, b);
            unroll!(r < R, {
                let fact = |fact: usize| facts.add(fact * R + r);
                let dot = |mut sum: __m512i, from: usize| {
                    for j in from..from + 4 {
                        let four = x.add(r * BLOCK + 4 * j).cast::<i32>().read_unaligned();
                        sum = _mm512_dpbusd_epi32(sum, block.quants[j], _mm512_set1_epi32(four));
                    }
                    sum
                };
                let scale = _mm512_set1_ps(fact(SCALE).cast::<f32>().read());
                let start = |index: usize| _mm512_set1_epi32(fact(index).cast::<i32>().read());
                if let Format::Q6K = K::FORMAT {
                    for half in 0..2 {
                        let sum = _mm512_cvtepi32_ps(dot(start(BACK_32 + half), 4 * half));
                        sums[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(block.scales[half], scale), sums[r]);
                    }
                } else {
                    let begin = match const { back(K::FORMAT) } {
                        Some(index) => start(index),
                        None => _mm512_setzero_si512(),
                    };
                    let sum = _mm512_cvtepi32_ps(dot(dot(begin, 0), 4));
                    sums[r] = _mm512_fmadd_ps(sum, _mm512_mul_ps(block.scales[0], scale), sums[r]);
                }
                if let Format::Q4_1 | Format::Q4K = K::FORMAT {
                    let scaled_sum = _mm512_set1_ps(fact(SCALED_SUM).cast::<f32>().read());
                    sums[r] = _mm512_fmadd_ps(block.minimum, scaled_sum, sums[r]);
                }
            });
            x = x.add(R * BLOCK);
            facts = facts.add(R * FACTS);
        }
    }
    for r in 0..R {
        // SAFETY: 16 floats are written to an array of 16.
        unsafe { _mm512_storeu_ps(out[r].as_mut_ptr(), sums[r]) };
    }
}

/// # Safety
/// Block `b` lies in the panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn load<K: Kind>(scales: *const u8, quants: *const u8, b: usize) -> Block {
    let unit = K::FORMAT.quant_bytes();
    // SAFETY: the offsets are those of the layout (see `format`); a prefetch may go anywhere.
    unsafe {
        let at = quants.add(b * unit);
        for line in (0..unit).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + line).cast());
        }
        let register = |i: usize| _mm512_loadu_si512(at.add(64 * i).cast());
        let halves = |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(at).cast()));
        let nibble = _mm512_set1_epi8(15);
        let mut w = [_mm512_setzero_si512(); 8];
        if let Format::Q8_0 = K::FORMAT {
            for (j, w) in w.iter_mut().enumerate() {
                *w = register(j);
            }
        } else {
            for j in 0..4 {
                let both = register(j);
                w[j] = _mm512_and_si512(both, nibble);
                w[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble);
            }
        }
        let zero = _mm512_setzero_ps();
        match K::FORMAT {
            Format::Q4_1 => Block {
                quants: w,
                scales: [halves(b * 4 * PANEL), zero],
                minimum: halves(b * 4 * PANEL + 2 * PANEL),
            },
            Format::Q4K => {
                let (at, inner) = (b / SUPER * Q4_K_SCALES, 64 + b % SUPER * 32);
                let bytes =
                    |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(scales.add(at).cast())));
                let minimum = _mm512_mul_ps(halves(at + 32), bytes(at + inner + PANEL));
                Block {
                    quants: w,
                    scales: [_mm512_mul_ps(halves(at), bytes(at + inner)), zero],
                    minimum: _mm512_sub_ps(zero, minimum),
                }
            }
            Format::Q6K => {
                let mask = _mm512_set1_epi8(0x30);
                for k in 0..2 {
                    let high = register(4 + k);
                    let parts = [
                        _mm512_slli_epi16::<4>(high),
                        _mm512_slli_epi16::<2>(high),
                        high,
                        _mm512_srli_epi16::<2>(high),
                    ];
                    for (n, part) in parts.into_iter().enumerate() {
                        w[4 * k + n] = _mm512_or_si512(w[4 * k + n], _mm512_and_si512(part, mask));
                    }
                }
                let (at, inner) = (b / SUPER * Q6_K_SCALES, 64 + b % SUPER * 32);
                let d = halves(at);
                let scale = |half: usize| {
                    let bytes = _mm_loadu_si128(scales.add(at + inner + half * PANEL).cast());
                    _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
                };
                Block {
                    quants: w,
                    scales: [scale(0), scale(1)],
                    minimum: zero,
                }
            }
            _ => Block {
                quants: w,
                scales: [halves(b * 2 * PANEL), zero],
                minimum: zero,
            },
        }
    }
}

/// See [`super::multiply::floats`].
///
/// # Safety
/// As [`quantized`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn floats(format: Format, panel: &[u8], tile: (&[f32], usize), sums: &mut Sums) {
    // SAFETY: as the function demands.
    unsafe {
        match format {
            Format::F32 => float_widths::<F32>(panel, tile, sums),
            Format::F16 => float_widths::<F16>(panel, tile, sums),
            Format::BF16 => float_widths::<BF16>(panel, tile, sums),
            _ => unreachable!("quantized formats have a path of their own"),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn float_widths<K: Kind>(panel: &[u8], tile: (&[f32], usize), sums: &mut Sums) {
    let (x, width) = tile;
    // SAFETY: as the caller promises.
    unsafe {
        match width {
            1 => columns::<K, 1>(panel, x, sums),
            2 => columns::<K, 2>(panel, x, sums),
            4 => columns::<K, 4>(panel, x, sums),
            8 => columns::<K, 8>(panel, x, sums),
            12 => columns::<K, 12>(panel, x, sums),
            _ => columns::<K, 16>(panel, x, sums),
        }
    }
}

/// # Safety
/// As [`floats`]; the tile is `R` wide.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn columns<K: Kind, const R: usize>(panel: &[u8], x: &[f32], out: &mut Sums) {
    let unit = K::FORMAT.quant_bytes();
    debug_assert_eq!(panel.len() / unit * R, x.len());
    let mut sums = [_mm512_setzero_ps(); R];
    for (column, x) in x.as_chunks::<R>().0.iter().enumerate() {
        // SAFETY: the panel has as many columns as the tile; a prefetch may go anywhere.
        let w = unsafe {
            let at = panel.as_ptr().add(column * unit);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            match K::FORMAT {
                Format::F32 => _mm512_loadu_ps(at.cast()),
                Format::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
                _ => {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                }
            }
        };
        unroll!(r < R, {
            sums[r] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r]), sums[r]);
        });
    }
    for r in 0..R {
        // SAFETY: 16 floats are written to an array of 16.
        unsafe { _mm512_storeu_ps(out[r].as_mut_ptr(), sums[r]) };
    }
}

/// Rounds a block of activations; see [`super::rows::Q8Rows`].
///
/// # Safety
/// The processor has AVX-512 F.
#[target_feature(enable = "avx2,fma,avx512f")]
pub(super) unsafe fn quantize(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [u32; FACTS] {
    // SAFETY: a block has 32 floats.
    let x = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(BLOCK / 2))] };
    let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1])));
    let inverse = _mm512_set1_ps(if largest > 0.0 { 127.0 / largest } else { 0.0 });
    let rounded = x.map(|x| _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
    for (half, rounded) in rounded.into_iter().enumerate() {
        // SAFETY: 16 bytes are written into one half of an array of 32.
        unsafe {
            let to = quants.as_mut_ptr().add(half * BLOCK / 2);
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(rounded));
        }
    }
    facts(largest / 127.0, rounded.map(|rounded| _mm512_reduce_add_epi32(rounded)))
}
