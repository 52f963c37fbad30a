//! Calls of tools, whatever the model: whole, streamed, in history, with a form beside them.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat, events};

fn tools() -> Value {
    json!([
        { "type": "function", "unknown": {}, "function": {
            "name": "get_weather", "description": "Current weather in a city", "strict": true,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": { "type": "string", "maxLength": 6 },
                    "days": { "type": "integer", "minimum": 1, "maximum": 7 },
                    "unit": { "enum": ["celsius", "fahrenheit"] },
                },
                "required": ["city", "days", "unit"], "additionalProperties": false,
            },
        } },
        { "type": "function", "function": { "name": "now" } },
    ])
}

fn asked(more: Value) -> Value {
    let bias = json!({ "34": 4, "44": 1, "125": 6, "93": 4, "258": 8 });
    let mut body = chat(
        "Will it rain?",
        json!({
            "tools": tools(), "temperature": 1.3, "max_tokens": 400, "ignore_eos": false, "logit_bias": bias,
        }),
    );
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn check(call: &Value) {
    assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
    assert_eq!(call["type"], "function");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    match call["function"]["name"].as_str().unwrap() {
        "get_weather" => {
            let keys: Vec<&String> = arguments.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["city", "days", "unit"]);
            assert!(arguments["city"].as_str().unwrap().chars().count() <= 6);
            assert!((1..=7).contains(&arguments["days"].as_i64().unwrap()));
            assert!(["celsius", "fahrenheit"].contains(&arguments["unit"].as_str().unwrap()));
        }
        "now" => assert_eq!(arguments, json!({})),
        other => panic!("{other} is no tool"),
    }
}

