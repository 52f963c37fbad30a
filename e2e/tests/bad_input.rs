//! Bad input ends with a condition that has its own reason and says what to do: nothing half-published, no endless
//! restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{ListParams, LogParams, Patch, PatchParams};
use serde_json::json;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};
use strata_e2e::strata::{apply, ready, reason};
use strata_e2e::{Context, install, run, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(180);

/// A data set that reads `source` and publishes to the claim `artifacts`; `more` are further lines of its spec.
fn dataset(name: &str, source: &str, more: &str) -> String {
    format!(
        "apiVersion: strata.dev/v1alpha1\nkind: Dataset\nmetadata: {{name: {name}}}\nspec:\n  task: Pretraining\n  \
         retries: 0\n  storage: {{uri: 'pvc://artifacts'}}\n  sources:\n  - name: source\n    {source}\n{more}"
    )
}

/// The claims `raw` and `artifacts`, and an operator; returns their folders.
async fn prepare(context: &Context, artifacts_limit_bytes: Option<u64>) -> Result<(PathBuf, PathBuf)> {
    install::once(&context.bed)?;
    let raw = context.claim("raw", "1Gi", None).await?.path()?;
    let artifacts = context.claim("artifacts", "1Gi", artifacts_limit_bytes).await?.path()?;
    Ok((raw, artifacts))
}

fn manifests(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.path().is_dir() {
            true => manifests(&entry.path()),
            false => usize::from(entry.file_name() == "manifest.json"),
        })
        .sum()
}

async fn jobs(context: &Context) -> Result<usize> {
    Ok(context.api::<Job>().list(&Default::default()).await?.items.len())
}

#[tokio::test]
async fn references_that_are_missing_are_waited_for_and_circles_are_refused() {
    with_temp_ns(|context| async move {
        let (raw, _) = prepare(&context, None).await?;
        apply(&context, &run::pretrain("tiny", 2048)).await?;
        let said = reason::<PretrainJob>(&context, "tiny", "Unknown", "ReferenceNotFound", DEADLINE).await?;
        ensure!(said.contains("Dataset") && said.contains("words"), "{said}");

        let alignment = |name: &str, base: &str| {
            format!(
                "apiVersion: strata.dev/v1alpha1\nkind: AlignmentJob\nmetadata: {{name: {name}}}\nspec:\n  \
                 storage: {{uri: 'pvc://artifacts'}}\n  base: {{alignmentJob: {{name: {base}}}}}\n  \
                 method: {{dpo: {{beta: '0.1'}}}}\n  adapter: {{lora: {{rank: 4}}}}\n  datasets: [{{name: words}}]\n  \
                 training: {{pairs: 2, maxPairTokens: 64, batchPairs: 2, learningRate: '1e-4'}}\n  \
                 evaluate: {{heldOutPairs: 2}}\n"
            )
        };
        apply(&context, &alignment("hen", "egg")).await?;
        apply(&context, &alignment("egg", "hen")).await?;
        let said = reason::<AlignmentJob>(&context, "hen", "False", "ReferenceCycle", DEADLINE).await?;
        ensure!(said.contains("hen") && said.contains("egg"), "{said}");

        // The data set comes: the job that waited starts by itself and ends well.
        fs::write(raw.join("words.txt"), run::text())?;
        apply(&context, run::WORDS).await?;
        ready::<PretrainJob>(&context, "tiny", DEADLINE).await.map(drop)
    })
    .await;
}

