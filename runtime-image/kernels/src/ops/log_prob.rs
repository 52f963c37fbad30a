//! Log-probabilities of target tokens under a softmax over a large vocabulary, and their gradients.
//!
//! Logits exist for 256 rows and 4,096 words at a time: with 49,152 words and 1,000 rows, 4 MiB instead of 192. Backward
//! computes them again from the saved denominators, which costs one more product and no memory.

use super::matmul::{Write, matmul_nn, matmul_nt, matmul_tn};
use super::{exp, maximum, vectorized};
use crate::pool::{self, Disjoint};

const ROW_BLOCK: usize = 256;
const WORD_BLOCK: usize = 4096;

/// The last layer: hidden states, the output embedding, and the token that each row is asked for.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// Hidden states, `targets.len() × width`.
    pub hidden: &'a [f32],
    /// Output embedding, `vocabulary × width`.
    pub weight: &'a [f32],
    /// Width of a hidden state.
    pub width: usize,
    /// Target of each row.
    pub targets: &'a [u32],
}

impl<'a> Head<'a> {
    fn vocabulary(&self) -> usize {
        self.weight.len() / self.width
    }

    fn check(&self) {
        let vocabulary = self.vocabulary();
        assert!(
            self.hidden.len() == self.targets.len() * self.width && self.weight.len() == vocabulary * self.width,
            "log_prob: shapes differ"
        );
        assert!(
            self.targets.iter().all(|&token| (token as usize) < vocabulary),
            "log_prob: a target is no word"
        );
    }

    /// Calls `visit(rows, words, logits)` for each block, all words of a block of rows after each other.
    fn for_each_block(&self, mut visit: impl FnMut(std::ops::Range<usize>, std::ops::Range<usize>, &mut [f32])) {
        let (rows, words, width) = (self.targets.len(), self.vocabulary(), self.width);
        let mut scratch = vec![0f32; ROW_BLOCK.min(rows) * WORD_BLOCK.min(words)];
        for row in (0..rows).step_by(ROW_BLOCK) {
            let row_end = rows.min(row + ROW_BLOCK);
            for word in (0..words).step_by(WORD_BLOCK) {
                let word_end = words.min(word + WORD_BLOCK);
                let (m, n) = (row_end - row, word_end - word);
                let logits = &mut scratch[..m * n];
                let hidden = &self.hidden[row * width..row_end * width];
                matmul_nt(
                    logits,
                    hidden,
                    &self.weight[word * width..word_end * width],
                    [m, n, width],
                    Write::Set,
                );
                visit(row..row_end, word..word_end, logits);
            }
        }
    }
}

/// A softmax denominator that grows by blocks: the largest logit so far and the sum of e^(logit - largest).
#[derive(Clone, Copy)]
struct Denominator {
    largest: f32,
    sum: f32,
}

vectorized! {
    fn extend(denominator: Denominator, logits: &[f32]) -> Denominator {
        let largest = maximum(logits).max(denominator.largest);
        let mut lanes = [0f32; 16];
        for chunk in logits.chunks(16) {
            for (lane, logit) in lanes.iter_mut().zip(chunk) {
                *lane += exp(logit - largest);
            }
        }
        // The first block has nothing to rescale; exp(-inf) is not exactly zero here, but its sum is.
        let sum = lanes.iter().sum::<f32>() + denominator.sum * exp(denominator.largest - largest);
        Denominator { largest, sum }
    }
}

vectorized! {
    /// Logits to gradients of the logits: `(onehot - softmax) · coefficient`; the one-hot part is the caller's.
    fn logits_to_gradient(logits: &mut [f32], log_sum: f32, coefficient: f32) {
        for logit in logits {
            *logit = -exp(*logit - log_sum) * coefficient;
        }
    }
}

/// `log_probs[i]` = log-probability of `targets[i]`; saves the log of each softmax denominator in `log_sums`.
pub fn log_probs(log_probs: &mut [f32], log_sums: &mut [f32], head: Head) {
    head.check();
    assert!(
        [log_probs.len(), log_sums.len()] == [head.targets.len(); 2],
        "log_prob: shapes differ"
    );
    let mut denominators = vec![
        Denominator {
            largest: f32::NEG_INFINITY,
            sum: 0.0
        };
        head.targets.len()
    ];
    head.for_each_block(|rows, words, logits| {
        let n = words.len();
        let (out, sums) = (Disjoint::new(&mut *log_probs), Disjoint::new(&mut denominators));
        let logits = &*logits;
        pool::parallel_for_min(rows.len(), 4, |range| {
            for i in range {
                let row = rows.start + i;
                let logits = &logits[i * n..(i + 1) * n];
                // SAFETY: each row is given to one chunk.
                let (out, sum) = unsafe { (out.slice_mut(row..row + 1), sums.slice_mut(row..row + 1)) };
                sum[0] = extend(sum[0], logits);
                if let Some(logit) = (head.targets[row] as usize)
                    .checked_sub(words.start)
                    .and_then(|at| logits.get(at))
                {
                    out[0] = *logit;
                }
            }
        });
    });
    for ((log_prob, log_sum), denominator) in log_probs.iter_mut().zip(log_sums).zip(&denominators) {
        *log_sum = denominator.largest + denominator.sum.ln();
        *log_prob -= *log_sum;
    }
}

