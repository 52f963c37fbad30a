//! Which tokens may come next so that an answer has the form that was asked for: grammars over a model's vocabulary.
//!
//! A grammar is compiled where its request is prepared, never on the engine's thread, within bounds on its size and on the
//! work that it may cause; compiled ones are kept for the next request that asks for the same. Each request walks a copy of
//! its own, so what it may say depends on nothing but its grammar and its tokens so far.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory, panic_utils, token_bytes_from_tokenizer_json};
use serde_json::Value;
use strata_model::Vocabulary;

/// The longest grammar, in bytes of its source.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// Address space for the stack on which a grammar is compiled; only what it uses costs memory. References to references are
/// followed by recursion: 10,000 of them fit into the longest grammar.
const COMPILE_STACK_BYTES: usize = 1 << 30;
/// Compiled grammars kept.
const MAX_KEPT: usize = 32;
/// What is told of an error; some quote a whole grammar.
const MAX_MESSAGE_CHARACTERS: usize = 500;
/// What a grammar may cost: some 20 ms to compile its terminals and, at the very worst, as much for one step. The states of its
/// lexer have 1 to 2 KiB each.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 20_000,
    max_grammar_size: 200_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// The form of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// JSON that is valid against a schema.
    Schema(Value),
    /// A text that matches a regular expression as a whole.
    Regex(String),
    /// A text of a grammar in Lark's notation.
    Lark(String),
}

/// Why a form cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// Its source is too long.
    #[error("it has {0} bytes; {MAX_GRAMMAR_BYTES} are the most")]
    TooLong(usize),
    /// It is not valid, not supported, or costs too much.
    #[error("{0}")]
    Invalid(String),
    /// The tokens of the model are not bytes of text.
    #[error("the tokenizer of this model does not allow it: {0}")]
    Tokenizer(String),
}

/// Compiles forms for one model.
pub struct Forms {
    vocabulary: Arc<Vocabulary>,
    /// Tokens that the model has logits for.
    size: usize,
    eos: Vec<u32>,
    /// Made when the first form is asked for: it takes a while, and many servers never need it.
    factory: OnceLock<Result<ParserFactory, String>>,
    /// The newest last.
    kept: Mutex<Vec<(String, Matcher)>>,
}

impl Forms {
    /// For a model with `size` tokens, of which `eos` end an answer.
    pub fn new(vocabulary: Arc<Vocabulary>, size: usize, eos: Vec<u32>) -> Self {
        Forms {
            vocabulary,
            size,
            eos,
            factory: OnceLock::new(),
            kept: Mutex::new(Vec::new()),
        }
    }

    /// What keeps an answer in `form`.
    pub fn compile(&self, form: Form) -> Result<Constraint, FormError> {
        let grammar = TopLevelGrammar::from_grammar(match form {
            Form::Schema(schema) => GrammarWithLexer::from_json_schema(schema),
            Form::Regex(regex) => GrammarWithLexer::from_lark(format!("start: {}", lark_regex(&regex))),
            Form::Lark(lark) => GrammarWithLexer::from_lark(lark),
        });
        let key = serde_json::to_string(&grammar).map_err(|error| FormError::Invalid(error.to_string()))?;
        if key.len() > MAX_GRAMMAR_BYTES {
            return Err(FormError::TooLong(key.len()));
        }
        if let Some(found) = self.find(&key) {
            return Ok(self.constraint(&found));
        }
        let factory = self
            .factory
            .get_or_init(|| factory(&self.vocabulary, self.size, &self.eos))
            .as_ref()
            .map_err(|error| FormError::Tokenizer(error.clone()))?;
        let matcher = deep(|| first_step(factory, grammar)).map_err(FormError::Invalid)?;
        let constraint = self.constraint(&matcher);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.remove(0);
        }
        kept.push((key, matcher));
        Ok(constraint)
    }

    fn find(&self, key: &str) -> Option<Matcher> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == key)?;
        let entry = kept.remove(at);
        let found = entry.1.clone();
        kept.push(entry);
        Some(found)
    }

    fn constraint(&self, matcher: &Matcher) -> Constraint {
        Constraint {
            matcher: matcher.deep_clone(),
            eos: self.eos.clone(),
        }
    }
}

