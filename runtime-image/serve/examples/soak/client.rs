//! One client: again and again one of the things that clients do, good and bad, and whether the server took it well.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Failure;

/// Longer than any answer takes while all the others are served too: later, it counts as not answered.
const ANSWER: Duration = Duration::from_secs(120);
/// The model's name.
const MODEL: &str = "tiny";
const SLOW: Duration = Duration::from_millis(20);
/// The first failures; more say nothing new.
const MAX_FAILURES: usize = 10;

/// What all clients saw.
#[derive(Default)]
pub(crate) struct Tally {
    counts: Mutex<BTreeMap<&'static str, u64>>,
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn count(&self, what: &'static str) {
        *self
            .counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(what)
            .or_default() += 1;
    }

    fn fail(&self, what: String) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() < MAX_FAILURES {
            failures.push(what);
        }
    }

    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
    /// Folders of adapters.
    adapters: Vec<PathBuf>,
    random: u64,
    tally: Arc<Tally>,
}

/// What a chat asks for.
struct Asked {
    model: String,
    tokens: u64,
}

impl Asked {
    /// An adapter may have been unloaded; the model never is.
    fn missing(&self) -> Option<StatusCode> {
        (self.model != MODEL).then_some(StatusCode::NOT_FOUND)
    }
}

/// What is done, and how often in relation to the others.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Ask,
    Stream,
    Several,
    SlowStream,
    CancelStream,
    CancelEarly,
    BrokenJson,
    WrongField,
    OversizedPrompt,
    OversizedBody,
    CutBody,
    Swap,
    Look,
}

const DEEDS: [(Deed, u64); 13] = [
    (Deed::Ask, 6),
    (Deed::Stream, 6),
    (Deed::Several, 3),
    (Deed::SlowStream, 2),
    (Deed::CancelStream, 4),
    (Deed::CancelEarly, 4),
    (Deed::BrokenJson, 2),
    (Deed::WrongField, 2),
    (Deed::OversizedPrompt, 1),
    (Deed::OversizedBody, 1),
    (Deed::CutBody, 1),
    (Deed::Swap, 2),
    (Deed::Look, 2),
];

impl Client {
    pub(crate) fn new(url: &str, adapters: Vec<PathBuf>, seed: u64, tally: Arc<Tally>) -> Self {
        Client {
            http: reqwest::Client::new(),
            url: url.to_owned(),
            adapters,
            random: seed,
            tally,
        }
    }

    pub(crate) async fn run(mut self, end: Instant) {
        while Instant::now() < end {
            let deed = self.deed();
            match tokio::time::timeout(ANSWER, self.act(deed)).await {
                Ok(Ok(what)) => self.tally.count(what),
                Ok(Err(error)) => self.tally.fail(format!("{deed:?}: {error}")),
                Err(_) => self
                    .tally
                    .fail(format!("{deed:?}: no answer within {} seconds", ANSWER.as_secs())),
            }
        }
    }

