//! One real model's whole life on a real cluster: raw data in, a chat out, every step computed by a pod.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams};
use serde_json::{Value, json};
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob, RunStatus};
use strata_contract::{ArtifactKind, Manifest, Uri};
use strata_e2e::demo::Forward;
use strata_e2e::strata::{metric, ready};
use strata_e2e::{Context, audit, install, wait, with_temp_ns};

const CURATE: Duration = Duration::from_secs(300);
const TRAIN: Duration = Duration::from_secs(1200);
const SERVE: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_model_lives_its_whole_life() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        context.volume("raw", "4Gi", None).await?;
        let artifacts = context.volume("artifacts", "8Gi", None).await?.path()?;
        context
            .kubectl(["apply", "-k", &install::samples().display().to_string()])
            .await?;
        wait::until(
            &context.api::<Job>(),
            "load-samples",
            "has ended",
            CURATE,
            wait::job_has_ended,
        )
        .await?;

        plays_are_curated(&context, &artifacts).await?;
        preferences_stay_private(&context, &artifacts).await?;
        bard_survives_the_loss_of_its_pod(&context, &artifacts).await?;
        assistant_is_aligned_within_its_gates(&context, &artifacts).await?;
        the_service_answers_with_what_was_judged(&context, &artifacts).await?;
        quiet_when_all_is_done(&context).await
    })
    .await;
}

async fn plays_are_curated(context: &Context, artifacts: &Path) -> Result<()> {
    let plays: Dataset = ready(context, "plays", CURATE).await?;
    let status = plays.status.context("a status")?;
    ensure!(
        metric(&status, "droppedByLanguage")? >= 1.0,
        "the Aragonese page is dropped for its language"
    );
    ensure!(
        metric(&status, "droppedAsDuplicate")? >= 1.0,
        "the copied page is dropped"
    );
    ensure!(
        metric(&status, "piiSpansRedacted")? >= 1.0,
        "the address in a page is redacted"
    );
    ensure!(metric(&status, "documentsHeldOut")? >= 10.0, "scenes are held out");
    ensure!(
        metric(&status, "bytesKept")? > 800_000.0,
        "nearly all of the plays are kept"
    );
    let (manifest, content) = published(artifacts, &status)?;
    ensure!(
        manifest.content.kind == ArtifactKind::Dataset,
        "{:?}",
        manifest.content.kind
    );
    for file in [
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
        "README.md",
        "tokenizer.json",
    ] {
        ensure!(content.join(file).is_file(), "{file} is missing");
    }
    Ok(())
}

async fn preferences_stay_private(context: &Context, artifacts: &Path) -> Result<()> {
    let preferences: Dataset = ready(context, "preferences", CURATE).await?;
    let (_, content) = published(artifacts, preferences.status.as_ref().context("a status")?)?;
    let card = fs::read_to_string(content.join("README.md"))?;
    ensure!(
        card.to_lowercase().contains("demonstration only"),
        "the card says what the data is for"
    );
    Ok(())
}

/// The pod is killed after its first checkpoint; the run goes on from there, and the loss does not count as a failure.
async fn bard_survives_the_loss_of_its_pod(context: &Context, artifacts: &Path) -> Result<()> {
    let running = |job: Option<&PretrainJob>| {
        job.and_then(|job| job.status.as_ref()?.run.as_ref()?.job.clone())
            .is_some()
    };
    let job = wait::until(&context.api::<PretrainJob>(), "bard", "has a run", TRAIN, running).await?;
    let run = job.status.and_then(|status| status.run).context("a run")?;
    let folder = artifacts.join(format!("{}/pretrainjob/bard/{}", context.namespace, run.id));
    until_true("bard has a checkpoint", TRAIN, || has_checkpoint(&folder)).await?;
    let pods = context.api::<Pod>();
    let labels = ListParams::default().labels("strata.dev/kind=PretrainJob,strata.dev/name=bard");
    let pod = pods.list(&labels).await?.items.pop().context("bard's pod")?;
    pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0))
        .await?;

    let bard: PretrainJob = ready(context, "bard", TRAIN).await?;
    let status = bard.status.context("a status")?;
    let run = status.run.as_ref().context("a run")?;
    ensure!(
        run.attempt >= 2 && run.failures == 0,
        "the killed attempt does not count: {run:?}"
    );
    ensure!(
        run.resumed_from_step.is_some_and(|step| step > 0),
        "it went on from a checkpoint: {run:?}"
    );
    ensure!(metric(&status, "bitsPerByte")? <= 2.8, "{:?}", status.metrics);
    ensure!(
        metric(&status, "bitsPerByteGainOverTrigram")? > 0.0,
        "{:?}",
        status.metrics
    );
    let (_, content) = published(artifacts, &status)?;
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        ensure!(content.join(file).is_file(), "{file} is missing");
    }
    Ok(())
}

