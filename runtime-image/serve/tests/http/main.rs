//! The OpenAI API over a real socket, with a synthetic model.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

mod access;
mod adapters;
mod answers;
mod choices;
mod document;
mod embeddings;
mod fairness;
mod forms;
mod life;
mod metrics;
#[path = "../peft/mod.rs"]
mod peft;
mod refusals;
mod responses;
#[path = "../../../model/tests/shipped/mod.rs"]
mod shipped;
mod speculation;
mod spill;
mod tools;

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
/// More tokens than any machine makes while a test runs: each costs more than the one before it.
const ENDLESS: usize = 1 << 18;

/// What a test gives stands last and counts.
#[derive(Parser)]
#[command(args_override_self = true)]
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
        Self::start_with(2048, arguments).await
    }

    /// A server of which [`endless`] requests can be asked, one at a time.
    async fn start_long(arguments: &str) -> Running {
        let cache = format!("--max-model-len {ENDLESS} --kv-cache-memory-bytes {}", ENDLESS * 256);
        Self::start_with(ENDLESS, &format!("{cache} {arguments}")).await
    }

    async fn start_with(max_positions: usize, arguments: &str) -> Running {
        let running = Self::begin(max_positions, arguments).await;
        running
            .until("the model is loaded", async || {
                running.get("/ready").await.0 == StatusCode::OK
            })
            .await;
        running
    }

    /// A server that may not have loaded its model yet.
    async fn begin(max_positions: usize, arguments: &str) -> Running {
        let folder = tempfile::tempdir().unwrap();
        write_model(
            folder.path(),
            &ModelConfig {
                max_positions,
                ..tiny_config()
            },
        );
        Self::begin_in(folder, arguments).await
    }

    /// A server of the model in `folder`, which may not have loaded it yet.
    async fn begin_in(folder: tempfile::TempDir, arguments: &str) -> Running {
        let server = Server::start(Self::arguments(folder.path(), arguments)).await.unwrap();
        let url = format!("http://{}", server.address());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.run_until(async {
            let _ = stopped.await;
        }));
        Running {
            url,
            client: client(),
            stop: Some(stop),
            task,
            _folder: folder,
        }
    }

    fn arguments(model: &Path, more: &str) -> ServeArgs {
        let line = format!(
            "serve --served-model-name tiny other --host 127.0.0.1 --port 0 --shutdown-delay 0 --model {} {more}",
            model.display()
        );
        Cli::parse_from(line.split_whitespace()).serve
    }

    /// Why a server with these arguments does not start.
    async fn refused(arguments: &str) -> ServeError {
        let started = Server::start(Self::arguments(Path::new("."), arguments)).await;
        started.err().expect("it does not start")
    }

    async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition().await {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the cache has given back all blocks.
    async fn until_blocks_are_free(&self) {
        let are_free = async || self.metric("vllm:kv_cache_usage_perc").await == 0.0;
        self.until("all blocks are free", are_free).await;
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

fn client() -> Client {
    // Also for plain HTTP, since reqwest has TLS in this workspace. Another test may have been first.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    Client::new()
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

/// A streamed chat that ends only if somebody ends it.
fn endless() -> Value {
    chat("x", json!({ "stream": true, "max_tokens": ENDLESS - 100 }))
}
