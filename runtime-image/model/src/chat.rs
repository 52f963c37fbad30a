//! Chat templates: Jinja as Hugging Face runs it, with one addition. What a user wrote is never parsed for special tokens.
//!
//! A template joins its own text ("<|im_start|>") and the users' into one string, which is then split into tokens; a user who
//! writes "<|im_end|>" would end the message. So before rendering, every special token's text inside the messages is broken
//! by a *mark*: a string that occurs nowhere in the input, chosen after reading it, so nobody can forge it. After rendering,
//! special tokens are found in the marked text (only the template's own are whole), and the rest is encoded literally with
//! the marks removed. Where no user wrote such a text there is no mark, and the tokens are HF's by construction.

mod python;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde_json::{Map, Value};

use crate::error::{ModelError, Result};
use crate::tokenizer::{SpecialTexts, Vocabulary};

/// Steps that a template may take; a hostile one ends with an error instead of never.
const FUEL: u64 = 20_000_000;
/// The largest template accepted, in bytes.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
const NAME: &str = "chat";
/// For models that bring no template: roles in words that any tokenizer has, and after an answer the token that ends a text,
/// the one such token that every model knows. Contents are trimmed, so that an opened turn is a prefix of a written one in
/// tokens too.
const PLAIN: &str = r"{{- bos_token or '' }}
{%- for message in messages %}
{{- (message['role'] | capitalize) + ':\n' + ((message['content'] or '') | trim) }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special: SpecialTexts,
}

/// A chat as one text, in which users' special tokens are broken by a mark.
#[derive(Clone, Debug)]
pub struct Rendered {
    text: String,
    mark: Option<String>,
}

impl Rendered {
    /// The text as HF's `apply_chat_template` returns it.
    pub fn text(&self) -> String {
        match &self.mark {
            Some(mark) => self.text.replace(mark, ""),
            None => self.text.clone(),
        }
    }

    pub(crate) fn marked_text(&self) -> &str {
        &self.text
    }

    pub(crate) fn mark(&self) -> Option<&str> {
        self.mark.as_deref()
    }
}

impl ChatTemplate {
    pub(crate) fn new(source: &str, special: SpecialTexts) -> Result<Self> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(ModelError::Template(format!(
                "it has {} bytes; {MAX_TEMPLATE_BYTES} are the most accepted",
                source.len()
            )));
        }
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("HF's settings are valid"),
        );
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python::format);
        environment.add_filter("tojson", python::tojson);
        environment.add_test("iterable", python::is_iterable);
        environment.add_function("strftime_now", python::strftime_now);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let compiled = environment.add_template_owned(NAME, python::without_generation_blocks(source));
        compiled.map_err(|error| ModelError::Template(error.to_string()))?;
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
            special,
        })
    }

    /// A template with the texts of the begin and end tokens, which it may refer to.
    pub fn from_source(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        Self::new(
            source,
            SpecialTexts {
                bos: bos.map(str::to_owned),
                eos: eos.map(str::to_owned),
            },
        )
    }

    /// The template for a model that has none of its own; see [`crate::LoadedModel::plain_template`].
    pub(crate) fn plain(special: SpecialTexts) -> Result<Self> {
        Self::new(PLAIN, special)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages` (a list of objects with `role` and `content`). `tools` and `arguments` are passed to the template
    /// as they are; `add_generation_prompt` opens the assistant's turn.
    ///
    /// Roles must be checked by the caller: a template writes them unquoted.
    pub fn render(
        &self,
        vocabulary: &Vocabulary,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        arguments: &Map<String, Value>,
    ) -> Result<Rendered> {
        let mut messages = Value::Array(messages.to_vec());
        let mut tools = tools.cloned();
        let mut arguments = Value::Object(arguments.clone());
        let mark = unused_mark(&[Some(&messages), tools.as_ref(), Some(&arguments)]);
        let mut marked = false;
        for value in [Some(&mut messages), tools.as_mut(), Some(&mut arguments)]
            .into_iter()
            .flatten()
        {
            marked |= break_special(value, vocabulary.special_texts(), &mark);
        }
        let fixed = context! {
            messages => Jinja::from(Serde(&messages)),
            tools => tools.as_ref().map(|tools| Jinja::from(Serde(tools))),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.special.bos.as_deref(),
            eos_token => self.special.eos.as_deref(),
        };
        let all = context! { ..fixed, ..Jinja::from(Serde(&arguments)) };
        let template = self
            .environment
            .get_template(NAME)
            .expect("the template was added when this was made");
        let text = template.render(all).map_err(|error| {
            // What `raise_exception` says stands in the detail; the kind alone tells a user nothing.
            ModelError::Template(error.detail().map_or_else(|| error.to_string(), str::to_owned))
        })?;
        Ok(Rendered {
            text,
            mark: marked.then_some(mark),
        })
    }
}

/// A string that occurs nowhere in `values`: noncharacters around the smallest number that makes it new.
fn unused_mark(values: &[Option<&Value>]) -> String {
    let mut n = 0u64;
    loop {
        let mark = format!("\u{FDD0}{n}\u{FDD1}");
        if !values.iter().flatten().any(|value| contains(value, &mark)) {
            return mark;
        }
        n += 1;
    }
}

fn contains(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string.contains(text),
        Value::Array(list) => list.iter().any(|value| contains(value, text)),
        Value::Object(object) => object
            .iter()
            .any(|(key, value)| key.contains(text) || contains(value, text)),
        _ => false,
    }
}

/// Breaks every special token in the strings of `value`; returns whether there was one.
fn break_special(value: &mut Value, special: &[String], mark: &str) -> bool {
    match value {
        Value::String(string) => match broken(string, special, mark, true) {
            Some(new) => {
                *string = new;
                true
            }
            None => false,
        },
        Value::Array(list) => list
            .iter_mut()
            .fold(false, |any, value| break_special(value, special, mark) | any),
        Value::Object(object) => {
            let mut any = false;
            for (_, value) in object.iter_mut() {
                any |= break_special(value, special, mark);
            }
            if object.keys().any(|key| broken(key, special, mark, false).is_some()) {
                any = true;
                *object = std::mem::take(object)
                    .into_iter()
                    .map(|(key, value)| (broken(&key, special, mark, false).unwrap_or(key), value))
                    .collect();
            }
            any
        }
        _ => false,
    }
}

/// `text` with a mark after the first character of every special token in it, or `None` if nothing needs one.
///
/// With `edges`, also where the text begins with the end of a special token or ends with the beginning of one: two texts that
/// a template puts side by side must not become one.
fn broken(text: &str, special: &[String], mark: &str, edges: bool) -> Option<String> {
    let mut places: Vec<usize> = Vec::new();
    for token in special {
        let first = token.chars().next().map_or(0, char::len_utf8);
        // Overlapping occurrences count too, so the search goes on one character later.
        let mut from = 0;
        while let Some(found) = text[from..].find(token.as_str()) {
            let at = from + found + first;
            places.push(at);
            from = at;
        }
        if edges {
            let splits = token.char_indices().map(|(at, _)| at).skip(1);
            for at in splits {
                if text.ends_with(&token[..at]) {
                    places.push(text.len() - at + first);
                }
                if text.starts_with(&token[at..]) {
                    places.push(0);
                }
            }
        }
    }
    if places.is_empty() {
        return None;
    }
    places.sort_unstable();
    places.dedup();
    let mut out = String::with_capacity(text.len() + places.len() * mark.len());
    let mut from = 0;
    for at in places {
        out.push_str(&text[from..at]);
        out.push_str(mark);
        from = at;
    }
    out.push_str(&text[from..]);
    Some(out)
}