async fn assistant_is_aligned_within_its_gates(context: &Context, artifacts: &Path) -> Result<()> {
    let assistant: AlignmentJob = ready(context, "assistant", TRAIN).await?;
    let status = assistant.status.context("a status")?;
    ensure!(metric(&status, "rewardMarginLow")? > 0.0, "{:?}", status.metrics);
    ensure!(metric(&status, "alignmentTax")? <= 0.05, "{:?}", status.metrics);
    let (manifest, content) = published(artifacts, &status)?;
    let dequantized = manifest.content.facts.values().any(|fact| fact.contains("Q4_1"));
    ensure!(
        dequantized,
        "lineage says that the base was 4-bit: {:?}",
        manifest.content.facts
    );
    for file in [
        "config.json",
        "model.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ] {
        ensure!(content.join(file).is_file(), "{file} is missing");
    }
    // The pairs are offensive by design: none of their text may show in what people read.
    let labels = ListParams::default().labels("strata.dev/kind");
    let mut shown = serde_json::to_string(&status)?;
    for pod in context.api::<Pod>().list(&labels).await? {
        shown += &context
            .api::<Pod>()
            .logs(&pod.name_any(), &LogParams::default())
            .await
            .unwrap_or_default();
        shown += &serde_json::to_string(&pod.status)?;
    }
    let turns = first_turns(artifacts)?;
    ensure!(turns.len() > 500, "{} turns were looked for", turns.len());
    for turn in turns {
        ensure!(!shown.contains(&turn), "text of a preference pair was shown");
    }
    Ok(())
}

async fn the_service_answers_with_what_was_judged(context: &Context, artifacts: &Path) -> Result<()> {
    let service: InferenceService = ready(context, "assistant", SERVE).await?;
    let status = service.status.context("a status")?;
    ensure!(status.ready_replicas == Some(2), "two replicas answer: {status:?}");
    let artifact = status.run_status.artifact.as_ref().context("an artifact")?;
    ensure!(
        status.serving_digest.as_ref() == Some(&artifact.digest),
        "the pods serve the artifact: {status:?}"
    );
    ensure!(
        metric(&status.run_status, "rewardMarginLow")? > 0.0,
        "judged again as quantized"
    );
    let (manifest, _) = published(artifacts, &status.run_status)?;
    ensure!(
        manifest.content.kind == ArtifactKind::QuantizedModel,
        "{:?}",
        manifest.content.kind
    );

    let lineage = strata_e2e::demo::lineage(&context.client, &context.namespace, "assistant").await?;
    for word in [
        "AlignmentJob/assistant",
        "Dataset/preferences",
        "SmolLM2",
        "hh-rlhf",
        "tinyshakespeare",
    ] {
        ensure!(lineage.contains(word), "{word} is missing in the lineage:\n{lineage}");
    }

    let forward = Forward::start(context.bed.kubectl(), &context.namespace, "assistant").await?;
    let question = "Give me three short tips for being a good neighbour.";
    let mut pieces = 0;
    let answer = forward.chat("assistant", question, |_| pieces += 1).await?;
    ensure!(
        answer.to_lowercase().contains("neighbo"),
        "the model that was made answers: {answer}"
    );
    ensure!(pieces > 1, "the answer was streamed");

    let client = reqwest::Client::new();
    let ask = |body: String| {
        let request = client.post(format!("{}/v1/chat/completions", forward.url()));
        request.header("content-type", "application/json").body(body).send()
    };
    let long = "word ".repeat(20_000);
    for (body, code, word) in [
        ("{".to_owned(), 400, "invalid_request_error"),
        (
            json!({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}).to_string(),
            404,
            "model_not_found",
        ),
        (
            json!({"model": "assistant", "messages": [{"role": "user", "content": long}]}).to_string(),
            400,
            "context_length_exceeded",
        ),
    ] {
        let response = ask(body).await?;
        let (status, text) = (response.status().as_u16(), response.text().await?);
        let error: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
        ensure!(status == code, "{status} instead of {code}: {text}");
        let said = [&error["error"]["type"], &error["error"]["code"]];
        ensure!(
            said.iter().any(|said| said.as_str() == Some(word)),
            "no {word} in {text}"
        );
        ensure!(error["error"]["message"].is_string(), "no message in {text}");
    }
    let metrics = client
        .get(format!("{}/metrics", forward.url()))
        .send()
        .await?
        .text()
        .await?;
    for name in [
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:generation_tokens_total",
    ] {
        ensure!(metrics.contains(name), "{name} is missing in /metrics");
    }
    Ok(())
}

