//! Talking to an endpoint as any OpenAI client does: through a port-forward, with server-sent events.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::bed::network::http;

/// Longest time for one answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(180);

/// A running `kubectl port-forward` to a Service; ends when dropped.
#[derive(Debug)]
pub struct Forward {
    url: String,
    _kubectl: tokio::process::Child,
}

impl Forward {
    /// Forwards a free local port to port 80 of `service`.
    ///
    /// # Errors
    /// kubectl ended, or said nothing for a while.
    pub async fn start(mut kubectl: Command, namespace: &str, service: &str) -> Result<Self> {
        kubectl
            .args(["-n", namespace, "port-forward", "--address", "127.0.0.1"])
            .args([&format!("service/{service}"), ":80"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = tokio::process::Command::from(kubectl).kill_on_drop(true).spawn()?;
        let output = child.stdout.take().context("standard output is piped")?;
        let mut lines = BufReader::new(output).lines();
        let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line())
            .await
            .context("kubectl port-forward says nothing")??
            .context("kubectl port-forward ended")?;
        // "Forwarding from 127.0.0.1:43211 -> 8000"
        let port = line
            .split(':')
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or_default();
        let url = format!(
            "http://127.0.0.1:{}",
            port.parse::<u16>().with_context(|| format!("no port in {line:?}"))?
        );
        // Its later lines ("Handling connection …") must be read, or the pipe fills.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { url, _kubectl: child })
    }

    /// Where the endpoint answers on this machine.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks `question` of `model`, greedily, and hands each piece of the streamed answer to `show`; returns it whole.
    ///
    /// # Errors
    /// The endpoint refused, or the stream ended early.
    pub async fn chat(&self, model: &str, question: &str, mut show: impl FnMut(&str)) -> Result<String> {
        let body = json!({
            "model": model, "stream": true, "temperature": 0, "max_tokens": 160,
            "messages": [{"role": "user", "content": question}],
        });
        let request = http()?.post(format!("{}/v1/chat/completions", self.url)).json(&body);
        let response = request.timeout(ANSWER_DEADLINE).send().await?;
        if !response.status().is_success() {
            bail!("the endpoint said {}: {}", response.status(), response.text().await?);
        }
        let mut stream = response.bytes_stream();
        let (mut pending, mut answer) = (Vec::new(), String::new());
        while let Some(bytes) = stream.next().await {
            pending.extend_from_slice(&bytes?);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let line = String::from_utf8(line)?;
                match line.trim_end().strip_prefix("data: ") {
                    Some("[DONE]") => return Ok(answer),
                    Some(event) => {
                        let event: Value = serde_json::from_str(event)?;
                        if let Some(piece) = event["choices"][0]["delta"]["content"].as_str() {
                            show(piece);
                            answer.push_str(piece);
                        }
                    }
                    None => {}
                }
            }
        }
        bail!("the stream ended without [DONE]")
    }
}
