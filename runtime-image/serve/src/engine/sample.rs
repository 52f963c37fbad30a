//! From logits to the next token. Reproducible: what is drawn depends on the logits, the seed and the token's index alone.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use strata_kernels::infer::log_sum_exp;

/// How a request wants its tokens chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Sample among the most likely tokens that together have this probability; 1 is all.
    pub top_p: f32,
    /// Sample among this many most likely tokens; 0 is all.
    pub top_k: usize,
    /// Leave out tokens that are less likely than this share of the most likely one; 0 is none. Applied before the other two.
    pub min_p: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// Subtracted from the logit of a token for each time it was generated.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of a token that was generated before.
    pub presence_penalty: f32,
    /// A token that stands in the prompt or the answer has its logit divided by this, or multiplied if it is negative; 1 is
    /// none.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub bias: Vec<(u32, f32)>,
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: Vec::new(),
        }
    }
}

/// What a request's tokens so far have to do with the next one.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Tokens of the prompt; empty where nobody asks for them.
    prompt: HashSet<u32>,
    /// How often each token was generated.
    generated: HashMap<u32, u32>,
    /// Tokens generated.
    count: usize,
}

impl History {
    /// Before the first token.
    pub fn new(prompt: &[u32], sampling: &Sampling) -> Self {
        let asked = sampling.repetition_penalty != 1.0;
        History {
            prompt: prompt.iter().copied().filter(|_| asked).collect(),
            ..History::default()
        }
    }

    /// Takes a token that was generated.
    pub fn push(&mut self, token: u32) {
        *self.generated.entry(token).or_default() += 1;
        self.count += 1;
    }

    /// Tokens generated.
    pub fn count(&self) -> usize {
        self.count
    }
}

/// A token with its log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenProb {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability, before temperature and penalties.
    pub log_prob: f32,
}

