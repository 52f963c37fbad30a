//! That walks along masks end in the form, and that no form stops the server.

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
        assert!(took < Duration::from_secs(5), "{name}: {took:?} for {outcome:?}");
    }
}
