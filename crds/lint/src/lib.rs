//! Judges manifests offline as the API server would, with the server's words.
//!
//! `text → documents → schema and unknown fields → CEL rules`. The rules are those of the CRDs themselves, so there is
//! nothing to keep in step; what is written here a second time is only how the server words a violation. The corpus in
//! `corpus/` holds both to that: the e2e suite applies it to a real server and compares.

#[cfg(test)]
mod corpus;
mod judge;
mod metadata;
mod schema;
mod yaml;

use std::fmt;

use serde::Serialize;

/// Largest text that is read, in bytes; the API server accepts no larger object either.
pub const INPUT_LIMIT_BYTES: usize = 8 * 1024 * 1024;

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The API server (or kubectl, strict by default) refuses the object.
    Error,
    /// Something was passed over.
    Note,
}

/// One thing to say about a document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Number of the document in the text, from 1; documents without content count.
    pub document: usize,
    /// Line in the text, from 1.
    pub line: usize,
    /// How much it weighs.
    pub severity: Severity,
    /// `Kind/name` of the object, as far as it is known.
    pub object: String,
    /// Field, such as `spec.sources[0]`; empty for the object as a whole.
    pub path: String,
    /// What is wrong, in the API server's words.
    pub message: String,
}

impl Finding {
    /// `path: message`, as it stands in the API server's answer.
    pub fn text(&self) -> String {
        match self.path.is_empty() {
            true => self.message.clone(),
            false => format!("{}: {}", self.path, self.message),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let note = if self.severity == Severity::Note { "note: " } else { "" };
        let object = if self.object.is_empty() {
            "document"
        } else {
            &self.object
        };
        write!(f, "{}: {object}: {note}{}", self.line, self.text())
    }
}

/// Judges every document of a YAML (or JSON) text, in their order. No finding means: the server would accept it.
pub fn lint(text: &str) -> Vec<Finding> {
    if text.len() > INPUT_LIMIT_BYTES {
        return vec![Finding {
            document: 1,
            line: 1,
            severity: Severity::Error,
            object: String::new(),
            path: String::new(),
            message: format!(
                "the text has {} bytes; at most {INPUT_LIMIT_BYTES} are read",
                text.len()
            ),
        }];
    }
    let mut findings: Vec<Finding> = yaml::documents(text).flat_map(judge::document).collect();
    findings.sort_by(|a, b| sort_key(a).cmp(&sort_key(b)));
    findings
}

/// By document, what is refused before what is passed over, then from top to bottom.
fn sort_key(finding: &Finding) -> (usize, Severity, usize, &str, &str) {
    (
        finding.document,
        finding.severity,
        finding.line,
        &finding.path,
        &finding.message,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<String> {
        lint(text).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn findings_name_line_object_and_field() {
        let text = "# two\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n---\napiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata:\n  name: chat\nspec:\n  model:\n    uri: pvc://raw/m.gguf\n  replicas: -1\n";
        assert_eq!(
            texts(text),
            [
                "2: ConfigMap/x: note: passed over: only the kinds of strata.dev are judged",
                "13: InferenceService/chat: spec.replicas: Invalid value: -1: spec.replicas in body should be greater than or equal to 0",
            ]
        );
    }

    #[test]
    fn yaml_is_read_as_kubectl_reads_it() {
        // YAML 1.1: a bare `no` is a boolean, and a key that is given twice is an error.
        let language = "apiVersion: strata.dev/v1alpha1\nkind: Dataset\nmetadata: {name: d}\nspec:\n  task: Pretraining\n  sources: [{name: a, webCrawl: {uri: pvc://raw/x}}]\n  curate:\n    languages:\n    - code: no\n";
        let findings = lint(language);
        assert_eq!(
            findings[0].text(),
            "spec.curate.languages[0].code: Invalid value: \"boolean\": spec.curate.languages[0].code in body must be of type string: \"boolean\""
        );
        assert_eq!(findings[0].line, 9);
        assert_eq!(
            texts("a: 1\nb: 2\na: 3\n"),
            ["3: document: key \"a\" already set in map"]
        );
    }

    #[test]
    fn hostile_input_ends_in_a_finding() {
        let bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]\n";
        let deep = "[".repeat(5000);
        for text in [
            bomb,
            deep.as_str(),
            "a: [1",
            "\u{0}",
            "a: *b",
            "kind: {}\napiVersion: []",
            "42",
        ] {
            assert!(!lint(text).is_empty(), "{text:.20}");
        }
        assert_eq!(lint("# nothing\n---\n"), []);
    }
}
