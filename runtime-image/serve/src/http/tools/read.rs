//! Calls in a model's text, as it comes: content before them, then names, then arguments piece by piece.
//!
//! ```text
//!            trigger              {                "arguments":            value ends             end of text
//! Content ───────────▶ Between ─────────▶ Head ─────────────────▶ Value ──────────────▶ Between ─────────────▶
//! ```
//! The grammar has made sure of the form; a text that was cut short ends wherever it ends.

use serde_json::Value;

use super::super::prepare::random;
use super::format::Format;

/// What a piece of text turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::http) enum Part {
    /// Text for the user.
    Content(String),
    /// A call began; its number, its id and its function.
    Call { index: usize, id: String, name: String },
    /// More of the JSON of a call's arguments.
    Arguments { index: usize, json: String },
}

#[derive(Clone, Debug)]
enum State {
    Content,
    Between,
    /// The text of a call until its arguments.
    Head(String),
    Value(Scanner),
    /// Behind the arguments, until the call's brace.
    Tail,
}

/// Reads one answer.
#[derive(Clone, Debug)]
pub(in crate::http) struct Reader {
    format: &'static Format,
    names: Vec<String>,
    state: State,
    /// Text that may turn out to be the beginning of calls.
    held: String,
    /// Whether any content was given out.
    begun: bool,
    calls: usize,
}

impl Reader {
    /// For an answer that may call `names`.
    pub(in crate::http) fn new(format: &'static Format, names: Vec<String>) -> Self {
        Reader {
            format,
            names,
            state: State::Content,
            held: String::new(),
            begun: false,
            calls: 0,
        }
    }

    /// Calls that have begun.
    pub(in crate::http) fn calls(&self) -> usize {
        self.calls
    }

    /// Takes the next text.
    pub(in crate::http) fn push(&mut self, text: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        if !matches!(self.state, State::Content) {
            self.inside(text, &mut parts);
            return parts;
        }
        self.held.push_str(text);
        match self.calls_at() {
            Found::Calls { content, rest } => {
                let rest = self.held.split_off(rest);
                self.held.truncate(content);
                let before = std::mem::take(&mut self.held);
                if !before.trim().is_empty() {
                    self.content(before.trim_end().to_owned(), &mut parts);
                }
                self.state = State::Between;
                self.inside(&rest, &mut parts);
            }
            Found::Perhaps(at) => {
                let held = self.held.split_off(at);
                let content = std::mem::replace(&mut self.held, held);
                self.content(content, &mut parts);
            }
        }
        parts
    }

    /// No more text comes.
    pub(in crate::http) fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        let rest = std::mem::take(&mut self.held);
        self.content(rest, &mut parts);
        parts
    }

    fn content(&mut self, text: String, parts: &mut Vec<Part>) {
        if !text.is_empty() {
            self.begun = true;
            parts.push(Part::Content(text));
        }
    }

    /// Where calls begin in the held text, or from where on they may.
    fn calls_at(&self) -> Found {
        let held = &self.held;
        if self.format.trigger.is_empty() {
            // Calls are the whole answer: it begins as one of them, or it is none.
            let text = held.trim_start();
            let heads = || self.names.iter().map(|name| self.format.head(name));
            if !self.begun && heads().any(|head| text.starts_with(&head)) {
                return Found::Calls { content: 0, rest: 0 };
            }
            let perhaps = !self.begun && heads().any(|head| head.starts_with(text));
            return Found::Perhaps(if perhaps { 0 } else { held.len() });
        }
        let trigger = self.format.trigger;
        if let Some(at) = held.find(trigger) {
            return Found::Calls {
                content: at,
                rest: at + trigger.len(),
            };
        }
        let begun = trigger
            .char_indices()
            .map(|(at, _)| &trigger[..at])
            .filter(|start| held.ends_with(start));
        let begun = begun.map(str::len).max().unwrap_or(0);
        // Blanks before calls are not content.
        Found::Perhaps(held[..held.len() - begun].trim_end().len())
    }

    fn inside(&mut self, text: &str, parts: &mut Vec<Part>) {
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            match &mut self.state {
                State::Content | State::Between => {
                    if character == '{' {
                        self.state = State::Head("{".to_owned());
                    }
                }
                State::Head(head) => {
                    head.push(character);
                    if let Some(name) = name(head, self.format) {
                        let (index, id) = (self.calls, id(self.format));
                        parts.push(Part::Call { index, id, name });
                        self.calls += 1;
                        self.state = State::Value(Scanner::default());
                    }
                }
                State::Value(scanner) => {
                    let length = scanner.take(rest);
                    let json = rest[..length].trim_start_matches(|c: char| !scanner.begun && c.is_whitespace());
                    if !json.is_empty() {
                        scanner.begun = true;
                        let index = self.calls - 1;
                        parts.push(Part::Arguments {
                            index,
                            json: json.to_owned(),
                        });
                    }
                    if scanner.ended {
                        self.state = State::Tail;
                    }
                    rest = &rest[length..];
                    continue;
                }
                State::Tail => {
                    if character == '}' {
                        self.state = State::Between;
                    }
                }
            }
            rest = &rest[character.len_utf8()..];
        }
    }
}

