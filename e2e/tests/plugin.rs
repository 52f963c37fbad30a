//! `kubectl strata` on a life: what it says while something is missing, while it is done, and to whom nothing can be said.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use serde_json::{Value, json};
use strata_api::{AlignmentJob, InferenceService, PretrainJob};
use strata_contract::SERVE_PORT;
use strata_e2e::bed::go::{self, Program};
use strata_e2e::bed::{command, network::http};
use strata_e2e::strata::{self, apply, ready, reason};
use strata_e2e::{Context, install, operator, small, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_plugin_shows_what_holds_a_life_up_where_it_comes_from_and_talks_to_it() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        let raw = context.claim("raw", "1Gi", None).await?.path()?;
        context.claim("artifacts", "1Gi", None).await?;
        small::fill(&raw)?;
        // All but the words.
        for manifest in [
            small::service(None),
            small::alignment("1e-3"),
            small::PREFERENCES.into(),
            small::model("tiny"),
        ] {
            apply(&context, &manifest).await?;
        }
        what_is_missing_is_to_blame(&context).await?;
        apply(&context, &small::words()).await?;
        ready::<AlignmentJob>(&context, "chat", DEADLINE).await?;
        let service: InferenceService = ready(&context, "chat", DEADLINE).await?;
        the_whole_life_is_shown(&context).await?;
        logs_are_those_of_the_stage_or_of_the_pods(&context).await?;
        let digest = service
            .status
            .and_then(|status| status.run_status.artifact)
            .context("an artifact")?
            .digest;
        lineage_leads_back_to_the_raw_files(&context, &digest).await?;
        it_talks(&context).await?;
        kubectl_completes_names(&context).await
    })
    .await;
}

async fn rows(context: &Context) -> Result<Vec<Value>> {
    let said = strata::run(context, &["status", "--output", "json"]).await?;
    serde_json::from_str(&said).with_context(|| format!("no list: {said}"))
}

fn row<'a>(rows: &'a [Value], resource: &str) -> Result<&'a Value> {
    let found = rows.iter().find(|row| row["resource"] == resource);
    found.with_context(|| format!("no {resource} in {rows:?}"))
}

async fn what_is_missing_is_to_blame(context: &Context) -> Result<()> {
    reason::<PretrainJob>(context, "tiny", "Unknown", "ReferenceNotFound", DEADLINE).await?;
    reason::<InferenceService>(context, "chat", "Unknown", "WaitingForInput", DEADLINE).await?;
    let rows = rows(context).await?;
    let words = row(&rows, "Dataset/words")?;
    let blocks = json!(["PretrainJob/tiny", "AlignmentJob/chat", "InferenceService/chat"]);
    ensure!(words["reason"] == "NotFound" && words["blocks"] == blocks, "{words}");
    let said = strata::run(context, &["logs", "pj/tiny"])
        .await
        .err()
        .context("there is no log")?
        .to_string();
    ensure!(said.contains("has no pod: ReferenceNotFound"), "{said}");
    let said = strata::run(context, &["chat", "chat"])
        .await
        .err()
        .context("nobody answers")?
        .to_string();
    ensure!(
        said.contains("no pod of InferenceService/chat answers yet: WaitingForInput"),
        "{said}"
    );
    Ok(())
}

async fn the_whole_life_is_shown(context: &Context) -> Result<()> {
    let rows = rows(context).await?;
    ensure!(
        rows.iter()
            .all(|row| row["ready"] == "True" && row["blocks"] == json!([])),
        "{rows:?}"
    );
    ensure!(row(&rows, "InferenceService/chat")?["readyReplicas"] == 1, "{rows:?}");
    let tree = strata::run(context, &["status", "isvc/chat"]).await?;
    for words in [
        "1/1 pods",
        "\n└─ AlignmentJob/chat",
        "\n   ├─ Dataset/preferences",
        "\n   └─ PretrainJob/tiny",
        "\n      └─ Dataset/words",
    ] {
        ensure!(tree.contains(words), "no {words:?} in\n{tree}");
    }
    let said = strata::run(context, &["status", "isvc/nobody"])
        .await
        .err()
        .context("it is refused")?
        .to_string();
    ensure!(said.contains("there is InferenceService/chat"), "{said}");
    Ok(())
}

async fn logs_are_those_of_the_stage_or_of_the_pods(context: &Context) -> Result<()> {
    let aligned = strata::run(context, &["logs", "alignmentjob.strata.dev/chat"]).await?;
    ensure!(
        aligned.contains("evaluated on held-out pairs"),
        "the log of the alignment: {aligned}"
    );
    let served = strata::run(context, &["logs", "isvc/chat"]).await?;
    let stage = strata::run(context, &["logs", "isvc/chat", "--stage", "--follow"]).await?;
    ensure!(
        !served.is_empty() && served != stage,
        "serving:\n{served}\nstage:\n{stage}"
    );
    let last = strata::run(context, &["logs", "pj/tiny", "--tail", "1"]).await?;
    ensure!(last.lines().count() == 1, "{last}");
    Ok(())
}

