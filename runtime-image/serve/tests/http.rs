//! The OpenAI API over a real socket, with a synthetic model.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Parser;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, tiny_config, weights};
use strata_model::{Dtype, GenerationConfig, ModelConfig, hf};
use strata_serve::{ServeArgs, ServeError, Server};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
}

/// Writes a synthetic model as a Hugging Face folder.
fn write_model(folder: &Path, config: &ModelConfig) {
    let generation = GenerationConfig {
        eos: config.eos.clone(),
        ..GenerationConfig::default()
    };
    let files = hf::Folder {
        config,
        weights: &weights(config, 11),
        dtype: Dtype::F32,
        tokenizer_json: &byte_tokenizer(),
        chat_template: Some(CHAT_TEMPLATE),
        generation: &generation,
    };
    hf::write(folder, &files).unwrap();
}

struct Running {
    url: String,
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
    _folder: tempfile::TempDir,
}

impl Running {
    async fn start(arguments: &str) -> Running {
        let folder = tempfile::tempdir().unwrap();
        write_model(
            folder.path(),
            &ModelConfig {
                max_positions: 2048,
                ..tiny_config()
            },
        );
        let line = format!(
            "serve --served-model-name tiny other --host 127.0.0.1 --port 0 --model {} {arguments}",
            folder.path().display()
        );
        let server = Server::start(Cli::parse_from(line.split_whitespace()).serve)
            .await
            .unwrap();
        let url = format!("http://{}", server.address());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.run_until(async {
            let _ = stopped.await;
        }));
        let running = Running {
            url,
            client: Client::new(),
            stop: Some(stop),
            task,
            _folder: folder,
        };
        running
            .until("the model is loaded", async || {
                running.get("/ready").await.0 == StatusCode::OK
            })
            .await;
        running
    }

    async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition().await {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    async fn post(&self, path: &str, body: impl Into<String>) -> (StatusCode, Value) {
        let response = self
            .client
            .post(format!("{}{path}", self.url))
            .body(body.into())
            .send()
            .await
            .unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        (
            status,
            serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: {text:?}")),
        )
    }

    async fn stream(&self, path: &str, body: Value) -> reqwest::Response {
        self.client
            .post(format!("{}{path}", self.url))
            .body(body.to_string())
            .send()
            .await
            .unwrap()
    }

    async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.1;
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")))
            .unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

/// The data of server-sent events; the last one must be `[DONE]`.
fn events(text: &str) -> Vec<Value> {
    let mut data: Vec<&str> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.into_iter()
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

fn chat(content: &str, more: Value) -> Value {
    let mut body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": content }], "temperature": 0, "max_tokens": 24, "ignore_eos": true });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_is_answered_the_same_whole_and_streamed_under_any_load() {
    // Blocks for one long answer, so that of any two that overlap one is preempted; a prefix cache, so that they share
    // blocks; small steps, so that prompts are cut.
    const ANSWER_TOKENS: u64 = 1000;
    let server = Running::start(
        "--kv-cache-memory-bytes 330000 --max-model-len 1200 --enable-prefix-caching --max-num-batched-tokens 23",
    )
    .await;
    let long = "word ".repeat(20);
    let chat = |content: &str, more: Value| {
        let mut body = chat(content, more);
        body["max_tokens"] = json!(ANSWER_TOKENS);
        body
    };
    let (status, whole) = server
        .post(
            "/v1/chat/completions",
            chat(&long, json!({ "unknown": [1] })).to_string(),
        )
        .await;
    assert_eq!(status, StatusCode::OK, "{whole}");
    assert_eq!(
        (&whole["object"], &whole["model"]),
        (&json!("chat.completion"), &json!("tiny"))
    );
    let choice = &whole["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["role"]),
        (&json!("length"), &json!("assistant"))
    );
    let text = choice["message"]["content"].as_str().unwrap();
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        (
            whole["usage"]["completion_tokens"].as_u64(),
            whole["usage"]["total_tokens"].as_u64()
        ),
        (Some(ANSWER_TOKENS), Some(prompt + ANSWER_TOKENS))
    );

    let streams = (0..8).map(async |i| {
        let options = json!({ "stream": true, "stream_options": { "include_usage": i % 2 == 0 } });
        let response = server.stream("/v1/chat/completions", chat(&long, options)).await;
        response.text().await.unwrap()
    });
    for (i, stream) in futures::future::join_all(streams).await.into_iter().enumerate() {
        let chunks = events(&stream);
        assert_eq!(
            chunks[0]["choices"][0]["delta"],
            json!({ "role": "assistant", "content": "" })
        );
        let streamed: String = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(streamed, text, "request {i}");
        let reasons: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0]["finish_reason"])
            .filter(|reason| !reason.is_null())
            .collect();
        assert_eq!(reasons, [&json!("length")]);
        let usage = &chunks.last().unwrap()["usage"];
        assert_eq!(
            usage["completion_tokens"].as_u64(),
            (i % 2 == 0).then_some(ANSWER_TOKENS),
            "{usage}"
        );
    }
    assert!(server.metric("vllm:prefix_cache_hits_total").await > 0.0);
    assert!(
        server.metric("vllm:num_preemptions_total").await > 0.0,
        "330000 bytes do not hold two such answers"
    );
    server
        .until("all blocks are free", async || {
            server.metric("vllm:kv_cache_usage_perc").await == 0.0
        })
        .await;
    assert_eq!(
        server.metric("vllm:generation_tokens_total").await,
        9.0 * ANSWER_TOKENS as f64
    );
    let metrics = server.get("/metrics").await.1;
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prompt_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:cache_config_info",
        "vllm:request_success_total",
    ] {
        assert!(
            metrics
                .lines()
                .any(|line| line.starts_with(name) && line.contains("model_name=\"tiny\"")),
            "{name}"
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_say_how_tokens_are_chosen_and_where_they_end() {
    let server = Running::start("--max-model-len 256").await;
    let answer = async |more: Value| {
        server.post("/v1/completions", {
        let mut body = json!({ "model": "other", "prompt": "abc", "temperature": 0, "max_tokens": 20, "ignore_eos": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    }).await.1
    };
    let text = async |more: Value| answer(more).await["choices"][0]["text"].as_str().unwrap().to_owned();
    let plain = text(json!({})).await;
    assert_eq!(text(json!({ "prompt": [97, 98, 99] })).await, plain);
    assert_eq!(text(json!({ "prompt": ["abc"] })).await, plain);
    // The stop text is not part of the answer.
    let ascii: String = plain.chars().filter(char::is_ascii).collect();
    let stop = &ascii[ascii.len() / 2..ascii.len() / 2 + 1];
    let stopped = answer(json!({ "stop": [stop] })).await;
    assert_eq!(stopped["choices"][0]["text"].as_str(), plain.split(stop).next());
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // A seed makes a draw repeatable; without one, answers differ.
    let drawn = async |more: Value| {
        let mut body = json!({ "temperature": 1.5 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        text(body).await
    };
    assert_eq!(drawn(json!({ "seed": 7 })).await, drawn(json!({ "seed": 7 })).await);
    assert_ne!(drawn(json!({ "seed": 7 })).await, drawn(json!({ "seed": 8 })).await);
    assert_ne!(drawn(json!({})).await, drawn(json!({})).await);
    // Greedy takes the most likely token: the alternatives' first.
    let probs = &answer(json!({ "logprobs": 2 })).await["choices"][0]["logprobs"];
    assert_eq!(probs["token_logprobs"].as_array().unwrap().len(), 20);
    for (chosen, top) in probs["token_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .zip(probs["top_logprobs"].as_array().unwrap())
    {
        assert!(top.as_object().unwrap().values().any(|prob| prob == chosen) && chosen.as_f64().unwrap() < 0.0);
    }
    let chat_probs = server
        .post(
            "/v1/chat/completions",
            chat(
                "x",
                json!({ "logprobs": true, "top_logprobs": 3, "max_completion_tokens": 4 }),
            )
            .to_string(),
        )
        .await
        .1;
    let content = chat_probs["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(
        (content.len(), content[0]["top_logprobs"].as_array().unwrap().len()),
        (4, 3)
    );

    // A user's special token is text: 12 bytes more, and no turn ends.
    let count = async |content: &str| {
        server
            .post(
                "/tokenize",
                json!({ "messages": [{ "role": "user", "content": content }] }).to_string(),
            )
            .await
            .1["count"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(count("<|im_end|>").await, count("").await + 10);
    let (_, tokens) = server
        .post("/tokenize", json!({ "prompt": "héllo <|im_end|>" }).to_string())
        .await;
    assert_eq!(
        tokens["tokens"].as_array().unwrap().last(),
        Some(&json!(258)),
        "a raw prompt is the caller's own"
    );
    let (_, back) = server
        .post("/detokenize", json!({ "tokens": tokens["tokens"] }).to_string())
        .await;
    assert_eq!(back["prompt"], "héllo <|im_end|>");
    let (_, models) = server.get("/v1/models").await;
    assert!(
        models.contains("\"id\":\"tiny\"")
            && models.contains("\"id\":\"other\"")
            && models.contains("\"max_model_len\":256"),
        "{models}"
    );
    server.stop().await;
}

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
            chat("x", json!({ "n": 2 })).to_string(),
            400,
            json!("n"),
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
            chat("x", json!({ "stop": [""] })).to_string(),
            400,
            json!("stop"),
            json!(null),
        ),
        (
            "/v1/chat/completions",
            chat("x", json!({ "tools": [{ "type": "function" }] })).to_string(),
            400,
            json!("tools"),
            json!(null),
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
            json!({ "prompt": ["a", "b"] }).to_string(),
            400,
            json!("prompt"),
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
async fn a_full_server_says_when_to_come_back_and_a_gone_client_frees_its_place() {
    let server = Running::start("--max-num-seqs 1 --max-num-waiting 0").await;
    let endless = chat("x", json!({ "stream": true, "max_tokens": 2000 }));
    let first = server.stream("/v1/chat/completions", endless).await;
    assert_eq!(first.status(), StatusCode::OK);
    let refused = server.stream("/v1/chat/completions", chat("y", json!({}))).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(
        refused.json::<Value>().await.unwrap()["error"]["code"],
        "rate_limit_exceeded"
    );
    drop(first);
    server
        .until("the place is free", async || {
            server
                .post("/v1/chat/completions", chat("y", json!({})).to_string())
                .await
                .0
                == StatusCode::OK
        })
        .await;
    server
        .until("all blocks are free", async || {
            server.metric("vllm:kv_cache_usage_perc").await == 0.0
        })
        .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_what_runs_refuses_what_is_new_and_ends_the_rest_properly() {
    for (timeout, most, reason) in [(60, 200, "length"), (0, 2000, "abort")] {
        let mut server = Running::start(&format!("--shutdown-timeout {timeout}")).await;
        let running = server
            .stream(
                "/v1/chat/completions",
                chat("x", json!({ "stream": true, "max_tokens": most })),
            )
            .await;
        server.stop.take().unwrap().send(()).unwrap();
        if timeout > 0 {
            server
                .until("not ready", async || {
                    match server.client.get(format!("{}/ready", server.url)).send().await {
                        Ok(response) => response.status() == StatusCode::SERVICE_UNAVAILABLE,
                        Err(_) => true, // already gone: the request was quick
                    }
                })
                .await;
        }
        let chunks = events(&running.text().await.unwrap());
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], reason);
        tokio::time::timeout(DEADLINE, server.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}
