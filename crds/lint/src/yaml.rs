//! YAML as kubectl reads it: documents cut at `---`, YAML 1.1's booleans, no key twice; with the line of every value.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};
use serde_json::{Map, Number, Value};

/// Most values in a document, aliases expanded.
const VALUE_LIMIT: usize = 200_000;
/// Deepest nesting.
const DEPTH_LIMIT: usize = 128;

/// One document of a text.
#[derive(Debug)]
pub struct Document {
    /// Its number, from 1.
    pub number: usize,
    /// Its first line with content, from 1.
    pub line: usize,
    /// What it holds, or why it cannot be read.
    pub content: Result<Tree, Fault>,
}

/// A value and where its parts stand.
#[derive(Debug, Default)]
pub struct Tree {
    /// The value.
    pub value: Value,
    /// Line of each field and item by path, such as `spec.sources[0].name`.
    lines: BTreeMap<String, usize>,
    first_line: usize,
}

impl Tree {
    /// The line of `path`, or of the nearest thing around it that the text holds.
    pub fn line(&self, path: &str) -> usize {
        let mut path = path;
        loop {
            if let Some(line) = self.lines.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return self.first_line,
            }
        }
    }
}

/// Why a document cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Line in the text, from 1.
    pub line: usize,
    /// What is wrong there.
    pub message: String,
}

/// The documents of `text` that have content.
pub fn documents(text: &str) -> impl Iterator<Item = Document> {
    let mut parts: Vec<(usize, String)> = vec![(1, String::new())];
    for (index, line) in text.lines().enumerate() {
        let separator = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '#', '\r']));
        match parts.last_mut() {
            // What follows the dashes on their line belongs to the document that they open.
            _ if separator => parts.push((index + 1, format!("{}\n", line.replacen("---", "   ", 1)))),
            Some((_, part)) => {
                part.push_str(line);
                part.push('\n');
            }
            None => {}
        }
    }
    parts.into_iter().enumerate().filter_map(|(index, (first_line, part))| {
        let content_line = part.lines().position(|line| {
            let line = line.trim();
            !line.is_empty() && !line.starts_with('#')
        })?;
        Some(Document {
            number: index + 1,
            line: first_line + content_line,
            content: Builder::read(&part, first_line - 1).map(|mut tree| {
                tree.first_line = first_line + content_line;
                tree
            }),
        })
    })
}

/// Builds a value from the parser's events.
struct Builder<'a> {
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    line_offset: usize,
    lines: BTreeMap<String, usize>,
    anchors: BTreeMap<usize, (Value, usize)>,
    count: usize,
}

impl<'a> Builder<'a> {
    fn read(text: &'a str, line_offset: usize) -> Result<Tree, Fault> {
        let mut builder = Self {
            events: Parser::new_from_str(text),
            line_offset,
            lines: BTreeMap::new(),
            anchors: BTreeMap::new(),
            count: 0,
        };
        let mut value = None;
        loop {
            let (event, span) = builder.next()?;
            match event {
                Event::StreamEnd => break,
                Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
                event if value.is_none() => value = Some(builder.value(event, span, "", 0)?),
                _ => return Err(builder.fault(span, "a second document: separate documents with ---")),
            }
        }
        Ok(Tree {
            value: value.unwrap_or_default(),
            lines: builder.lines,
            first_line: line_offset + 1,
        })
    }

