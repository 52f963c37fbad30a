//! A whole life that takes a minute: words, a model of them, what people prefer, the aligned model, the service. What it says is
//! nonsense; that it says it is what tests are about.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::run;

/// What people prefer.
pub const PREFERENCES: &str = "apiVersion: strata.dev/v1alpha1
kind: Dataset
metadata: {name: preferences}
spec:
  task: Preference
  retries: 0
  storage: {uri: 'pvc://artifacts'}
  sources: [{name: pairs, preferences: {uri: 'pvc://raw/pairs.jsonl'}}]
  split: {heldOutPercent: 30}
";

/// The raw data of the life, into the folder of the claim `raw`.
///
/// # Errors
/// It cannot be written.
pub fn fill(raw: &Path) -> Result<()> {
    let pair = |number: u32| {
        let text = |said: &str| format!("\n\nHuman: What is {number}?\n\nAssistant: {said}");
        json!({"chosen": text("It is a word that repeats."), "rejected": text("No.")}).to_string() + "\n"
    };
    fs::write(raw.join("words.txt"), run::text())?;
    fs::write(raw.join("pairs.jsonl"), (0..64).map(pair).collect::<String>())?;
    Ok(())
}

/// The words, with room in a sequence for a question and its answer.
#[must_use]
pub fn words() -> String {
    run::WORDS.replace("lengthTokens: 32", "lengthTokens: 256")
}

/// A model of them.
#[must_use]
pub fn model(name: &str) -> String {
    run::pretrain(name, 4096).replace("contextTokens: 32", "contextTokens: 256")
}

/// The model `tiny`, aligned at this learning rate.
#[must_use]
pub fn alignment(rate: &str) -> String {
    format!(
        "apiVersion: strata.dev/v1alpha1
kind: AlignmentJob
metadata: {{name: chat}}
spec:
  storage: {{uri: 'pvc://artifacts'}}
  base: {{pretrainJob: {{name: tiny}}}}
  method: {{dpo: {{beta: '0.1'}}}}
  adapter: {{lora: {{rank: 4}}}}
  datasets: [{{name: preferences}}]
  training: {{pairs: 16, maxPairTokens: 128, batchPairs: 4, learningRate: '{rate}'}}
  evaluate: {{heldOutPairs: 8}}
  pod: {{resources: {{requests: {{cpu: 100m}}}}}}
"
    )
}

/// The service, which follows what is published, or is pinned to a digest.
#[must_use]
pub fn service(digest: Option<&str>) -> String {
    let pinned = digest.map(|digest| format!(", digest: '{digest}'")).unwrap_or_default();
    format!(
        "apiVersion: strata.dev/v1alpha1
kind: InferenceService
metadata: {{name: chat}}
spec:
  storage: {{uri: 'pvc://artifacts'}}
  model: {{alignmentJob: {{name: chat{pinned}}}}}
  kvCache: {{memory: 16Mi}}
  pod: {{resources: {{requests: {{cpu: 100m}}}}}}
"
    )
}