/// The message that streamed chunks add up to, and why it ended.
fn joined(chunks: &[Value]) -> (Value, Value) {
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<Value>::new(), Value::Null);
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        content += choice["delta"]["content"].as_str().unwrap_or_default();
        for call in choice["delta"]["tool_calls"].as_array().unwrap_or(&Vec::new()) {
            let index = call["index"].as_u64().unwrap() as usize;
            let more = call["function"]["arguments"].as_str().unwrap();
            if index == calls.len() {
                calls.push(call.clone());
            } else {
                assert!(
                    index + 1 == calls.len() && call.get("id").is_none() && !more.is_empty(),
                    "{call}"
                );
                let arguments = calls[index]["function"]["arguments"].as_str().unwrap().to_owned() + more;
                calls[index]["function"]["arguments"] = json!(arguments);
            }
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (json!({ "content": content, "tool_calls": calls }), reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_asked_for_is_made_with_valid_arguments_whole_and_streamed_alike() {
    let server = Running::start("--max-model-len 2048").await;
    let named = json!({ "type": "function", "function": { "name": "get_weather" } });
    for (more, only, several) in [
        (json!({ "tool_choice": "required" }), None, true),
        (
            json!({ "tool_choice": "required", "parallel_tool_calls": false }),
            None,
            false,
        ),
        (
            json!({ "tool_choice": named, "parallel_tool_calls": false }),
            Some("get_weather"),
            false,
        ),
        // A form is for answers in words; here there are none.
        (
            json!({ "tool_choice": "required", "response_format": { "type": "json_object" } }),
            None,
            true,
        ),
    ] {
        let mut complete = 0;
        for seed in 0..4 {
            let mut body = asked(more.clone());
            body["seed"] = json!(seed);
            let (status, answer) = server.post("/v1/chat/completions", body.to_string()).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            let choice = &answer["choices"][0];
            let message = &choice["message"];
            let calls = message["tool_calls"].as_array().unwrap();
            assert!(
                message["content"].is_null() && !calls.is_empty() && (several || calls.len() == 1),
                "{answer}"
            );
            if choice["finish_reason"] == "tool_calls" {
                complete += 1;
                calls.iter().for_each(check);
                assert!(
                    calls
                        .iter()
                        .all(|call| only.is_none_or(|name| call["function"]["name"] == name)),
                    "{answer}"
                );
            }
            body["stream"] = json!(true);
            body["stream_options"] = json!({ "include_usage": true, "continuous_usage_stats": false });
            let stream = server.stream("/v1/chat/completions", body).await.text().await.unwrap();
            let (streamed, reason) = joined(&events(&stream));
            assert_eq!(reason, choice["finish_reason"]);
            assert_eq!(streamed["content"], "");
            let functions = |calls: &Value| {
                calls
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|call| call["function"].clone())
                    .collect::<Vec<_>>()
            };
            assert_eq!(functions(&streamed["tool_calls"]), functions(&message["tool_calls"]));
        }
        assert!(complete >= 2, "{more}: only {complete} of 4 ended");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_auto_an_answer_is_text_or_calls_and_with_a_form_it_is_one_of_both() {
    let server = Running::start("--max-model-len 2048").await;
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].as_str().map(str::to_owned);
    // A random model writes no trigger by chance.
    let (_, free) = server
        .post("/v1/chat/completions", asked(json!({ "max_tokens": 20 })).to_string())
        .await;
    assert!(
        text(&free).is_some() && free["choices"][0]["message"].get("tool_calls").is_none(),
        "{free}"
    );
    let choice = json!({ "tools": tools(), "guided_choice": ["rain", "sun"], "seed": 3 });
    let mut kinds = Vec::new();
    for bias in [json!({ "60": 60 }), json!({ "60": -60 })] {
        let mut body = asked(choice.clone());
        body["logit_bias"] = bias;
        let (_, answer) = server.post("/v1/chat/completions", body.to_string()).await;
        kinds.push(match text(&answer) {
            Some(text) => {
                assert!(["rain", "sun"].contains(&text.as_str()), "{answer}");
                "form"
            }
            None => "calls",
        });
    }
    assert_eq!(kinds, ["calls", "form"]);
    // None means that the model is not told of them either.
    let count = async |more: Value| {
        let body = json!({ "messages": [{ "role": "user", "content": "x" }] });
        let mut body = body.as_object().unwrap().clone();
        body.extend(more.as_object().unwrap().clone());
        server.post("/tokenize", json!(body).to_string()).await.1["count"]
            .as_u64()
            .unwrap()
    };
    let plain = count(json!({})).await;
    assert_eq!(count(json!({ "tools": tools(), "tool_choice": "none" })).await, plain);
    assert!(count(json!({ "tools": tools() })).await > plain + 500);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn earlier_calls_and_their_results_are_part_of_the_prompt() {
    let server = Running::start("--max-model-len 2048").await;
    let history = |arguments: Value| {
        json!([
            { "role": "user", "content": "Will it rain?" },
            { "role": "assistant", "content": null, "tool_calls": [
                { "id": "call_1", "type": "function", "function": { "name": "get_weather", "arguments": arguments } },
            ] },
            { "role": "tool", "tool_call_id": "call_1", "content": "{\"rain\": true}" },
        ])
    };
    let body = json!({ "messages": history(json!("{\"city\": \"Rome\"}")) });
    let (_, tokens) = server.post("/tokenize", body.to_string()).await;
    let (_, prompt) = server
        .post("/detokenize", json!({ "tokens": tokens["tokens"] }).to_string())
        .await;
    assert_eq!(
        prompt["prompt"],
        "<|im_start|>user\nWill it rain?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n\
         {\"name\": \"get_weather\", \"arguments\": {\"city\":\"Rome\"}}\n</tool_call><|im_end|>\n\
         <|im_start|>user\n<tool_response>\n{\"rain\": true}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    );
    for (messages, part) in [
        (history(json!("{")), "arguments is not JSON"),
        (history(json!("[1]")), "not a JSON object"),
        (
            json!([{ "role": "assistant", "tool_calls": [{}] }]),
            "function is missing",
        ),
        (
            json!([{ "role": "assistant", "function_call": { "name": "f" } }]),
            "older form",
        ),
    ] {
        let (status, answer) = server
            .post(
                "/v1/chat/completions",
                chat("", json!({ "messages": messages })).to_string(),
            )
            .await;
        assert_eq!(
            (status, &answer["error"]["param"]),
            (StatusCode::BAD_REQUEST, &json!("messages"))
        );
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{answer}");
    }
    for (fields, param) in [
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "no good" } }] }),
            "tools",
        ),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "f", "parameters": {
            "type": "object", "properties": { "x": { "type": "colour" } } } } }] }),
            "tools",
        ),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "functions": [{ "name": "f" }] }), "functions"),
    ] {
        let (status, answer) = server.post("/v1/chat/completions", chat("x", fields).to_string()).await;
        assert_eq!(
            (status, &answer["error"]["param"]),
            (StatusCode::BAD_REQUEST, &json!(param)),
            "{answer}"
        );
    }
    server.stop().await;
}
