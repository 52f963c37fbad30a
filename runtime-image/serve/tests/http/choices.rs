//! Several answers to one request.

use std::collections::HashSet;

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat, endless, events};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn choices_are_drawn_apart_from_one_prompt_and_the_first_is_the_answer_that_it_would_be_alone() {
    let server = Running::start("--max-model-len 256").await;
    let ask = |more: Value| {
        let mut body = json!({ "temperature": 1.5, "seed": 7, "max_tokens": 20 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        chat("some words for a prompt", body)
    };
    let answer = async |more: Value| {
        let (status, answer) = server.post("/v1/chat/completions", ask(more).to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap().iter().enumerate();
        let text = choices.map(|(i, choice)| {
            assert_eq!(
                (&choice["index"], &choice["finish_reason"]),
                (&json!(i), &json!("length"))
            );
            choice["message"]["content"].as_str().unwrap().to_owned()
        });
        text.collect()
    };
    let one = answer(json!({})).await;
    let before = server.metric("vllm:prompt_tokens_total").await;
    let four = answer(json!({ "n": 4 })).await;
    let prompt = one["usage"]["prompt_tokens"].as_f64().unwrap();
    assert_eq!(server.metric("vllm:prompt_tokens_total").await, before + prompt);
    let (first, all) = (texts(&one), texts(&four));
    assert_eq!(first[0], all[0]);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 4, "{all:?}");
    assert_eq!(four["usage"]["prompt_tokens"].as_f64(), Some(prompt));
    assert_eq!(four["usage"]["completion_tokens"], 80);
    assert_eq!(four["usage"]["total_tokens"].as_f64(), Some(prompt + 80.0));

    let options = json!({ "n": 4, "stream": true, "stream_options": { "include_usage": true } });
    let streamed = server.stream("/v1/chat/completions", ask(options)).await;
    let chunks = events(&streamed.text().await.unwrap());
    let mut written = vec![String::new(); 4];
    let mut ended = [0; 4];
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        let index = choice["index"].as_u64().unwrap() as usize;
        written[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        ended[index] += usize::from(!choice["finish_reason"].is_null());
    }
    assert_eq!((written, ended), (all, [1; 4]));
    assert_eq!(chunks.last().unwrap()["usage"], four["usage"]);

    // Plain completions count the offsets of each choice for itself.
    let body = json!({ "prompt": "abc", "n": 2, "seed": 3, "max_tokens": 9, "logprobs": 0, "ignore_eos": true });
    let (_, plain) = server.post("/v1/completions", body.to_string()).await;
    for choice in plain["choices"].as_array().unwrap() {
        let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
        assert_eq!((offsets.len(), &offsets[0]), (9, &json!(0)));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn choices_are_bounded_and_a_client_that_goes_ends_them_all() {
    let server = Running::start_long("--max-num-seqs 3 --max-num-waiting 0").await;
    for (n, most) in [(0, 3), (4, 3), (-1, 3)] {
        let (status, answer) = server
            .post("/v1/chat/completions", chat("x", json!({ "n": n })).to_string())
            .await;
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("n")));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(&format!("between 1 and {most}")), "{message}");
    }
    let mut body = endless();
    body["n"] = json!(3);
    let mut three = server.stream("/v1/chat/completions", body).await;
    assert!(three.chunk().await.unwrap().is_some());
    server
        .until("all three run", async || {
            server.metric("vllm:num_requests_running").await == 3.0
        })
        .await;
    assert_eq!(server.ask_status().await, 429, "each choice takes a place");
    drop(three);
    server
        .until("their places are free", async || server.ask_status().await == 200)
        .await;
    server.until_blocks_are_free().await;
    server.stop().await;
}

impl Running {
    async fn ask_status(&self) -> u16 {
        let body = chat("y", json!({ "max_tokens": 1 }));
        self.stream("/v1/chat/completions", body).await.status().as_u16()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_best_of_several_are_the_likeliest_ones_and_all_are_counted() {
    let server = Running::start("--max-model-len 256").await;
    let ask = async |more: Value| {
        let mut body =
            json!({ "prompt": ["abc", "xyz"], "temperature": 1.5, "seed": 7, "max_tokens": 12, "ignore_eos": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (status, answer) = server.post("/v1/completions", body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let all = ask(json!({ "n": 4, "logprobs": 0 })).await;
    let likelihood = |choice: &Value| {
        let probs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        probs.iter().map(|prob| prob.as_f64().unwrap()).sum::<f64>() / probs.len() as f64
    };
    let mut expected = Vec::new();
    for group in all["choices"].as_array().unwrap().chunks(4) {
        let mut group = group.to_vec();
        group.sort_by(|a, b| likelihood(b).total_cmp(&likelihood(a)));
        expected.extend(group[..2].iter().map(|choice| choice["text"].clone()));
    }
    let best = ask(json!({ "n": 2, "best_of": 4 })).await;
    let choices = best["choices"].as_array().unwrap();
    let texts: Vec<Value> = choices.iter().map(|choice| choice["text"].clone()).collect();
    assert_eq!(texts, expected);
    for (i, choice) in choices.iter().enumerate() {
        assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(i), &Value::Null));
    }
    assert_eq!(best["usage"]["completion_tokens"], 2 * 4 * 12);
    let shown = ask(json!({ "best_of": 4, "logprobs": 1 })).await;
    assert_eq!(
        shown["choices"][0]["logprobs"]["tokens"].as_array().map(Vec::len),
        Some(12)
    );
    server.stop().await;
}
