//! SentencePiece's BPE, which GGUF calls "llama": tokens with scores and types, bytes for what no token has, a space written as
//! "▁". As the object of an HF `tokenizer.json`, and back.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::tokenizer::{CONTROL, NORMAL, USER_DEFINED};

/// The character that stands for a space.
const SPACE: &str = "▁";
/// Token types in GGUF.
const UNKNOWN: i32 = 2;
const BYTE: i32 = 6;
/// Longest token whose splits become merges, in characters.
const MAX_TOKEN_CHARACTERS: usize = 256;

/// Normalizer and decoder; `prefix`: a text begins as if a space stood before it.
pub(super) fn pipeline(prefix: bool) -> (Value, Value) {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![
        replace(SPACE, " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    (
        json!({"type": "Sequence", "normalizers": normalizers}),
        json!({"type": "Sequence", "decoders": decoders}),
    )
}

/// `model` of a `tokenizer.json`. SentencePiece joins the pair whose result has the highest score; a BPE knows pairs in order.
///
/// That order is HF's converter's: results that the model's maker defined come first, as SentencePiece never splits them.
/// Pairs with one result go by their ids or, in Gemma's files (`by_length`), with the longest left part first.
pub(super) fn model(tokens: &[String], types: &[i64], scores: &[f64], vocab: Value, by_length: bool) -> Value {
    let defined = |id: usize| types[id] == i64::from(USER_DEFINED);
    let plain: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| types[*id] == i64::from(NORMAL) || defined(*id))
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    let mut merges: Vec<(usize, usize, usize)> = Vec::new();
    for (text, id) in &plain {
        if text.len() > 4 * MAX_TOKEN_CHARACTERS {
            continue;
        }
        for (at, _) in text.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (plain.get(&text[..at]), plain.get(&text[at..])) {
                merges.push((*id, *left, *right));
            }
        }
    }
    let score = |id: usize| if defined(id) { f64::INFINITY } else { scores[id] };
    let lengths = |(_, left, right): &(usize, usize, usize)| match by_length {
        true => [*left, *right].map(|part| tokens[part].chars().count()),
        false => [0; 2],
    };
    merges.sort_by(|a, b| {
        let by_score = score(b.0).total_cmp(&score(a.0));
        by_score.then_with(|| lengths(b).cmp(&lengths(a))).then(a.cmp(b))
    });
    let merges: Vec<Value> = merges
        .iter()
        .map(|(_, left, right)| json!([tokens[*left], tokens[*right]]))
        .collect();
    let unknown = types.iter().position(|kind| *kind == i64::from(UNKNOWN));
    json!({
        "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| &tokens[id]), "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
        "merges": merges,
    })
}

/// The tokens' texts as an HF `tokenizer.json` has them: llama.cpp's converter writes runs of spaces that the model's maker
/// defined (Gemma's) as spaces.
pub(super) fn texts(tokens: &[&str], types: &[i64]) -> Vec<String> {
    let known: HashSet<&str> = tokens.iter().copied().collect();
    let text = |(text, kind): (&&str, &i64)| {
        let spaces = *kind == i64::from(USER_DEFINED) && text.bytes().all(|byte| byte == b' ');
        let written = text.replace(' ', SPACE);
        if spaces && !known.contains(written.as_str()) {
            written
        } else {
            (*text).to_owned()
        }
    };
    tokens.iter().zip(types).map(text).collect()
}

/// Whether a `tokenizer.json` is SentencePiece's BPE in the form that [`pipeline`] gives; if so, its `prefix`.
pub(super) fn recognise(json: &Value) -> Option<bool> {
    if json["model"]["byte_fallback"] != true {
        return None;
    }
    // Gemma splits at spaces, of which its normalizer has left none.
    let splits = &json["pre_tokenizer"];
    if !(splits.is_null() || (splits["type"] == "Split" && splits["pattern"]["String"] == " ")) {
        return None;
    }
    let found = &json["normalizer"];
    [true, false].into_iter().find(|prefix| {
        let (normalizer, _) = pipeline(*prefix);
        // A sequence of one is also written without the sequence.
        *found == normalizer || (!prefix && *found == normalizer["normalizers"][0])
    })
}

/// Scores and types for tokens of a recognised `tokenizer.json`; `types` has what is known of added tokens.
pub(super) fn scores_and_types(json: &Value, tokens: &[String], types: &mut [i32]) -> Vec<f32> {
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    for (id, text) in tokens.iter().enumerate() {
        let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if types[id] == NORMAL && byte.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok()) {
            types[id] = BYTE;
        }
    }
    if let Some(id) = json["model"]["unk_token"].as_str().and_then(|text| ids.get(text)) {
        types[*id] = UNKNOWN;
    }
    // The first pair that makes a token says when it is made; what no pair makes is never asked for its score.
    let merges = json["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
    let mut scores = vec![-(merges.len() as f32) - 1.0; tokens.len()];
    for (rank, merge) in merges.iter().enumerate().rev() {
        let result = match merge {
            Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect::<String>(),
            other => other.as_str().unwrap_or_default().replacen(' ', "", 1),
        };
        if let Some(id) = ids.get(result.as_str()) {
            scores[*id] = -(rank as f32);
        }
    }
    for (id, kind) in types.iter().enumerate() {
        if [CONTROL, UNKNOWN, BYTE].contains(kind) {
            scores[id] = 0.0;
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order of Gemma's own `tokenizer.json`, from the lists as `convert_hf_to_gguf.py` writes them: what the maker defined
    /// has its own type, spaces, and a score that says nothing.
    #[test]
    fn gemmas_runs_of_spaces_are_joined_before_all_else() {
        let tokens = ["▁", "a", "▁a", "  ", "   ", "▁▁a", "<unused0>"];
        let types = [1, 1, 1, 4, 4, 1, 4];
        let scores = [-3.0, -4.0, -1.0, -1000.0, -1000.0, -2.0, -1000.0];
        let texts = texts(&tokens, &types);
        assert_eq!(texts[3..5], ["▁▁", "▁▁▁"]);
        let merges = |by_length| model(&texts, &types, &scores, Value::Null, by_length)["merges"].clone();
        assert_eq!(
            merges(true),
            json!([
                ["▁▁", "▁"],
                ["▁", "▁▁"],
                ["▁", "▁"],
                ["▁", "a"],
                ["▁▁", "a"],
                ["▁", "▁a"]
            ])
        );
        // The pairs of one result in Llama's order, by their ids.
        let llama = merges(false);
        assert_eq!(
            llama.as_array().map(|all| &all[4..]),
            Some(&[json!(["▁", "▁a"]), json!(["▁▁", "a"])][..])
        );
    }
}
