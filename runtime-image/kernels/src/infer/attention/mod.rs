//! Attention over a key-value cache that is kept in blocks: keys and values are read where they lie, once for several queries.
//!
//! A row's tokens are taken in parts of [`PART`] that begin at the same places in every sequence: each part has a softmax of
//! its own, and the parts are then joined in order. What a row gets depends on its own tokens alone, so neither blocks, batch,
//! neighbours nor threads change a bit; and the parts of a long sequence can be shared by the threads.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
mod cache;
mod part;

use std::cell::RefCell;

pub use cache::{KvDtype, KvLayer, KvLayout};

use crate::cpu::Isa;
use crate::ops::exp;
use crate::pool::{Disjoint, Pool};
use part::{Part, Queries, Scores};

/// Tokens in a part.
const PART: usize = 128;
/// Queries that share one pass over keys and values: heads of a group, and rows of one sequence.
const QUERIES: usize = 12;

/// What one row attends to: the first `len` tokens in the blocks of `table`, in order.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The sequence's blocks.
    pub table: &'a [u32],
    /// Tokens to attend to, the row's own included.
    pub len: usize,
}

/// How scores are made in a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scoring {
    /// Factor of `query · key`, usually `1 / √head_dim`.
    pub scale: f32,
    /// Only that many of the latest tokens are attended to, the row's own included.
    pub window: Option<usize>,
    /// `cap · tanh(score / cap)`, where a model has it.
    pub soft_cap: Option<f32>,
}

impl Scoring {
    /// `1 / √head_dim`, all tokens, no cap.
    pub fn plain(head_dim: usize) -> Self {
        Scoring {
            scale: 1.0 / (head_dim as f32).sqrt(),
            window: None,
            soft_cap: None,
        }
    }
}

/// Consecutive rows of one sequence whose queries are computed together.
struct Tile {
    first: usize,
    count: usize,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Scratch {
    queries: Queries,
    joined: Part,
    part: Part,
    scores: Scores,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch {
            queries: Queries::default(),
            joined: Part::default(),
            part: Part::default(),
            scores: [[0.0; PART]; QUERIES],
        }
    }
}

/// Causal attention of each row's query heads (`rows × heads · head_dim`, already turned by its position) over its sequence.
///
/// Panics when the sizes do not fit together or a table is too short.
pub fn attend(
    pool: &Pool,
    isa: Isa,
    cache: &KvLayer,
    scoring: &Scoring,
    queries: &[f32],
    rows: &[Sequence<'_>],
    out: &mut [f32],
) {
    let KvLayout {
        kv_heads,
        head_dim,
        block_tokens,
        ..
    } = cache.layout;
    if rows.is_empty() {
        return;
    }
    let share = queries.len() / rows.len() / (kv_heads * head_dim);
    assert!(
        share > 0 && queries.len() == rows.len() * kv_heads * share * head_dim && out.len() == queries.len(),
        "attention: sizes differ"
    );
    for (i, row) in rows.iter().enumerate() {
        assert!(
            row.len > 0 && row.table.len() * block_tokens >= row.len,
            "a table of {} blocks for {} tokens",
            row.table.len(),
            row.len
        );
        // The rows of a prompt share a table: it is looked through once.
        let known = i > 0 && std::ptr::eq(rows[i - 1].table, row.table);
        assert!(
            known || row.table.iter().all(|block| (*block as usize) < cache.blocks()),
            "a block outside of the cache"
        );
    }
    let job = Job {
        isa,
        cache,
        scoring,
        share,
        queries,
        rows,
    };
    let tiles = tiles(rows, (QUERIES / share).max(1));
    let parts = |tile: &Tile| rows[tile.first + tile.count - 1].len.div_ceil(PART);
    let all_parts: usize = tiles.iter().map(parts).sum();
    let out = Disjoint::new(out);
    if tiles.len() * kv_heads >= 4 * pool.threads() || all_parts == tiles.len() {
        pool.parallel_for(tiles.len() * kv_heads, |range| {
            SCRATCH.with_borrow_mut(|scratch| {
                for index in range {
                    let (tile, head) = (&tiles[index / kv_heads], index % kv_heads);
                    job.whole(tile, head, parts(tile), scratch, &out);
                }
            });
        });
        return;
    }
    // Few rows, long sequences: the parts are computed apart and joined after, in the same order as above.
    let mut places = Vec::with_capacity(all_parts * kv_heads);
    for (i, tile) in tiles.iter().enumerate() {
        for head in 0..kv_heads {
            places.extend((0..parts(tile)).map(|part| (i, head, part)));
        }
    }
    let groups = share.div_ceil(QUERIES);
    let mut results: Vec<Part> = Vec::new();
    results.resize_with(places.len() * groups, Part::default);
    let shared = Disjoint::new(&mut results);
    pool.parallel_for(places.len(), |range| {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { queries, scores, .. } = scratch;
            for index in range {
                let (tile, head, part) = places[index];
                // SAFETY: each place belongs to one chunk.
                let results = unsafe { shared.slice_mut(index * groups..(index + 1) * groups) };
                for (group, result) in results.iter_mut().enumerate() {
                    job.load(&tiles[tile], head, group, queries);
                    let table = rows[tiles[tile].first].table;
                    part::compute(isa, cache, scoring, table, head, queries, part, scores, result);
                }
            }
        });
    });
    let mut results = results.chunks_exact(groups);
    SCRATCH.with_borrow_mut(|scratch| {
        for tile in &tiles {
            for head in 0..kv_heads {
                let results: Vec<&[Part]> = results.by_ref().take(parts(tile)).collect();
                for group in 0..groups {
                    scratch.joined.clear(results[0][group].values.len());
                    results
                        .iter()
                        .for_each(|part| scratch.joined.join(&part[group], head_dim));
                    job.finish(tile, head, group, &scratch.joined, &out);
                }
            }
        }
    });
}

