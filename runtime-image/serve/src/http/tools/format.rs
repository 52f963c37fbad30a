//! How a family of models writes calls: one table, and the grammar that follows from a row of it.
//!
//! A format is recognised by what the model's chat template says. A model whose template knows no tools is told of them in
//! the system message, in words of our own.

use std::fmt::Write;

use super::super::form::{self, literal};
use super::define::{Choice, Tools};
use crate::engine::Form;

/// How calls stand in a model's text: `begin`, then each call between `open` and `close` with `between` among them, then
/// `end`. A call is a JSON object of its name and its arguments.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::http) struct Format {
    pub(super) name: &'static str,
    /// A template that contains one of these writes calls this way.
    known_by: &'static [&'static str],
    begin: &'static str,
    open: &'static str,
    close: &'static str,
    between: &'static str,
    end: &'static str,
    /// Where the arguments stand.
    pub(super) arguments: &'static str,
    /// What tells a reader that calls begin; nothing where they are the whole answer.
    pub(super) trigger: &'static str,
    /// The length of a call's id, if the template checks it.
    pub(super) id_length: Option<usize>,
}

const HERMES: Format = Format {
    name: "hermes",
    known_by: &["<tool_call>"],
    begin: "",
    open: "<tool_call>\n",
    close: "\n</tool_call>",
    between: "\n",
    end: "",
    arguments: "arguments",
    trigger: "<tool_call>",
    id_length: None,
};

/// The first row that fits counts; the last one is for all others.
const FORMATS: &[Format] = &[
    Format {
        name: "mistral",
        known_by: &["[TOOL_CALLS]"],
        begin: "[TOOL_CALLS][",
        open: "",
        close: "",
        between: ", ",
        end: "]",
        trigger: "[TOOL_CALLS]",
        id_length: Some(9),
        ..HERMES
    },
    Format {
        name: "llama3_json",
        known_by: &["<|python_tag|>", "\"parameters\": dictionary"],
        open: "",
        close: "",
        between: "; ",
        arguments: "parameters",
        trigger: "",
        ..HERMES
    },
    Format {
        name: "smollm2",
        known_by: &["named SmolLM"],
        begin: "<tool_call>[",
        open: "",
        close: "",
        between: ", ",
        end: "]</tool_call>",
        ..HERMES
    },
    HERMES,
];

