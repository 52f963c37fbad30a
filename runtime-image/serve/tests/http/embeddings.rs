//! `/v1/embeddings`, with a small encoder of random weights.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::StatusCode;
use serde_json::{Value, json};
use strata_model::bert::synthetic;

use super::{Running, chat};

impl Running {
    async fn encoder(arguments: &str) -> Running {
        let folder = tempfile::tempdir().unwrap();
        synthetic::write(folder.path()).unwrap();
        let server = Running::begin_in(folder, arguments).await;
        server
            .until("the model is loaded", async || {
                server.get("/ready").await.0 == StatusCode::OK
            })
            .await;
        server
    }
}

fn vectors(answer: &Value) -> Vec<Vec<f32>> {
    let data = answer["data"].as_array().unwrap().iter().enumerate();
    data.map(|(i, embedding)| {
        assert_eq!(
            (&embedding["index"], &embedding["object"]),
            (&json!(i), &json!("embedding"))
        );
        match &embedding["embedding"] {
            Value::String(text) => {
                let bytes = STANDARD.decode(text).unwrap();
                bytes
                    .chunks_exact(4)
                    .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
                    .collect()
            }
            list => list
                .as_array()
                .unwrap()
                .iter()
                .map(|x| x.as_f64().unwrap() as f32)
                .collect(),
        }
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoder_has_no_use_for_a_disk_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    synthetic::write(folder.path()).unwrap();
    let disk = "--enable-prefix-caching --kv-spill-dir /tmp --kv-spill-bytes 1000000";
    let server = Running::begin_in(folder, disk).await;
    let error = server.task.await.unwrap().unwrap_err();
    assert!(
        error.is_bad_input() && error.to_string().contains("leave it out"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_has_one_vector_whatever_form_and_company_it_comes_in() {
    let server = Running::encoder("--max-num-batched-tokens 16").await;
    let ask = async |path: &str, body: Value| {
        let (status, answer) = server.post(path, body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let one = ask("/v1/embeddings", json!({ "model": "tiny", "input": "abc" })).await;
    assert_eq!((&one["object"], &one["model"]), (&json!("list"), &json!("tiny")));
    assert_eq!(one["usage"], json!({ "prompt_tokens": 3, "total_tokens": 3 }));
    let vector = vectors(&one).remove(0);
    assert_eq!(vector.len(), 24);
    let length: f32 = vector.iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
    let others = json!(["a longer text than a step takes", "abc", "x"]);
    for (path, body, at) in [
        (
            "/openai/v1/embeddings",
            json!({ "input": ["abc"], "dimensions": 24, "user": "u" }),
            0,
        ),
        (
            "/openai/deployments/other/embeddings?api-version=2024-10-21",
            json!({ "input": "abc" }),
            0,
        ),
        (
            "/v1/embeddings",
            json!({ "input": [97, 98, 99], "encoding_format": "base64" }),
            0,
        ),
        (
            "/v1/embeddings",
            json!({ "input": [[98], [97, 98, 99]], "encoding_format": "float" }),
            1,
        ),
        (
            "/v1/embeddings",
            json!({ "input": others, "encoding_format": "base64" }),
            1,
        ),
    ] {
        assert_eq!(vectors(&ask(path, body.clone()).await)[at], vector, "{body}");
    }
    let many = (0..20).map(async |i| {
        let body = json!({ "input": vec!["abc"; i % 7 + 1] });
        assert!(
            vectors(&ask("/v1/embeddings", body).await)
                .iter()
                .all(|each| *each == vector)
        );
    });
    futures::future::join_all(many).await;
    assert_eq!(server.metric("vllm:prompt_tokens_total").await, (51 + 3 * 77) as f64);
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_encoder_cannot_do_is_refused_and_the_other_way_round() {
    let server = Running::encoder("").await;
    for (path, body, param, code) in [
        ("/v1/embeddings", json!({ "input": "" }), "input", json!(null)),
        ("/v1/embeddings", json!({ "input": [] }), "input", json!(null)),
        ("/v1/embeddings", json!({ "input": [[]] }), "input", json!(null)),
        ("/v1/embeddings", json!({ "input": [300] }), "input", json!(null)),
        (
            "/v1/embeddings",
            json!({ "input": vec!["a"; 2049] }),
            "input",
            json!(null),
        ),
        (
            "/v1/embeddings",
            json!({ "input": "x".repeat(33) }),
            "input",
            json!("context_length_exceeded"),
        ),
        (
            "/v1/embeddings",
            json!({ "input": "x", "dimensions": 8 }),
            "dimensions",
            json!(null),
        ),
        (
            "/v1/embeddings",
            json!({ "input": "x", "truncate_prompt_tokens": 8 }),
            "truncate_prompt_tokens",
            json!(null),
        ),
        ("/v1/chat/completions", chat("x", json!({})), "model", json!(null)),
        ("/v1/completions", json!({ "prompt": "x" }), "model", json!(null)),
        ("/v1/responses", json!({ "input": "x" }), "model", json!(null)),
        (
            "/tokenize",
            json!({ "messages": [{ "role": "user", "content": "x" }] }),
            "model",
            json!(null),
        ),
    ] {
        let (status, answer) = server.post(path, body.to_string()).await;
        let error = &answer["error"];
        assert_eq!(
            (status.as_u16(), &error["param"], &error["code"]),
            (400, &json!(param), &code),
            "{path}: {answer}"
        );
    }
    let (_, tokens) = server.post("/tokenize", json!({ "prompt": "abc" }).to_string()).await;
    assert_eq!(tokens["tokens"], json!([97, 98, 99]));
    assert!(server.get("/v1/models").await.1.contains("\"max_model_len\":32"));
    server.stop().await;

    let server = Running::start("--max-model-len 64").await;
    let (status, answer) = server.post("/v1/embeddings", json!({ "input": "x" }).to_string()).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["param"]),
        (400, &json!("model")),
        "{answer}"
    );
    server.stop().await;
}
