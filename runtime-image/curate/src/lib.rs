//! The curate stage: raw sources to a published data set.
//!
//! ```text
//! read → language → quality → personal data → (split) → exact duplicates → near duplicates → Parquet → tokens → publish
//! └────────────────── filter.rs ────────────────────┘   └────────────── select.rs ───────────────┘   └ tokens.rs
//! ```
//!
//! Documents stream through; between the passes they lie in files without a name, which end with the process. Held in
//! memory are one document, one Parquet row group, about 300 bytes a kept record, and, while the tokenizer is trained,
//! the different words of a bounded part of the training records. Text of the data never reaches a log, a message or a
//! report.

mod check;
mod dedup;
mod figures;
mod filter;
mod hash;
mod language;
mod pii;
mod publish;
mod quality;
mod record;
mod select;
mod source;
mod spill;
mod tokens;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use strata_artifact::{ArtifactError, Draft, RunFolder};
use strata_contract::{ArtifactKind, CurateConfig, GateResult, Report};
use strata_stage::{StageContext, StageError};

use figures::Figures;

/// Curates `config.sources` into a data set and publishes it in the run's folder.
///
/// The same configuration on the same sources gives the same content digest.
pub fn run(config: &CurateConfig, context: &StageContext) -> Result<Report, StageError> {
    let checked = check::check(config)?;
    let folder = RunFolder::new(&context.run.output, &context.volumes);
    let attempt = folder.attempt(&context.attempt_id)?;
    let scratch = Scratch::create(attempt.dir().join("scratch"))?;

    let mut figures = Figures::default();
    let (filtered, inputs) = filter::filter_sources(&checked, context, &scratch.0, &mut figures)?;
    let kept = select::select(&checked, context, &attempt, &scratch.0, filtered, &mut figures)?;
    if figures.train.documents == 0 {
        return Err(filter::nothing_left(&figures));
    }
    if let Some(encode) = &config.encode {
        tokens::encode(
            encode,
            context,
            &attempt,
            &kept,
            config.held_out_percent > 0,
            &mut figures,
        )?;
    }
    attempt.write("README.md", publish::card(&checked, &figures).as_bytes())?;
    let report = serde_json::to_vec_pretty(&figures).expect("figures serialize to JSON");
    attempt.write("report.json", &report)?;

    let metrics = figures.metrics();
    let gates: Vec<GateResult> = config.gates.iter().map(|gate| gate.judge(&metrics)).collect();
    if let Some(error) = StageError::from_gates(&gates) {
        return Err(error);
    }
    let message = format!(
        "published {} of {} documents: {} for training, {} held out",
        metrics["documentsKept"], metrics["documentsSeen"], figures.train.documents, figures.held_out.documents
    );
    let draft = Draft {
        kind: ArtifactKind::Dataset,
        run_id: context.run.id.clone(),
        inputs,
        config: serde_json::to_value(config).expect("a configuration serializes to JSON"),
        metrics,
        gates,
        facts: facts(config),
    };
    let manifest = attempt.publish(draft, context.run.resource.clone(), context.run.attempt)?;
    Ok(Report::published(&manifest, &context.run.output, message))
}

fn facts(config: &CurateConfig) -> BTreeMap<String, String> {
    let licenses: Vec<String> = config
        .sources
        .iter()
        .map(|source| format!("{}: {}", source.name, source.license.as_deref().unwrap_or("unknown")))
        .collect();
    let mut facts = BTreeMap::from([("licenses".to_owned(), licenses.join(", "))]);
    if !config.card.notice.is_empty() {
        facts.insert("notice".into(), config.card.notice.clone());
    }
    facts
}

/// A folder for files between the passes, gone when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn create(path: PathBuf) -> Result<Self, ArtifactError> {
        fs::create_dir_all(&path).map_err(|error| ArtifactError::writing(&path, error))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "cannot remove temporary files");
        }
    }
}
