//! Who is served first, and who may see that another one asked the same.

use std::sync::Mutex;

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Running, chat, endless};

/// Sends requests one after the other while nothing can run, lets them run one at a time, and gives the order in which they
/// ended.
async fn order(server: &Running, requests: &[Value]) -> Vec<usize> {
    let with_key: Vec<_> = requests.iter().map(|request| ("key", request.clone())).collect();
    order_of_keys(server, &with_key).await
}

/// The same, each request with its key.
async fn order_of_keys(server: &Running, requests: &[(&str, Value)]) -> Vec<usize> {
    let post = async |key: &str, body: Value| {
        let request = server.client.post(format!("{}/v1/chat/completions", server.url));
        let answer = request.bearer_auth(key).body(body.to_string()).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        answer
    };
    let running = post(requests[0].0, endless()).await;
    let ended = Mutex::new(Vec::new());
    let send = async |i: usize, (key, more): &(&str, Value)| {
        let waiting = async || server.metric("vllm:num_requests_waiting").await == i as f64;
        server.until("those before it wait", waiting).await;
        let mut body = chat("x", more.clone());
        // Much more than is served to the endless one while these arrive: later clients begin at a higher count.
        body["max_tokens"] = json!(2000);
        post(key, body).await.bytes().await.unwrap();
        ended.lock().unwrap().push(i);
    };
    let all = futures::future::join_all(requests.iter().enumerate().map(|(i, more)| send(i, more)));
    let begin = async {
        let waiting = async || server.metric("vllm:num_requests_waiting").await == requests.len() as f64;
        server.until("all wait", waiting).await;
        drop(running);
    };
    futures::join!(all, begin);
    ended.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lower_priority_is_answered_earlier_and_clients_take_turns() {
    let server = Running::start_long("--max-num-seqs 1").await;
    let priority = |priority: i64| json!({ "priority": priority });
    let requests = [priority(5), priority(0), priority(-5)];
    assert_eq!(order(&server, &requests).await, [2, 1, 0]);
    let of = |user: &str| json!({ "user": user });
    let requests = [of("a"), of("a"), of("a"), of("b")];
    assert_eq!(order(&server, &requests).await[..2], [0, 3]);
    let requests = [json!({ "safety_identifier": "c" }), of("c"), of("d")];
    assert_eq!(order(&server, &requests).await, [0, 2, 1]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_gets_no_larger_share_by_naming_many_users() {
    let server = Running::start_long("--max-num-seqs 1 --api-key one --api-key two").await;
    let of = |key: &'static str, user: &str| (key, json!({ "user": user }));
    // By user alone, the last one would wait for all the others.
    let requests = [of("one", "a"), of("one", "b"), of("one", "c"), of("two", "d")];
    let order = order_of_keys(&server, &requests).await;
    assert!(order.iter().position(|i| *i == 3) <= Some(1), "{order:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_salt_keeps_prompts_from_being_found_by_others() {
    let server = Running::start("--max-model-len 512 --enable-prefix-caching").await;
    for (salt, found) in [
        (json!(null), false),
        (json!(null), true),
        (json!("a"), false),
        (json!("a"), true),
        (json!("b"), false),
        (json!(null), true),
    ] {
        let body = chat(&"word ".repeat(20), json!({ "cache_salt": salt, "max_tokens": 1 }));
        let (_, answer) = server.post("/v1/chat/completions", body.to_string()).await;
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        assert_eq!(cached.map(|cached| cached > 0), Some(found), "{salt}: {answer}");
    }
    for salt in [String::new(), "x".repeat(257)] {
        let body = chat("x", json!({ "cache_salt": salt }));
        let (status, answer) = server.post("/v1/chat/completions", body.to_string()).await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["param"]),
            (400, &json!("cache_salt"))
        );
    }
    server.stop().await;
}
