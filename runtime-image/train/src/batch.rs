//! What one pass of the body computes: packed sequences, and which next tokens they are asked for.

use strata_kernels::ops::attention::Sequence;

/// A question to the model: how probable is `target` after the token at `row`?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scored {
    /// Row of the batch.
    pub row: u32,
    /// The token asked for.
    pub target: u32,
}

/// Packed sequences and the questions on them.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) scored: Vec<Scored>,
}

impl Batch {
    /// Rows, which are tokens that the body computes.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The questions, in the order in which they were added.
    pub fn scored(&self) -> &[Scored] {
        &self.scored
    }

    /// Adds a text of at least 2 tokens, asking for each token from `score_from` (at least 1) on. The last token is not
    /// computed, since nothing follows it.
    pub fn push_text(&mut self, tokens: &[u32], score_from: usize) {
        assert!(
            tokens.len() >= 2 && score_from >= 1,
            "a text without a context cannot be scored"
        );
        let first = self.rows();
        self.scored.extend((score_from..tokens.len()).map(|i| Scored {
            row: (first + i - 1) as u32,
            target: tokens[i],
        }));
        self.push_sequence(Sequence::plain(tokens.len() - 1), &[&tokens[..tokens.len() - 1]]);
    }

    /// Adds a prompt with two completions, asking for every token of each: first `chosen`'s, then `rejected`'s. The prompt
    /// is computed once for both. None of the three is empty.
    pub fn push_pair(&mut self, prompt: &[u32], chosen: &[u32], rejected: &[u32]) {
        assert!(
            ![prompt, chosen, rejected].iter().any(|part| part.is_empty()),
            "a pair with an empty part"
        );
        let last_of_prompt = self.rows() + prompt.len() - 1;
        let mut branch_start = self.rows() + prompt.len();
        for completion in [chosen, rejected] {
            let asking = std::iter::once(last_of_prompt).chain(branch_start..);
            self.scored.extend(asking.zip(completion).map(|(row, &target)| Scored {
                row: row as u32,
                target,
            }));
            branch_start += completion.len() - 1;
        }
        let (chosen, rejected) = (&chosen[..chosen.len() - 1], &rejected[..rejected.len() - 1]);
        let sequence = Sequence {
            trunk: prompt.len(),
            branches: vec![chosen.len(), rejected.len()],
        };
        self.push_sequence(sequence, &[prompt, chosen, rejected]);
    }

    fn push_sequence(&mut self, sequence: Sequence, parts: &[&[u32]]) {
        self.positions.extend(sequence.positions());
        parts.iter().for_each(|part| self.tokens.extend_from_slice(part));
        self.sequences.push(sequence);
    }

    /// Checks what the body indexes by.
    pub(crate) fn check(&self, vocab_size: usize, max_positions: usize) {
        assert!(
            self.tokens.iter().all(|&token| (token as usize) < vocab_size),
            "a token is outside of the vocabulary"
        );
        assert!(
            self.positions.iter().all(|&p| (p as usize) < max_positions),
            "a sequence is longer than the model's context"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_asks_for_every_completion_token_after_its_own_past() {
        let mut batch = Batch::default();
        batch.push_text(&[9, 8], 1);
        batch.push_pair(&[1, 2], &[3, 4], &[5, 6, 7]);
        assert_eq!(batch.tokens, [9, 1, 2, 3, 5, 6]);
        assert_eq!(batch.positions, [0, 0, 1, 2, 2, 3]);
        let asked: Vec<(u32, u32)> = batch.scored.iter().map(|scored| (scored.row, scored.target)).collect();
        assert_eq!(asked, [(0, 8), (2, 3), (3, 4), (2, 5), (4, 6), (5, 7)]);
    }
}
