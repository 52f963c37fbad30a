//! One part of a sequence and up to [`QUERIES`] queries: scores, softmax, mix.

use std::ops::Range;

use super::cache::{KvLayer, KvLayout};
use super::{PART, QUERIES, Scoring};
use crate::cpu::Isa;
use crate::ops::{exp, vectorized};

/// Numbers of queries that kernels exist for.
const WIDTHS: [usize; 7] = [1, 2, 3, 4, 6, 8, QUERIES];
/// Lanes of a sum over tokens.
pub(super) const LANES: usize = 16;

/// Queries side by side, and the tokens that each attends to.
#[derive(Default)]
pub(super) struct Queries {
    width: usize,
    /// `[dimension][query]`
    pub(super) values: Vec<f32>,
    pub(super) tokens: [Range<usize>; QUERIES],
}

impl Queries {
    /// Takes up to [`QUERIES`] queries of `dim` numbers each with their tokens.
    pub(super) fn load<'a>(&mut self, dim: usize, members: impl Iterator<Item = (&'a [f32], Range<usize>)> + Clone) {
        let count = members.clone().count();
        self.width = *WIDTHS.iter().find(|width| **width >= count).expect("at most QUERIES");
        self.tokens = Default::default();
        self.values.clear();
        self.values.resize(dim * self.width, 0.0);
        for (i, (query, tokens)) in members.enumerate() {
            query
                .iter()
                .enumerate()
                .for_each(|(d, x)| self.values[d * self.width + i] = *x);
            self.tokens[i] = tokens;
        }
    }

    /// Queries, those that only fill up the width included: they attend to no token.
    pub(super) fn width(&self) -> usize {
        self.width
    }
}

/// What each query has of a part: the largest score, the sum of the weights, and the weighted values `[query][dimension]`.
#[derive(Default)]
pub(super) struct Part {
    pub(super) largest: [f32; QUERIES],
    pub(super) sums: [f32; QUERIES],
    pub(super) values: Vec<f32>,
}

/// Scores, then weights: `[query][token of the part]`.
pub(super) type Scores = [[f32; PART]; QUERIES];

/// Tokens of a part that lie side by side in a block.
pub(super) struct Run {
    pub(super) block: u32,
    pub(super) slot: usize,
    /// At most [`LANES`].
    pub(super) count: usize,
    /// Its first token, counted from the beginning of the part.
    pub(super) at: usize,
}

/// The first `len` tokens of part `index` in runs.
pub(super) fn runs(layout: KvLayout, table: &[u32], index: usize, len: usize) -> impl Iterator<Item = Run> {
    let (first, size) = (index * PART, layout.block_tokens);
    let mut at = 0;
    std::iter::from_fn(move || {
        let (block, slot) = ((first + at) / size, (first + at) % size);
        let count = LANES.min(size - slot).min(len.checked_sub(at)?);
        let run = Run {
            block: table[block.min(table.len() - 1)],
            slot,
            count,
            at,
        };
        at += count;
        (count > 0).then_some(run)
    })
}

/// Computes part `index` of a sequence in the blocks of `table`, which hold all tokens of the queries. `scores` is scratch.
#[allow(
    clippy::too_many_arguments,
    reason = "what a part is, in the order of the words above"
)]
pub(super) fn compute(
    isa: Isa,
    cache: &KvLayer,
    scoring: &Scoring,
    table: &[u32],
    head: usize,
    queries: &Queries,
    index: usize,
    scores: &mut Scores,
    out: &mut Part,
) {
    let (first, dim) = (index * PART, cache.layout.head_dim);
    let inside = |tokens: &Range<usize>| {
        let place = |token: usize| token.clamp(first, first + PART) - first;
        place(tokens.start)..place(tokens.end)
    };
    let len = queries
        .tokens
        .iter()
        .map(|tokens| inside(tokens).end)
        .max()
        .unwrap_or(0);
    out.values.clear();
    out.values.resize(queries.width() * dim, 0.0);
    out.sums.fill(0.0);
    if len == 0 || queries.tokens.iter().all(|tokens| inside(tokens).is_empty()) {
        return;
    }
    let wide = isa >= Isa::Avx512Vnni;
    #[cfg(target_arch = "x86_64")]
    if wide {
        // SAFETY: the processor has AVX-512; the table's blocks lie in the cache, as `attend` checked.
        unsafe { super::avx512::scores(cache, table, head, queries, index, len, scores) };
    }
    if !wide {
        portable_scores(cache, table, head, queries, index, len, scores);
    }
    for (i, scores) in scores.iter_mut().enumerate().take(queries.width()) {
        let tokens = inside(&queries.tokens[i]);
        if tokens.is_empty() {
            scores.fill(0.0);
            continue;
        }
        shape(&mut scores[tokens.clone()], scoring);
        #[cfg(target_arch = "x86_64")]
        if wide {
            // SAFETY: the processor has AVX-512.
            (out.largest[i], out.sums[i]) = unsafe { super::avx512::softmax(scores, tokens.start, tokens.end) };
            continue;
        }
        (out.largest[i], out.sums[i]) = softmax(scores, tokens.start, tokens.end);
    }
    #[cfg(target_arch = "x86_64")]
    if wide {
        // SAFETY: as above.
        unsafe { super::avx512::mix(cache, table, head, queries.width(), index, len, scores, &mut out.values) };
    }
    if !wide {
        portable_mix(cache, table, head, queries.width(), index, len, scores, &mut out.values);
    }
}