/// The logits with what the request adds to them. Only tokens whose bit is set in `allowed`, if given, and that are not
/// `banned` remain possible; there must be one.
pub fn adjusted<'a>(
    logits: &'a [f32],
    sampling: &Sampling,
    history: &History,
    allowed: Option<&[u32]>,
    banned: &[u32],
) -> Cow<'a, [f32]> {
    let penalized = sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0;
    let repetition = sampling.repetition_penalty != 1.0;
    if !penalized && !repetition && sampling.bias.is_empty() && allowed.is_none() && banned.is_empty() {
        return Cow::Borrowed(logits);
    }
    let mut out = logits.to_vec();
    for (token, bias) in &sampling.bias {
        out[*token as usize] += bias;
    }
    if repetition {
        let seen = history.generated.keys().filter(|token| !history.prompt.contains(token));
        for token in history.prompt.iter().chain(seen) {
            let logit = &mut out[*token as usize];
            *logit = if *logit > 0.0 {
                *logit / sampling.repetition_penalty
            } else {
                *logit * sampling.repetition_penalty
            };
        }
    }
    if penalized {
        for (token, count) in &history.generated {
            out[*token as usize] -= sampling.presence_penalty + sampling.frequency_penalty * *count as f32;
        }
    }
    if let Some(allowed) = allowed {
        for (at, logits) in out.chunks_mut(32).enumerate() {
            let bits = allowed.get(at).copied().unwrap_or(0);
            for (bit, logit) in logits.iter_mut().enumerate() {
                if bits >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
    for token in banned {
        out[*token as usize] = f32::NEG_INFINITY;
    }
    Cow::Owned(out)
}

/// The next token, the `index`th of the answer, from [`adjusted`] logits.
pub fn sample(logits: &[f32], sampling: &Sampling, index: u64) -> u32 {
    if sampling.temperature <= 0.0 {
        return argmax(logits);
    }
    let draw = uniform(sampling.seed, index);
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // A token of weight 0 is never drawn.
    let weight = |logit: f32| {
        let weight = f64::from((logit - largest) / sampling.temperature).exp();
        if weight >= f64::from(sampling.min_p) {
            weight
        } else {
            0.0
        }
    };
    if sampling.top_p >= 1.0 && sampling.top_k == 0 {
        return draw_from(
            logits
                .iter()
                .enumerate()
                .map(|(token, logit)| (token as u32, weight(*logit))),
            draw,
        );
    }
    let total: f64 = logits.iter().map(|logit| weight(*logit)).sum(); // after min-p
    // Tokens below this share of the probability, all together, have less than the nucleus may leave out: no need to sort them.
    let least = if sampling.top_p < 1.0 {
        total * f64::from(1.0 - sampling.top_p) / logits.len() as f64
    } else {
        0.0
    };
    let weights = logits
        .iter()
        .enumerate()
        .map(|(token, logit)| (token as u32, weight(*logit)));
    let mut candidates: Vec<(u32, f64)> = weights.filter(|(_, weight)| *weight >= least).collect();
    let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if sampling.top_k > 0 && sampling.top_k < candidates.len() {
        candidates.select_nth_unstable_by(sampling.top_k - 1, by_weight);
        candidates.truncate(sampling.top_k);
    }
    candidates.sort_unstable_by(by_weight);
    if sampling.top_p < 1.0 {
        // The nucleus is measured among the tokens that top-k left.
        let left: f64 = if sampling.top_k > 0 {
            candidates.iter().map(|(_, weight)| weight).sum()
        } else {
            total
        };
        let mut sum = 0.0;
        let enough = left * f64::from(sampling.top_p.max(0.0));
        let count = candidates.iter().position(|(_, weight)| {
            sum += weight;
            sum >= enough
        });
        candidates.truncate(count.map_or(candidates.len(), |last| last + 1));
    }
    draw_from(candidates.into_iter(), draw)
}

/// The most likely token; the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// The log-probability of `token`, and of the `count` most likely tokens.
pub fn log_probs(logits: &[f32], token: u32, count: usize) -> (TokenProb, Vec<TokenProb>) {
    let sum = log_sum_exp(logits);
    let prob = |token: u32| TokenProb {
        token,
        log_prob: logits[token as usize] - sum,
    };
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(tokens.len());
    if count > 0 {
        tokens.select_nth_unstable_by(count - 1, by_logit);
    }
    tokens.truncate(count);
    tokens.sort_unstable_by(by_logit);
    (prob(token), tokens.into_iter().map(prob).collect())
}

fn draw_from(candidates: impl Iterator<Item = (u32, f64)> + Clone, draw: f64) -> u32 {
    let total: f64 = candidates.clone().map(|(_, weight)| weight).sum();
    let (mut sum, mut last) = (0.0, 0);
    for (token, weight) in candidates {
        sum += weight;
        if weight > 0.0 {
            last = token;
        }
        if sum > draw * total {
            break;
        }
    }
    last
}

/// A number in 0..1 from the seed and the index (splitmix64).
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, -1.0, 2.0];

    fn shares(sampling: &Sampling) -> Vec<f64> {
        let mut counts = [0u32; 5];
        for index in 0..20_000 {
            counts[sample(&LOGITS, sampling, index) as usize] += 1;
        }
        counts.iter().map(|count| f64::from(*count) / 20_000.0).collect()
    }

    fn expected(kept: &[usize], temperature: f64) -> Vec<f64> {
        let weight = |i: usize| {
            if kept.contains(&i) {
                (f64::from(LOGITS[i]) / temperature).exp()
            } else {
                0.0
            }
        };
        let total: f64 = (0..5).map(weight).sum();
        (0..5).map(|i| weight(i) / total).collect()
    }

    #[test]
    fn draws_follow_the_distribution_that_was_asked_for() {
        let plain = Sampling {
            temperature: 1.0,
            ..Sampling::greedy()
        };
        for (sampling, kept, temperature) in [
            (plain.clone(), &[0, 1, 2, 3, 4][..], 1.0),
            (
                Sampling {
                    temperature: 0.5,
                    ..plain.clone()
                },
                &[0, 1, 2, 3, 4],
                0.5,
            ),
            (
                Sampling {
                    top_k: 3,
                    ..plain.clone()
                },
                &[1, 2, 4],
                1.0,
            ),
            (
                Sampling {
                    min_p: 0.1,
                    ..plain.clone()
                },
                &[0, 1, 2, 4],
                1.0,
            ),
            // Of what min-p leaves (0.422, 0.422, 0.155), two are 0.84.
            (
                Sampling {
                    min_p: 0.3,
                    top_p: 0.84,
                    ..plain.clone()
                },
                &[1, 4],
                1.0,
            ),
            (
                Sampling {
                    top_p: 0.7,
                    ..plain.clone()
                },
                &[1, 4],
                1.0,
            ),
            (
                Sampling {
                    top_p: 0.85,
                    ..plain.clone()
                },
                &[1, 2, 4],
                1.0,
            ),
            (
                Sampling {
                    top_p: 0.0,
                    ..plain.clone()
                },
                &[1],
                1.0,
            ),
            (
                Sampling {
                    top_k: 1,
                    ..plain.clone()
                },
                &[1],
                1.0,
            ),
        ] {
            for (got, expected) in shares(&sampling).iter().zip(expected(kept, temperature)) {
                assert!((got - expected).abs() < 0.015, "{sampling:?}: {got} {expected}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_best_and_penalties_and_bias_move_it() {
        let best = |sampling: Sampling, prompt: &[u32], generated: &[u32], allowed: Option<&[u32]>, banned: &[u32]| {
            let mut history = History::new(prompt, &sampling);
            generated.iter().for_each(|token| history.push(*token));
            sample(&adjusted(&LOGITS, &sampling, &history, allowed, banned), &sampling, 0)
        };
        let plain = Sampling::greedy;
        let frequency = |frequency_penalty| Sampling {
            frequency_penalty,
            ..plain()
        };
        let presence = |presence_penalty| Sampling {
            presence_penalty,
            ..plain()
        };
        let repetition = |repetition_penalty| Sampling {
            repetition_penalty,
            ..plain()
        };
        let bias = |bias: &[(u32, f32)]| Sampling {
            bias: bias.to_vec(),
            ..plain()
        };
        for (sampling, prompt, generated, allowed, banned, expected) in [
            (plain(), &[][..], &[][..], None, &[][..], 1),
            (frequency(0.1), &[], &[1, 1], None, &[], 4),
            (presence(1.5), &[], &[1, 1, 4], None, &[], 2),
            (presence(1.5), &[1, 4], &[], None, &[], 1),
            (repetition(1.5), &[1], &[], None, &[], 4),
            (repetition(2.5), &[1], &[4, 4], None, &[], 2),
            // A negative logit gets smaller, and above 1 nothing that was not seen is touched.
            (repetition(0.1), &[3], &[0], None, &[], 1),
            (bias(&[(3, 100.0), (1, -100.0)]), &[], &[], None, &[], 3),
            (bias(&[(3, 100.0)]), &[], &[], Some(&[0b00101][..]), &[], 2),
            (plain(), &[], &[], None, &[1, 4], 2),
        ] {
            let got = best(sampling.clone(), prompt, generated, allowed, banned);
            assert_eq!(
                got, expected,
                "{sampling:?} {prompt:?} {generated:?} {allowed:?} {banned:?}"
            );
        }
    }

    #[test]
    fn what_is_not_allowed_is_never_drawn() {
        let sampling = Sampling {
            temperature: 2.0,
            seed: 3,
            ..Sampling::greedy()
        };
        let logits = adjusted(&LOGITS, &sampling, &History::default(), Some(&[0b01001]), &[]);
        let drawn: HashSet<u32> = (0..2000).map(|index| sample(&logits, &sampling, index)).collect();
        assert_eq!(drawn, HashSet::from([0, 3]));
    }

    #[test]
    fn log_probabilities_come_with_the_most_likely_first() {
        let (chosen, top) = log_probs(&LOGITS, 2, 3);
        assert_eq!(top.iter().map(|prob| prob.token).collect::<Vec<_>>(), [1, 4, 2]);
        assert_eq!(chosen, top[2]);
        assert!((f64::from(chosen.log_prob).exp() - expected(&[0, 1, 2, 3, 4], 1.0)[2]).abs() < 1e-5);
    }
}
