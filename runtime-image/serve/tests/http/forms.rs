//! Answers in a form that was asked for, whatever the model.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat, events};

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 8 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "maxItems": 2 },
            "home": { "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/address" }] },
        },
        "required": ["name", "age", "tags", "home"],
        "additionalProperties": false,
        "$defs": { "address": {
            "type": "object", "properties": { "zip": { "type": "string", "pattern": "^[0-9]{5}$" } },
            "required": ["zip"], "additionalProperties": false,
        } },
    })
}

fn is_person(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap();
    let object = value.as_object().unwrap();
    let keys: Vec<&String> = object.keys().collect();
    let tags = value["tags"].as_array().unwrap();
    let home = &value["home"];
    let zip = home["zip"]
        .as_str()
        .is_some_and(|zip| zip.len() == 5 && zip.bytes().all(|byte| byte.is_ascii_digit()));
    keys == ["name", "age", "tags", "home"]
        && value["name"].as_str().unwrap().chars().count() <= 8
        && (0..=150).contains(&value["age"].as_i64().unwrap())
        && tags.len() <= 2
        && tags.iter().all(|tag| ["a", "b"].contains(&tag.as_str().unwrap()))
        && (home.is_null() || zip && home.as_object().unwrap().len() == 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_has_the_form_that_was_asked_for_whatever_the_model() {
    let server = Running::start("--max-model-len 1024").await;
    let schema = |strict: bool| json!({ "type": "json_schema", "json_schema": { "name": "person", "strict": strict, "schema": person() } });
    let object = |text: &str| match serde_json::from_str::<Value>(text) {
        Ok(value) => value.is_object(),
        Err(error) => error.to_string().starts_with("number out of range"), // 1e999 is JSON
    };
    let choice = |text: &str| ["red", "green", "dark\nblue"].contains(&text);
    let regex = |text: &str| text.len() == 5 && text.starts_with("v1/") && text[3..].parse::<u8>().is_ok();
    let calculation = |text: &str| text.chars().all(|c| "0123456789+".contains(c)) && !text.ends_with('+');
    let lark = "start: number (\"+\" number)~0..3\nnumber: /[0-9]{1,3}/";
    let choices = json!(["red", "green", "dark\nblue"]);
    type Valid<'a> = &'a dyn Fn(&str) -> bool;
    let cases: [(Value, Valid); 11] = [
        (json!({ "response_format": { "type": "json_object" } }), &object),
        (json!({ "response_format": schema(true) }), &is_person),
        (
            json!({ "response_format": schema(false), "ignore_eos": true }),
            &is_person,
        ),
        (json!({ "guided_json": person() }), &is_person),
        (
            json!({ "structured_outputs": { "json": person().to_string(), "disable_any_whitespace": true } }),
            &is_person,
        ),
        (json!({ "guided_choice": choices }), &choice),
        (json!({ "structured_outputs": { "choice": choices } }), &choice),
        (json!({ "guided_regex": "v1/\\d{2}" }), &regex),
        (json!({ "structured_outputs": { "regex": "v1/\\d{2}" } }), &regex),
        (json!({ "guided_grammar": lark }), &calculation),
        (json!({ "structured_outputs": { "grammar": lark } }), &calculation),
    ];
    for (fields, valid) in cases {
        let mut complete = 0;
        for seed in 0..6 {
            // The bias makes a random model close what it opens.
            let mut body = chat(
                "x",
                json!({
                    "seed": seed, "temperature": 1.5, "max_tokens": 300, "ignore_eos": false,
                    "logit_bias": { "34": 4, "44": 1, "125": 4, "93": 4, "258": 8 },
                }),
            );
            body.as_object_mut()
                .unwrap()
                .extend(fields.as_object().unwrap().clone());
            let (status, answer) = server.post("/v1/chat/completions", body.to_string()).await;
            assert_eq!(status, StatusCode::OK, "{fields}: {answer}");
            let choice = &answer["choices"][0];
            let text = choice["message"]["content"].as_str().unwrap();
            match choice["finish_reason"].as_str().unwrap() {
                "stop" => {
                    assert!(valid(text), "{fields}: {text}");
                    complete += 1;
                }
                // What was cut short says so.
                reason => assert_eq!(
                    (reason, &answer["usage"]["completion_tokens"]),
                    ("length", &json!(300)),
                    "{answer}"
                ),
            }
            if seed == 0 {
                body["stream"] = json!(true);
                let stream = server.stream("/v1/chat/completions", body).await.text().await.unwrap();
                let chunks = events(&stream);
                let streamed: String = chunks
                    .iter()
                    .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
                    .collect();
                assert_eq!(streamed, text, "{fields}");
            }
        }
        assert!(complete >= 3, "{fields}: only {complete} of 6 ended");
    }
    let body = json!({ "prompt": "x", "guided_choice": ["red", "green"], "min_tokens": 10, "max_tokens": 16 });
    let (_, answer) = server.post("/v1/completions", body.to_string()).await;
    assert!(
        ["red", "green"].contains(&answer["choices"][0]["text"].as_str().unwrap()),
        "{answer}"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_form_changes_no_answer_beside_it_and_is_changed_by_none() {
    let server = Running::start("--max-model-len 512 --max-num-batched-tokens 23").await;
    let text = async |more: Value| {
        let (_, answer) = server
            .post("/v1/chat/completions", chat("words of a prompt", more).to_string())
            .await;
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let formed = || json!({ "max_tokens": 80, "response_format": { "type": "json_object" } });
    let free = || json!({ "max_tokens": 80 });
    let (alone_formed, alone_free) = (text(formed()).await, text(free()).await);
    let together = (0..8).map(async |i| (i, text(if i % 2 == 0 { formed() } else { free() }).await));
    for (i, text) in futures::future::join_all(together).await {
        assert_eq!(text, if i % 2 == 0 { &*alone_formed } else { &*alone_free });
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_form_that_cannot_be_followed_is_refused_with_what_is_wrong() {
    let server = Running::start("--max-model-len 256").await;
    let format = |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": schema } });
    for (fields, param, part) in [
        (
            json!({ "response_format": { "type": "xml" } }),
            "response_format",
            "xml",
        ),
        (format(json!({ "name": "x" })), "response_format", "needs schema"),
        (
            format(json!({ "name": "x", "schema": { "type": "colour" } })),
            "response_format",
            "colour",
        ),
        (
            format(json!({ "name": "x", "strict": true, "schema": { "type": "object", "if": {} } })),
            "response_format",
            "if",
        ),
        (json!({ "guided_json": "{" }), "guided_json", "not JSON"),
        (json!({ "guided_json": 7 }), "guided_json", "an object is needed"),
        (json!({ "guided_choice": [] }), "guided_choice", "1 to"),
        (json!({ "guided_regex": "(" }), "guided_regex", "regex"),
        (
            json!({ "guided_grammar": "start: nothing" }),
            "guided_grammar",
            "nothing",
        ),
        (
            json!({ "structured_outputs": { "structural_tag": {} } }),
            "structured_outputs",
            "structural_tag",
        ),
        (
            json!({ "guided_regex": "a", "guided_choice": ["b"] }),
            "guided_choice",
            "guided_regex",
        ),
        (
            json!({ "guided_regex": "a".repeat(300_000) }),
            "guided_regex",
            "too long",
        ),
    ] {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let mut body = chat("x", json!({ "prompt": "x" }));
            body.as_object_mut()
                .unwrap()
                .extend(fields.as_object().unwrap().clone());
            let (status, answer) = server.post(path, body.to_string()).await;
            let error = &answer["error"];
            assert_eq!(
                (status, error["param"].as_str()),
                (StatusCode::BAD_REQUEST, Some(param)),
                "{answer}"
            );
            assert!(error["message"].as_str().unwrap().contains(part), "{answer}");
        }
    }
    server.stop().await;
}
