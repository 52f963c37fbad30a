//! Guesses at the tokens that come next, so that one pass over the weights checks several.
//!
//! What is guessed decides nothing: the engine samples each position from the model's own logits, as it would without a
//! guess, and a draft only stands if it is that very token. So answers are the same to the bit, greedy or drawn.

mod lookup;

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::executor::{Batch, Executor, Row};
use super::forward::Forward;
use super::run::Actives;
use crate::error::ServeError;
use crate::schedule::{RequestId, Scheduler, Work};

/// The most tokens that are drafted at once, and the longest end of a text that is looked up.
const MAX_DRAFTS: usize = 16;
const MAX_LOOKUP: usize = 32;

/// `--speculative-config`: as vLLM's, a JSON object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case", deny_unknown_fields)]
pub enum Speculation {
    /// What followed the last tokens the last time that they stood in the text.
    Ngram {
        /// Tokens drafted at once.
        num_speculative_tokens: usize,
        /// The longest end of the text that is looked for. Default: what the other one says, or 5.
        prompt_lookup_max: Option<usize>,
        /// The shortest one.
        prompt_lookup_min: Option<usize>,
    },
    /// What a smaller model with the same tokens says.
    DraftModel {
        /// Tokens drafted at once.
        num_speculative_tokens: usize,
        /// Hugging Face folder, GGUF file, or folder with one GGUF file; or a URI of where it is.
        model: PathBuf,
        /// With a URI: the digest that its artifact must have.
        digest: Option<String>,
    },
}

impl Speculation {
    /// Tokens drafted at once.
    pub fn drafts(&self) -> usize {
        match self {
            Speculation::Ngram {
                num_speculative_tokens, ..
            }
            | Speculation::DraftModel {
                num_speculative_tokens, ..
            } => *num_speculative_tokens,
        }
    }

    /// The lengths that are looked up: at most, at least.
    fn lookup(most: Option<usize>, least: Option<usize>) -> (usize, usize) {
        let most_or = |other: Option<usize>| most.or(other).unwrap_or(5);
        (most_or(least), least.unwrap_or(most_or(None)))
    }
}

impl std::str::FromStr for Speculation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed: Speculation = serde_json::from_str(text).map_err(|error| {
            let example = "{\"method\": \"ngram\", \"num_speculative_tokens\": 4, \"prompt_lookup_max\": 4, \"prompt_lookup_min\": 2}";
            format!("{error}; an example: {example}")
        })?;
        if !(1..=MAX_DRAFTS).contains(&parsed.drafts()) {
            return Err(format!("num_speculative_tokens must lie between 1 and {MAX_DRAFTS}"));
        }
        if let Speculation::Ngram {
            prompt_lookup_max,
            prompt_lookup_min,
            ..
        } = parsed
        {
            let (most, least) = Self::lookup(prompt_lookup_max, prompt_lookup_min);
            if !(1..=most).contains(&least) || most > MAX_LOOKUP {
                return Err(format!(
                    "prompt_lookup_min must lie between 1 and prompt_lookup_max, and that at most at {MAX_LOOKUP}"
                ));
            }
        }
        Ok(parsed)
    }
}

/// What guesses.
pub(crate) enum Drafter {
    Lookup { most: usize, least: usize },
    Model(Box<DraftModel>),
}

impl Drafter {
    /// The guesser of a configuration; `executor` is that of its model, if it has one.
    pub(crate) fn new(speculation: &Speculation, executor: Option<Box<dyn Forward>>) -> Option<Self> {
        match speculation {
            Speculation::Ngram {
                prompt_lookup_max,
                prompt_lookup_min,
                ..
            } => {
                let (most, least) = Speculation::lookup(*prompt_lookup_max, *prompt_lookup_min);
                Some(Drafter::Lookup { most, least })
            }
            Speculation::DraftModel { .. } => Some(Drafter::Model(Box::new(DraftModel {
                executor: executor?,
                computed: HashMap::new(),
            }))),
        }
    }

    /// A block of the cache becomes a copy of another one.
    pub(super) fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ServeError> {
        match self {
            Drafter::Lookup { .. } => Ok(()),
            Drafter::Model(model) => model.executor.copy_block(from, to),
        }
    }

    /// What computes the smaller model, as [`Forward::on_cpu`].
    pub(super) fn on_cpu(&mut self) -> Option<&mut Executor> {
        match self {
            Drafter::Lookup { .. } => None,
            Drafter::Model(model) => model.executor.on_cpu(),
        }
    }