/// Rows in order, cut where the sequence changes or after `most`.
fn tiles(rows: &[Sequence<'_>], most: usize) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        match tiles.last_mut() {
            // The last row of a tile has the most tokens.
            Some(tile)
                if tile.count < most
                    && std::ptr::eq(rows[tile.first].table, row.table)
                    && rows[i - 1].len <= row.len =>
            {
                tile.count += 1
            }
            _ => tiles.push(Tile { first: i, count: 1 }),
        }
    }
    tiles
}

struct Job<'a> {
    isa: Isa,
    cache: &'a KvLayer,
    scoring: &'a Scoring,
    share: usize,
    queries: &'a [f32],
    rows: &'a [Sequence<'a>],
}

impl Job<'_> {
    /// All parts of a tile and a head.
    fn whole(&self, tile: &Tile, head: usize, parts: usize, scratch: &mut Scratch, out: &Disjoint<'_, f32>) {
        let Scratch {
            queries,
            joined,
            part,
            scores,
        } = scratch;
        let table = self.rows[tile.first].table;
        for group in 0..self.share.div_ceil(QUERIES) {
            self.load(tile, head, group, queries);
            joined.clear(queries.width() * self.cache.layout.head_dim);
            for index in 0..parts {
                part::compute(
                    self.isa,
                    self.cache,
                    self.scoring,
                    table,
                    head,
                    queries,
                    index,
                    scores,
                    part,
                );
                joined.join(part, self.cache.layout.head_dim);
            }
            self.finish(tile, head, group, joined, out);
        }
    }

    /// The rows and query heads of a group of a tile, in order; each with where it stands among the queries.
    fn members(&self, tile: &Tile, head: usize, group: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
        let (first, share) = (tile.first, self.share);
        let (heads, head_dim) = (self.cache.layout.kv_heads * share, self.cache.layout.head_dim);
        let range = group * QUERIES..((group + 1) * QUERIES).min(tile.count * share);
        range.map(move |query| {
            let row = first + query / share;
            (row, (row * heads + head * share + query % share) * head_dim)
        })
    }

    fn load(&self, tile: &Tile, head: usize, group: usize, queries: &mut Queries) {
        let dim = self.cache.layout.head_dim;
        let members = self.members(tile, head, group).map(|(row, at)| {
            let len = self.rows[row].len;
            let start = self.scoring.window.map_or(0, |window| len.saturating_sub(window));
            (&self.queries[at..at + dim], start..len)
        });
        queries.load(dim, members);
    }

    fn finish(&self, tile: &Tile, head: usize, group: usize, joined: &Part, out: &Disjoint<'_, f32>) {
        let dim = self.cache.layout.head_dim;
        for (i, (_, at)) in self.members(tile, head, group).enumerate() {
            // SAFETY: each row and head belongs to one chunk.
            let out = unsafe { out.slice_mut(at..at + dim) };
            let inverse = 1.0 / joined.sums[i];
            for (out, value) in out.iter_mut().zip(&joined.values[i * dim..]) {
                *out = value * inverse;
            }
        }
    }
}

impl Part {
    /// Nothing yet, for `numbers` numbers of all queries.
    fn clear(&mut self, numbers: usize) {
        self.largest.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
        self.values.clear();
        self.values.resize(numbers, 0.0);
    }