    /// A number below `bound` from a splitmix64 sequence.
    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }

    fn deed(&mut self) -> Deed {
        let mut at = self.below(DEEDS.iter().map(|(_, weight)| weight).sum());
        for (deed, weight) in DEEDS {
            match at.checked_sub(weight) {
                Some(left) => at = left,
                None => return deed,
            }
        }
        Deed::Look
    }

    /// A chat of random length; some share their beginning.
    fn chat(&mut self, more: Value) -> (Value, Asked) {
        let tokens = 1 + self.below(48);
        let shared =
            "A beginning that many conversations share, long enough for some blocks. ".repeat(self.below(3) as usize);
        let own: String = (0..self.below(120))
            .map(|_| char::from_u32(0x20 + self.below(0x500) as u32).unwrap_or('ü'))
            .collect();
        let temperature = self.below(3) as f64 / 2.0;
        let model = match self.below(4) {
            0 => self.adapter(),
            _ => MODEL.to_owned(),
        };
        let mut body = json!({
            "model": model, "messages": [{ "role": "user", "content": shared + &own }], "max_tokens": tokens,
            "temperature": temperature, "ignore_eos": true,
        });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        (body, Asked { model, tokens })
    }

    /// A name of an adapter, which may be loaded or not.
    fn adapter(&mut self) -> String {
        format!("adapter-{}", self.below(self.adapters.len() as u64))
    }

    async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> Result<Response, Failure> {
        Ok(self.http.post(format!("{}{path}", self.url)).body(body).send().await?)
    }

    async fn act(&mut self, deed: Deed) -> Result<&'static str, Failure> {
        match deed {
            Deed::Ask => {
                let logprobs = self.below(2) == 0;
                let (body, asked) = self.chat(json!({ "logprobs": logprobs }));
                let answer = self.post("/v1/chat/completions", body.to_string()).await?;
                whole(answer, &asked, 1).await
            }
            Deed::Several => {
                let n = 2 + self.below(3);
                let (body, asked) = self.chat(json!({ "n": n }));
                let answer = self.post("/v1/chat/completions", body.to_string()).await?;
                whole(answer, &asked, n).await
            }
            Deed::Stream | Deed::SlowStream | Deed::CancelStream => {
                let (body, asked) = self.chat(json!({ "stream": true, "stream_options": { "include_usage": true } }));
                let pieces = if let Deed::CancelStream = deed {
                    self.below(8)
                } else {
                    u64::MAX
                };
                let pause = if let Deed::SlowStream = deed {
                    SLOW
                } else {
                    Duration::ZERO
                };
                let answer = self.post("/v1/chat/completions", body.to_string()).await?;
                stream(answer, &asked, pieces, pause).await
            }
            Deed::CancelEarly => {
                let (body, asked) = self.chat(json!({}));
                let patience = Duration::from_millis(self.below(40));
                match tokio::time::timeout(patience, self.post("/v1/chat/completions", body.to_string())).await {
                    Ok(answer) => whole(answer?, &asked, 1).await,
                    Err(_) => Ok("cancelled before the answer"),
                }
            }
            Deed::BrokenJson => {
                let (body, _) = self.chat(json!({}));
                let text = body.to_string().into_bytes();
                let mut cut = text[..self.below(text.len() as u64) as usize].to_vec();
                if self.below(2) == 0 {
                    cut.push(0xFF);
                }
                refused(
                    self.post("/v1/chat/completions", cut).await?,
                    &[StatusCode::BAD_REQUEST],
                )
                .await
            }
            Deed::WrongField => {
                let wrong = [
                    json!({ "messages": [] }),
                    json!({ "messages": "hi" }),
                    json!({ "max_tokens": -1 }),
                    json!({ "temperature": 1e9 }),
                    json!({ "stop": [""] }),
                    json!({ "top_logprobs": 500, "logprobs": true }),
                    json!({ "messages": [{ "role": "nobody", "content": "x" }] }),
                ];
                let which = self.below(wrong.len() as u64) as usize;
                let (body, _) = self.chat(wrong[which].clone());
                refused(
                    self.post("/v1/chat/completions", body.to_string()).await?,
                    &[StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND],
                )
                .await
            }
            Deed::OversizedPrompt => {
                let body = json!({ "model": "tiny", "prompt": "x".repeat(5000), "max_tokens": 1 });
                refused(
                    self.post("/v1/completions", body.to_string()).await?,
                    &[StatusCode::BAD_REQUEST],
                )
                .await
            }
            Deed::OversizedBody => {
                // The server may close the connection before it has read all of it: then there is no answer to read.
                match self.post("/v1/completions", vec![b' '; 5 << 20]).await {
                    Ok(answer) => refused(answer, &[StatusCode::PAYLOAD_TOO_LARGE]).await,
                    Err(_) => Ok("refused"),
                }
            }
            Deed::CutBody => {
                let address = self.url.trim_start_matches("http://").to_owned();
                let mut connection = tokio::net::TcpStream::connect(&address).await?;
                let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{\"mess";
                connection.write_all(head.as_bytes()).await?;
                if self.below(2) == 0 {
                    return Ok("cut off");
                }
                // A client that never sends the rest is told so within the body's time.
                let mut answer = Vec::new();
                connection.read_to_end(&mut answer).await?;
                let text = String::from_utf8_lossy(&answer);
                match text.split_whitespace().nth(1) {
                    Some("408" | "429") => Ok("refused"),
                    _ => Err(format!("half a body got {text:?}").into()),
                }
            }
            Deed::Swap => {
                let (name, folder) = (self.adapter(), self.below(self.adapters.len() as u64) as usize);
                let (path, body) = match self.below(2) {
                    0 => ("/v1/unload_lora_adapter", json!({ "lora_name": name })),
                    _ => {
                        let body = json!({ "lora_name": name, "lora_path": self.adapters[folder] });
                        ("/v1/load_lora_adapter", body)
                    }
                };
                let answer = self.post(path, body.to_string()).await?;
                match answer.status() {
                    StatusCode::OK => Ok("swapped"),
                    // The name is taken, or not there; or the server has as many as it takes.
                    _ => refused(answer, &[StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND]).await,
                }
            }
            Deed::Look => {
                let paths = ["/metrics", "/health", "/ready", "/v1/models"];
                let path = paths[self.below(paths.len() as u64) as usize];
                let answer = self.http.get(format!("{}{path}", self.url)).send().await?;
                let status = answer.status();
                answer.bytes().await?;
                if status == StatusCode::OK {
                    Ok("looked")
                } else {
                    Err(format!("{path} says {status}").into())
                }
            }
        }
    }
}