/// A regular expression as Lark writes it; `\d`, `\w` and `\s` are ASCII.
pub(crate) fn lark_regex(regex: &str) -> String {
    format!("/{}/", llguidance::regex_to_lark(regex, "dws"))
}

/// The grammar compiled; its first step tells whether any text has this form.
fn first_step(factory: &ParserFactory, grammar: TopLevelGrammar) -> Result<Matcher, String> {
    let mut matcher = Matcher::new(factory.create_parser(grammar));
    // What it takes to find it stays with the matcher, so that copies do not need to find it again.
    match matcher.compute_mask_or_eos() {
        Ok(_) => Ok(matcher),
        Err(error) => Err(plain(&error.to_string())),
    }
}

/// Does the work on a stack that holds whatever a grammar of [`MAX_GRAMMAR_BYTES`] can nest.
fn deep<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("grammar".to_owned())
            .stack_size(COMPILE_STACK_BYTES);
        let thread = thread.spawn_scoped(scope, work).map_err(|error| error.to_string())?;
        thread
            .join()
            .unwrap_or_else(|_| Err("it cannot be compiled".to_owned()))
    })
}

fn factory(vocabulary: &Vocabulary, size: usize, eos: &[u32]) -> Result<ParserFactory, String> {
    let begin = std::time::Instant::now();
    let made = panic_utils::catch_unwind(AssertUnwindSafe(|| {
        let mut words = token_bytes_from_tokenizer_json(&serde_json::to_value(vocabulary.tokenizer())?)?;
        words.resize(size, Vec::new());
        let info = TokRxInfo::new(size as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if !eos.is_empty() {
            trie = trie.with_eos_tokens(eos);
        }
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)?;
        *factory.limits_mut() = LIMITS;
        factory.quiet();
        Ok(factory)
    }));
    tracing::info!(
        seconds = begin.elapsed().as_secs_f64(),
        "tokens are indexed for constrained answers"
    );
    made.map_err(|error| plain(&error.to_string()))
}

/// The beginning of the message, without what the library adds for its own developers.
fn plain(message: &str) -> String {
    let end = ["<state>", "<non-verbose/>", "<backtrace>"]
        .iter()
        .filter_map(|mark| message.find(mark))
        .min()
        .unwrap_or(message.len());
    message[..end].trim().chars().take(MAX_MESSAGE_CHARACTERS).collect()
}

/// The tokens that may come next, as bits.
pub struct Mask(SimpleVob);

impl Mask {
    /// Bit `i % 32` of word `i / 32` says whether token `i` may come.
    pub fn bits(&self) -> &[u32] {
        self.0.as_slice()
    }

    /// Without `tokens`, if any token remains then.
    pub fn without(mut self, tokens: &[u32]) -> Mask {
        let all = self.0.clone();
        for token in tokens {
            self.0.disallow_token(*token);
        }
        if self.0.is_zero() { Mask(all) } else { self }
    }
}

/// Why an answer cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(String);

/// Where one answer stands in its form.
pub struct Constraint {
    matcher: Matcher,
    eos: Vec<u32>,
}

impl Constraint {
    /// The tokens that may come next; at least one.
    pub fn mask(&mut self) -> Result<Mask, ConstraintError> {
        let mask = self.matcher.compute_mask_or_eos();
        mask.map(Mask)
            .map_err(|error| ConstraintError(plain(&error.to_string())))
    }

    /// Takes the next token, one of those that may come. Whether the answer is complete, so that nothing may follow.
    pub fn accept(&mut self, token: u32) -> Result<bool, ConstraintError> {
        if self.eos.contains(&token) {
            return Ok(true);
        }
        self.matcher
            .consume_token(token)
            .map_err(|error| ConstraintError(plain(&error.to_string())))?;
        Ok(self.matcher.is_stopped())
    }
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Constraint {
            matcher: self.matcher.deep_clone(),
            eos: self.eos.clone(),
        }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
