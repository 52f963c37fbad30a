//! `strata logs`: what the pods of a resource say: those that serve, or those of the stage's current attempt.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, LogParams};
use kube::{Api, ResourceExt as _};
use strata_operator::engine::kind::{Ref, ResourceKind};
use strata_operator::workload::labels;
use tokio::sync::mpsc;

use crate::cluster::{Cluster, Connection, explain};
use crate::output;
use crate::resource::{self, Item, Named};

/// Time between two looks at a pod that has not started.
const LOOK: Duration = Duration::from_secs(1);
/// Lines that may wait for a slow reader; the pods' own logs keep the rest.
const LINES_AHEAD: usize = 256;

/// Whose log to show.
#[derive(clap::Args)]
pub struct Arguments {
    /// The resource, as alignmentjob/assistant.
    #[arg(value_name = "KIND/NAME")]
    resource: Named,
    /// Goes on with what is said from now on; waits for a pod that has not started.
    #[arg(short, long)]
    follow: bool,
    /// Of an InferenceService: the stage that prepares its weights, instead of the pods that serve.
    #[arg(long)]
    stage: bool,
    /// Only so many of the last lines of each pod.
    #[arg(long, value_name = "LINES", value_parser = clap::value_parser!(i64).range(0..))]
    tail: Option<i64>,
    #[command(flatten)]
    cluster: Cluster,
}

/// Prints the log; that of several pods line by line, with the pod's name before each.
pub async fn run(arguments: Arguments) -> Result<()> {
    let connection = arguments.cluster.connect().await?;
    let pods = started(&connection, &arguments).await?;
    let api: Api<Pod> = Api::namespaced(connection.client, &connection.namespace);
    let (sender, mut lines) = mpsc::channel(LINES_AHEAD);
    let several = pods.len() > 1;
    for pod in pods {
        let (api, sender) = (api.clone(), sender.clone());
        let parameters = LogParams {
            follow: arguments.follow,
            tail_lines: arguments.tail,
            ..LogParams::default()
        };
        tokio::spawn(async move {
            let outcome = read(&api, &pod, &parameters, several, &sender).await;
            if let Err(error) = outcome {
                let _ = sender.send(Err(error)).await;
            }
        });
    }
    drop(sender);
    let mut failed = None;
    while let Some(line) = lines.recv().await {
        match line {
            Ok(line) => output::print(&line)?,
            // The other pods' logs are wanted all the same.
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(()), Err)
}

async fn read(
    api: &Api<Pod>,
    pod: &str,
    parameters: &LogParams,
    several: bool,
    sender: &mpsc::Sender<Result<String>>,
) -> Result<()> {
    let what = || format!("read the log of pod {pod}");
    let stream = api
        .log_stream(pod, parameters)
        .await
        .map_err(|error| explain(error, &what()))?;
    let mut lines = stream.lines();
    while let Some(line) = lines.try_next().await.with_context(what)? {
        let line = if several {
            format!("[{pod}] {line}\n")
        } else {
            format!("{line}\n")
        };
        if sender.send(Ok(line)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// The names of the pods to read, once one of them has begun to say something.
async fn started(connection: &Connection, arguments: &Arguments) -> Result<Vec<String>> {
    let name = &arguments.resource.0;
    let api: Api<Pod> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let selector = labels::selector(name.kind, &name.name);
    let mut said = String::new();
    loop {
        let all = resource::snapshot(connection).await?;
        let item = resource::find(&all, name, &connection.namespace)?;
        let pods = api.list(&ListParams::default().labels(&selector)).await;
        let pods = pods.map_err(|error| explain(error, "list the pods"))?.items;
        let waiting = match choose(name, item, &pods, arguments.stage) {
            Ok(started) => return Ok(started),
            Err(waiting) => waiting,
        };
        if !arguments.follow {
            bail!("{waiting}");
        }
        if said != waiting {
            output::say(&format!("waiting: {waiting}"));
            said = waiting;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The pods whose log is asked for, or why there is none to read.
fn choose(name: &Ref, item: &Item, pods: &[Pod], stage: bool) -> Result<Vec<String>, String> {
    let label = |pod: &Pod, key: &str| pod.labels().get(key).cloned().unwrap_or_default();
    let serving: Vec<&Pod> = pods
        .iter()
        .filter(|pod| label(pod, labels::COMPONENT) == labels::SERVE)
        .collect();
    let of_attempt = |pod: &&Pod| {
        let run = item.run.as_ref();
        run.is_some_and(|run| {
            label(pod, labels::RUN) == run.id
                && label(pod, labels::ATTEMPT) == run.attempt.to_string()
                && label(pod, labels::COMPONENT) != labels::SERVE
        })
    };
    let is_serving = name.kind == ResourceKind::InferenceService && !stage && !serving.is_empty();
    let chosen: Vec<&Pod> = if is_serving {
        serving
    } else {
        pods.iter().filter(of_attempt).collect()
    };
    let started: Vec<String> = chosen
        .iter()
        .filter(|pod| has_started(pod))
        .map(|pod| pod.name_any())
        .collect();
    match (chosen.first(), started.is_empty()) {
        (_, false) => Ok(started),
        (Some(pod), true) => Err(format!(
            "pod {} of {name} has not started: {}: {}",
            pod.name_any(),
            item.reason,
            item.message
        )),
        (None, true) if item.digest.is_some() => Err(format!(
            "{name} has no pod any more: {}: {}; its artifact is published, and `kubectl strata lineage {name}` shows from what",
            item.reason, item.message
        )),
        (None, true) => Err(format!("{name} has no pod: {}: {}", item.reason, item.message)),
    }
}

fn has_started(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Running" | "Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use strata_api::RunInfo;

    use super::*;
    use crate::resource::Ready;
    use crate::resource::tests::row;

    fn pod(name: &str, component: &str, attempt: &str, phase: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "labels": {
                "app.kubernetes.io/component": component, "strata.dev/run": "r1", "strata.dev/attempt": attempt,
            }},
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    #[test]
    fn the_log_is_that_of_the_serving_pods_or_of_the_current_attempt() {
        let quantized = [
            pod("chat-r1-1", "quantize", "1", "Failed"),
            pod("chat-r1-2", "quantize", "2", "Succeeded"),
        ];
        let served = [
            pod("chat-a", "serve", "", "Running"),
            pod("chat-b", "serve", "", "Pending"),
        ];
        let both: Vec<Pod> = quantized.iter().chain(&served).cloned().collect();
        for (kind, stage, pods, chosen) in [
            ("isvc", false, both.as_slice(), Ok("chat-a")),
            ("isvc", true, both.as_slice(), Ok("chat-r1-2")),
            ("isvc", false, &quantized[..], Ok("chat-r1-2")),
            ("aj", false, &quantized[..], Ok("chat-r1-2")),
            ("aj", false, &quantized[..1], Err("has no pod: Running")),
            (
                "isvc",
                false,
                &served[1..],
                Err("pod chat-b of InferenceService/chat has not started"),
            ),
        ] {
            let (name, mut item) = row(&format!("{kind}/chat"), Ready::Unknown, "Running", None, &[]);
            item.run = Some(RunInfo {
                id: "r1".into(),
                attempt: 2,
                ..RunInfo::default()
            });
            match (choose(&name, &item, pods, stage), chosen) {
                (Ok(all), Ok(one)) => assert_eq!(all, [one], "{kind} {stage}"),
                (Err(said), Err(words)) => assert!(said.contains(words), "{said}"),
                other => panic!("{kind} {stage}: {other:?}"),
            }
        }
    }
}