enum Found {
    /// Content ends at one place, and calls go on at the other.
    Calls { content: usize, rest: usize },
    /// Until there it is content.
    Perhaps(usize),
}

/// A new id for a call.
fn id(format: &Format) -> String {
    let id = format!("{:016x}{:016x}", random(), random());
    match format.id_length {
        Some(length) => id[..length].to_owned(),
        None => format!("call_{}", &id[..24]),
    }
}

/// The name in a call's text, once that has come to the arguments.
fn name(head: &str, format: &Format) -> Option<String> {
    let key = head.trim_end().strip_suffix(':')?;
    key.trim_end().strip_suffix(&format!("\"{}\"", format.arguments))?;
    let object: Value = serde_json::from_str(&format!("{head}null}}")).ok()?;
    object["name"].as_str().map(str::to_owned)
}

/// Finds the end of an object of JSON.
#[derive(Clone, Debug, Default)]
struct Scanner {
    depth: usize,
    string: bool,
    escaped: bool,
    /// Some of it was given out.
    begun: bool,
    ended: bool,
}

impl Scanner {
    /// How many bytes of `text` belong to it.
    fn take(&mut self, text: &str) -> usize {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.string => self.escaped = true,
                b'"' => self.string = !self.string,
                b'{' | b'[' if !self.string => self.depth += 1,
                b'}' | b']' if !self.string => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        self.ended = true;
                        return at + 1;
                    }
                }
                _ => (),
            }
        }
        text.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Content, and each call's name and arguments.
    type Read = (String, Vec<(String, String)>);

    fn read(template: &str, pieces: &[&str]) -> Read {
        let mut reader = Reader::new(Format::of(template), vec!["f".to_owned(), "g".to_owned()]);
        let mut read = Read::default();
        let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| reader.push(piece)).collect();
        parts.extend(reader.finish());
        for part in parts {
            match part {
                Part::Content(text) => {
                    assert!(read.1.is_empty(), "content comes first");
                    read.0 += &text;
                }
                Part::Call { index, name, .. } => {
                    assert_eq!(index, read.1.len());
                    read.1.push((name, String::new()));
                }
                Part::Arguments { index, json } => {
                    assert_eq!(index + 1, read.1.len());
                    read.1[index].1 += &json;
                }
            }
        }
        assert_eq!(reader.calls(), read.1.len());
        read
    }

    #[test]
    fn calls_are_read_the_same_however_the_text_is_cut() {
        let call = |name: &str, arguments: &str| (name.to_owned(), arguments.to_owned());
        let hard = r#"{"a": "}\" \\", "b": [{"c": "ö}"}], "d": {}}"#;
        let both = || [("f", hard.to_owned()), ("g", "{}".to_owned())].into_iter();
        for template in ["<tool_call>", "named SmolLM", "[TOOL_CALLS]", "<|python_tag|>"] {
            let format = Format::of(template);
            let calls = format.calls(both());
            let expected = vec![call("f", hard), call("g", "{}")];
            let mut texts = vec![(calls.clone(), (String::new(), expected.clone()))];
            if !format.trigger.is_empty() {
                texts.push((
                    format!("Let me see <t.\n\n{calls}"),
                    ("Let me see <t.".to_owned(), expected),
                ));
            }
            for plain in [
                "",
                "no call at all",
                "a < b",
                "x <tool_cal",
                "[1]",
                " \n",
                "{\"name\": \"h\"}",
            ] {
                texts.push((plain.to_owned(), (plain.to_owned(), Vec::new())));
            }
            for (text, expected) in texts {
                assert_eq!(read(template, &[&text]), expected, "{template} {text}");
                let characters: Vec<String> = text.chars().map(String::from).collect();
                let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
                assert_eq!(read(template, &characters), expected, "{template} {text}");
                for (cut, _) in text.char_indices() {
                    assert_eq!(
                        read(template, &[&text[..cut], &text[cut..]]),
                        expected,
                        "{template} {text} at {cut}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_call_that_is_cut_short_has_the_arguments_that_came() {
        let text = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"b";
        assert_eq!(
            read("<tool_call>", &[text]),
            (String::new(), vec![("f".to_owned(), "{\"a\": \"b".to_owned())])
        );
        assert_eq!(
            read("<tool_call>", &["<tool_call>\n{\"name\": \"f"]),
            (String::new(), Vec::new())
        );
    }
}
