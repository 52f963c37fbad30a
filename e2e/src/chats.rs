//! Clients that chat without end, each chat on a connection of its own, and none of them may fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Longest time for one answer: all of them share a few slow cores.
const ANSWER_DEADLINE: Duration = Duration::from_secs(240);

/// How an endpoint is reached.
#[derive(Clone)]
pub enum Way {
    /// By its address: the cluster is on this machine.
    Address(String),
    /// Through the API server, which asks a ready pod: namespace and name of the Service.
    Proxy(Client, String, String),
}

impl Way {
    /// The address of a Service of a cluster on this machine.
    ///
    /// # Errors
    /// There is no such Service.
    pub async fn to_service(client: &Client, namespace: &str, name: &str) -> Result<Self> {
        let service = Api::<Service>::namespaced(client.clone(), namespace).get(name).await?;
        let address = service
            .spec
            .and_then(|spec| spec.cluster_ip)
            .context("it has no address")?;
        Ok(Self::Address(format!("http://{address}")))
    }

    /// The whole of a streamed answer.
    async fn post(&self, body: &Value) -> Result<String> {
        let path = "/v1/chat/completions";
        match self {
            Self::Address(base) => {
                // A client of its own has a connection of its own, and so another pod may answer.
                let client = reqwest::Client::builder().no_proxy().build()?;
                let response = client.post(format!("{base}{path}")).json(body).send().await?;
                let status = response.status();
                let text = response.text().await.context("the answer broke off")?;
                ensure!(status.is_success(), "{status}: {text}");
                Ok(text)
            }
            Self::Proxy(client, namespace, service) => {
                let uri = format!("/api/v1/namespaces/{namespace}/services/{service}:http/proxy{path}");
                let request = http::Request::post(uri).header("content-type", "application/json");
                Ok(client
                    .request_text(request.body(body.to_string().into_bytes())?)
                    .await?)
            }
        }
    }
}

/// What clients share.
#[derive(Default)]
struct Shared {
    is_over: AtomicBool,
    answers: AtomicUsize,
}

/// Clients that chat.
pub struct Chats {
    shared: Arc<Shared>,
    clients: JoinSet<Result<()>>,
}

impl Chats {
    /// Lets so many clients ask `model` for answers of exactly so many tokens, one after the other.
    #[must_use]
    pub fn start(way: &Way, model: &str, clients: usize, tokens: u32) -> Self {
        let shared = Arc::new(Shared::default());
        let mut set = JoinSet::new();
        for number in 0..clients {
            let (way, model, shared) = (way.clone(), model.to_owned(), shared.clone());
            set.spawn(async move {
                let mut turn = 0;
                while !shared.is_over.load(Ordering::Relaxed) {
                    turn += 1;
                    let question =
                        format!("Client {number} asks for the {turn}. time: tell me a story about a good neighbour.");
                    let asked = tokio::time::timeout(ANSWER_DEADLINE, ask(&way, &model, &question, tokens)).await;
                    asked
                        .context("no answer in time")
                        .flatten()
                        .with_context(|| format!("chat {turn} of client {number} failed"))?;
                    shared.answers.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
        }
        Self { shared, clients: set }
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> usize {
        self.shared.answers.load(Ordering::Relaxed)
    }

    /// Waits for the answers under way; returns how many there were in all.
    ///
    /// # Errors
    /// A chat failed at any time, or was cut off.
    pub async fn finish(mut self) -> Result<usize> {
        self.shared.is_over.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client??;
        }
        Ok(self.answers())
    }
}

/// One chat. What it checks is that the answer is whole: it has its last event, and ended for its length.
async fn ask(way: &Way, model: &str, question: &str, tokens: u32) -> Result<()> {
    let body = json!({
        "model": model, "stream": true, "temperature": 0.7, "max_tokens": tokens, "ignore_eos": true,
        "messages": [{"role": "user", "content": question}],
    });
    let text = way.post(&body).await?;
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    ensure!(events.last() == Some(&"[DONE]"), "the stream has no end: {text:.300}");
    let ended = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .find_map(|event| event["choices"][0]["finish_reason"].as_str().map(str::to_owned));
    ensure!(ended.as_deref() == Some("length"), "the answer was cut off: {ended:?}");
    Ok(())
}
