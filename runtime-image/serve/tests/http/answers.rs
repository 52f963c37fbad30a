//! What is answered, and that nothing but the request decides it.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat, events};

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
    server.until_blocks_are_free().await;
    assert_eq!(
        server.metric("vllm:generation_tokens_total").await,
        9.0 * ANSWER_TOKENS as f64
    );
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
    // Several prompts are answered as each alone, and with echo after their text.
    let several = json!({ "prompt": ["abc", "xyz"], "n": 2, "echo": true });
    let both = answer(several.clone()).await;
    let other = text(json!({ "prompt": "xyz" })).await;
    let expected = [format!("abc{plain}"), format!("xyz{other}")];
    let choices = both["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, [&*expected[0], &expected[0], &expected[1], &expected[1]]);
    assert_eq!(
        (&both["usage"]["prompt_tokens"], &both["usage"]["completion_tokens"]),
        (&json!(6), &json!(80))
    );
    let mut body = json!({ "temperature": 0, "max_tokens": 20, "ignore_eos": true, "stream": true });
    body.as_object_mut()
        .unwrap()
        .extend(several.as_object().unwrap().clone());
    let stream = server.stream("/v1/completions", body).await.text().await.unwrap();
    let mut streamed = vec![String::new(); 4];
    for chunk in events(&stream) {
        let choice = &chunk["choices"][0];
        streamed[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    assert_eq!(streamed, texts);
    // The stop text is not part of the answer.
    let ascii: String = plain.chars().filter(char::is_ascii).collect();
    let stop = &ascii[ascii.len() / 2..ascii.len() / 2 + 1];
    let stopped = answer(json!({ "stop": [stop] })).await;
    assert_eq!(stopped["choices"][0]["text"].as_str(), plain.split(stop).next());
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let shown = text(json!({ "stop": [stop], "include_stop_str_in_output": true })).await;
    assert_eq!(shown, format!("{}{stop}", plain.split(stop).next().unwrap()));
    // Tokens here are bytes: a bias forces one or forbids one, and one can end the answer, but not before its time.
    assert_eq!(text(json!({ "logit_bias": { "122": 100 } })).await, "z".repeat(20));
    assert_eq!(
        text(json!({ "logit_bias": { "122": 90, "121": 80 }, "repetition_penalty": 2 })).await,
        format!("zy{}", "z".repeat(18)),
        "a token that was seen is punished once"
    );
    let ended =
        answer(json!({ "logit_bias": { "122": 100 }, "stop_token_ids": [122], "min_tokens": 3, "ignore_eos": false }))
            .await;
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");
    assert_eq!(ended["usage"]["completion_tokens"], 4);
    assert!(!ended["choices"][0]["text"].as_str().unwrap().contains('z'), "{ended}");
    let special = async |skip: bool| {
        text(json!({ "logit_bias": { "258": 100 }, "max_tokens": 2, "skip_special_tokens": skip })).await
    };
    assert_eq!(
        (special(true).await, special(false).await),
        (String::new(), "<|im_end|><|im_end|>".to_owned())
    );
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
async fn azure_paths_are_answered_as_openais() {
    let server = Running::start("--max-model-len 256").await;
    let content = async |path: &str, body: Value| {
        let (status, answer) = server.post(path, body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        let choice = &answer["choices"][0];
        choice["message"]["content"]
            .as_str()
            .or(choice["text"].as_str())
            .unwrap()
            .to_owned()
    };
    let said = content("/v1/chat/completions", chat("x", json!({}))).await;
    let mut without_model = chat("x", json!({}));
    without_model.as_object_mut().unwrap().remove("model");
    for (path, body) in [
        ("/openai/v1/chat/completions", chat("x", json!({}))),
        // The path says what is asked; Azure does not look at the body's model.
        (
            "/openai/deployments/tiny/chat/completions?api-version=2024-10-21",
            chat("x", json!({ "model": "gpt-4o" })),
        ),
        (
            "/openai/deployments/tiny/chat/completions?api-version=2024-10-21",
            without_model,
        ),
    ] {
        assert_eq!(content(path, body).await, said, "{path}");
    }
    let completion = json!({ "prompt": "abc", "temperature": 0, "max_tokens": 8, "ignore_eos": true });
    let written = content("/v1/completions", completion.clone()).await;
    let path = "/openai/deployments/other/completions?api-version=2024-10-21";
    assert_eq!(content(path, completion).await, written);
    for path in ["/openai/v1/models", "/openai/models?api-version=2024-10-21"] {
        assert_eq!(server.get(path).await, server.get("/v1/models").await, "{path}");
    }
    // As with Azure where no filter judged: the fields are there, and say nothing.
    let path = "/openai/deployments/tiny/chat/completions?api-version=2024-10-21";
    let (_, answer) = server.post(path, chat("x", json!({ "n": 2 })).to_string()).await;
    let prompt = json!([{ "prompt_index": 0, "content_filter_results": {} }]);
    assert_eq!(answer["prompt_filter_results"], prompt);
    assert_eq!(answer["choices"][1]["content_filter_results"], json!({}));
    let stream = server.stream(path, chat("x", json!({ "stream": true }))).await;
    let chunks = events(&stream.text().await.unwrap());
    assert_eq!(
        (&chunks[0]["choices"], &chunks[0]["prompt_filter_results"]),
        (&json!([]), &prompt)
    );
    assert!(
        chunks[1..]
            .iter()
            .all(|chunk| chunk["choices"][0]["content_filter_results"] == json!({}))
    );
    let (_, openai) = server
        .post("/v1/chat/completions", chat("x", json!({})).to_string())
        .await;
    assert!(!openai.to_string().contains("filter"), "{openai}");
    let (status, answer) = server
        .post(
            "/openai/deployments/gpt-4/chat/completions",
            chat("x", json!({})).to_string(),
        )
        .await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::NOT_FOUND, &json!("DeploymentNotFound"))
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_echo_has_the_log_probabilities_that_its_tokens_would_have_as_answers_whatever_is_cached() {
    // Small blocks and steps: the prompt is in the cache when it is asked about, and computed in several steps.
    let server =
        Running::start("--max-model-len 256 --enable-prefix-caching --block-size 4 --max-num-batched-tokens 7").await;
    let prompt = "The quick brown fox jumps";
    let body = |more: Value| {
        let mut body = json!({ "prompt": prompt, "temperature": 0, "ignore_eos": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let ask = async |more: Value| {
        let (status, answer) = server.post("/v1/completions", body(more).to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let mut expected = vec![Value::Null];
    for (i, byte) in prompt.bytes().enumerate().skip(1) {
        // Biases do not count: the probability is the model's own.
        let bias = json!({ byte.to_string(): 100 });
        let one = ask(json!({ "prompt": prompt[..i], "max_tokens": 1, "logprobs": 0, "logit_bias": bias })).await;
        expected.push(one["choices"][0]["logprobs"]["token_logprobs"][0].clone());
    }
    let answer = ask(json!({ "max_tokens": 3, "logprobs": 0 })).await["choices"][0].clone();
    expected.extend(answer["logprobs"]["token_logprobs"].as_array().unwrap().clone());

    let echoed = ask(json!({ "max_tokens": 3, "logprobs": 2, "echo": true, "n": 2 })).await;
    for choice in echoed["choices"].as_array().unwrap() {
        let text = format!("{prompt}{}", answer["text"].as_str().unwrap());
        assert_eq!(choice["text"], text);
        let said = &choice["logprobs"];
        assert_eq!(said["token_logprobs"], json!(expected));
        assert_eq!((&said["tokens"][0], &said["tokens"][24]), (&json!("T"), &json!("s")));
        assert_eq!(
            (&said["top_logprobs"][0], &said["text_offset"][24]),
            (&Value::Null, &json!(24))
        );
        assert_eq!(said["top_logprobs"][1].as_object().map(|top| top.len()), Some(2));
    }
    assert_eq!(echoed["usage"]["prompt_tokens_details"]["cached_tokens"], 0);

    let mut streamed = Vec::new();
    let stream = body(json!({ "max_tokens": 3, "logprobs": 2, "echo": true, "stream": true }));
    for chunk in events(&server.stream("/v1/completions", stream).await.text().await.unwrap()) {
        let probs = chunk["choices"][0]["logprobs"]["token_logprobs"].clone();
        streamed.extend(probs.as_array().cloned().unwrap_or_default());
    }
    assert_eq!(streamed, expected);

    let only = ask(json!({ "max_tokens": 0, "logprobs": 0, "echo": true })).await;
    let choice = &only["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(prompt), &json!("length"))
    );
    assert_eq!(choice["logprobs"]["token_logprobs"], json!(expected[..prompt.len()]));
    assert_eq!(only["usage"]["completion_tokens"], 0);
    server.stop().await;
}
