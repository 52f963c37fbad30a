//! Tokens guessed ahead change how fast an answer comes, and nothing of it.

use strata_model::ModelConfig;
use strata_model::synthetic::tiny_config;

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat, write_model};

/// Requests that end, draw, count and constrain in all the ways there are; the choices that each gets.
async fn choices(server: &Running) -> Vec<Value> {
    let requests = [
        json!({ "max_tokens": 200 }),
        json!({ "max_tokens": 1 }),
        json!({ "temperature": 1.2, "seed": 5, "max_tokens": 100 }),
        json!({ "temperature": 0.7, "top_p": 0.9, "seed": 6, "n": 3, "max_tokens": 60 }),
        json!({ "logprobs": true, "top_logprobs": 3, "max_tokens": 50 }),
        json!({ "stop": ["e", "a"], "max_tokens": 100 }),
        json!({ "frequency_penalty": 0.5, "repetition_penalty": 1.1, "max_tokens": 100 }),
        json!({ "structured_outputs": { "regex": "(ab|cd){20}" }, "ignore_eos": false, "max_tokens": 100 }),
    ];
    let answers = requests.into_iter().map(async |more| {
        let body = chat("a word, a word, and another word", more);
        let (status, answer) = server.post("/v1/chat/completions", body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        json!([answer["choices"], answer["usage"]["completion_tokens"]])
    });
    // All at once, so that guesses stand among other work and blocks are short.
    futures::future::join_all(answers).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_same_whatever_is_guessed() {
    let cache = "--max-model-len 512 --kv-cache-memory-bytes 400000 --max-num-batched-tokens 40";
    let plain = Running::start(cache).await;
    let expected = choices(&plain).await;
    plain.stop().await;
    let (same, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = ModelConfig {
        max_positions: 2048,
        ..tiny_config()
    };
    write_model(same.path(), &config);
    write_model(
        other.path(),
        &ModelConfig {
            intermediate_size: config.intermediate_size / 2,
            ..config
        },
    );
    let model = |folder: &tempfile::TempDir| {
        json!({ "method": "draft_model", "model": folder.path(), "num_speculative_tokens": 4 }).to_string()
    };
    let ngram = r#"{"method":"ngram","num_speculative_tokens":5,"prompt_lookup_max":3,"prompt_lookup_min":1}"#;
    for (config, least, more) in [
        (ngram.to_owned(), 0.01, "--enable-prefix-caching"),
        (model(&same), 0.5, ""),
        (model(&other), 0.0, "--enable-prefix-caching"),
    ] {
        let server = Running::start(&format!("{cache} {more} --speculative-config {config}")).await;
        for (i, (got, expected)) in choices(&server).await.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "request {i} with {config}");
        }
        let count = async |what: &str| server.metric(&format!("vllm:spec_decode_num_{what}_total")).await;
        let (drafts, tokens, right) = (
            count("drafts").await,
            count("draft_tokens").await,
            count("accepted_tokens").await,
        );
        assert!(
            drafts > 0.0 && tokens >= drafts && right >= least * tokens,
            "{config}: {drafts} drafts of {tokens} tokens, {right} right"
        );
        server.until_blocks_are_free().await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_cannot_draft_for_this_one_is_named_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    for (config, words) in [
        (
            ModelConfig {
                max_positions: 100,
                ..tiny_config()
            },
            "100 positions",
        ),
        (
            ModelConfig {
                vocab_size: tiny_config().vocab_size + 4,
                max_positions: 2048,
                ..tiny_config()
            },
            "tokens and not",
        ),
    ] {
        write_model(folder.path(), &config);
        let draft = json!({ "method": "draft_model", "model": folder.path(), "num_speculative_tokens": 4 });
        let server = Running::begin(2048, &format!("--speculative-config {draft}")).await;
        let error = server.task.await.unwrap().unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(words), "{error}");
    }
}
