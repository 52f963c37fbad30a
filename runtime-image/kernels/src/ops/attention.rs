//! Causal attention with grouped query heads over packed sequences; scores exist for one block of 64 queries at a time.
//!
//! Forward saves the logarithm of each row's softmax denominator; backward recomputes the scores from it. A sequence is a
//! trunk and branches: every branch sees the trunk and itself, not its siblings. So a prompt that several completions share
//! is computed once, exactly; a plain sequence is a trunk without branches.
//!
//! ```text
//!   rows:      | trunk: prompt | branch: chosen | branch: rejected |
//!   rejected sees ^^^^^^^^^^^^^                   ^^^^ up to itself
//! ```

use super::matmul::{View, Write, gemm};
use super::{SharedMut, dot, exp, maximum, vectorized};
use crate::pool;

/// Queries whose scores exist at one time.
const BLOCK: usize = 64;

/// Shape of the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// One packed sequence: consecutive rows, the trunk's first, then each branch's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Rows of the trunk.
    pub trunk: usize,
    /// Rows of each branch; they see the trunk and themselves.
    pub branches: Vec<usize>,
}

impl Sequence {
    /// A plain sequence of `rows`.
    pub fn plain(rows: usize) -> Self {
        Self {
            trunk: rows,
            branches: Vec::new(),
        }
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.trunk + self.branches.iter().sum::<usize>()
    }

    /// The position of each row: a branch goes on where the trunk ends.
    pub fn positions(&self) -> impl Iterator<Item = u32> + '_ {
        let branches = self.branches.iter().flat_map(|&len| self.trunk..self.trunk + len);
        (0..self.trunk).chain(branches).map(|position| position as u32)
    }

    /// `(start, len, rows of the trunk that it sees)` of the trunk and each branch, `start` within the sequence.
    fn parts(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let mut start = self.trunk;
        let branches = self.branches.iter().map(move |&len| {
            start += len;
            (start - len, len, self.trunk)
        });
        std::iter::once((0, self.trunk, 0)).chain(branches)
    }
}

/// What forward and backward read: queries (`rows × heads · head_dim`), keys and values (`rows × kv_heads · head_dim`).
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries.
    pub q: &'a [f32],
    /// Keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Shape of the heads.
    pub heads: Heads,
    /// How the rows are packed; covers all rows.
    pub sequences: &'a [Sequence],
}

impl Inputs<'_> {
    /// Checks the shapes; returns the number of rows.
    fn rows(&self) -> usize {
        let rows = self.sequences.iter().map(Sequence::rows).sum::<usize>();
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        assert!(
            kv_heads > 0 && heads % kv_heads == 0,
            "attention: {heads} heads do not share {kv_heads} kv heads"
        );
        assert!(
            self.q.len() == rows * heads * head_dim
                && self.k.len() == rows * kv_heads * head_dim
                && self.v.len() == self.k.len(),
            "attention: shapes differ"
        );
        rows
    }

    /// First row of each sequence.
    fn starts(&self) -> Vec<usize> {
        let starts = self.sequences.iter().scan(0, |next, sequence| {
            *next += sequence.rows();
            Some(*next - sequence.rows())
        });
        starts.collect()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }
}

/// Rows `row..` of one head of a `rows × heads · head_dim` matrix.
fn head_view(matrix: &[f32], heads: usize, head_dim: usize, head: usize, row: usize) -> View {
    View {
        start: matrix[(row * heads + head) * head_dim..].as_ptr(),
        row_stride: heads * head_dim,
        column_stride: 1,
    }
}

fn transpose(view: View) -> View {
    View {
        row_stride: view.column_stride,
        column_stride: view.row_stride,
        ..view
    }
}

/// `len` rows of contiguous scores, `stride` apart, from column `column` on.
fn score_view(scores: &[f32], stride: usize, column: usize) -> View {
    View {
        start: scores[column..].as_ptr(),
        row_stride: stride,
        column_stride: 1,
    }
}

vectorized! {
    /// Turns scores into probabilities in place; the masked tail becomes zero. Returns the log of the denominator.
    fn softmax(scores: &mut [f32], valid: usize) -> f32 {
        let (row, masked) = scores.split_at_mut(valid);
        masked.fill(0.0);
        let largest = maximum(row);
        let mut lanes = [0f32; 8];
        for chunk in row.chunks_mut(8) {
            for (score, lane) in chunk.iter_mut().zip(&mut lanes) {
                *score = exp(*score - largest);
                *lane += *score;
            }
        }
        let sum = lanes.iter().sum::<f32>();
        let inverse = 1.0 / sum;
        row.iter_mut().for_each(|p| *p *= inverse);
        largest + sum.ln()
    }
}

