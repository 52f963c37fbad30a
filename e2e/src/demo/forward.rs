//! The way from this machine to an endpoint for any client: a port-forward.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncBufReadExt as _, BufReader};

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
}
