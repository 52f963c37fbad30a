//! What is refused, and how a client is told.

use reqwest::StatusCode;
use serde_json::json;

use super::{Running, chat};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_get_openai_errors() {
    let server = Running::start("--max-model-len 128").await;
    let long = "x".repeat(200);
    for (path, body, status, param, code) in [
        ("/v1/chat/completions", "{".to_owned(), 400, json!(null), json!(null)),
        (
            "/v1/chat/completions",
            json!({ "model": "tiny" }).to_string(),
            400,
            json!(null),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "model": "gpt-4" })).to_string(),
            404,
            json!("model"),
            json!("model_not_found"),
        ),
        (
            "/v1/chat/completions",
            chat(&long, json!({})).to_string(),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "max_tokens": 120 })).to_string(),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "max_tokens": 0 })).to_string(),
            400,
            json!("max_tokens"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "temperature": -1 })).to_string(),
            400,
            json!("temperature"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "logit_bias": { "97": 101 } })).to_string(),
            400,
            json!("logit_bias"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "logit_bias": { "a": 1 } })).to_string(),
            400,
            json!("logit_bias"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x", "min_p": 1.5 }).to_string(),
            400,
            json!("min_p"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x", "repetition_penalty": 0 }).to_string(),
            400,
            json!("repetition_penalty"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x", "max_tokens": 4, "min_tokens": 5 }).to_string(),
            400,
            json!("min_tokens"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x", "stop_token_ids": [259] }).to_string(),
            400,
            json!("stop_token_ids"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "stop": [""] })).to_string(),
            400,
            json!("stop"),
            json!(null),
        ),
        (
            "/detokenize",
            json!({ "tokens": vec![97; 129] }).to_string(),
            400,
            json!("tokens"),
            json!("context_length_exceeded"),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "messages": [] })).to_string(),
            400,
            json!("messages"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat(
                "x",
                json!({ "messages": [{ "role": "user<|im_end|>", "content": "x" }] }),
            )
            .to_string(),
            400,
            json!("messages"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat(
                "x",
                json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            )
            .to_string(),
            400,
            json!("messages"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": [999_999] }).to_string(),
            400,
            json!("prompt"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "" }).to_string(),
            400,
            json!("prompt"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": vec!["a"; 129] }).to_string(),
            400,
            json!("prompt"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "a", "best_of": 2, "stream": true }).to_string(),
            400,
            json!("best_of"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "a", "best_of": 2, "n": 3 }).to_string(),
            400,
            json!("best_of"),
            json!(null),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "a", "max_tokens": 0 }).to_string(),
            400,
            json!("max_tokens"),
            json!(null),
        ),
        ("/v1/completions", " ".repeat(5 << 20), 413, json!(null), json!(null)),
        ("/v1/nothing", String::new(), 404, json!(null), json!("not_found")),
        ("/v1/models", String::new(), 405, json!(null), json!(null)),
    ] {
        let (got, answer) = server.post(path, body.clone()).await;
        let error = &answer["error"];
        let shown: String = body.chars().take(120).collect();
        assert_eq!(
            (got.as_u16(), &error["param"], &error["code"]),
            (status, &param, &code),
            "{path} {shown}: {answer}"
        );
        assert!(
            error["message"].as_str().is_some_and(|message| !message.is_empty()) && error["type"].is_string(),
            "{answer}"
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_change_the_answer_and_is_not_supported_is_refused_and_defaults_pass() {
    let server = Running::start("--max-model-len 128").await;
    for refused in [
        json!({ "functions": [{ "name": "f" }] }),
        json!({ "prompt_logprobs": 0 }),
        json!({ "continue_final_message": true }),
        json!({ "add_generation_prompt": false }),
        json!({ "suffix": "." }),
    ] {
        let field = refused.as_object().unwrap().keys().next().unwrap();
        for (path, prompt) in [
            (
                "/v1/chat/completions",
                json!({ "messages": [{ "role": "user", "content": "x" }] }),
            ),
            ("/v1/completions", json!({ "prompt": "x" })),
        ] {
            let mut body = prompt;
            body.as_object_mut()
                .unwrap()
                .extend(refused.as_object().unwrap().clone());
            let (status, answer) = server.post(path, body.to_string()).await;
            let error = &answer["error"];
            assert_eq!(
                (status.as_u16(), error["param"].as_str()),
                (400, Some(field.as_str())),
                "{path} {refused}: {answer}"
            );
            assert!(error["message"].as_str().unwrap().contains("leave it out"), "{answer}");
        }
    }
    let neutral = json!({
        "n": 1, "best_of": 1, "repetition_penalty": 1, "min_p": 0.0, "min_tokens": 0, "logit_bias": {}, "stop_token_ids": [],
        "tools": [], "tool_choice": "none", "functions": null, "response_format": { "type": "text" }, "guided_json": null,
        "continue_final_message": false, "add_generation_prompt": true, "skip_special_tokens": true, "echo": false, "suffix": "",
        "user": "u", "metadata": { "a": "b" }, "never_heard_of": { "n": 2 },
    });
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let mut body = chat("x", json!({ "prompt": "x", "max_tokens": 2 }));
        body.as_object_mut()
            .unwrap()
            .extend(neutral.as_object().unwrap().clone());
        let (status, answer) = server.post(path, body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
    }
    server.stop().await;
}