vectorized! {
    /// Turns scores into probabilities and `dp` (gradient of the probabilities) into the gradient of the scaled scores.
    fn softmax_backward(scores: &mut [f32], dp: &mut [f32], valid: usize, log_sum: f32, delta: f32, scale: f32) {
        scores[valid..].fill(0.0);
        dp[valid..].fill(0.0);
        for (p, dp) in scores[..valid].iter_mut().zip(&mut dp[..valid]) {
            *p = exp(*p - log_sum);
            *dp = *p * (*dp - delta) * scale;
        }
    }
}

vectorized! {
    fn dot_row(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
}

/// Scores of queries `first..first + count` of a part against the trunk rows it sees and its own rows up to the last query:
/// `count × (seen + first + count)`. Returns that width.
fn block_scores(
    inputs: &Inputs,
    scores: &mut [f32],
    (sequence, head): (usize, usize),
    (start, seen): (usize, usize),
    (first, count): (usize, usize),
) -> usize {
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = inputs.heads;
    let kv = head / (heads / kv_heads);
    let own = first + count;
    let width = seen + own;
    assert!(
        scores.len() >= count * width,
        "attention: the block's scores do not fit"
    );
    let q = head_view(inputs.q, heads, head_dim, head, sequence + start + first);
    for (column, row, len) in [(0, sequence, seen), (seen, sequence + start, own)] {
        if len > 0 {
            let k = head_view(inputs.k, kv_heads, head_dim, kv, row);
            // SAFETY: rows and heads lie inside of q and k (checked by `rows`), columns inside of the scores.
            unsafe {
                gemm(
                    scores.as_mut_ptr().add(column),
                    width,
                    q,
                    transpose(k),
                    [count, len, head_dim],
                    inputs.scale(),
                    Write::Set,
                );
            }
        }
    }
    width
}

/// Largest block of scores that any part of the sequences needs.
fn scratch_len(sequences: &[Sequence]) -> usize {
    let widest = sequences
        .iter()
        .flat_map(|s| s.parts().map(|(_, len, seen)| len + seen))
        .max();
    BLOCK * widest.unwrap_or(0)
}

/// `out = softmax(q · kᵀ / sqrt(head_dim)) · v` per head; `out` is shaped as `q`. Saves the log of each softmax denominator
/// in `log_sums` (`rows × heads`).
pub fn attention(out: &mut [f32], log_sums: &mut [f32], inputs: Inputs) {
    let rows = inputs.rows();
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = inputs.heads;
    assert!(
        out.len() == inputs.q.len() && log_sums.len() == rows * heads,
        "attention: shapes differ"
    );
    let starts = inputs.starts();
    let (out, log_sums) = (SharedMut(out.as_mut_ptr()), SharedMut(log_sums.as_mut_ptr()));
    let scratch = scratch_len(inputs.sequences);
    pool::parallel_for(starts.len() * heads, |tasks| {
        let mut scores = vec![0f32; scratch];
        for task in tasks {
            let (sequence, head) = (task / heads, task % heads);
            let (base, kv) = (starts[sequence], head / (heads / kv_heads));
            for (start, len, seen) in inputs.sequences[sequence].parts() {
                for first in (0..len).step_by(BLOCK) {
                    let count = BLOCK.min(len - first);
                    let width = block_scores(&inputs, &mut scores, (base, head), (start, seen), (first, count));
                    for (i, row) in scores[..count * width].chunks_exact_mut(width).enumerate() {
                        let log_sum = softmax(row, seen + first + i + 1);
                        // SAFETY: this row and head belong to this task alone.
                        unsafe { *log_sums.at((base + start + first + i) * heads + head) = log_sum };
                    }
                    let at = out.at(((base + start + first) * heads + head) * head_dim);
                    let mut write = Write::Set;
                    for (column, row, keys) in [(0, base, seen), (seen, base + start, width - seen)] {
                        if keys > 0 {
                            let p = score_view(&scores, width, column);
                            let v = head_view(inputs.v, kv_heads, head_dim, kv, row);
                            // SAFETY: inside of `out`, in rows and columns of this task alone.
                            unsafe { gemm(at, heads * head_dim, p, v, [count, head_dim, keys], 1.0, write) };
                            write = Write::Add;
                        }
                    }
                }
            }
        }
    });
}

/// What the backward of [`attention`] writes; all are set.
pub struct Gradients<'a> {
    /// Of the queries.
    pub dq: &'a mut [f32],
    /// Of the keys.
    pub dk: &'a mut [f32],
    /// Of the values.
    pub dv: &'a mut [f32],
}

