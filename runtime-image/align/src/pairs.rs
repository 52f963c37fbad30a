//! Preferences as token pairs: rendered with the model's chat template, sampled by the seed.

use std::collections::BinaryHeap;

use serde_json::{Map, Value, json};
use strata_artifact::Opened;
use strata_contract::AlignTraining;
use strata_stage::{StageContext, StageError};
use strata_train::Random;

use crate::base::Base;
use crate::records::{Message, Preference, Split, for_each_row};

/// Stream of the seed for the sampling of a split; row `n` takes `… + n`.
const SAMPLE_STREAM: u64 = 1 << 33;

/// A preference in the model's tokens: the loss is on `chosen` and `rejected` alone, each the last assistant turn with the
/// token that ends it. Has no `Debug`: it is text that must not reach a log.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct TokenPair {
    pub(crate) prompt: Vec<u32>,
    pub(crate) chosen: Vec<u32>,
    pub(crate) rejected: Vec<u32>,
}

impl TokenPair {
    /// Length of the longer conversation.
    fn tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len().max(self.rejected.len())
    }

    /// Rows that the body computes for it.
    pub(crate) fn rows(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.len() - 2
    }
}

/// Pairs of a split.
#[derive(Default)]
pub(crate) struct Sample {
    /// In random order.
    pub(crate) pairs: Vec<TokenPair>,
    /// Pairs of the split that are longer than allowed.
    pub(crate) too_long: usize,
    /// Pairs of the split that the template refuses, or whose parts are empty or equal.
    pub(crate) unusable: usize,
}

/// A uniform sample without replacement of `count` pairs among those that fit, in random order: each row has a random key,
/// and the smallest keys win. One pass, and never more than `count` pairs in memory.
pub(crate) fn sample(
    datasets: &[Opened],
    split: Split,
    count: usize,
    base: &Base,
    training: &AlignTraining,
    context: &StageContext,
) -> Result<Sample, StageError> {
    let mut found = Sample::default();
    let mut best: BinaryHeap<Keyed> = BinaryHeap::new();
    let mut row = 0u64;
    for dataset in datasets {
        for_each_row(dataset, split, |record| {
            if context.interrupt.is_set() {
                return Err(StageError::interrupted("asked to stop before the training began"));
            }
            let key = Random::new(training.seed, SAMPLE_STREAM + row).next();
            row += 1;
            match tokenize(base, &record.preference()?) {
                None => found.unusable += 1,
                Some(pair) if pair.tokens() > longest(base, training) => found.too_long += 1,
                Some(pair) => {
                    best.push(Keyed { key, row, pair });
                    if best.len() > count {
                        best.pop();
                    }
                }
            }
            Ok(true)
        })?;
    }
    found.pairs = best.into_sorted_vec().into_iter().map(|keyed| keyed.pair).collect();
    Ok(found)
}

fn longest(base: &Base, training: &AlignTraining) -> usize {
    (training.max_pair_tokens as usize).min(base.body.config().max_positions)
}

struct Keyed {
    key: u64,
    row: u64,
    pair: TokenPair,
}

impl PartialEq for Keyed {
    fn eq(&self, other: &Self) -> bool {
        (self.key, self.row) == (other.key, other.row)
    }
}

impl Eq for Keyed {}

impl PartialOrd for Keyed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Keyed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.key, self.row).cmp(&(other.key, other.row))
    }
}

/// The preference in the model's tokens; `None` if it cannot be used.
pub(crate) fn tokenize(base: &Base, preference: &Preference) -> Option<TokenPair> {
    let render = |messages: &[&Message], opens_turn: bool| -> Option<Vec<u32>> {
        // A template writes roles unquoted, so they are not the data's to choose.
        let known = |role: &str| matches!(role, "system" | "user" | "assistant");
        if !messages.iter().all(|message| known(&message.role)) {
            return None;
        }
        let values: Vec<Value> = messages
            .iter()
            .map(|message| json!({"role": message.role, "content": message.content}))
            .collect();
        let rendered = base
            .template
            .render(&base.vocabulary, &values, None, opens_turn, &Map::new())
            .ok()?;
        base.vocabulary.encode_rendered(&rendered).ok()
    };
    let prompt_messages: Vec<&Message> = preference.prompt.iter().collect();
    let prompt = render(&prompt_messages, true)?;
    let turn = |answer: &[Message]| -> Option<Vec<u32>> {
        let messages: Vec<&Message> = prompt_messages.iter().copied().chain(answer).collect();
        let mut turn = render(&messages, false)?.strip_prefix(prompt.as_slice())?.to_vec();
        // What a template writes after the end of the turn is not the assistant's.
        if let Some(end) = turn.iter().rposition(|token| base.ends().any(|end| end == *token)) {
            turn.truncate(end + 1);
        }
        Some(turn)
    };
    let (chosen, rejected) = (turn(&preference.chosen)?, turn(&preference.rejected)?);
    let usable = !prompt.is_empty() && !chosen.is_empty() && !rejected.is_empty() && chosen != rejected;
    usable.then_some(TokenPair {
        prompt,
        chosen,
        rejected,
    })
}
