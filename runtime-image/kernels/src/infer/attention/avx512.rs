//! Scores and mixing with AVX-512: 16 tokens, or 16 dimensions, in a register; each load serves all queries.

use std::arch::x86_64::*;

use super::cache::{KvLayer, KvLayout, Store};
use super::part::{LANES, Queries, Scores, runs};
use super::{PART, QUERIES};

/// How far ahead of their use keys are fetched.
const AHEAD_BLOCKS: usize = 2;

/// A number type of the cache.
trait Number {
    /// Bytes of a number.
    const BYTES: usize;
    /// Whether numbers have scales.
    const SCALED: bool;
    /// Up to 16 numbers from `at` on as floats, without their scales; zero where `mask` has no bit.
    unsafe fn load(numbers: *const u8, at: usize, mask: __mmask16) -> __m512;
}

struct F32;
struct F16;
struct Q8;

impl Number for F32 {
    const BYTES: usize = 4;
    const SCALED: bool = false;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
    unsafe fn load(numbers: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the masked numbers exist.
        unsafe { _mm512_maskz_loadu_ps(mask, numbers.add(4 * at).cast()) }
    }
}

impl Number for F16 {
    const BYTES: usize = 2;
    const SCALED: bool = false;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
    unsafe fn load(numbers: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the masked numbers exist.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, numbers.add(2 * at).cast())) }
    }
}

impl Number for Q8 {
    const BYTES: usize = 1;
    const SCALED: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
    unsafe fn load(numbers: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the masked numbers exist.
        let bytes = unsafe { _mm_maskz_loadu_epi8(mask, numbers.add(at).cast()) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }
}

/// The numbers and, where they have them, the scales of a store.
fn pointers(store: &Store) -> (*const u8, *const u16) {
    match store {
        Store::F32(numbers) => (numbers.as_ptr().cast(), std::ptr::null()),
        Store::F16(numbers) => (numbers.as_ptr().cast(), std::ptr::null()),
        Store::Q8 { quants, scales } => (quants.as_ptr().cast(), scales.as_ptr()),
    }
}

/// Asks for `count` numbers from `at` on; a hint, which no address makes wrong.
#[inline]
fn prefetch<N: Number>(numbers: *const u8, at: usize, count: usize) {
    for line in (N::BYTES * at..N::BYTES * (at + count)).step_by(64) {
        // SAFETY: a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(numbers.wrapping_add(line).cast()) };
    }
}

fn mask(count: usize) -> __mmask16 {
    ((1u32 << count.min(16)) - 1) as __mmask16
}

/// Calls `$function` for the store's type and the number of queries.
macro_rules! dispatch {
    ($store:expr, $width:expr, $function:ident($($arg:expr),*)) => {
        match $store {
            Store::F32(_) => dispatch!(@ F32, $width, $function($($arg),*)),
            Store::F16(_) => dispatch!(@ F16, $width, $function($($arg),*)),
            Store::Q8 { .. } => dispatch!(@ Q8, $width, $function($($arg),*)),
        }
    };
    (@ $number:ident, $width:expr, $function:ident($($arg:expr),*)) => {
        match $width {
            1 => $function::<$number, 1>($($arg),*),
            2 => $function::<$number, 2>($($arg),*),
            3 => $function::<$number, 3>($($arg),*),
            4 => $function::<$number, 4>($($arg),*),
            6 => $function::<$number, 6>($($arg),*),
            8 => $function::<$number, 8>($($arg),*),
            _ => $function::<$number, QUERIES>($($arg),*),
        }
    };
}

/// `scores[query][token] = query · key` for the first `len` tokens of part `index`.
///
/// # Safety
/// The processor has AVX-512 F, BW and VL; the blocks of those tokens lie in the cache.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn scores(
    cache: &KvLayer,
    table: &[u32],
    head: usize,
    queries: &Queries,
    index: usize,
    len: usize,
    scores: &mut Scores,
) {
    // SAFETY: as the function demands.
    unsafe {
        dispatch!(
            &cache.keys,
            queries.width(),
            scores_of(cache, table, head, &queries.values, index, len, scores)
        )
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
unsafe fn scores_of<N: Number, const Q: usize>(
    cache: &KvLayer,
    table: &[u32],
    head: usize,
    queries: &[f32],
    index: usize,
    len: usize,
    scores: &mut Scores,
) {
    let KvLayout {
        head_dim, block_tokens, ..
    } = cache.layout;
    let group = if N::SCALED { cache.layout.group() } else { head_dim };
    let (numbers, scales) = pointers(&cache.keys);
    debug_assert_eq!(queries.len(), head_dim * Q);
    let (values, _) = pointers(&cache.values);
    for run in runs(cache.layout, table, index, len) {
        let (at, mask) = (cache.at(run.block, head), mask(run.count));
        // Blocks lie anywhere, so the hardware foresees nothing: keys are fetched ahead, values for the mixing that follows.
        let ahead = (index * PART + run.at) / block_tokens + AHEAD_BLOCKS;
        if let Some(block) = table.get(ahead).filter(|_| run.slot == 0) {
            prefetch::<N>(numbers, cache.at(*block, head), head_dim * block_tokens);
        }
        prefetch::<N>(values, at + run.slot * head_dim, run.count * head_dim);
        let mut sums = [_mm512_setzero_ps(); Q];
        for (g, queries) in queries.chunks_exact(group * Q).enumerate() {
            let mut parts = [_mm512_setzero_ps(); Q];
            for (i, queries) in queries.as_chunks::<Q>().0.iter().enumerate() {
                let d = g * group + i;
                // SAFETY: the run's tokens lie side by side in each dimension of the block.
                let key = unsafe { N::load(numbers, at + d * block_tokens + run.slot, mask) };
                for q in 0..Q {
                    parts[q] = _mm512_fmadd_ps(key, _mm512_set1_ps(queries[q]), parts[q]);
                }
            }
            if !N::SCALED {
                sums = parts;
                continue;
            }
            // SAFETY: a scale for each token of the run, side by side.
            let scale = unsafe {
                let at = at / group + g * block_tokens + run.slot;
                _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales.add(at).cast()))
            };
            for q in 0..Q {
                sums[q] = _mm512_fmadd_ps(parts[q], scale, sums[q]);
            }
        }
        for q in 0..Q {
            // SAFETY: the run ends inside the part.
            unsafe { _mm512_mask_storeu_ps(scores[q].as_mut_ptr().add(run.at), mask, sums[q]) };
        }
    }
}

