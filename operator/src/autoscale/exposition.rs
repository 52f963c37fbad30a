//! Prometheus' text format, a line at a time. Whatever a pod writes, nothing panics: what is no sample is none.

/// One line of the text format.
pub struct Sample<'a> {
    /// Name of the series.
    pub name: &'a str,
    /// Its labels, as they are written.
    pub labels: &'a str,
    /// Its value.
    pub value: f64,
}

impl Sample<'_> {
    /// The value of a label, without its escapes.
    pub fn label(&self, wanted: &str) -> Option<String> {
        let mut rest = self.labels;
        loop {
            let (name, after) = rest.split_once('=')?;
            let after = after.trim_start().strip_prefix('"')?;
            let end = quoted_end(after)?;
            if name.trim_matches(|c: char| c == ',' || c.is_whitespace()) == wanted {
                return Some(unescape(&after[..end]));
            }
            rest = &after[end + 1..];
        }
    }
}

/// Reads `name{labels} value …`; comments, and what is neither, are nothing. What is not finite or below zero says nothing.
pub fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let end = line.find(|c: char| c == '{' || c.is_whitespace())?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        None => ("", rest),
        Some(inside) => {
            let end = labels_end(inside)?;
            (&inside[..end], &inside[end + 1..])
        }
    };
    let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
    let is_said = !name.is_empty() && value.is_finite() && value >= 0.0;
    is_said.then_some(Sample { name, labels, value })
}

/// Where the bracket closes; one inside of quotes does not.
fn labels_end(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + text[from..].find(['"', '}'])?;
        if text[at..].starts_with('}') {
            return Some(at);
        }
        from = at + 1 + quoted_end(&text[at + 1..])? + 1;
    }
}

/// Where the quotes close.
fn quoted_end(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(at),
            _ => {}
        }
    }
    None
}

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                Some(other) => out.push(other),
                None => {}
            },
            c => out.push(c),
        }
    }
    out
}