    /// Joins the part after it.
    fn join(&mut self, next: &Part, head_dim: usize) {
        for (i, values) in self.values.chunks_exact_mut(head_dim).enumerate() {
            if next.sums[i] == 0.0 {
                continue; // none of its tokens is this query's
            }
            let added = &next.values[i * head_dim..(i + 1) * head_dim];
            if self.sums[i] == 0.0 {
                (self.largest[i], self.sums[i]) = (next.largest[i], next.sums[i]);
                values.copy_from_slice(added);
                continue;
            }
            let largest = self.largest[i].max(next.largest[i]);
            let (old, new) = (exp(self.largest[i] - largest), exp(next.largest[i] - largest));
            self.largest[i] = largest;
            self.sums[i] = self.sums[i] * old + next.sums[i] * new;
            for (value, added) in values.iter_mut().zip(added) {
                *value = *value * old + added * new;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::numbers;

    /// One head in the plainest form; the window and the cap as a model's documentation says them.
    fn reference(scoring: &Scoring, query: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f64> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let first = scoring.window.map_or(0, |window| keys.len().saturating_sub(window));
        let scores: Vec<f64> = keys[first..]
            .iter()
            .map(|key| dot(query, key) * f64::from(scoring.scale))
            .map(|score| match scoring.soft_cap.map(f64::from) {
                Some(cap) => cap * (score / cap).tanh(),
                None => score,
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mixed = |d: usize| {
            weights
                .iter()
                .zip(&values[first..])
                .map(|(w, v)| w * f64::from(v[d]))
                .sum::<f64>()
        };
        (0..query.len()).map(|d| mixed(d) / sum).collect()
    }

    #[test]
    fn agrees_with_a_plain_reference_for_any_grouping_type_and_length() {
        let pool = Pool::new(2);
        for (kv_heads, share, head_dim, block_tokens) in [
            (1, 1, 6, 4),
            (2, 3, 16, 4),
            (3, 3, 64, 16),
            (1, 7, 24, 8),
            (1, 13, 40, 48),
        ] {
            for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Q8] {
                let layout = KvLayout {
                    kv_heads,
                    head_dim,
                    block_tokens,
                    dtype,
                };
                let (tokens, blocks) = (300usize, 100u32);
                let mut cache = KvLayer::new(layout, blocks as usize);
                // Blocks in any order, not those that come first.
                let table: Vec<u32> = (0..tokens.div_ceil(block_tokens) as u32)
                    .map(|i| (i * 7 + 3) % blocks)
                    .collect();
                let width = kv_heads * head_dim;
                let (keys, values) = (numbers(1, tokens * width, 1.0), numbers(2, tokens * width, 1.0));
                let slots: Vec<(u32, usize)> = (0..tokens)
                    .map(|t| (table[t / block_tokens], t % block_tokens))
                    .collect();
                cache.write(&pool, &slots, &keys, &values);
                let lens = [1, 4, 5, 16, 37, 127, 128, 129, 299, 300];
                let rows: Vec<Sequence<'_>> = lens
                    .iter()
                    .map(|len| Sequence {
                        table: &table,
                        len: *len,
                    })
                    .collect();
                let queries = numbers(3, rows.len() * width * share, 2.0);
                let capped = Scoring {
                    scale: 0.3,
                    window: Some(100),
                    soft_cap: Some(2.0),
                };
                let cases = Isa::available()
                    .into_iter()
                    .flat_map(|isa| [(isa, Scoring::plain(head_dim)), (isa, capped)]);
                for (isa, scoring) in cases {
                    let mut out = vec![f32::NAN; queries.len()];
                    attend(&pool, isa, &cache, &scoring, &queries, &rows, &mut out);
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
                                &scoring,
                                &queries[at..at + head_dim],
                                &k.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                                &v.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                            );
                            let most = match dtype {
                                KvDtype::F32 => 1e-5,
                                KvDtype::F16 => 4e-3,
                                KvDtype::Q8 => 4e-2,
                            };
                            for (got, expected) in out[at..at + head_dim].iter().zip(expected) {
                                assert!(
                                    (f64::from(*got) - expected).abs() < most,
                                    "{layout:?} {} len {len}: {got} {expected}",
                                    isa.name()
                                );
                            }
                        }
                    }
                    // Alone a row gets the same bits as among others, and on one thread the same as on two.
                    let width = width * share;
                    for (r, pool) in [(3, &pool), (8, &pool), (9, &Pool::new(1))] {
                        let (mut alone, queries) = (vec![0.0; width], &queries[r * width..(r + 1) * width]);
                        attend(pool, isa, &cache, &scoring, queries, &rows[r..=r], &mut alone);
                        assert_eq!(alone, out[r * width..(r + 1) * width]);
                    }
                }
            }
        }
    }
}