/// Gradients of [`attention`] from its result, its saved `log_sums` and the gradient of its result.
pub fn attention_backward(gradients: Gradients, dout: &[f32], out: &[f32], log_sums: &[f32], inputs: Inputs) {
    let rows = inputs.rows();
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = inputs.heads;
    let Gradients { dq, dk, dv } = gradients;
    assert!(
        [dq.len(), dout.len(), out.len()] == [inputs.q.len(); 3]
            && [dk.len(), dv.len()] == [inputs.k.len(); 2]
            && log_sums.len() == rows * heads,
        "attention: shapes differ"
    );
    dk.fill(0.0);
    dv.fill(0.0);
    let starts = inputs.starts();
    let [dq, dk, dv] = [dq, dk, dv].map(|gradient| SharedMut(gradient.as_mut_ptr()));
    let scratch = scratch_len(inputs.sequences);
    let (group, q_stride, kv_stride) = (heads / kv_heads, heads * head_dim, kv_heads * head_dim);
    // One task has a whole sequence of one kv head: nobody else adds to its keys and values.
    pool::parallel_for(starts.len() * kv_heads, |tasks| {
        let (mut scores, mut dp) = (vec![0f32; scratch], vec![0f32; scratch]);
        for task in tasks {
            let (sequence, kv) = (task / kv_heads, task % kv_heads);
            let base = starts[sequence];
            for (head, (start, len, seen)) in (kv * group..(kv + 1) * group)
                .flat_map(|head| inputs.sequences[sequence].parts().map(move |p| (head, p)))
            {
                for first in (0..len).step_by(BLOCK) {
                    let count = BLOCK.min(len - first);
                    let row = base + start + first;
                    let width = block_scores(&inputs, &mut scores, (base, head), (start, seen), (first, count));
                    let keys = [(0, base, seen), (seen, base + start, width - seen)];
                    let q = head_view(inputs.q, heads, head_dim, head, row);
                    let dout_view = head_view(dout, heads, head_dim, head, row);
                    for (column, key_row, key_count) in keys.into_iter().filter(|keys| keys.2 > 0) {
                        let v = head_view(inputs.v, kv_heads, head_dim, kv, key_row);
                        // SAFETY: inside of `dp`, which is as large as the scores.
                        unsafe {
                            let at = dp.as_mut_ptr().add(column);
                            gemm(
                                at,
                                width,
                                dout_view,
                                transpose(v),
                                [count, key_count, head_dim],
                                1.0,
                                Write::Set,
                            );
                        }
                    }
                    for i in 0..count {
                        let at = ((row + i) * heads + head) * head_dim;
                        let delta = dot_row(&dout[at..at + head_dim], &out[at..at + head_dim]);
                        let (p, dp) = (
                            &mut scores[i * width..(i + 1) * width],
                            &mut dp[i * width..(i + 1) * width],
                        );
                        let log_sum = log_sums[(row + i) * heads + head];
                        softmax_backward(p, dp, seen + first + i + 1, log_sum, delta, inputs.scale());
                    }
                    let mut write = Write::Set;
                    for (column, key_row, key_count) in keys.into_iter().filter(|keys| keys.2 > 0) {
                        let k = head_view(inputs.k, kv_heads, head_dim, kv, key_row);
                        let (p, ds) = (score_view(&scores, width, column), score_view(&dp, width, column));
                        let key_at = (key_row * kv_heads + kv) * head_dim;
                        let key_shape = [key_count, head_dim, count];
                        // SAFETY: dq's rows of this head, dk's and dv's rows of this sequence and kv head: this task's alone.
                        unsafe {
                            let at = dq.at((row * heads + head) * head_dim);
                            gemm(at, q_stride, ds, k, [count, head_dim, key_count], 1.0, write);
                            gemm(dk.at(key_at), kv_stride, transpose(ds), q, key_shape, 1.0, Write::Add);
                            gemm(
                                dv.at(key_at),
                                kv_stride,
                                transpose(p),
                                dout_view,
                                key_shape,
                                1.0,
                                Write::Add,
                            );
                        }
                        write = Write::Add;
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, numbers, weigh};
    use super::*;

    const HEADS: Heads = Heads {
        heads: 4,
        kv_heads: 2,
        head_dim: 3,
    };

    fn run(q: &[f32], k: &[f32], v: &[f32], sequences: &[Sequence]) -> (Vec<f32>, Vec<f32>) {
        let (mut out, mut log_sums) = (vec![0.0; q.len()], vec![0.0; q.len() / HEADS.head_dim]);
        attention(
            &mut out,
            &mut log_sums,
            Inputs {
                q,
                k,
                v,
                heads: HEADS,
                sequences,
            },
        );
        (out, log_sums)
    }

    fn inputs(rows: usize) -> [Vec<f32>; 3] {
        [
            numbers(1, rows * 12, 1.5),
            numbers(2, rows * 6, 1.5),
            numbers(3, rows * 6, 1.0),
        ]
    }

    #[test]
    fn a_branch_computes_what_the_whole_conversation_alone_would() {
        // Longer than a block, so that blocks and their seams are covered.
        let (trunk, one, two) = (70, 80, 5);
        let rows = trunk + one + two;
        let [q, k, v] = inputs(rows);
        let packed = [Sequence {
            trunk,
            branches: vec![one, two],
        }];
        let (out, _) = run(&q, &k, &v, &packed);
        for (start, len) in [(trunk, one), (trunk + one, two)] {
            let pick =
                |x: &[f32], width: usize| [&x[..trunk * width], &x[start * width..(start + len) * width]].concat();
            let (alone, _) = run(
                &pick(&q, 12),
                &pick(&k, 6),
                &pick(&v, 6),
                &[Sequence::plain(trunk + len)],
            );
            for (got, expected) in pick(&out, 12).iter().zip(&alone) {
                assert!((got - expected).abs() < 1e-5);
            }
        }
        assert_eq!(packed[0].positions().skip(69).take(3).collect::<Vec<_>>(), [69, 70, 71]);
        assert_eq!(packed[0].positions().last(), Some(74));
    }

    #[test]
    fn attention_equals_the_plain_formula() {
        let rows = 9;
        let [q, k, v] = inputs(rows);
        let (out, _) = run(&q, &k, &v, &[Sequence::plain(4), Sequence::plain(5)]);
        for row in 0..rows {
            let first = if row < 4 { 0 } else { 4 };
            for head in 0..4 {
                let score = |key: usize| -> f64 {
                    (0..3)
                        .map(|d| f64::from(q[row * 12 + head * 3 + d] * k[key * 6 + head / 2 * 3 + d]))
                        .sum::<f64>()
                        / 3f64.sqrt()
                };
                let sum: f64 = (first..=row).map(|key| score(key).exp()).sum();
                for d in 0..3 {
                    let expected: f64 = (first..=row)
                        .map(|key| score(key).exp() / sum * f64::from(v[key * 6 + head / 2 * 3 + d]))
                        .sum();
                    assert!((f64::from(out[row * 12 + head * 3 + d]) - expected).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let sequences = [
            Sequence {
                trunk: 3,
                branches: vec![2, 3],
            },
            Sequence::plain(4),
        ];
        let [q, k, v] = inputs(12);
        let dout = numbers(4, q.len(), 1.0);
        let (out, log_sums) = run(&q, &k, &v, &sequences);
        let (mut dq, mut dk, mut dv) = (vec![9.0; q.len()], vec![9.0; k.len()], vec![9.0; v.len()]);
        let gradients = Gradients {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        let all = Inputs {
            q: &q,
            k: &k,
            v: &v,
            heads: HEADS,
            sequences: &sequences,
        };
        attention_backward(gradients, &dout, &out, &log_sums, all);
        check_gradient("dq", &q, &dq, |q| weigh(&run(q, &k, &v, &sequences).0, &dout));
        check_gradient("dk", &k, &dk, |k| weigh(&run(&q, k, &v, &sequences).0, &dout));
        check_gradient("dv", &v, &dv, |v| weigh(&run(&q, &k, v, &sequences).0, &dout));
    }

    #[test]
    fn gradients_across_blocks_equal_those_of_short_rows_alone() {
        // The gradient of one query's output is the same whether 100 other queries stand before it in the batch or not.
        let [q, k, v] = inputs(150);
        let gradient = |sequences: &[Sequence], rows: std::ops::Range<usize>, q: &[f32], k: &[f32], v: &[f32]| {
            let (out, log_sums) = run(q, k, v, sequences);
            let mut dout = vec![0.0; q.len()];
            dout[rows.start * 12..rows.end * 12].copy_from_slice(&numbers(5, rows.len() * 12, 1.0));
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            let gradients = Gradients {
                dq: &mut dq,
                dk: &mut dk,
                dv: &mut dv,
            };
            attention_backward(
                gradients,
                &dout,
                &out,
                &log_sums,
                Inputs {
                    q,
                    k,
                    v,
                    heads: HEADS,
                    sequences,
                },
            );
            [dq, dk, dv]
        };
        let packed = gradient(
            &[Sequence {
                trunk: 100,
                branches: vec![50],
            }],
            100..150,
            &q,
            &k,
            &v,
        );
        let plain = gradient(&[Sequence::plain(150)], 100..150, &q, &k, &v);
        for (packed, plain) in packed.iter().zip(&plain) {
            assert!(packed.iter().zip(plain).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
}