/// Sets `dhidden`, and adds to `dweight` if wanted, the gradient of `sum of coefficients[i] · log_probs[i]`.
pub fn log_probs_backward(
    dhidden: &mut [f32],
    mut dweight: Option<&mut [f32]>,
    coefficients: &[f32],
    log_sums: &[f32],
    head: Head,
) {
    head.check();
    let width = head.width;
    assert!(
        dhidden.len() == head.hidden.len() && [coefficients.len(), log_sums.len()] == [head.targets.len(); 2],
        "log_prob: shapes differ"
    );
    head.for_each_block(|rows, words, logits| {
        let (m, n) = (rows.len(), words.len());
        let out = Disjoint::new(&mut *logits);
        pool::parallel_for_min(m, 4, |range| {
            for i in range {
                let row = rows.start + i;
                // SAFETY: each row is given to one chunk.
                let logits = unsafe { out.slice_mut(i * n..(i + 1) * n) };
                logits_to_gradient(logits, log_sums[row], coefficients[row]);
                if let Some(at) = (head.targets[row] as usize)
                    .checked_sub(words.start)
                    .filter(|&at| at < n)
                {
                    logits[at] += coefficients[row];
                }
            }
        });
        let weight = &head.weight[words.start * width..words.end * width];
        let write = if words.start == 0 { Write::Set } else { Write::Add };
        matmul_nn(
            &mut dhidden[rows.start * width..rows.end * width],
            logits,
            weight,
            [m, width, n],
            write,
        );
        if let Some(dweight) = dweight.as_deref_mut() {
            let hidden = &head.hidden[rows.start * width..rows.end * width];
            let dweight = &mut dweight[words.start * width..words.end * width];
            matmul_tn(dweight, logits, hidden, [n, width, m], Write::Add);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, numbers, weigh};
    use super::*;

    fn forward(hidden: &[f32], weight: &[f32], width: usize, targets: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let (mut probs, mut sums) = (vec![0.0; targets.len()], vec![0.0; targets.len()]);
        log_probs(
            &mut probs,
            &mut sums,
            Head {
                hidden,
                weight,
                width,
                targets,
            },
        );
        (probs, sums)
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let (width, words, targets) = (5, 7, [0u32, 6, 3, 3]);
        let (hidden, weight) = (numbers(1, 4 * width, 1.0), numbers(2, words * width, 1.0));
        let coefficients = [0.5, -1.0, 2.0, 0.25];
        let (_, sums) = forward(&hidden, &weight, width, &targets);
        let (mut dhidden, mut dweight) = (vec![9.0; hidden.len()], vec![0.0; weight.len()]);
        let head = Head {
            hidden: &hidden,
            weight: &weight,
            width,
            targets: &targets,
        };
        log_probs_backward(&mut dhidden, Some(&mut dweight), &coefficients, &sums, head);
        let value = |hidden: &[f32], weight: &[f32]| weigh(&forward(hidden, weight, width, &targets).0, &coefficients);
        check_gradient("dhidden", &hidden, &dhidden, |hidden| value(hidden, &weight));
        check_gradient("dweight", &weight, &dweight, |weight| value(&hidden, weight));
    }

    #[test]
    fn blocks_of_words_and_rows_change_nothing() {
        // More words than WORD_BLOCK and more rows than ROW_BLOCK, with targets in every block.
        let (width, words, rows) = (3, 2 * WORD_BLOCK + 10, ROW_BLOCK + 3);
        let (hidden, weight) = (numbers(1, rows * width, 3.0), numbers(2, words * width, 3.0));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 97 % words) as u32).collect();
        let (probs, sums) = forward(&hidden, &weight, width, &targets);
        let coefficients = numbers(3, rows, 1.0);
        let mut dhidden = vec![0.0; hidden.len()];
        let head = Head {
            hidden: &hidden,
            weight: &weight,
            width,
            targets: &targets,
        };
        log_probs_backward(&mut dhidden, None, &coefficients, &sums, head);
        for row in (0..rows).step_by(29) {
            let logits: Vec<f64> = (0..words)
                .map(|word| weigh(&hidden[row * width..][..width], &weight[word * width..][..width]))
                .collect();
            let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            let expected = logits[targets[row] as usize] - log_sum;
            assert!(
                (f64::from(probs[row]) - expected).abs() < 1e-4,
                "row {row}: {} not {expected}",
                probs[row]
            );
            for column in 0..width {
                let mean: f64 = (0..words)
                    .map(|word| (logits[word] - log_sum).exp() * f64::from(weight[word * width + column]))
                    .sum();
                let target = f64::from(weight[targets[row] as usize * width + column]);
                let expected = f64::from(coefficients[row]) * (target - mean);
                assert!((f64::from(dhidden[row * width + column]) - expected).abs() < 1e-4);
            }
        }
    }
}
