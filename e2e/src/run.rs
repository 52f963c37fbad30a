//! Runs that tests need beside the samples: small ones, and what they leave on the volume of their artifacts.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use strata_api::{Dataset, PretrainJob};

use crate::strata::{apply, ready};
use crate::{Context, wait};

/// A text for [`words`].
#[must_use]
pub fn text() -> String {
    (0..400)
        .map(|i| format!("The {i}. word of a text that repeats is {i}.\n\n"))
        .collect()
}

/// The data set `words`: reads `words.txt` on the claim `raw`, with a tokenizer and token files.
pub const WORDS: &str = "apiVersion: strata.dev/v1alpha1
kind: Dataset
metadata: {name: words}
spec:
  task: Pretraining
  retries: 0
  storage: {uri: 'pvc://artifacts'}
  sources:
  - {name: text, documents: {uri: 'pvc://raw/words.txt', format: Text, splitBytes: 64}}
  split: {heldOutPercent: 20}
  encode: {tokenizer: {train: {algorithm: BPE, vocabSize: 300}}, sequence: {lengthTokens: 32}}
";

/// A PretrainJob on `words` of so many tokens, with a checkpoint every second. It leaves the machine to others: its pace is
/// not what any test is about.
#[must_use]
pub fn pretrain(name: &str, tokens: u64) -> String {
    format!(
        "apiVersion: strata.dev/v1alpha1\nkind: PretrainJob\nmetadata: {{name: {name}}}\nspec:\n  \
         storage: {{uri: 'pvc://artifacts'}}\n  datasets: [{{name: words}}]\n  \
         model: {{llama: {{hiddenSize: 32, layers: 1, heads: 2, contextTokens: 32}}}}\n  \
         training: {{tokens: {tokens}, batchTokens: 256, learningRate: '1e-3'}}\n  checkpoint: {{every: 1s, keep: 2}}\n  \
         pod: {{resources: {{limits: {{cpu: 500m}}}}}}\n"
    )
}

/// Publishes `words`, starts the PretrainJob `name`, which would take hours, and returns its run's folder once it has two
/// checkpoints. `raw` and `artifacts` are the folders of the claims.
///
/// # Errors
/// It does not get there in time.
pub async fn start_long(
    context: &Context,
    name: &str,
    (raw, artifacts): (&Path, &Path),
    deadline: Duration,
) -> Result<PathBuf> {
    fs::write(raw.join("words.txt"), text())?;
    apply(context, WORDS).await?;
    ready::<Dataset>(context, "words", deadline).await?;
    apply(context, &pretrain(name, 10_000_000_000)).await?;
    let folder = folder(context, name, artifacts, deadline).await?;
    wait::poll("there are two checkpoints", deadline, || async {
        Ok((checkpoints(&folder).len() >= 2).then_some(()))
    })
    .await?;
    Ok(folder)
}

/// The folder of the PretrainJob's run, once it has one.
///
/// # Errors
/// It has none in time.
pub async fn folder(context: &Context, name: &str, artifacts: &Path, deadline: Duration) -> Result<PathBuf> {
    let started = |job: Option<&PretrainJob>| {
        job.and_then(|job| job.status.as_ref()?.run.as_ref()?.job.clone())
            .is_some()
    };
    let job = wait::until(&context.api::<PretrainJob>(), name, "has a run", deadline, started).await?;
    let run = job.status.and_then(|status| status.run).context("a run")?;
    Ok(artifacts.join(format!("{}/pretrainjob/{name}/{}", context.namespace, run.id)))
}

/// The whole checkpoints of all attempts of the run in `folder`, oldest first.
#[must_use]
pub fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let list = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = list(folder.join("attempts"))
        .flat_map(|attempt| list(attempt.path().join("checkpoints")))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none_or(|extension| extension != "partial"))
        .collect();
    all.sort_by_key(|path| path.file_name().map(ToOwned::to_owned));
    all
}

/// The attempts that left something in the run's `folder`.
#[must_use]
pub fn attempts(folder: &Path) -> usize {
    fs::read_dir(folder.join("attempts")).into_iter().flatten().count()
}

/// An InferenceService of the PretrainJob `model`, as small as they come; `more` are further lines of its spec. A model on
/// [`WORDS`] is ready within seconds.
#[must_use]
pub fn serve(name: &str, model: &str, more: &str) -> String {
    format!(
        "apiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata: {{name: {name}}}\nspec:\n  \
         storage: {{uri: 'pvc://artifacts'}}\n  model: {{pretrainJob: {{name: {model}}}}}\n  quantization: F16\n  \
         kvCache: {{memory: 4Mi}}\n{more}"
    )
}
