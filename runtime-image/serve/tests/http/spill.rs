//! Beginnings of prompts that the cache has no room for lie on the disk: answers are the same, and nobody finds them there.

use std::path::Path;

use reqwest::StatusCode;
use serde_json::{Value, json};
use strata_model::ModelConfig;
use strata_model::synthetic::tiny_config;

use super::{DEADLINE, Running, chat, shipped, write_model};

/// The options for a disk in `folder`.
fn spill(folder: &Path, bytes: usize) -> String {
    let folder = folder.display();
    format!("--enable-prefix-caching --kv-spill-dir {folder} --kv-spill-bytes {bytes}")
}

/// Chats whose beginnings are as long as a third of the cache, each with a request of its own kind.
fn requests() -> Vec<Value> {
    let texts = (0..6).map(|i| format!("{i}, and then {}", format!("word {i} ").repeat(12)));
    let more = [
        json!({ "logprobs": true, "top_logprobs": 3 }),
        json!({ "temperature": 0.9, "seed": 3 }),
        json!({ "n": 2, "temperature": 0.7, "seed": 4 }),
    ];
    let all = texts
        .zip(more.into_iter().cycle())
        .map(|(text, more)| chat(&text, more));
    all.collect()
}

/// What is answered: the choices, and how many tokens of the prompts were known.
async fn ask(server: &Running, requests: &[Value], at_once: bool) -> (Vec<Value>, u64) {
    let one = async |body: &Value| {
        let (status, answer) = server.post("/v1/chat/completions", body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let answers = match at_once {
        true => futures::future::join_all(requests.iter().map(one)).await,
        false => {
            let mut answers = Vec::new();
            for body in requests {
                answers.push(one(body).await);
            }
            answers
        }
    };
    let known = |answer: &Value| {
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    let known = answers.iter().map(known).sum();
    (answers.iter().map(|answer| answer["choices"].clone()).collect(), known)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_the_same_to_the_bit_whether_its_prompt_comes_from_memory_from_the_disk_or_is_computed() {
    let (draft, requests) = (tempfile::tempdir().unwrap(), requests());
    write_model(
        draft.path(),
        &ModelConfig {
            max_positions: 2048,
            ..tiny_config()
        },
    );
    let draft = json!({ "method": "draft_model", "model": draft.path(), "num_speculative_tokens": 3 });
    // Bytes of a token in the caches of all models.
    for (token, more) in [
        (256, "".to_owned()),
        (144, "--kv-cache-dtype q8 --max-num-batched-tokens 19".into()),
        (512, "--kv-cache-dtype f32".into()),
        (512, format!("--speculative-config {draft}")),
    ] {
        let cache = format!(
            "--max-model-len 300 --block-size 4 --kv-cache-memory-bytes {} {more}",
            token * 340
        );
        let plain = Running::start(&cache).await;
        let (expected, _) = ask(&plain, &requests, false).await;
        plain.stop().await;

        let folder = tempfile::tempdir().unwrap();
        let most = token * 4000;
        let server = Running::start(&format!("{cache} {}", spill(folder.path(), most))).await;
        let found = async || server.metric("vllm:external_prefix_cache_hits_total").await;
        for (round, at_once) in [false, false, true, true].into_iter().enumerate() {
            let (before, in_memory) = (found().await, server.metric("vllm:prefix_cache_hits_total").await);
            let (got, known) = ask(&server, &requests, at_once).await;
            assert_eq!(got, expected, "round {round} with {more}");
            let on_disk = found().await - before;
            let in_memory = server.metric("vllm:prefix_cache_hits_total").await - in_memory;
            assert_eq!(on_disk + in_memory, known as f64, "round {round} with {more}");
            assert_eq!(on_disk > 0.0, round > 0, "round {round} with {more}");
        }
        let queries = server.metric("vllm:external_prefix_cache_queries_total").await;
        assert!(queries >= found().await, "{queries}");
        let used = server.metric("strata_kv_spill_used_bytes").await;
        assert!(used > 0.0 && used <= most as f64, "{used}");
        assert_eq!(server.metric("strata_kv_spill_damaged_total").await, 0.0);
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "the file has no name"
        );
        server.until_blocks_are_free().await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_go_while_the_disk_reads_leave_nothing_behind() {
    let (folder, requests) = (tempfile::tempdir().unwrap(), requests());
    let cache = "--max-model-len 300 --block-size 4 --kv-cache-memory-bytes 87040";
    let server = Running::start(&format!("{cache} {}", spill(folder.path(), 1 << 20))).await;
    let (expected, _) = ask(&server, &requests, false).await;
    for body in requests.iter().cycle().take(60) {
        let mut body = body.clone();
        body["stream"] = json!(true);
        drop(server.stream("/v1/chat/completions", body).await);
    }
    server
        .until("all blocks are free", async || {
            server.metric("vllm:kv_cache_usage_perc").await == 0.0
                && server.metric("vllm:num_requests_running").await == 0.0
        })
        .await;
    assert_eq!(ask(&server, &requests, true).await.0, expected);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_cannot_be_used_is_named_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (spill(Path::new("/nowhere"), 1 << 20), "--kv-spill-dir /nowhere"),
        (
            spill(folder.path(), 4095),
            "--kv-spill-bytes 4095 holds no block of 4096",
        ),
    ] {
        let server = Running::begin(2048, &arguments).await;
        let ended = tokio::time::timeout(DEADLINE, server.task).await;
        let error = ended.unwrap().unwrap().unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(words), "{error}");
    }
}

/// Prompts of a real model, of 528 tokens that look random.
fn real_prompt(which: u64) -> Value {
    let token = |i: u64| ((i + 1 + 1000 * which).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) % 40_000 + 100;
    json!({ "model": "tiny", "prompt": (0..528).map(token).collect::<Vec<_>>(), "max_tokens": 8, "temperature": 0,
        "ignore_eos": true, "logprobs": 2 })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_model_finds_a_prompt_on_the_disk_that_three_others_pushed_out_of_memory() {
    let real = |arguments: String| async move {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(shipped::path(), folder.path().join("model.gguf")).unwrap();
        let server = Running::begin_in(folder, &arguments).await;
        server
            .until("the model is loaded", async || {
                server.get("/ready").await.0 == StatusCode::OK
            })
            .await;
        server
    };
    // 23,040 bytes a token: 40 blocks of 16 tokens.
    let cache = "--kv-cache-memory-bytes 14745600 --max-model-len 600";
    let ask = async |server: &Running, which: u64| {
        let (status, answer) = server.post("/v1/completions", real_prompt(which).to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["choices"].clone()
    };
    let plain = real(cache.to_owned()).await;
    let expected = [ask(&plain, 0).await, ask(&plain, 1).await];
    plain.stop().await;

    let folder = tempfile::tempdir().unwrap();
    let server = real(format!("{cache} {}", spill(folder.path(), 100 << 20))).await;
    for which in [0, 1, 2, 3] {
        ask(&server, which).await;
    }
    let hits = async || {
        (
            server.metric("vllm:prefix_cache_hits_total").await,
            server.metric("vllm:external_prefix_cache_hits_total").await,
        )
    };
    assert_eq!(hits().await, (0.0, 0.0));
    assert_eq!(ask(&server, 0).await, expected[0]);
    assert_eq!(hits().await, (0.0, 512.0));
    assert_eq!(ask(&server, 0).await, expected[0]);
    assert_eq!(hits().await, (512.0, 512.0), "it is in memory again");
    assert_eq!(ask(&server, 1).await, expected[1]);
    assert_eq!(hits().await, (512.0, 1024.0));
    server.stop().await;
}
