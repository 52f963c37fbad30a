//! Attention over a key-value cache that is kept in blocks: keys and values are read where they lie, once per group of query
//! heads that share them. Tokens are summed in order, so neither blocks, batch nor threads change a result.

use std::cell::RefCell;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::cpu::Isa;
use crate::ops::{exp, vectorized};
use crate::pool::{Disjoint, Pool};

/// Query heads that share one pass over keys and values.
const HEADS: usize = 4;
const LANES: usize = 8;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// 32-bit floats: exact.
    F32,
    /// Half floats: half the memory and reads.
    F16,
}

impl KvDtype {
    /// Bytes of one number.
    pub fn size_bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 => 2,
        }
    }
}

/// Sizes of a cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// Number type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes that a block takes in one layer, keys and values together.
    pub fn block_bytes(&self) -> usize {
        2 * self.block_elements() * self.dtype.size_bytes()
    }

    fn block_elements(&self) -> usize {
        self.kv_heads * self.block_tokens * self.head_dim
    }
}

#[derive(Debug)]
enum Store {
    F32(Vec<f32>),
    /// The bits of half floats: zeroed integers come from the system untouched, zeroed structures do not.
    F16(Vec<u16>),
}

impl Store {
    fn new(dtype: KvDtype, len: usize) -> Self {
        match dtype {
            KvDtype::F32 => Store::F32(vec![0.0; len]),
            KvDtype::F16 => Store::F16(vec![0; len]),
        }
    }

    fn write(&mut self, at: usize, values: &[f32]) {
        match self {
            Store::F32(store) => store[at..at + values.len()].copy_from_slice(values),
            Store::F16(store) => {
                store[at..at + values.len()]
                    .reinterpret_cast_mut::<f16>()
                    .convert_from_f32_slice(values);
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Store::F32(store) => store.len(),
            Store::F16(store) => store.len(),
        }
    }

    fn read(&self, at: usize) -> f32 {
        match self {
            Store::F32(store) => store[at],
            Store::F16(store) => f16::from_bits(store[at]).to_f32(),
        }
    }
}

/// Keys and values of one layer: `[block][head][token][dimension]`. Memory is taken from the system when a block is first
/// written.
#[derive(Debug)]
pub struct KvLayer {
    layout: KvLayout,
    keys: Store,
    values: Store,
}

impl KvLayer {
    /// A cache of `blocks` blocks.
    pub fn new(layout: KvLayout, blocks: usize) -> Self {
        let len = blocks * layout.block_elements();
        KvLayer {
            layout,
            keys: Store::new(layout.dtype, len),
            values: Store::new(layout.dtype, len),
        }
    }

    /// Stores one token's keys and values (`kv_heads · head_dim` each) at place `slot` of `block`.
    pub fn write(&mut self, block: u32, slot: usize, keys: &[f32], values: &[f32]) {
        let KvLayout {
            kv_heads,
            head_dim,
            block_tokens,
            ..
        } = self.layout;
        assert!(
            slot < block_tokens && keys.len() == kv_heads * head_dim && values.len() == keys.len(),
            "slot {slot}"
        );
        for head in 0..kv_heads {
            let at = self.at(block, head) + slot * head_dim;
            self.keys.write(at, &keys[head * head_dim..(head + 1) * head_dim]);
            self.values.write(at, &values[head * head_dim..(head + 1) * head_dim]);
        }
    }

    /// Where the numbers of `head` begin in `block`.
    fn at(&self, block: u32, head: usize) -> usize {
        (block as usize * self.layout.kv_heads + head) * self.layout.block_tokens * self.layout.head_dim
    }
}

/// What one row attends to: the first `len` tokens in the blocks of `table`, in order.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The sequence's blocks.
    pub table: &'a [u32],
    /// Tokens to attend to, the row's own included.
    pub len: usize,
}

thread_local! {
    /// Scores of one row and up to [`HEADS`] heads.
    static SCORES: RefCell<Vec<[f32; HEADS]>> = const { RefCell::new(Vec::new()) };
}

