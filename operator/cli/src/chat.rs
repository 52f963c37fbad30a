//! `strata chat`: a conversation with an InferenceService, through the API server to one of its pods, streamed.

mod endpoint;
mod events;

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use strata_operator::engine::kind::{Ref, ResourceKind};

use crate::cluster::Cluster;
use crate::output;
use crate::resource::{self, Named};
use endpoint::Endpoint;

/// Most bytes of one line that is read as a question.
const QUESTION_LIMIT_BYTES: u64 = 1 << 20;

/// With whom to talk, and how.
#[derive(clap::Args)]
pub struct Arguments {
    /// The InferenceService.
    #[arg(value_name = "NAME")]
    service: String,
    /// Asks this one question; without, each line of standard input is one.
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// What the model is told before the first question.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer.
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// 0 always gives the same answer; without, the model's own default.
    #[arg(long)]
    temperature: Option<f32>,
    /// A key, where spec.auth asks for one.
    #[arg(long, value_name = "KEY", env = "STRATA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Certificates (PEM) that the endpoint's is checked against, where spec.tls is set; without, those of this machine.
    #[arg(long, value_name = "FILE")]
    certificate_authority: Option<PathBuf>,
    #[command(flatten)]
    cluster: Cluster,
}

/// Talks until standard input ends.
pub async fn run(arguments: Arguments) -> Result<()> {
    let connection = arguments.cluster.connect().await?;
    let service = name(&arguments.service)?;
    let all = resource::snapshot(&connection).await?;
    let item = resource::find(&all, &service, &connection.namespace)?;
    if item.replicas.is_none_or(|(ready, _)| ready == 0) {
        bail!("no pod of {service} answers yet: {}: {}", item.reason, item.message);
    }
    let endpoint = Endpoint::of(connection, &service.name, arguments.certificate_authority.as_deref()).await?;
    let mut talk = Talk {
        arguments: &arguments,
        endpoint,
        model: service.name.clone(),
        said: Vec::new(),
    };
    if let Some(system) = &arguments.system {
        talk.said.push(json!({"role": "system", "content": system}));
    }
    if let Some(question) = &arguments.message {
        return talk.ask(question).await;
    }
    let person = io::stdin().is_terminal() && io::stdout().is_terminal();
    if person {
        output::say(&format!("talking to {service}; an empty line or Ctrl-D ends it"));
    }
    loop {
        if person {
            output::print("> ")?;
        }
        let Some(question) = line().await? else { return Ok(()) };
        match question.trim() {
            "" if person => return Ok(()),
            "" => {}
            question => talk.ask(question).await?,
        }
    }
}

/// `NAME`, also as `isvc/NAME`.
fn name(text: &str) -> Result<Ref> {
    let Named(name) = match text.contains('/') {
        true => text.parse().map_err(anyhow::Error::msg)?,
        false => Named(Ref {
            kind: ResourceKind::InferenceService,
            name: text.to_owned(),
        }),
    };
    if name.kind != ResourceKind::InferenceService {
        bail!("{name} does not answer: only an InferenceService does; write one that has it as spec.model");
    }
    Ok(name)
}

/// The next line of standard input.
async fn line() -> Result<Option<String>> {
    let read = || {
        let mut line = String::new();
        let mut limited = io::Read::take(io::stdin().lock(), QUESTION_LIMIT_BYTES);
        io::BufRead::read_line(&mut limited, &mut line).map(|bytes| (bytes > 0).then_some(line))
    };
    tokio::task::spawn_blocking(read)
        .await?
        .context("standard input is no text")
}

struct Talk<'a> {
    arguments: &'a Arguments,
    endpoint: Endpoint,
    model: String,
    /// The conversation so far: the model itself remembers nothing.
    said: Vec<Value>,
}

impl Talk<'_> {
    async fn ask(&mut self, question: &str) -> Result<()> {
        self.said.push(json!({"role": "user", "content": question}));
        let mut body = json!({"model": self.model, "stream": true, "messages": self.said});
        if let Some(tokens) = self.arguments.max_tokens {
            body["max_tokens"] = tokens.into();
        }
        if let Some(temperature) = self.arguments.temperature {
            body["temperature"] = temperature.into();
        }
        let answer = self
            .endpoint
            .stream(&body, self.arguments.api_key.as_deref(), output::print)
            .await;
        self.said.push(json!({"role": "assistant", "content": answer?}));
        output::print("\n")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_inference_service_is_talked_to() {
        for text in ["chat", "isvc/chat", "inferenceservice.strata.dev/chat"] {
            assert_eq!(name(text).unwrap().to_string(), "InferenceService/chat");
        }
        assert!(
            name("pj/base")
                .unwrap_err()
                .to_string()
                .contains("only an InferenceService")
        );
    }
}