impl Format {
    /// The format of models with this chat template.
    pub(in crate::http) fn of(template: &str) -> &'static Format {
        let fits = |format: &&Format| format.known_by.iter().any(|part| template.contains(part));
        FORMATS.iter().find(fits).unwrap_or(&FORMATS[FORMATS.len() - 1])
    }

    /// The calls as the model writes them, given names and arguments as JSON.
    pub(in crate::http) fn calls<'a>(&self, calls: impl Iterator<Item = (&'a str, String)>) -> String {
        let calls =
            calls.map(|(name, arguments)| format!("{}{}{arguments}}}{}", self.open, self.head(name), self.close));
        let calls: Vec<String> = calls.collect();
        format!("{}{}{}", self.begin, calls.join(self.between), self.end)
    }

    /// A call's text until its arguments.
    pub(super) fn head(&self, name: &str) -> String {
        format!("{{\"name\": {}, \"{}\": ", literal(name), self.arguments)
    }

    /// What tells a model of its tools whose template does not.
    pub(in crate::http) fn instruction(&self, tools: &Tools) -> String {
        let mut text = "You have functions that you can call to help with what the user asks. Each stands in <tools></tools> as a \
                        JSON object with the schema of its arguments.\n\n<tools>\n"
            .to_owned();
        for tool in &tools.told {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{}", tool.object);
        }
        let one = |name: &'static str| (name, "{\"argument\": \"value\"}".to_owned());
        let example = match tools.parallel {
            true => self.calls([one("first_function"), one("second_function")].into_iter()),
            false => self.calls([one("function_name")].into_iter()),
        };
        let _ = write!(
            text,
            "</tools>\n\nTo call functions, answer only with their names and arguments, in exactly this form:\n{example}\n\n\
             If no function helps, answer in plain text."
        );
        text
    }

    /// The grammar of an answer with these tools; `answer` is the form of an answer without a call, if it has one. `special`
    /// is the id of the trigger where it is a special token.
    pub(in crate::http) fn grammar(&self, tools: &Tools, answer: Option<&Form>, special: Option<u32>) -> Form {
        let before = format!("{}{}", self.begin, self.open);
        let after = literal(before.strip_prefix(self.trigger).unwrap_or(&before));
        let (trigger, after) = match special {
            Some(id) => (format!("<[{id}]>"), format!("\" \"? {after}")),
            None => (literal(self.trigger), after),
        };
        let more = match tools.parallel {
            true => format!("({} call)*", literal(&format!("{}{}", self.between, self.open))),
            false => String::new(),
        };
        let mut lark = String::new();
        let mut rule = |name: &str, what: String| _ = writeln!(lark, "{name}: {what}");
        let any = "/(.|\\n)*/";
        match (tools.choice, answer) {
            (Choice::Required, _) => rule("start", format!("{trigger} calls")),
            (Choice::Auto, Some(answer)) => {
                rule("start", format!("{trigger} calls | other"));
                rule("other", form::within(answer));
            }
            (Choice::Auto, None) if self.trigger.is_empty() => {
                // Calls are the whole answer, and nothing else begins as they do.
                rule("start", "calls | other".to_owned());
                rule("other", "/([^{](.|\\n)*)?/".to_owned());
            }
            (Choice::Auto, None) if special.is_some() => {
                rule("start", format!("other {trigger} calls | other"));
                rule("other", any.to_owned());
            }
            (Choice::Auto, None) => {
                rule("start", "text calls | other".to_owned());
                // Lazy: the first trigger ends the text, and calls must follow.
                rule("text[lazy]", format!("{any} {trigger}"));
                rule("other", any.to_owned());
            }
        }
        rule("calls", format!("{after} call {more} {}", literal(self.end)));
        let each: Vec<String> = (0..tools.callable.len()).map(|i| format!("call_{i}")).collect();
        rule("call", format!("({}) {}", each.join(" | "), literal(self.close)));
        for (i, tool) in tools.callable().enumerate() {
            let schema = form::inner(tool.parameters.clone());
            rule(
                &each[i],
                format!("{} %json {schema} \"}}\"", literal(&self.head(&tool.name))),
            );
        }
        Form::Lark(lark)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};
    use strata_model::Vocabulary;
    use strata_model::synthetic::byte_tokenizer;

    use super::super::define::Tool;
    use super::*;
    use crate::engine::Forms;

    #[test]
    fn a_template_says_how_calls_are_written() {
        for (template, name) in [
            ("{{ '<tool_call>\\n' }}", "hermes"),
            ("{{ '[TOOL_CALLS]' }}", "mistral"),
            ("{{ '<|python_tag|>' }}", "llama3_json"),
            (
                "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
                "smollm2",
            ),
            ("{{ messages[0].content }}", "hermes"),
        ] {
            assert_eq!(Format::of(template).name, name, "{template}");
        }
    }

    #[test]
    fn calls_are_written_as_each_family_does() {
        let two = || [("f", "{\"x\": 1}".to_owned()), ("g", "{}".to_owned())].into_iter();
        for (template, expected) in [
            (
                "<tool_call>",
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
            ),
            (
                "named SmolLM",
                "<tool_call>[{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]</tool_call>",
            ),
            (
                "[TOOL_CALLS]",
                "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            ),
            (
                "<|python_tag|>",
                "{\"name\": \"f\", \"parameters\": {\"x\": 1}}; {\"name\": \"g\", \"parameters\": {}}",
            ),
        ] {
            assert_eq!(Format::of(template).calls(two()), expected);
        }
    }

    fn tools(choice: Choice, parallel: bool) -> Tools {
        let tool = |name: &str, parameters: Value| Tool {
            name: name.to_owned(),
            object: json!({ "type": "function", "function": { "name": name, "parameters": parameters } }),
            parameters: parameters.as_object().unwrap().clone(),
        };
        let x = json!({ "type": "object", "properties": { "x": { "type": "integer" } }, "required": ["x"] });
        Tools {
            told: vec![
                tool("f", x),
                tool("g", json!({ "type": "object", "properties": {} })),
                tool("h", json!({})),
            ],
            callable: vec![0, 1],
            choice,
            parallel,
        }
    }

    /// Whether the text is a whole answer of the form, token by token.
    fn is(forms: &Forms, form: &Form, text: &[u32]) -> bool {
        let mut constraint = forms.compile(form.clone()).unwrap();
        for (i, token) in text.iter().enumerate() {
            let mask = constraint.mask().unwrap();
            if mask.bits()[*token as usize / 32] >> (token % 32) & 1 == 0 {
                return false;
            }
            if constraint.accept(*token).unwrap() {
                return i + 1 == text.len();
            }
        }
        constraint.mask().unwrap().bits()[258 / 32] >> (258 % 32) & 1 == 1
    }

    #[test]
    fn text_is_free_until_calls_begin_and_calls_are_those_that_are_defined() {
        let vocabulary = Arc::new(Vocabulary::from_json(&byte_tokenizer()).unwrap());
        let forms = Forms::new(vocabulary, 259, vec![258]);
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
        let answer = Form::Schema(json!({ "type": "array", "maxItems": 0 }));
        for (template, special) in [
            ("<tool_call>", None),
            ("named SmolLM", None),
            ("[TOOL_CALLS]", None),
            ("[TOOL_CALLS]", Some(257)),
            ("<|python_tag|>", None),
        ] {
            let format = Format::of(template);
            let calls = |all: &[(&str, &str)]| {
                let text = format.calls(all.iter().map(|(name, arguments)| (*name, (*arguments).to_owned())));
                match special {
                    Some(id) => [vec![id], bytes(text.strip_prefix(format.trigger).unwrap())].concat(),
                    None => bytes(&text),
                }
            };
            let (one, two) = (
                calls(&[("f", "{\"x\": 3}")]),
                calls(&[("g", "{}"), ("f", "{\"x\": -1}")]),
            );
            let wrong: Vec<Vec<u32>> = [
                ("h", "{}"),
                ("f", "{}"),
                ("f", "{\"x\": \"\"}"),
                ("f", "{\"x\": 1, \"y\": 2}"),
                ("g", "[]"),
            ]
            .into_iter()
            .map(|call| calls(&[call]))
            .collect();
            let prose = bytes("A < b, \"c\"\nund ä.");
            let before = [prose.clone(), one.clone()].concat();
            let grammar =
                |choice, parallel, answer: Option<&Form>| format.grammar(&tools(choice, parallel), answer, special);
            let within = !format.trigger.is_empty();
            for (form, yes, no) in [
                (
                    grammar(Choice::Auto, true, None),
                    vec![&one, &two, &prose, if within { &before } else { &prose }],
                    vec![],
                ),
                (grammar(Choice::Auto, false, None), vec![&one, &prose], vec![&two]),
                (
                    grammar(Choice::Required, true, None),
                    vec![&one, &two],
                    vec![&prose, &before],
                ),
                (grammar(Choice::Required, false, None), vec![&one], vec![&two, &prose]),
                (
                    grammar(Choice::Auto, true, Some(&answer)),
                    vec![&one, &two],
                    vec![&prose, &before],
                ),
            ] {
                for text in yes {
                    assert!(is(&forms, &form, text), "{template} {special:?} {form:?} {text:?}");
                }
                for text in no.into_iter().chain(&wrong) {
                    assert!(!is(&forms, &form, text), "{template} {special:?} {form:?} {text:?}");
                }
            }
            assert!(
                is(&forms, &grammar(Choice::Auto, true, Some(&answer)), &bytes("[]")),
                "{template}"
            );
        }
    }
}