/// `out[query][dimension] = Σ weight[query][token] · value[token]` over the first `len` tokens of part `index`.
///
/// # Safety
/// As [`scores`].
#[allow(clippy::too_many_arguments, reason = "as `part::compute`")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn mix(
    cache: &KvLayer,
    table: &[u32],
    head: usize,
    width: usize,
    index: usize,
    len: usize,
    weights: &Scores,
    out: &mut [f32],
) {
    // SAFETY: as the function demands.
    unsafe {
        dispatch!(
            &cache.values,
            width,
            mix_of(cache, table, head, index, len, weights, out)
        )
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
unsafe fn mix_of<N: Number, const Q: usize>(
    cache: &KvLayer,
    table: &[u32],
    head: usize,
    index: usize,
    len: usize,
    weights: &Scores,
    out: &mut [f32],
) {
    let dim = cache.layout.head_dim;
    let group = if N::SCALED { cache.layout.group() } else { dim };
    let (numbers, scales) = pointers(&cache.values);
    debug_assert!(out.len() == dim * Q && len <= PART);
    for d in (0..dim).step_by(32) {
        // Two registers of dimensions at a time, for all queries. What lies behind the head's width is masked off.
        let masks = [mask(dim - d), mask((dim - d).saturating_sub(16))];
        let mut mixed = [[_mm512_setzero_ps(); 2]; Q];
        for run in runs(cache.layout, table, index, len) {
            let first = cache.at(run.block, head) + run.slot * dim + d;
            for i in 0..run.count {
                let at = first + i * dim;
                // SAFETY: the masked numbers are the token's; each has a scale. A pointer behind the last one is not read.
                let value = unsafe {
                    let mut value = [N::load(numbers, at, masks[0]), N::load(numbers, at + 16, masks[1])];
                    if N::SCALED {
                        // Both registers lie in one group, of 32 numbers or of the whole head.
                        let half = _mm256_set1_epi16(scales.add(at / group).read() as i16);
                        value = value.map(|value| _mm512_mul_ps(value, _mm512_cvtph_ps(half)));
                    }
                    value
                };
                for q in 0..Q {
                    let weight = _mm512_set1_ps(weights[q][run.at + i]);
                    mixed[q][0] = _mm512_fmadd_ps(weight, value[0], mixed[q][0]);
                    mixed[q][1] = _mm512_fmadd_ps(weight, value[1], mixed[q][1]);
                }
            }
        }
        for q in 0..Q {
            for i in 0..2 {
                // SAFETY: the masked numbers are the query's.
                unsafe {
                    let to = out.as_mut_ptr().wrapping_add(q * dim + d + 16 * i);
                    _mm512_mask_storeu_ps(to, masks[i], mixed[q][i]);
                }
            }
        }
    }
}

/// See [`super::part`]'s function of this name.
///
/// # Safety
/// The processor has AVX-512 F.
#[target_feature(enable = "avx2,fma,avx512f")]
pub(super) unsafe fn softmax(scores: &mut [f32; PART], start: usize, end: usize) -> (f32, f32) {
    // Lanes of chunk `index` whose tokens count.
    let inside = |index: usize| {
        let below = |token: usize| mask(token.saturating_sub(index * LANES));
        below(end) & !below(start)
    };
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut largest = lowest;
    for (index, scores) in scores.as_chunks::<LANES>().0.iter().enumerate() {
        // SAFETY: a chunk has 16 floats.
        largest = _mm512_max_ps(largest, unsafe {
            _mm512_mask_loadu_ps(lowest, inside(index), scores.as_ptr())
        });
    }
    let largest = _mm512_reduce_max_ps(largest);
    let mut sums = _mm512_setzero_ps();
    for (index, scores) in scores.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // SAFETY: a chunk has 16 floats.
        unsafe {
            let score = _mm512_sub_ps(_mm512_loadu_ps(scores.as_ptr()), _mm512_set1_ps(largest));
            let weight = _mm512_maskz_mov_ps(inside(index), exp(score));
            _mm512_storeu_ps(scores.as_mut_ptr(), weight);
            sums = _mm512_add_ps(sums, weight);
        }
    }
    (largest, _mm512_reduce_add_ps(sums))
}

/// e^x for x up to 0, as [`crate::ops::exp`] computes it.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f")]
fn exp(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_set1_ps(-87.3));
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693_359_4), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.987_569_2e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    }
    let mantissa = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0));
    _mm512_scalef_ps(mantissa, n)
}
