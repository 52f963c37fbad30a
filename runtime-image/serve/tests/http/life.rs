//! More than the server takes, clients that go or never finish, and the server's own end.

use futures::future::select_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{DEADLINE, ENDLESS, Running, chat, endless, events};

impl Running {
    /// Sends the head of a request with a body of `length` bytes, and nothing of the body.
    async fn head(&self, path: &str, length: usize) -> TcpStream {
        let address = self.url.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    /// A chat's status, and whether its connection stays.
    async fn ask(&self) -> (u16, bool) {
        let body = chat("y", json!({ "max_tokens": 1 }));
        let response = self.stream("/v1/chat/completions", body).await;
        let stays = response
            .headers()
            .get("connection")
            .is_none_or(|value| value != "close");
        (response.status().as_u16(), stays)
    }

    /// Sends SIGTERM, so to speak, and waits until readiness probes see it.
    async fn terminate(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.until("not ready", async || {
            self.get("/ready").await.0 == StatusCode::SERVICE_UNAVAILABLE
        })
        .await;
    }

    /// Waits for the server's end.
    async fn ended(self) {
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

/// Reads to the end of the connection.
async fn read(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A server that closes while the client still could send may reset the connection: what came until then counts.
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_can_never_start_ends_and_says_what_to_change() {
    for (arguments, words) in [
        ("--max-model-len 2049", "the model has 2048 positions"),
        (
            "--max-model-len 2048 --kv-cache-memory-bytes 40960",
            "raise --kv-cache-memory-bytes",
        ),
        ("--kv-cache-memory-bytes 1", "give it at least that"),
    ] {
        let server = Running::begin(2048, arguments).await;
        let error = tokio::time::timeout(DEADLINE, server.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap_err();
        assert!(
            error.is_bad_input() && error.to_string().contains(words),
            "{arguments}: {error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_says_when_to_come_back_and_a_gone_client_frees_its_place() {
    let server = Running::start_long("--max-num-seqs 1 --max-num-waiting 0").await;
    let first = server.stream("/v1/chat/completions", endless()).await;
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
        .until("the place is free", async || server.ask().await.0 == 200)
        .await;
    server.until_blocks_are_free().await;
    let generated = server.metric("vllm:generation_tokens_total").await;
    assert!(
        generated < (ENDLESS / 2) as f64,
        "{generated} tokens were made of an answer that nobody waited for"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_the_server_can_hold_is_refused_before_it_is_read() {
    let server = Running::start("--body-timeout 3600").await;
    // 16 bodies of 4 MiB are what it holds, so one of 17 is refused.
    let mut holding = Vec::new();
    for _ in 0..17 {
        holding.push(server.head("/v1/completions", 4 << 20).await);
    }
    let answers = holding.iter_mut().map(|stream| Box::pin(read(stream)));
    let (answer, ..) = tokio::time::timeout(DEADLINE, select_all(answers)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    for path in ["/v1/chat/completions", "/tokenize", "/detokenize"] {
        let answer = read(&mut server.head(path, 10).await).await;
        assert!(answer.starts_with("HTTP/1.1 429 "), "{path}: {answer}");
        assert!(
            answer.contains("retry-after: 1") && answer.contains("rate_limit_exceeded"),
            "{answer}"
        );
    }
    drop(holding);
    server
        .until("there is room again", async || server.ask().await.0 == 200)
        .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_sends_its_body_is_told_so_and_lets_go() {
    let server = Running::start("--body-timeout 1").await;
    let mut stream = server.head("/v1/chat/completions", 10).await;
    stream.write_all(b"{").await.unwrap();
    let answer = tokio::time::timeout(DEADLINE, read(&mut stream)).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 408 ") && answer.contains("within 1 seconds"),
        "{answer}"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_sigterm_it_is_not_ready_and_still_answers_whoever_has_not_heard_of_it() {
    let mut server = Running::start("--shutdown-delay 3600").await;
    assert_eq!(server.ask().await, (200, true));
    server.terminate().await;
    // The connection closes, so that a client that keeps it finds another server.
    assert_eq!(server.ask().await, (200, false));
    assert_eq!(server.get("/health").await.0, StatusCode::OK, "liveness must not fail");
    server.task.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_refuses_what_is_new_and_goes_on_with_what_runs() {
    let mut server = Running::start_long("--shutdown-delay 0 --shutdown-timeout 3600").await;
    let mut running = server.stream("/v1/chat/completions", endless()).await;
    server.terminate().await;
    server
        .until("new requests are refused", async || server.ask().await.0 == 503)
        .await;
    let before = server.metric("vllm:generation_tokens_total").await;
    server
        .until("the running answer goes on", async || {
            server.metric("vllm:generation_tokens_total").await > before
        })
        .await;
    assert!(running.chunk().await.unwrap().is_some());
    drop(running);
    server.ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_every_answer_properly_by_itself_or_at_the_timeout() {
    let short = chat("x", json!({ "stream": true, "max_tokens": 200 }));
    for (timeout, request, reason) in [(3600, short, "length"), (0, endless(), "abort")] {
        let mut server = Running::start_long(&format!("--shutdown-delay 0 --shutdown-timeout {timeout}")).await;
        let running = server.stream("/v1/chat/completions", request).await;
        server.stop.take().unwrap().send(()).unwrap();
        let chunks = events(&running.text().await.unwrap());
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], reason);
        server.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_sends_a_whole_request_loses_the_connection_and_holds_up_nobody_for_long() {
    let server = Running::start("--max-connections 3 --header-timeout 1").await;
    let address = server.url.strip_prefix("http://").unwrap();
    let mut slow = Vec::new();
    for _ in 0..9 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ")
            .await
            .unwrap();
        slow.push(stream);
    }
    // More than there are places: this one is answered when they have lost theirs.
    assert_eq!(tokio::time::timeout(DEADLINE, server.ask()).await.unwrap().0, 200);
    for mut stream in slow {
        let said = tokio::time::timeout(DEADLINE, read(&mut stream)).await.unwrap();
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 408 "), "{said}");
    }
    server.stop().await;
}