fn shape(scores: &mut [f32], scoring: &Scoring) {
    scores.iter_mut().for_each(|score| *score *= scoring.scale);
    if let Some(cap) = scoring.soft_cap {
        scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
    }
}

vectorized! {
    /// Replaces the scores `start..end` by `e^(score - largest)` and all others by zero; returns the largest and the sum.
    fn softmax(scores: &mut [f32; PART], start: usize, end: usize) -> (f32, f32) {
        scores[..start].fill(f32::NEG_INFINITY);
        scores[end..].fill(f32::NEG_INFINITY);
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for scores in scores.as_chunks::<LANES>().0 {
            for (largest, score) in lanes.iter_mut().zip(scores) {
                *largest = if *score > *largest { *score } else { *largest };
            }
        }
        let largest = lanes.iter().fold(f32::NEG_INFINITY, |largest, score| if *score > largest { *score } else { largest });
        let mut lanes = [0f32; LANES];
        for scores in scores.as_chunks_mut::<LANES>().0 {
            for (sum, score) in lanes.iter_mut().zip(scores) {
                let weight = exp(*score - largest);
                *score = if *score == f32::NEG_INFINITY { 0.0 } else { weight };
                *sum += *score;
            }
        }
        (largest, lanes.iter().sum())
    }
}

fn portable_scores(
    cache: &KvLayer,
    table: &[u32],
    head: usize,
    queries: &Queries,
    index: usize,
    len: usize,
    scores: &mut Scores,
) {
    let KvLayout {
        head_dim, block_tokens, ..
    } = cache.layout;
    let group = cache.layout.group();
    let mut keys = vec![[0f32; LANES]; head_dim];
    for run in runs(cache.layout, table, index, len) {
        let at = cache.at(run.block, head);
        for (d, keys) in keys.iter_mut().enumerate() {
            for (lane, key) in keys.iter_mut().enumerate().take(run.count) {
                let token = run.slot + lane;
                let scale = at / group + d / group * block_tokens + token;
                *key = KvLayer::read(&cache.keys, at + d * block_tokens + token, scale);
            }
        }
        for (i, scores) in scores.iter_mut().enumerate().take(queries.width()) {
            let sums = dot(&keys, &queries.values, queries.width(), i);
            scores[run.at..run.at + run.count].copy_from_slice(&sums[..run.count]);
        }
    }
}

vectorized! {
    fn dot(keys: &[[f32; LANES]], queries: &[f32], width: usize, query: usize) -> [f32; LANES] {
        let mut sums = [0f32; LANES];
        for (keys, queries) in keys.iter().zip(queries.chunks_exact(width)) {
            for lane in 0..LANES {
                sums[lane] = keys[lane].mul_add(queries[query], sums[lane]);
            }
        }
        sums
    }
}

#[allow(clippy::too_many_arguments, reason = "as `compute`")]
fn portable_mix(
    cache: &KvLayer,
    table: &[u32],
    head: usize,
    width: usize,
    index: usize,
    len: usize,
    weights: &Scores,
    out: &mut [f32],
) {
    let dim = cache.layout.head_dim;
    let group = cache.layout.group();
    let mut value = vec![0f32; dim];
    for run in runs(cache.layout, table, index, len) {
        for slot in 0..run.count {
            let token = run.slot + slot;
            let head = cache.at(run.block, head);
            for (d, value) in value.iter_mut().enumerate() {
                let at = head + token * dim + d;
                *value = KvLayer::read(&cache.values, at, at / group);
            }
            for (weights, out) in weights.iter().zip(out.chunks_exact_mut(dim)).take(width) {
                add_scaled(out, &value, weights[run.at + slot]);
            }
        }
    }
}

vectorized! {
    fn add_scaled(out: &mut [f32], value: &[f32], weight: f32) {
        for (out, value) in out.iter_mut().zip(value) {
            *out = weight.mul_add(*value, *out);
        }
    }
}