async fn lineage_leads_back_to_the_raw_files(context: &Context, digest: &str) -> Result<()> {
    let tree: Value = serde_json::from_str(&strata::run(context, &["lineage", "isvc/chat", "-o", "json"]).await?)?;
    ensure!(tree["digest"] == digest, "{tree}");
    let mut sources = BTreeSet::new();
    let mut open = vec![&tree];
    while let Some(node) = open.pop() {
        ensure!(node["digest"].is_string() && node["note"].is_null(), "{node}");
        sources.extend(node["source"].as_str());
        open.extend(node["inputs"].as_array().into_iter().flatten());
    }
    let all = [
        "AlignmentJob/chat",
        "Dataset/preferences",
        "Dataset/words",
        "InferenceService/chat",
        "PretrainJob/tiny",
        "pvc://raw/pairs.jsonl",
        "pvc://raw/words.txt",
    ];
    ensure!(sources.iter().eq(&all), "{sources:?}");
    Ok(())
}

/// What it says is nonsense, and may be nothing at all: that it was asked is what counts. `story.rs` talks to a model that speaks.
async fn it_talks(context: &Context) -> Result<()> {
    let before = answered(context).await?;
    let settings = ["--max-tokens", "8", "--temperature", "0"];
    let ask = ["chat", "chat", "--message", "What is 7?", "--system", "You count."];
    let answer = strata::run(context, &[&ask[..], &settings].concat()).await?;
    ensure!(answer.ends_with('\n'), "an answer ends its line: {answer:?}");

    // Two questions, one a line, as a pipe asks them.
    let mut chat = strata::program(&context.bed)?;
    chat.args(["chat", "isvc/chat", "--namespace", &context.namespace])
        .args(settings);
    chat.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut chat = tokio::process::Command::from(chat).spawn()?;
    let mut questions = chat.stdin.take().context("standard input is piped")?;
    tokio::io::AsyncWriteExt::write_all(&mut questions, b"What is 7?\n\nWhat is 8?\n").await?;
    drop(questions);
    let run = tokio::time::timeout(DEADLINE, chat.wait_with_output()).await??;
    ensure!(
        run.status.success(),
        "the conversation ends with its input: {:?}",
        run.status
    );
    let asked = answered(context).await? - before;
    ensure!(
        (asked - 3.0).abs() < 0.5,
        "three questions were asked, and {asked} were answered"
    );

    let said = strata::run(context, &["chat", "pj/tiny"])
        .await
        .err()
        .context("it is refused")?
        .to_string();
    ensure!(said.contains("only an InferenceService"), "{said}");
    Ok(())
}

/// How many requests the serving pod has answered.
async fn answered(context: &Context) -> Result<f64> {
    let ours = ListParams::default().labels("strata.dev/name=chat,app.kubernetes.io/component=serve");
    let pods = context.api::<Pod>().list(&ours).await?.items;
    let address = pods.first().and_then(|pod| pod.status.as_ref()?.pod_ip.clone());
    let url = format!(
        "http://{}:{SERVE_PORT}/metrics",
        address.context("the pod has an address")?
    );
    let text = http()?.get(url).send().await?.text().await?;
    Ok(operator::series(&text, "vllm:request_success_total").sum())
}

/// The real kubectl, which asks the program that `strata completion kubectl` prints.
async fn kubectl_completes_names(context: &Context) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let complete = folder.path().join("kubectl_complete-strata");
    let script = command::output(strata::program(&context.bed)?.args(["completion", "kubectl"]))?;
    std::fs::write(&complete, script)?;
    std::fs::set_permissions(&complete, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let strata = strata::program(&context.bed)?;
    std::os::unix::fs::symlink(strata.get_program(), folder.path().join("kubectl-strata"))?;
    let path = format!("{}:/usr/bin:/bin", folder.path().display());
    let mut kubectl = tokio::process::Command::new(go::path(Program::Kubectl));
    kubectl
        .env("PATH", path)
        .env("KUBECONFIG", context.bed.kubeconfig())
        .env("NO_PROXY", "*");
    kubectl.args(["__complete", "strata", "logs", "--namespace", &context.namespace, "ali"]);
    let said = String::from_utf8(kubectl.output().await?.stdout)?;
    ensure!(said == "AlignmentJob/chat\n:4\n", "{said}");
    Ok(())
}