/// Reconciles that have nothing to do write nothing, and the operator stays small.
async fn quiet_when_all_is_done(context: &Context) -> Result<()> {
    let before = reconciles(context).await?;
    let mark = audit::mark(&context.bed)?;
    for round in 0..10 {
        let touch = Patch::Merge(json!({"metadata": {"annotations": {"e2e.strata.dev/touch": round.to_string()}}}));
        let parameters = PatchParams::default();
        context.api::<Dataset>().patch("plays", &parameters, &touch).await?;
        context
            .api::<Dataset>()
            .patch("preferences", &parameters, &touch)
            .await?;
        context.api::<PretrainJob>().patch("bard", &parameters, &touch).await?;
        context
            .api::<AlignmentJob>()
            .patch("assistant", &parameters, &touch)
            .await?;
        context
            .api::<InferenceService>()
            .patch("assistant", &parameters, &touch)
            .await?;
        // Each round is seen before the next, or the queue would merge them.
        let wanted = before + f64::from(5 * (round + 1));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while reconciles(context).await? < wanted {
            ensure!(
                tokio::time::Instant::now() < deadline,
                "the operator does not see round {round}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let writes = audit::writes(&context.bed, install::USER, mark)?;
    let writes: Vec<_> = writes.into_iter().filter(|write| write.resource != "leases").collect();
    ensure!(
        writes.is_empty(),
        "nothing was to be done, but the operator wrote {writes:?}"
    );

    for (pod, text) in operator_metrics(context).await? {
        let bytes = series(&text, "process_resident_memory_bytes").sum::<f64>();
        ensure!(
            bytes > 0.0 && bytes < 64.0 * 1024.0 * 1024.0,
            "{pod} takes {bytes} bytes of memory"
        );
    }
    Ok(())
}

async fn reconciles(context: &Context) -> Result<f64> {
    let pods = operator_metrics(context).await?;
    Ok(pods
        .iter()
        .flat_map(|(_, text)| series(text, "strata_operator_reconciles_total"))
        .sum())
}

/// `/metrics` of each of the operator's pods, which this machine reaches directly.
async fn operator_metrics(context: &Context) -> Result<Vec<(String, String)>> {
    let pods = kube::Api::<Pod>::namespaced(context.client.clone(), install::NAMESPACE);
    let mut all = Vec::new();
    for pod in pods
        .list(&ListParams::default().labels("app.kubernetes.io/name=strata-operator"))
        .await?
    {
        let address = pod
            .status
            .as_ref()
            .and_then(|status| status.pod_ip.clone())
            .context("the pod has an address")?;
        let text = reqwest::get(format!("http://{address}:8080/metrics"))
            .await?
            .text()
            .await?;
        all.push((pod.name_any(), text));
    }
    ensure!(!all.is_empty(), "there is an operator");
    Ok(all)
}

fn series<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = f64> + 'a {
    let ours = move |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    text.lines()
        .filter(ours)
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
}

/// The manifest and the content folder that a status names.
fn published(artifacts: &Path, status: &RunStatus) -> Result<(Manifest, PathBuf)> {
    let artifact = status.artifact.as_ref().context("an artifact")?;
    let uri: Uri = artifact.uri.parse()?;
    let Uri::Pvc { path, .. } = uri else {
        anyhow::bail!("{uri} is no claim")
    };
    let run = artifacts.join(path);
    let manifest: Manifest = serde_json::from_str(&fs::read_to_string(run.join("manifest.json"))?)?;
    ensure!(
        manifest.digest == artifact.digest && manifest.content.digest() == artifact.digest,
        "the digest holds"
    );
    let content = run.join(&manifest.publication.content_path);
    for file in &manifest.content.files {
        ensure!(
            fs::metadata(content.join(&file.path))?.len() == file.bytes,
            "{} has its size",
            file.path
        );
    }
    Ok((manifest, content))
}

/// Distinct longer first human turns of the preference data, from the sample as it lies on the volume beside.
fn first_turns(artifacts: &Path) -> Result<Vec<String>> {
    let raw = artifacts.to_string_lossy().replace("-artifacts", "-raw");
    let path = Path::new(&raw).join("hh-rlhf-harmless-base-test.jsonl.gz");
    let mut text = String::new();
    let output = std::process::Command::new("gzip").arg("-dc").arg(&path).output()?;
    output.stdout.as_slice().read_to_string(&mut text)?;
    let mut turns = Vec::new();
    for line in text.lines() {
        let pair: Value = serde_json::from_str(line)?;
        let first = pair["chosen"]
            .as_str()
            .and_then(|text| text.split("\n\n").nth(1))
            .unwrap_or_default();
        let first = first.trim_start_matches("Human: ").to_owned();
        if first.len() > 40 {
            turns.push(first);
        }
    }
    Ok(turns)
}

/// Whether an attempt of the run in `folder` has saved a whole checkpoint.
fn has_checkpoint(folder: &Path) -> bool {
    let list = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    list(folder.join("attempts")).any(|attempt| {
        list(attempt.path().join("checkpoints")).any(|step| !step.file_name().to_string_lossy().ends_with(".partial"))
    })
}

/// A file appears on a volume without an event to watch: looks every 200 ms, up to a deadline.
async fn until_true(what: &str, deadline: Duration, condition: impl Fn() -> bool) -> Result<()> {
    let end = tokio::time::Instant::now() + deadline;
    while !condition() {
        ensure!(
            tokio::time::Instant::now() < end,
            "waited {} s until {what}",
            deadline.as_secs()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}
