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
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;
    use strata_model::synthetic::byte_tokenizer;

    use super::*;

    const EOS: u32 = 258;

    fn forms() -> Forms {
        let vocabulary = Arc::new(Vocabulary::from_json(&byte_tokenizer()).unwrap());
        Forms::new(vocabulary, 260, vec![256, EOS])
    }

    /// A walk along tokens that may come, each drawn from `seed`; `None` if it has not ended after `most` of them.
    fn walk(mut constraint: Constraint, mut seed: u64, most: usize) -> Option<String> {
        let mut bytes = Vec::new();
        for _ in 0..most {
            let mask = constraint.mask().unwrap();
            let allowed: Vec<u32> = (0..260)
                .filter(|id| mask.bits()[*id as usize / 32] >> (id % 32) & 1 == 1)
                .collect();
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // A token that ends is taken whenever there is one, and quotes and brackets close early.
            let closing = [EOS, u32::from(b'"'), u32::from(b'}'), u32::from(b']')];
            let favourite = closing.into_iter().find(|id| seed >> 62 == 0 && allowed.contains(id));
            let token = favourite.unwrap_or_else(|| allowed[(seed >> 33) as usize % allowed.len()]);
            assert_ne!(token, 259, "there is no such token");
            bytes.extend(u8::try_from(token));
            if constraint.accept(token).unwrap() {
                return Some(String::from_utf8(bytes).unwrap());
            }
        }
        None
    }

    #[test]
    fn every_walk_ends_in_the_form_and_equal_walks_are_equal() {
        let forms = forms();
        let schema = json!({ "type": "object", "properties": {
            "s": { "type": "string", "maxLength": 5 }, "n": { "type": "integer", "minimum": 3, "maximum": 20 },
            "e": { "enum": ["a", 7, null] }, "l": { "type": "array", "items": { "type": "boolean" }, "maxItems": 3 },
        }, "required": ["s", "n", "e", "l"], "additionalProperties": false });
        let valid = |text: &str| {
            let value: Value = serde_json::from_str(text).unwrap();
            let few = value["s"].as_str().unwrap().chars().count() <= 5 && value["l"].as_array().unwrap().len() <= 3;
            few && (3..=20).contains(&value["n"].as_i64().unwrap())
                && [json!("a"), json!(7), json!(null)].contains(&value["e"])
        };
        let any_object = |text: &str| match serde_json::from_str::<Value>(text) {
            Ok(value) => value.is_object(),
            Err(error) => error.to_string().starts_with("number out of range"), // 1e999 is JSON
        };
        type Valid<'a> = &'a dyn Fn(&str) -> bool;
        let cases: [(Form, Valid); 4] = [
            (Form::Schema(schema), &valid),
            (Form::Schema(json!({ "type": "object" })), &any_object),
            (Form::Regex("[a-f]{2}/\\d".to_owned()), &|text| {
                text.len() == 4 && text.as_bytes()[2] == b'/' && text.as_bytes()[3].is_ascii_digit()
            }),
            (Form::Lark("start: \"yes\" | \"no\"".to_owned()), &|text| {
                ["yes", "no"].contains(&text)
            }),
        ];
        for (form, valid) in cases {
            let mut ended = 0;
            for seed in 0..40 {
                let walked = walk(forms.compile(form.clone()).unwrap(), seed, 300);
                assert_eq!(
                    walked,
                    walk(forms.compile(form.clone()).unwrap(), seed, 300),
                    "{form:?}"
                );
                if let Some(text) = walked {
                    ended += 1;
                    assert!(valid(&text), "{form:?}: {text}");
                }
            }
            assert!(ended > 10, "{form:?}: only {ended} ended");
        }
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_a_reason() {
        let forms = forms();
        for (form, part) in [
            (
                Form::Schema(json!({ "type": "object", "unknownKeyword": 1, "if": {} })),
                "if",
            ),
            (Form::Schema(json!({ "type": "striing" })), "striing"),
            (Form::Schema(json!({ "$ref": "#/$defs/none" })), "none"),
            (
                Form::Schema(json!({ "type": "integer", "minimum": 3, "maximum": 2 })),
                "nsatisfiable",
            ),
            (Form::Regex("(a".to_owned()), "regex"),
            (Form::Lark("start: nothing".to_owned()), "nothing"),
            (Form::Lark(String::new()), "start"),
            (Form::Regex("a".repeat(300_000)), "bytes"),
        ] {
            let error = forms.compile(form.clone()).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains('<'), "{part}: {error}");
        }
    }

    #[test]
    fn what_costs_too_much_is_refused_or_served_but_soon() {
        let forms = forms();
        let mut chain = json!({ "end": { "type": "null" } });
        for i in 0..3000 {
            let next = if i == 0 {
                "end".to_owned()
            } else {
                format!("d{}", i - 1)
            };
            chain[format!("d{i}")] =
                json!({ "type": "object", "properties": { "x": { "$ref": format!("#/$defs/{next}") } } });
        }
        let mut refs = json!({ "end": { "type": "null" } });
        for i in 0..7000 {
            let next = if i == 0 {
                "end".to_owned()
            } else {
                format!("d{}", i - 1)
            };
            refs[format!("d{i}")] = json!({ "$ref": format!("#/$defs/{next}") });
        }
        let both = |k: usize| json!({ "anyOf": (0..k).map(|i| json!({ "properties": { format!("p{i}"): { "type": "string" } } })).collect::<Vec<_>>() });
        let rules: String = (0..5000).map(|i| format!("r{i}: \"a\" r{} | \"b\"\n", i + 1)).collect();
        let terminals: String = (0..5000).map(|i| format!("T{i}: \"a\" T{}\n", i + 1)).collect();
        for (name, form) in [
            (
                "brackets",
                Form::Lark(format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000))),
            ),
            (
                "regex brackets",
                Form::Regex(format!("{}a{}", "(".repeat(50_000), ")".repeat(50_000))),
            ),
            ("not", Form::Lark(format!("start: A\nA: {}\"a\"", "~".repeat(50_000)))),
            ("repetition", Form::Regex("((a{1000}){1000}){1000}".to_owned())),
            ("backtracking", Form::Regex("(a|aa|aaa|b)*(a|aa)*c.{500}".to_owned())),
            (
                "items",
                Form::Schema(
                    json!({ "type": "array", "items": { "type": "array", "maxItems": 100_000 }, "minItems": 100_000 }),
                ),
            ),
            (
                "length",
                Form::Schema(json!({ "type": "string", "minLength": 1_000_000 })),
            ),
            (
                "chain",
                Form::Schema(json!({ "$ref": "#/$defs/d2999", "$defs": chain })),
            ),
            ("refs", Form::Schema(json!({ "$ref": "#/$defs/r6999", "$defs": refs }))),
            (
                "product",
                Form::Schema(json!({ "allOf": (0..12).map(|_| both(8)).collect::<Vec<_>>() })),
            ),
            ("rules", Form::Lark(format!("start: r0\n{rules}r5000: \"c\""))),
            ("terminals", Form::Lark(format!("start: T0\n{terminals}T5000: \"c\""))),
            ("enum", Form::Schema(json!({ "enum": (0..20_000).collect::<Vec<_>>() }))),
        ] {
            let begin = Instant::now();
            // In a thread with the stack that requests are prepared on.
            let outcome = std::thread::scope(|scope| {
                let thread = std::thread::Builder::new().stack_size(2 << 20);
                let task = || forms.compile(form).map(|constraint| walk(constraint, 1, 20).is_some());
                thread.spawn_scoped(scope, task).unwrap().join().unwrap()
            });
            let took = begin.elapsed();
            println!("{name}: {took:?} {:.100}", format!("{outcome:?}"));
            assert!(took < Duration::from_secs(5), "{name}: {took:?}");
        }
    }
}