/// Causal attention of each row's query heads (`rows × heads · head_dim`, already turned by its position) over its sequence.
///
/// Panics when the sizes do not fit together or a table is too short.
pub fn attend(pool: &Pool, isa: Isa, cache: &KvLayer, queries: &[f32], rows: &[Sequence<'_>], out: &mut [f32]) {
    let KvLayout {
        kv_heads,
        head_dim,
        block_tokens,
        ..
    } = cache.layout;
    if rows.is_empty() {
        return;
    }
    let width = queries.len() / rows.len();
    let share = width / (kv_heads * head_dim);
    assert!(
        share > 0 && queries.len() == rows.len() * kv_heads * share * head_dim && out.len() == queries.len(),
        "attention: sizes differ"
    );
    let blocks = cache.keys.len() / cache.layout.block_elements().max(1);
    for row in rows {
        assert!(
            row.len > 0 && row.table.len() * block_tokens >= row.len,
            "a table of {} blocks for {} tokens",
            row.table.len(),
            row.len
        );
        assert!(
            row.table.iter().all(|block| (*block as usize) < blocks),
            "a block outside of the cache"
        );
    }
    let out = Disjoint::new(out);
    pool.parallel_for(rows.len() * kv_heads, |range| {
        SCORES.with_borrow_mut(|scores| {
            for index in range {
                let (row, head) = (index / kv_heads, index % kv_heads);
                for first in (0..share).step_by(HEADS) {
                    let at = row * width + (head * share + first) * head_dim;
                    let at = at..at + (share - first).min(HEADS) * head_dim;
                    // SAFETY: each row and head belongs to one chunk.
                    let out = unsafe { out.slice_mut(at.clone()) };
                    heads(isa, cache, head, &queries[at], rows[row], scores, out);
                }
            }
        });
    });
}

/// Up to [`HEADS`] query heads that share the keys and values of `head`.
fn heads(
    isa: Isa,
    cache: &KvLayer,
    head: usize,
    queries: &[f32],
    row: Sequence<'_>,
    scores: &mut Vec<[f32; HEADS]>,
    out: &mut [f32],
) {
    let head_dim = cache.layout.head_dim;
    scores.clear();
    scores.resize(row.len, [0.0; HEADS]);
    let scale = 1.0 / (head_dim as f32).sqrt();
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 && head_dim.is_multiple_of(LANES) {
        // SAFETY: the processor has what the paths need; sizes and blocks were checked by `attend`.
        unsafe {
            match (&cache.keys, &cache.values) {
                (Store::F16(keys), Store::F16(values)) => {
                    x86::dots::<true>(cache, keys.as_ptr().cast(), head, queries, row, scale, scores);
                    let sums = softmax(scores);
                    x86::mix::<true>(cache, values.as_ptr().cast(), head, row, scores, sums, out);
                }
                (Store::F32(keys), Store::F32(values)) => {
                    x86::dots::<false>(cache, keys.as_ptr().cast(), head, queries, row, scale, scores);
                    let sums = softmax(scores);
                    x86::mix::<false>(cache, values.as_ptr().cast(), head, row, scores, sums, out);
                }
                _ => unreachable!("keys and values are made with one type"),
            }
        }
        return;
    }
    let _ = isa;
    for_tokens(cache, head, row, |t, at| {
        for (score, query) in scores[t].iter_mut().zip(queries.chunks_exact(head_dim)) {
            *score = query
                .iter()
                .enumerate()
                .map(|(d, q)| q * cache.keys.read(at + d))
                .sum::<f32>()
                * scale;
        }
    });
    let sums = softmax(scores);
    out.fill(0.0);
    for_tokens(cache, head, row, |t, at| {
        for (weight, out) in scores[t].iter().zip(out.chunks_exact_mut(head_dim)) {
            for (d, out) in out.iter_mut().enumerate() {
                *out += weight * cache.values.read(at + d);
            }
        }
    });
    for (sum, out) in sums.iter().zip(out.chunks_exact_mut(head_dim)) {
        out.iter_mut().for_each(|x| *x *= 1.0 / sum);
    }
}

/// Calls `visit(token, where its numbers begin)` for the row's tokens in order.
#[inline(always)]
fn for_tokens(cache: &KvLayer, head: usize, row: Sequence<'_>, mut visit: impl FnMut(usize, usize)) {
    let KvLayout {
        block_tokens, head_dim, ..
    } = cache.layout;
    for (i, block) in row.table.iter().enumerate() {
        let first = i * block_tokens;
        if first >= row.len {
            return;
        }
        let at = cache.at(*block, head);
        for slot in 0..block_tokens.min(row.len - first) {
            visit(first + slot, at + slot * head_dim);
        }
    }
}

vectorized! {
    /// Replaces scores by `e^(score - largest)`; returns their sums.
    fn softmax(scores: &mut [[f32; HEADS]]) -> [f32; HEADS] {
        let mut largest = [f32::NEG_INFINITY; HEADS];
        for score in scores.iter() {
            for head in 0..HEADS {
                largest[head] = if score[head] > largest[head] { score[head] } else { largest[head] };
            }
        }
        let mut sums = [0f32; HEADS];
        for score in scores.iter_mut() {
            for head in 0..HEADS {
                score[head] = exp(score[head] - largest[head]);
                sums[head] += score[head];
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{HEADS, KvLayer, LANES, Sequence, for_tokens};

    /// Eight numbers at element `at`, halves or floats.
    ///
    /// # Safety
    /// The elements exist, and the processor has AVX2 and F16C.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load<const HALF: bool>(store: *const u8, at: usize) -> __m256 {
        // SAFETY: as the function demands.
        unsafe {
            if HALF {
                _mm256_cvtph_ps(_mm_loadu_si128(store.add(at * 2).cast()))
            } else {
                _mm256_loadu_ps(store.add(at * 4).cast())
            }
        }
    }

    /// `scores[token][head] = scale · query[head] · key[token]`.
    ///
    /// # Safety
    /// `keys` has all blocks of the row's table; the head's width is a multiple of 8.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn dots<const HALF: bool>(
        cache: &KvLayer,
        keys: *const u8,
        head: usize,
        queries: &[f32],
        row: Sequence<'_>,
        scale: f32,
        scores: &mut [[f32; HEADS]],
    ) {
        let dim = cache.layout.head_dim;
        // Heads that are not there repeat the last one; nobody reads their scores.
        let last = queries.len() / dim - 1;
        let query: [*const f32; HEADS] = std::array::from_fn(|i| queries[i.min(last) * dim..].as_ptr());
        let scale = _mm_set1_ps(scale);
        for_tokens(cache, head, row, |t, at| {
            let mut sums = [_mm256_setzero_ps(); HEADS];
            for d in (0..dim).step_by(LANES) {
                // SAFETY: the token's numbers and the queries have `dim` elements.
                unsafe {
                    let key = load::<HALF>(keys, at + d);
                    for i in 0..HEADS {
                        sums[i] = _mm256_fmadd_ps(key, _mm256_loadu_ps(query[i].add(d)), sums[i]);
                    }
                }
            }
            let pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
            let all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
            // SAFETY: 4 floats are written to an array of 4.
            unsafe { _mm_storeu_ps(scores[t].as_mut_ptr(), _mm_mul_ps(all, scale)) };
        });
    }

    /// `out[head] = Σ weight[token][head] · value[token] / sums[head]`.
    ///
    /// # Safety
    /// As [`dots`], for `values`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn mix<const HALF: bool>(
        cache: &KvLayer,
        values: *const u8,
        head: usize,
        row: Sequence<'_>,
        weights: &[[f32; HEADS]],
        sums: [f32; HEADS],
        out: &mut [f32],
    ) {
        let dim = cache.layout.head_dim;
        let count = out.len() / dim;
        let mut d = 0;
        while d < dim {
            // Two registers of dimensions at a time, for all heads: one read of the values serves them all.
            let wide = d + 2 * LANES <= dim;
            let mut mixed = [[_mm256_setzero_ps(); 2]; HEADS];
            for_tokens(cache, head, row, |t, at| {
                // SAFETY: the token's numbers have `dim` elements; without `wide` the second register repeats the first.
                let value = unsafe {
                    [
                        load::<HALF>(values, at + d),
                        load::<HALF>(values, at + d + if wide { LANES } else { 0 }),
                    ]
                };
                for i in 0..HEADS {
                    let weight = _mm256_set1_ps(weights[t][i]);
                    mixed[i][0] = _mm256_fmadd_ps(weight, value[0], mixed[i][0]);
                    mixed[i][1] = _mm256_fmadd_ps(weight, value[1], mixed[i][1]);
                }
            });
            for i in 0..count {
                let inverse = _mm256_set1_ps(1.0 / sums[i]);
                let out = &mut out[i * dim + d..(i + 1) * dim];
                // SAFETY: at least 8 elements are left from `d` on, 16 if `wide`.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(mixed[i][0], inverse));
                    if wide {
                        _mm256_storeu_ps(out.as_mut_ptr().add(LANES), _mm256_mul_ps(mixed[i][1], inverse));
                    }
                }
            }
            d += if wide { 2 * LANES } else { LANES };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::numbers;

    /// One head in the plainest form.
    fn reference(query: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f64> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let scores: Vec<f64> = keys
            .iter()
            .map(|key| dot(query, key) / (query.len() as f64).sqrt())
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..query.len())
            .map(|d| {
                weights
                    .iter()
                    .zip(values)
                    .map(|(w, value)| w * f64::from(value[d]))
                    .sum::<f64>()
                    / sum
            })
            .collect()
    }

    #[test]
    fn agrees_with_a_plain_reference_for_any_grouping_type_and_length() {
        let pool = Pool::new(2);
        for (kv_heads, share, head_dim, block_tokens) in [(1, 1, 6, 4), (2, 3, 16, 4), (3, 3, 64, 16), (1, 7, 24, 8)] {
            for dtype in [KvDtype::F32, KvDtype::F16] {
                let layout = KvLayout {
                    kv_heads,
                    head_dim,
                    block_tokens,
                    dtype,
                };
                let (tokens, blocks) = (37usize, 20u32);
                let mut cache = KvLayer::new(layout, blocks as usize);
                // Blocks in any order, not those that come first.
                let table: Vec<u32> = (0..tokens.div_ceil(block_tokens) as u32)
                    .map(|i| (i * 7 + 3) % blocks)
                    .collect();
                let width = kv_heads * head_dim;
                let (keys, values) = (numbers(1, tokens * width, 1.0), numbers(2, tokens * width, 1.0));
                for t in 0..tokens {
                    let at = t * width..(t + 1) * width;
                    cache.write(
                        table[t / block_tokens],
                        t % block_tokens,
                        &keys[at.clone()],
                        &values[at],
                    );
                }
                let lens = [1, 4, 5, 16, 37];
                let rows: Vec<Sequence<'_>> = lens
                    .iter()
                    .map(|len| Sequence {
                        table: &table,
                        len: *len,
                    })
                    .collect();
                let queries = numbers(3, rows.len() * width * share, 2.0);
                for isa in Isa::available() {
                    let mut out = vec![f32::NAN; queries.len()];
                    attend(&pool, isa, &cache, &queries, &rows, &mut out);
                    for (r, len) in lens.iter().enumerate() {
                        for head in 0..kv_heads * share {
                            let column = head / share * head_dim;
                            let slice = |all: &'_ [f32], t: usize| -> Vec<f32> {
                                all[t * width + column..][..head_dim].to_vec()
                            };
                            let k: Vec<Vec<f32>> = (0..*len).map(|t| slice(&keys, t)).collect();
                            let v: Vec<Vec<f32>> = (0..*len).map(|t| slice(&values, t)).collect();
                            let at = (r * kv_heads * share + head) * head_dim;
                            let expected = reference(
                                &queries[at..at + head_dim],
                                &k.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                                &v.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                            );
                            let most = if dtype == KvDtype::F16 { 4e-3 } else { 1e-5 };
                            for (got, expected) in out[at..at + head_dim].iter().zip(expected) {
                                assert!(
                                    (f64::from(*got) - expected).abs() < most,
                                    "{layout:?} {} len {len}: {got} {expected}",
                                    isa.name()
                                );
                            }
                        }
                    }
                    // Alone a row gets the same bits as among others.
                    let width = width * share;
                    let mut alone = vec![0.0; width];
                    attend(
                        &pool,
                        isa,
                        &cache,
                        &queries[3 * width..4 * width],
                        &rows[3..4],
                        &mut alone,
                    );
                    assert_eq!(alone, out[3 * width..4 * width]);
                }
            }
        }
    }
}
