//! One real model's whole life on a real cluster: raw data in, a chat out, every step computed by a pod.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob, RunStatus};
use strata_contract::{ArtifactKind, Manifest, Uri};
use strata_e2e::bed::{command, network::http};
use strata_e2e::demo::Forward;
use strata_e2e::strata::{self, Kind, metric, ready};
use strata_e2e::{Context, audit, install, operator, run, wait, with_temp_ns};

const CURATE: Duration = Duration::from_secs(300);
const TRAIN: Duration = Duration::from_secs(1200);
const SERVE: Duration = Duration::from_secs(300);
/// Enough of a turn to know it by; a log may cut the rest off.
const TEXT_CHARACTERS: usize = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_model_lives_its_whole_life() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        let raw = context.volume("raw", "4Gi", None).await?.path()?;
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
        preferences_are_published_with_their_notice(&context, &artifacts).await?;
        bard_survives_the_loss_of_its_pod(&context, &artifacts).await?;
        assistant_is_aligned_within_its_gates(&context, &artifacts).await?;
        the_service_answers_with_what_was_judged(&context, &artifacts).await?;
        the_plugin_shows_where_it_comes_from_and_talks(&context).await?;
        preferences_stay_private(&context, &raw).await?;
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

async fn preferences_are_published_with_their_notice(context: &Context, artifacts: &Path) -> Result<()> {
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
    let folder = run::folder(context, "bard", artifacts, TRAIN).await?;
    wait::poll("bard has a checkpoint", TRAIN, || async {
        Ok((!run::checkpoints(&folder).is_empty()).then_some(()))
    })
    .await?;
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
    Ok(())
}

async fn the_service_answers_with_what_was_judged(context: &Context, artifacts: &Path) -> Result<()> {
    let service: InferenceService = ready(context, "assistant", SERVE).await?;
    let status = service.status.context("a status")?;
    ensure!(status.ready_replicas == Some(1), "one replica answers: {status:?}");
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

    let forward = Forward::start(context.bed.kubectl(), &context.namespace, "assistant").await?;
    let client = http()?;
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

/// As the demo asks them.
async fn the_plugin_shows_where_it_comes_from_and_talks(context: &Context) -> Result<()> {
    let lineage = strata::run(context, &["lineage", "inferenceservice/assistant"]).await?;
    for word in [
        "AlignmentJob/assistant",
        "Dataset/preferences",
        "SmolLM2",
        "hh-rlhf",
        "tinyshakespeare",
    ] {
        ensure!(lineage.contains(word), "{word} is missing in the lineage:\n{lineage}");
    }
    let question = "Give me three short tips for being a good neighbour.";
    let ask = [
        "chat",
        "assistant",
        "--message",
        question,
        "--max-tokens",
        "160",
        "--temperature",
        "0",
    ];
    let answer = strata::run(context, &ask).await?;
    ensure!(
        answer.to_lowercase().contains("neighbo"),
        "the model that was made answers: {answer}"
    );
    Ok(())
}

/// The pairs are offensive by design: none of their text is in what people read of a cluster.
async fn preferences_stay_private(context: &Context, raw: &Path) -> Result<()> {
    let mut shown = Vec::new();
    statuses::<Dataset>(context, &mut shown).await?;
    statuses::<PretrainJob>(context, &mut shown).await?;
    statuses::<AlignmentJob>(context, &mut shown).await?;
    statuses::<InferenceService>(context, &mut shown).await?;
    let mut logged = BTreeSet::new();
    for namespace in [context.namespace.as_str(), install::NAMESPACE] {
        let events = Api::<Event>::namespaced(context.client.clone(), namespace);
        for event in events.list(&ListParams::default()).await? {
            strings(&serde_json::to_value(&event)?, &mut shown);
        }
        let pods = Api::<Pod>::namespaced(context.client.clone(), namespace);
        for pod in pods.list(&ListParams::default()).await? {
            strings(&serde_json::to_value(&pod.status)?, &mut shown);
            let name = pod.name_any();
            let log = pods.logs(&name, &LogParams::default()).await;
            for line in log.with_context(|| format!("the log of {name}"))?.lines() {
                // Text in JSON has its quotes and line ends escaped.
                match serde_json::from_str::<Value>(line) {
                    Ok(line) => strings(&line, &mut shown),
                    Err(_) => shown.push(line.to_owned()),
                }
            }
            logged.extend(pod.labels().get("strata.dev/kind").cloned());
        }
    }
    let kinds = ["AlignmentJob", "Dataset", "InferenceService", "PretrainJob"];
    ensure!(logged.iter().eq(kinds), "logs were read of {logged:?} only");
    let shown = shown.join("\n");
    let texts = preference_texts(raw)?;
    ensure!(texts.len() > 5_000, "{} texts were looked for", texts.len());
    ensure!(
        !texts.iter().any(|text| shown.contains(text)),
        "text of a preference pair was shown"
    );
    Ok(())
}

async fn statuses<K: Kind>(context: &Context, shown: &mut Vec<String>) -> Result<()> {
    let before = shown.len();
    for object in context.api::<K>().list(&ListParams::default()).await? {
        strings(&serde_json::to_value(&object)?["status"], shown);
    }
    ensure!(shown.len() > before, "no {} has a status", K::kind(&()));
    Ok(())
}

/// All strings in a value, as a person would read them, and not as JSON writes them.
fn strings(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::String(text) => into.push(text.clone()),
        Value::Array(all) => all.iter().for_each(|value| strings(value, into)),
        Value::Object(all) => all.iter().for_each(|(key, value)| {
            into.push(key.clone());
            strings(value, into);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// How every longer turn of the preference data begins, from the sample as it lies on the volume.
fn preference_texts(raw: &Path) -> Result<BTreeSet<String>> {
    let path = raw.join("hh-rlhf-harmless-base-test.jsonl.gz");
    let text = command::output(Command::new("gzip").arg("-dc").arg(path))?;
    let mut texts = BTreeSet::new();
    for line in text.lines() {
        let pair: Value = serde_json::from_str(line)?;
        for side in ["chosen", "rejected"] {
            let turns = pair[side].as_str().context("a pair has two sides")?.split("\n\n");
            let said = turns.filter_map(|turn| turn.split_once(": ").map(|(_, said)| said));
            let starts = said.map(|said| said.chars().take(TEXT_CHARACTERS).collect::<String>());
            texts.extend(starts.filter(|start| start.chars().count() == TEXT_CHARACTERS));
        }
    }
    Ok(texts)
}

/// Reconciles that have nothing to do write nothing, and the operator stays small.
async fn quiet_when_all_is_done(context: &Context) -> Result<()> {
    let before = operator::reconciles(&context.client).await?;
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
        let what = format!("the operator sees round {round}");
        wait::poll(&what, Duration::from_secs(60), || async {
            Ok((operator::reconciles(&context.client).await? >= wanted).then_some(()))
        })
        .await?;
    }
    let writes = audit::writes(&context.bed, install::USER, mark)?;
    let writes: Vec<_> = writes.into_iter().filter(|write| write.resource != "leases").collect();
    ensure!(
        writes.is_empty(),
        "nothing was to be done, but the operator wrote {writes:?}"
    );

    for (pod, text) in operator::metrics(&context.client).await? {
        let bytes = operator::series(&text, "process_resident_memory_bytes").sum::<f64>();
        ensure!(
            bytes > 0.0 && bytes < 64.0 * 1024.0 * 1024.0,
            "{pod} takes {bytes} bytes of memory"
        );
    }
    Ok(())
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
