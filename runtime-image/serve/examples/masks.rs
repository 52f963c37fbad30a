//! What constrained decoding costs on a real vocabulary: seconds to index the tokens, milliseconds to compile a form,
//! microseconds for a step's mask.
//!
//! `cargo run -p strata-serve --example masks -- MODEL`

use std::io::Write;
use std::time::Instant;

use serde_json::json;
use strata_model::LoadedModel;
use strata_serve::engine::{Form, Forms};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("which model?")?;
    let model = LoadedModel::open(path.as_ref())?;
    let forms = Forms::new(
        model.vocabulary.clone(),
        model.config.vocab_size,
        model.generation.eos.clone(),
    );
    let mut out = std::io::stdout().lock();
    let begin = Instant::now();
    forms.compile(Form::Regex("a".to_owned()))?;
    writeln!(
        out,
        "index {:.3} s, {} tokens",
        begin.elapsed().as_secs_f64(),
        model.config.vocab_size
    )?;
    let person = json!({ "type": "object", "properties": {
        "name": { "type": "string" }, "age": { "type": "integer" }, "tags": { "type": "array", "items": { "type": "string" } },
    }, "required": ["name", "age", "tags"], "additionalProperties": false, "x-guidance": { "whitespace_pattern": " " } });
    let object = json!({ "type": "object", "x-guidance": { "whitespace_pattern": " " } });
    let object_text = r#"{"name": "Ada Lovelace, Countess", "list": [1, 2.5, true, {"deep": {"er": null}}]}"#;
    let auto = "start: text call | other\ntext[lazy]: /(.|\\n)*<tool_call>/\nother: /(.|\\n)*/\ncall: \"{}\"";
    let prose =
        "Let me think about that, \"quoted\" words included.\nA second line <b>with markup</b>; then some more words.";
    for (name, form, text) in [
        (
            "schema",
            Form::Schema(person),
            r#"{"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry"]}"#,
        ),
        ("any object", Form::Schema(object), object_text),
        (
            "regex",
            Form::Regex("[A-Z][a-z]+( [A-Z][a-z]+)*".to_owned()),
            "Ada Lovelace Byron King Noel",
        ),
        ("text with a trigger", Form::Lark(auto.to_owned()), prose),
    ] {
        let begin = Instant::now();
        let compiled = forms.compile(form.clone())?;
        let compile = begin.elapsed();
        let begin = Instant::now();
        forms.compile(form)?;
        let again = begin.elapsed();
        let tokens = model.vocabulary.encode(text, false)?;
        let mut micros = Vec::new();
        for round in 0..5 {
            let mut constraint = compiled.clone();
            for token in &tokens {
                let begin = Instant::now();
                let mask = constraint.mask()?;
                let took = begin.elapsed().as_secs_f64() * 1e6;
                if mask.bits()[*token as usize / 32] >> (token % 32) & 1 == 0 {
                    return Err(format!(
                        "{name}: {token} {:?} is not allowed",
                        model.vocabulary.token_text(*token)
                    )
                    .into());
                }
                constraint.accept(*token)?;
                if round > 0 {
                    micros.push(took);
                }
            }
        }
        micros.sort_by(f64::total_cmp);
        writeln!(
            out,
            "{name}: compile {:.2} ms, again {:.2} ms; mask mean {:.0} µs, median {:.0}, p95 {:.0}, largest {:.0}",
            compile.as_secs_f64() * 1e3,
            again.as_secs_f64() * 1e3,
            micros.iter().sum::<f64>() / micros.len() as f64,
            micros[micros.len() / 2],
            micros[micros.len() * 95 / 100],
            micros[micros.len() - 1],
        )?;
    }
    Ok(())
}
