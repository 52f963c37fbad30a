//! What tokenizer and chat templates make of given texts, for comparison with others:
//! `texts tokenize MODEL TEXTS OUT [--special]` or `texts render MODEL REQUESTS OUT`.
//!
//! TEXTS: length (32 bits) and bytes of each; OUT: count and ids of each, 32 bits; `--special`: text may become a special
//! token. On the way every text is put together again, whole and as a stream, and what differs is counted: one JSON line.
//! REQUESTS: an object with `source`, `bos`, `eos`, `messages`, `tools`, `add_generation_prompt` on each line; OUT: what the
//! template makes of each, or an object with the error where it refuses, as JSON lines.

use std::error::Error;
use std::fs::{File, read, read_to_string};
use std::io::{BufWriter, Write};

use serde_json::{Map, Value, json};
use strata_model::{ChatTemplate, LoadedModel, ModelError, TokenText, Vocabulary};

/// How texts fare that are taken apart and put together again.
#[derive(Default)]
struct Counts {
    texts: usize,
    /// Texts that come back as others.
    changed: usize,
    /// Streams with a character that was cut in two, or that do not add up to the text.
    split: usize,
    /// Texts of a user that became special tokens.
    special: usize,
}

fn tokenize(
    vocabulary: &Vocabulary,
    texts: &[u8],
    out: &mut impl Write,
    special: bool,
) -> Result<Counts, Box<dyn Error>> {
    let mut counts = Counts::default();
    let mut rest = texts;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (bytes, next) = after
            .split_at_checked(u32::from_le_bytes(*length) as usize)
            .ok_or("a text is cut off")?;
        rest = next;
        let text = std::str::from_utf8(bytes)?;
        let ids = if special {
            vocabulary.encode(text, false)?
        } else {
            vocabulary.encode_literal(text)?
        };
        out.write_all(&u32::try_from(ids.len())?.to_le_bytes())?;
        ids.iter().try_for_each(|id| out.write_all(&id.to_le_bytes()))?;
        counts.texts += 1;
        counts.changed += usize::from(vocabulary.decode(&ids, false)? != text);
        if !special {
            counts.special += usize::from(ids.iter().any(|id| vocabulary.is_special(*id)));
            let mut stream = TokenText::default();
            let mut pieces = ids
                .iter()
                .map(|id| stream.push(vocabulary, *id))
                .collect::<Result<Vec<_>, _>>()?;
            pieces.push(stream.finish(vocabulary)?);
            counts.split += usize::from(pieces.concat() != text);
        }
    }
    Ok(counts)
}

/// What one request's template makes of it.
fn render(vocabulary: &Vocabulary, request: &Value) -> Result<String, ModelError> {
    let text = |key: &str| request[key].as_str();
    let template = ChatTemplate::from_source(text("source").unwrap_or_default(), text("bos"), text("eos"))?;
    let tools = Some(&request["tools"]).filter(|tools| !tools.is_null());
    let open = request["add_generation_prompt"] == true;
    let messages = request["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(template.render(vocabulary, messages, tools, open, &Map::new())?.text())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mode, model, input, out, flags @ ..] = arguments.as_slice() else {
        return Err("give tokenize or render, a model, and the files to read and to write".into());
    };
    let vocabulary = LoadedModel::open(model.as_ref())?.vocabulary;
    let mut out = BufWriter::new(File::create(out)?);
    let line = match mode.as_str() {
        "tokenize" => {
            let counts = tokenize(
                &vocabulary,
                &read(input)?,
                &mut out,
                flags.contains(&"--special".to_owned()),
            )?;
            json!({ "texts": counts.texts, "changed": counts.changed, "split": counts.split, "special": counts.special })
        }
        "render" => {
            let mut count = 0;
            for request in read_to_string(input)?.lines() {
                let line = match render(&vocabulary, &serde_json::from_str(request)?) {
                    Ok(text) => json!(text),
                    Err(error) => json!({ "error": error.to_string() }),
                };
                writeln!(out, "{line}")?;
                count += 1;
            }
            json!({ "requests": count })
        }
        other => return Err(format!("there is no {other}").into()),
    };
    out.flush()?;
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