/// A refusal with one of these statuses or, as to any request, because the server is full.
async fn refused(answer: Response, statuses: &[StatusCode]) -> Result<&'static str, Failure> {
    let status = answer.status();
    let full = status == StatusCode::TOO_MANY_REQUESTS;
    if full && !answer.headers().contains_key("retry-after") {
        return Err("a full server does not say when to come again".into());
    }
    let body: Value = serde_json::from_slice(&answer.bytes().await?)?;
    if !body["error"]["message"].is_string() {
        return Err(format!("{status} without an error's message: {body}").into());
    }
    match (full, statuses.contains(&status)) {
        (true, _) => Ok("told to come again"),
        (_, true) => Ok("refused"),
        _ => Err(format!("{status}: {body}").into()),
    }
}

/// A whole answer of `n` choices, each with as many tokens as were asked for.
async fn whole(answer: Response, asked: &Asked, n: u64) -> Result<&'static str, Failure> {
    if answer.status() != StatusCode::OK {
        // More than one choice may be more than the server does; it says so.
        let several = (n > 1).then_some(StatusCode::BAD_REQUEST);
        let statuses: Vec<StatusCode> = several.into_iter().chain(asked.missing()).collect();
        return refused(answer, &statuses).await;
    }
    let tokens = asked.tokens;
    let body: Value = serde_json::from_slice(&answer.bytes().await?)?;
    let choices = body["choices"].as_array().ok_or("an answer without choices")?;
    let complete = choices.iter().all(|choice| choice["finish_reason"] == "length");
    if !complete
        || body["model"] != *asked.model
        || choices.len() as u64 != n
        || body["usage"]["completion_tokens"] != tokens * n
    {
        return Err(format!("asked for {n} × {tokens} tokens, got {body}").into());
    }
    Ok("answered")
}

/// A stream, read to its end or left after `pieces` pieces.
async fn stream(mut answer: Response, asked: &Asked, pieces: u64, pause: Duration) -> Result<&'static str, Failure> {
    if answer.status() != StatusCode::OK {
        return refused(answer, asked.missing().as_slice()).await;
    }
    let tokens = asked.tokens;
    let mut bytes = Vec::new();
    let mut read = 0;
    while let Some(piece) = answer.chunk().await? {
        bytes.extend_from_slice(&piece);
        read += 1;
        if read > pieces {
            return Ok("cancelled in the middle");
        }
        tokio::time::sleep(pause).await;
    }
    let text = String::from_utf8(bytes)?;
    let mut events: Vec<&str> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect();
    if events.pop() != Some("[DONE]") {
        return Err(format!("a stream ends with {:?}", events.last()).into());
    }
    let last: Value = serde_json::from_str(events.last().ok_or("an empty stream")?)?;
    if last["usage"]["completion_tokens"] != tokens || last["model"] != *asked.model {
        return Err(format!("asked for {tokens} tokens, got {last}").into());
    }
    Ok("answered")
}