#[tokio::test]
async fn inputs_that_are_missing_or_damaged_are_named_and_not_tried_again() {
    with_temp_ns(|context| async move {
        let (raw, artifacts) = prepare(&context, None).await?;
        fs::write(raw.join("page.warc.gz"), truncated_warc()?)?;
        fs::write(raw.join("strange.gguf"), strange_gguf())?;
        fs::write(raw.join("text.txt"), "One short text.\n")?;
        let nothing = "documents: {uri: 'pvc://raw/nothing/*.txt', format: Text}";
        apply(&context, &dataset("missing", nothing, "")).await?;
        apply(
            &context,
            &dataset("truncated", "webCrawl: {uri: 'pvc://raw/page.warc.gz'}", ""),
        )
        .await?;
        let text = "documents: {uri: 'pvc://raw/text.txt', format: Text}";
        apply(
            &context,
            &dataset("gated", text, "  gates: [{metric: documentsKept, min: '100'}]\n"),
        )
        .await?;
        let service = "apiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: strange}\nspec:\n  \
             retries: 0\n  storage: {uri: 'pvc://artifacts'}\n  model: {uri: 'pvc://raw/strange.gguf'}\n";
        apply(&context, service).await?;

        let said = reason::<Dataset>(&context, "missing", "False", "InputNotFound", DEADLINE).await?;
        ensure!(said.contains("nothing"), "the message names the place: {said}");
        let said = reason::<Dataset>(&context, "truncated", "False", "InputCorrupt", DEADLINE).await?;
        ensure!(said.contains("page.warc.gz"), "the message names the file: {said}");
        let said = reason::<Dataset>(&context, "gated", "False", "GateFailed", DEADLINE).await?;
        ensure!(
            said.contains("documentsKept") && said.contains("100"),
            "the message has the figures: {said}"
        );
        let said =
            reason::<InferenceService>(&context, "strange", "False", "ArchitectureUnsupported", DEADLINE).await?;
        ensure!(
            said.contains("teapot") && said.contains("llama"),
            "the message names both: {said}"
        );
        ensure!(manifests(&artifacts) == 0, "nothing was published");
        let count = jobs(&context).await?;
        ensure!(count == 4, "each was tried once, but there are {count} Jobs");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_full_disk_and_too_little_memory_are_said() {
    with_temp_ns(|context| async move {
        let (raw, artifacts) = prepare(&context, Some(512 * 1024)).await?;
        let text: String = (0..60_000)
            .map(|i| format!("Line {i} says {}.\n\n", i * 7919 % 10_007))
            .collect();
        fs::write(raw.join("text.txt"), text)?;
        let text = "documents: {uri: 'pvc://raw/text.txt', format: Text, splitBytes: 512}";
        apply(&context, &dataset("large", text, "")).await?;
        // It trains a tokenizer, which needs more than this, and publishes where there is room.
        let little = "  encode: {tokenizer: {train: {algorithm: BPE, vocabSize: 8000}}, sequence: {lengthTokens: 64}}\n  \
                      pod: {resources: {limits: {memory: 6Mi}}}\n";
        apply(
            &context,
            &dataset("starved", text, little).replace("pvc://artifacts", "pvc://raw/results"),
        )
        .await?;
        let said = reason::<Dataset>(&context, "large", "False", "StorageFull", DEADLINE).await?;
        ensure!(said.contains("space"), "{said}");
        reason::<Dataset>(&context, "starved", "False", "OutOfMemory", DEADLINE).await?;
        ensure!(manifests(&artifacts) == 0, "nothing was published");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_damaged_checkpoint_is_passed_over_for_the_one_before_and_said() {
    with_temp_ns(|context| async move {
        let (raw, artifacts) = prepare(&context, None).await?;
        let folder = run::start_long(&context, "long", (&raw, &artifacts), DEADLINE).await?;
        suspend(&context, "long", true).await?;
        reason::<PretrainJob>(&context, "long", "Unknown", "Suspended", DEADLINE).await?;
        let pods = context.api::<Pod>();
        let its = ListParams::default().labels("strata.dev/kind=PretrainJob,strata.dev/name=long");
        wait::poll("its pod is gone", DEADLINE, || async {
            Ok(pods.list(&its).await?.items.is_empty().then_some(()))
        })
        .await?;

        let checkpoints = run::checkpoints(&folder);
        let [.., older, newest] = &checkpoints[..] else {
            anyhow::bail!("two checkpoints were kept, but there are {checkpoints:?}")
        };
        let state = newest.join("state.safetensors");
        let mut bytes = fs::read(&state)?;
        *bytes.last_mut().context("the state is not empty")? ^= 1;
        fs::write(&state, bytes)?;
        suspend(&context, "long", false).await?;

        let log = wait::poll("it goes on from a checkpoint", DEADLINE, || async {
            for pod in pods.list(&its).await? {
                // No log before the container has started.
                let log = pods
                    .logs(&pod.name_any(), &LogParams::default())
                    .await
                    .unwrap_or_default();
                if log.contains("going on from a checkpoint") {
                    return Ok(Some(log));
                }
            }
            Ok(None)
        })
        .await?;
        let named = |line: &str, words: &str, step: &Path| {
            let step = step.file_name().unwrap_or_default().to_string_lossy();
            line.contains(words) && line.contains(&*step)
        };
        for (words, step) in [("passed over", newest), ("going on from a checkpoint", older)] {
            ensure!(
                log.lines().any(|line| named(line, words, step)),
                "no {words:?} of {step:?} in:\n{log}"
            );
        }
        Ok(())
    })
    .await;
}

async fn suspend(context: &Context, name: &str, suspend: bool) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": {"suspend": suspend}}));
    let jobs = context.api::<PretrainJob>();
    jobs.patch(name, &PatchParams::default(), &patch).await?;
    Ok(())
}

/// The sample's crawl, cut in the middle of a member.
fn truncated_warc() -> Result<Vec<u8>> {
    let mut bytes = fs::read(install::samples().join("data/commoncrawl-sample.warc.gz"))
        .context("the sample crawl is in config/samples/data")?;
    bytes.truncate(bytes.len() * 2 / 3);
    Ok(bytes)
}

/// A valid GGUF header of an architecture that nobody knows.
fn strange_gguf() -> Vec<u8> {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    [
        b"GGUF".as_slice(),
        &3_u32.to_le_bytes(),
        &0_u64.to_le_bytes(),
        &1_u64.to_le_bytes(),
        &string("general.architecture"),
        &8_u32.to_le_bytes(),
        &string("teapot"),
    ]
    .concat()
}