    fn next(&mut self) -> Result<(Event<'a>, Span), Fault> {
        match self.events.next() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => Err(Fault {
                line: self.line_offset + error.marker().line(),
                message: format!("not YAML: {}", error.info()),
            }),
            None => Err(Fault {
                line: self.line_offset + 1,
                message: "not YAML: it ends too early".into(),
            }),
        }
    }

    fn fault(&self, span: Span, message: impl Into<String>) -> Fault {
        Fault {
            line: self.line_offset + span.start.line(),
            message: message.into(),
        }
    }

    fn count(&mut self, values: usize, span: Span) -> Result<(), Fault> {
        self.count += values;
        match self.count > VALUE_LIMIT {
            true => Err(self.fault(span, format!("more than {VALUE_LIMIT} values in one document"))),
            false => Ok(()),
        }
    }

    fn value(&mut self, event: Event<'a>, span: Span, path: &str, depth: usize) -> Result<Value, Fault> {
        if depth > DEPTH_LIMIT {
            return Err(self.fault(span, format!("nested deeper than {DEPTH_LIMIT} levels")));
        }
        self.count(1, span)?;
        let before = self.count;
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => (scalar(&text, style, tag.as_deref()), anchor),
            Event::Alias(id) => {
                let Some((value, size)) = self.anchors.get(&id).cloned() else {
                    return Err(self.fault(
                        span,
                        "an alias to an anchor that does not enclose it and stands before it",
                    ));
                };
                self.count(size, span)?;
                (value, 0)
            }
            Event::SequenceStart(anchor, _) => (self.sequence(path, depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.mapping(path, depth)?, anchor),
            _ => return Err(self.fault(span, "not YAML: a value is missing")),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, (value.clone(), 1 + self.count - before));
        }
        Ok(value)
    }

    fn sequence(&mut self, path: &str, depth: usize) -> Result<Value, Fault> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(Value::Array(items));
            }
            let path = format!("{path}[{}]", items.len());
            self.lines.insert(path.clone(), self.line_offset + span.start.line());
            items.push(self.value(event, span, &path, depth + 1)?);
        }
    }

    fn mapping(&mut self, path: &str, depth: usize) -> Result<Value, Fault> {
        let mut map = Map::new();
        let mut merged = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let key = match event {
                Event::MappingEnd => break,
                Event::Scalar(text, ScalarStyle::Plain, ..) if text == "<<" => None,
                Event::Scalar(text, style, _, tag) => Some(match scalar(&text, style, tag.as_deref()) {
                    Value::String(key) => key,
                    other => other.to_string(),
                }),
                _ => return Err(self.fault(span, "a key must be a scalar")),
            };
            let path = match (&key, path) {
                (None, path) => path.to_owned(),
                (Some(key), "") => key.clone(),
                (Some(key), path) => format!("{path}.{key}"),
            };
            if key.is_some() {
                self.lines.insert(path.clone(), self.line_offset + span.start.line());
            }
            let (event, value_span) = self.next()?;
            let value = self.value(event, value_span, &path, depth + 1)?;
            match key {
                None => merged.push((value, value_span)),
                Some(key) if map.contains_key(&key) => {
                    return Err(self.fault(span, format!("key {key:?} already set in map")));
                }
                Some(key) => {
                    map.insert(key, value);
                }
            }
        }
        for (value, span) in merged {
            let sources = match value {
                Value::Array(sources) => sources,
                one => vec![one],
            };
            for source in sources {
                let Value::Object(source) = source else {
                    return Err(self.fault(span, "map merge requires map or sequence of maps as the value"));
                };
                for (key, value) in source {
                    map.entry(key).or_insert(value);
                }
            }
        }
        Ok(Value::Object(map))
    }
}

/// A scalar's value by YAML 1.1's rules, as kubectl's parser applies them.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let tagged_string = tag.is_some_and(|tag| tag.suffix == "str" || tag.suffix.is_empty());
    if style != ScalarStyle::Plain || tagged_string {
        return Value::from(text);
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Value::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return Value::from(text);
    }
    let plain = text.replace('_', "");
    integer(&plain)
        .map(Value::from)
        .or_else(|| float(&plain).map(Value::Number))
        .unwrap_or_else(|| Value::from(text))
}

fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        // Go reads a leading zero as octal.
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let sign = if negative { "-" } else { "" };
    match digits.starts_with(['+', '-']) {
        true => None,
        false => i64::from_str_radix(&format!("{sign}{digits}"), radix).ok(),
    }
}

fn float(text: &str) -> Option<Number> {
    let numeric = text
        .chars()
        .all(|c| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E'));
    numeric
        .then(|| text.parse::<f64>().ok())
        .flatten()
        .and_then(Number::from_f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scalars_are_what_kubectl_takes_them_for() {
        let cases = [
            ("off", json!(false)),
            ("'off'", json!("off")),
            ("010", json!(8)),
            ("0x1F", json!(31)),
            ("1_000", json!(1000)),
            ("-3", json!(-3)),
            ("2.5", json!(2.5)),
            ("1e3", json!(1000.0)),
            ("3e-4x", json!("3e-4x")),
            ("1.2.3", json!("1.2.3")),
            ("~", json!(null)),
            ("!!str 5", json!("5")),
            ("sha256:00", json!("sha256:00")),
        ];
        for (text, value) in cases {
            let document = documents(&format!("a: {text}\n")).next().expect("one document");
            assert_eq!(document.content.expect(text).value["a"], value, "{text}");
        }
    }

    #[test]
    fn merge_keys_fill_what_is_absent() {
        let text = "base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  x: 3\n";
        let document = documents(text).next().expect("one document");
        let value = document.content.expect("readable").value;
        // A bare y is true in YAML 1.1, and keys are strings in JSON.
        assert_eq!(value["use"], json!({"x": 3, "true": 2}));
    }
}
