//! One answer that is being generated: what decides its next token, and what has been given out of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use strata_model::Vocabulary;
use tokio::sync::mpsc;

use super::constraint::{Constraint, ConstraintError, Mask};
use super::sample::{self, History, Sampling, TokenProb};
use super::text::Answer;
use super::{Event, Submission};
use crate::metrics::Timing;

/// One answer; before the prompt is computed, one for all choices.
pub(super) struct Active {
    pub(super) submission: Arc<Submission>,
    pub(super) choice: usize,
    /// How many choices it stands for, its own and those after it.
    pub(super) width: usize,
    sampling: Sampling,
    constraint: Option<Constraint>,
    /// Of what was sampled.
    history: History,
    /// Of the prompt's tokens but the first, as far as they were computed; absent where nobody asks for them, and once given out.
    prompt: Option<Vec<(TokenProb, Vec<TokenProb>)>>,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) answer: Answer,
    /// Tokens given out: fewer than sampled where a stop text ended the answer.
    pub(super) count: usize,
    pub(super) timing: Timing,
    /// Tokens of the longest choice of the request that has ended; all of them share it.
    pub(super) longest: Arc<AtomicUsize>,
}

/// A token that was sampled.
pub(super) struct Sampled {
    pub(super) token: u32,
    pub(super) log_probs: Option<(TokenProb, Vec<TokenProb>)>,
    /// It is one that ends the answer.
    pub(super) ends: bool,
    /// The answer's form lets nothing follow.
    pub(super) complete: bool,
}

impl Active {
    pub(super) fn new(
        vocabulary: &Vocabulary,
        submission: Arc<Submission>,
        events: mpsc::Sender<Event>,
        timing: Timing,
        choice: usize,
    ) -> Self {
        let sampling = Sampling {
            seed: choice_seed(submission.sampling.seed, choice),
            ..submission.sampling.clone()
        };
        Active {
            choice,
            width: 1,
            history: History::new(&submission.prompt, &sampling),
            sampling,
            constraint: submission.constraint.clone(),
            prompt: (choice == 0 && submission.prompt_log_probs.is_some()).then(Vec::new),
            events,
            answer: Answer::new(submission.stop.clone(), submission.show_stop, submission.show_special)
                .after(vocabulary, submission.prompt.last().copied()),
            submission,
            count: 0,
            timing,
            longest: Arc::default(),
        }
    }

    /// The next token. It depends on nothing but the logits, the request, and the tokens before it.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<Sampled, ConstraintError> {
        let (submission, history) = (&self.submission, &self.history);
        let early = history.count() < submission.min_tokens;
        let mut banned: &[u32] = if early { &submission.stop_tokens } else { &[] };
        let mask = self.constraint.as_mut().map(Constraint::mask).transpose()?;
        let mask = mask.map(|mask| mask.without(std::mem::take(&mut banned)));
        let allowed = mask.as_ref().map(Mask::bits);
        let adjusted = sample::adjusted(logits, &self.sampling, history, allowed, banned);
        let token = sample::sample(&adjusted, &self.sampling, history.count() as u64);
        let complete = match &mut self.constraint {
            Some(constraint) => constraint.accept(token)?,
            None => false,
        };
        self.history.push(token);
        Ok(Sampled {
            token,
            log_probs: submission
                .log_probs
                .map(|count| sample::log_probs(logits, token, count)),
            ends: submission.stop_tokens.contains(&token),
            complete,
        })
    }
}

impl Active {
    /// What a smaller model, whose logits these are, takes for the token `ahead` tokens after the next one. It draws as the
    /// answer itself will, so that where the two models agree the drafts stand.
    pub(super) fn guess(&self, logits: &[f32], ahead: usize) -> u32 {
        let adjusted = sample::adjusted(logits, &self.sampling, &self.history, None, &[]);
        sample::sample(&adjusted, &self.sampling, (self.history.count() + ahead) as u64)
    }

    /// Positions of the prompt's tokens whose log-probabilities are wanted and not known.
    pub(super) fn unseen_prompt(&self) -> Range<usize> {
        match &self.prompt {
            Some(seen) => seen.len() + 1..self.submission.prompt.len(),
            None => 0..0,
        }
    }

    /// Takes the logits before the prompt's token at `position`.
    pub(super) fn see_prompt(&mut self, position: usize, logits: &[f32]) {
        let (Some(seen), Some(count)) = (&mut self.prompt, self.submission.prompt_log_probs) else {
            return;
        };
        if position == seen.len() + 1 {
            seen.push(sample::log_probs(logits, self.submission.prompt[position], count));
        }
    }

    /// The prompt's log-probabilities, the first time.
    pub(super) fn take_prompt(&mut self) -> Option<Vec<(TokenProb, Vec<TokenProb>)>> {
        self.prompt.take()
    }

    /// Tokens sampled.
    pub(super) fn sampled(&self) -> usize {
        self.history.count()
    }
}

/// The seed of a choice: its own for each, and the given one for the first.
fn choice_seed(seed: u64, choice: usize) -> u64 {
    if choice == 0 {
        return seed;
    }
    // The finalizer of MurmurHash3: seeds and choices that differ in a bit give draws that have nothing in common.
    let mut z = seed ^ (choice as u64).wrapping_mul(0xA076_1D64_78BD_642F);
    z = (z ^ (z >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    z = (z ^ (z >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    z ^ (z >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::choice_seed;

    #[test]
    fn every_choice_of_every_seed_draws_for_itself_and_the_first_one_as_if_alone() {
        let seeds: HashSet<u64> = (0..100)
            .flat_map(|seed| (0..16).map(move |choice| choice_seed(seed, choice)))
            .collect();
        assert_eq!(seeds.len(), 1600);
        assert_eq!(choice_seed(7, 0), 7);
    }
}