    /// A request has ended.
    pub(super) fn forget(&mut self, id: RequestId) {
        if let Drafter::Model(model) = self {
            model.computed.remove(&id);
        }
    }

    /// Drafts for each piece of work, at most as many as it has room for.
    pub(super) fn draft(
        &mut self,
        work: &[Work],
        scheduler: &Scheduler,
        active: &Actives,
    ) -> Result<Vec<Vec<u32>>, ServeError> {
        match self {
            Drafter::Lookup { most, least } => Ok(work
                .iter()
                .map(|work| lookup::lookup(scheduler.tokens(work.id), *most, *least, work.drafts))
                .collect()),
            Drafter::Model(model) => model.draft(work, scheduler, active),
        }
    }
}

/// A smaller model. Its cache has the same blocks as the large one's, with the same owners.
///
/// Where it lags behind, as at the end of an answer whose blocks another request then finds, its guesses get worse; nothing
/// else does.
pub(crate) struct DraftModel {
    executor: Box<dyn Forward>,
    /// Tokens of each request that it has computed, if no more than the large one has.
    computed: HashMap<RequestId, usize>,
}

impl DraftModel {
    fn draft(&mut self, work: &[Work], scheduler: &Scheduler, active: &Actives) -> Result<Vec<Vec<u32>>, ServeError> {
        let tables: Vec<Vec<u32>> = work.iter().map(|work| scheduler.table(work.id).to_vec()).collect();
        let mut drafts: Vec<Vec<u32>> = vec![Vec::new(); work.len()];
        // First whatever it has not seen, then one token after the other.
        let mut rows = Vec::new();
        for (table, work) in work.iter().enumerate() {
            let end = work.start + work.count;
            let from = self
                .computed
                .get(&work.id)
                .map_or(work.start, |computed| work.start.min(*computed));
            let tokens = &scheduler.tokens(work.id)[from..end];
            rows.extend(tokens.iter().enumerate().map(|(i, token)| Row {
                token: *token,
                position: (from + i) as u32,
                table,
                logits: work.drafts > 0 && from + i + 1 == end,
            }));
            self.computed.insert(work.id, end);
        }
        // Drafts come from the base: what an adapter makes of them decides the verification.
        let mut batch = Batch {
            rows,
            tables,
            ..Batch::default()
        };
        loop {
            let (rows, guesses) = (&batch.rows, &mut drafts);
            self.executor.forward(&batch, &mut |row, logits| {
                let at = rows[row].table;
                let guess = active[&work[at].id].guess(logits, guesses[at].len());
                guesses[at].push(guess);
            })?;
            batch.rows = (0..work.len())
                .filter(|at| !drafts[*at].is_empty() && drafts[*at].len() < work[*at].drafts)
                .map(|at| {
                    let position = work[at].start + work[at].count + drafts[at].len() - 1;
                    self.computed.insert(work[at].id, position + 1);
                    Row {
                        token: drafts[at][drafts[at].len() - 1],
                        position: position as u32,
                        table: at,
                        logits: true,
                    }
                })
                .collect();
            if batch.rows.is_empty() {
                return Ok(drafts);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_vllms_and_what_it_cannot_mean_is_refused() {
        let ngram = |drafts, most, least| Speculation::Ngram {
            num_speculative_tokens: drafts,
            prompt_lookup_max: most,
            prompt_lookup_min: least,
        };
        let parse = |text: &str| text.parse::<Speculation>();
        let text = r#"{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}"#;
        assert_eq!(parse(text), Ok(ngram(5, Some(4), None)));
        let text = r#"{"model": "m", "method": "draft_model", "num_speculative_tokens": 3}"#;
        assert_eq!(parse(text).map(|parsed| parsed.drafts()), Ok(3));
        for (most, least, expected) in [
            (None, None, (5, 5)),
            (Some(3), None, (3, 3)),
            (None, Some(2), (2, 2)),
            (Some(4), Some(1), (4, 1)),
        ] {
            assert_eq!(Speculation::lookup(most, least), expected);
        }
        for (text, words) in [
            ("ngram", "an example"),
            (r#"{"method": "eagle", "num_speculative_tokens": 3}"#, "draft_model"),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 0}"#,
                "between 1 and 16",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 33}"#,
                "at most at 32",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 2, "prompt_lookup_min": 3}"#,
                "prompt_lookup_min",
            ),
            (
                r#"{"method": "ngram", "num_speculative_tokens": 1, "acceptance": 1}"#,
                "acceptance",
            ),
            (r#"{"method": "draft_model", "num_speculative_tokens": 1}"#, "model"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
