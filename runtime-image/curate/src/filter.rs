//! The first pass: every document is read, identified, judged and described, alone; survivors go to files by split.

use strata_artifact::ArtifactError;
use strata_contract::{CurateConfig, FailureReason, Input};
use strata_stage::{StageContext, StageError};

use crate::check::Checked;
use crate::dedup::Signature;
use crate::figures::{Figures, StepKind, count_words};
use crate::hash::digest;
use crate::language;
use crate::quality::{Analysis, Verdict};
use crate::record::{Body, Record, is_held_out, parse_pair};
use crate::source::{self, RawContent, RawDocument};
use crate::spill::{Spill, SpillWriter, Spilled};

/// Records by split.
pub(crate) struct Splits<T> {
    pub(crate) held_out: T,
    pub(crate) train: T,
}

/// Reads and filters all sources; returns the survivors in files under `scratch`, and the sources as inputs.
pub(crate) fn filter_sources(
    checked: &Checked<'_>,
    context: &StageContext,
    scratch: &std::path::Path,
    figures: &mut Figures,
) -> Result<(Splits<Spill>, Vec<Input>), StageError> {
    let config = checked.config;
    let mut total = 0;
    for source in &config.sources {
        total += source::files(source, &context.volumes)?
            .iter()
            .map(|(_, bytes)| bytes)
            .sum::<u64>();
    }
    context.progress.start("reading and filtering", "bytes", total);
    let mut splits = Splits {
        held_out: SpillWriter::create(scratch.join("filtered-held-out"))?,
        train: SpillWriter::create(scratch.join("filtered-train"))?,
    };
    let mut inputs = Vec::new();
    for source in &config.sources {
        let mut number = 0u64;
        let input = source::read(source, &context.volumes, &mut |document, bytes| {
            if context.interrupt.is_set() {
                return Err(interrupted());
            }
            context.progress.add(bytes);
            number += 1;
            let id = format!("{}-{number:09}", source.name);
            if let Some((spilled, held_out)) = filter(checked, id, &source.name, document, figures) {
                let split = if held_out {
                    &mut splits.held_out
                } else {
                    &mut splits.train
                };
                split.push(&spilled)?;
            }
            Ok(())
        })?;
        inputs.push(input);
    }
    let splits = Splits {
        held_out: splits.held_out.finish()?,
        train: splits.train.finish()?,
    };
    Ok((splits, inputs))
}

/// The error of a stage that was asked to stop. Curation has nothing to save: the next attempt starts over.
pub(crate) fn interrupted() -> StageError {
    StageError::interrupted("curation was asked to stop; the next attempt starts it over")
}

/// Judges one document; the record and whether it is held out, or `None` if it is dropped.
fn filter(
    checked: &Checked<'_>,
    id: String,
    source: &str,
    document: RawDocument,
    figures: &mut Figures,
) -> Option<(Spilled, bool)> {
    let config = checked.config;
    let body = match document.content {
        RawContent::Text(text) if text.trim().is_empty() => Err("empty"),
        RawContent::Text(text) => Ok(Body::Text(text.trim().to_owned())),
        RawContent::Pair { chosen, rejected } => parse_pair(&chosen, &rejected).map(Body::Pair),
        RawContent::Nothing(reason) => Err(reason),
    };
    let seen = figures.sources.entry(source.to_owned()).or_default();
    seen.documents_seen += 1;
    let mut body = match body {
        Ok(body) => {
            seen.bytes_seen += body.bytes();
            body
        }
        Err(reason) => {
            figures.step(StepKind::Read).drop(reason);
            return None;
        }
    };
    figures.step(StepKind::Read).keep();

    let text = body.text();
    let analysis = Analysis::new(&text);
    count_words(&mut figures.words_seen, analysis.words() as u64);
    let held_out = is_held_out(body.group(analysis.normalized()), config.seed, config.held_out_percent);

    let identified = language::identify(&text);
    *figures.languages.entry(identified.code.to_owned()).or_default() += 1;
    if !keep_language(config, identified, figures) {
        return None;
    }

    let edited = match judge(checked, &text, &analysis, figures) {
        Ok(edited) => edited,
        Err(()) => return None,
    };
    let again = edited.as_deref().map(Analysis::new);
    let analysis = again.as_ref().unwrap_or(&analysis);
    let words: Vec<[u8; 8]> = analysis.normalized().iter().map(|word| word.to_le_bytes()).collect();
    let digest = digest(words.iter().map(|word| &word[..]));
    let signature = config
        .min_hash_similarity_percent
        .map(|_| Signature::new(analysis.normalized()));
    let words = analysis.words() as u64;
    if let Some(text) = edited {
        body = Body::Text(text);
    }
    let (language, language_score) = (identified.code.to_owned(), identified.confidence);
    let record = Record {
        id,
        source: source.into(),
        origin: document.origin,
        language,
        language_score,
        body,
    };
    Some((
        Spilled {
            record,
            digest,
            words,
            signature,
        },
        held_out,
    ))
}

fn keep_language(config: &CurateConfig, found: language::Identified, figures: &mut Figures) -> bool {
    if config.languages.is_empty() {
        return true;
    }
    let step = figures.step(StepKind::Language);
    match config.languages.iter().find(|language| language.code == found.code) {
        Some(language) if found.confidence * 100.0 >= f64::from(language.min_confidence_percent) => {
            step.keep();
            true
        }
        Some(language) => {
            step.drop(format!("{} below {} %", language.code, language.min_confidence_percent));
            false
        }
        None => {
            step.drop(format!("closest to {}", found.code));
            false
        }
    }
}

/// The text without the lines that a rule drops (`None`: it keeps all), or an error if the document is dropped.
fn judge(
    checked: &Checked<'_>,
    text: &str,
    analysis: &Analysis<'_>,
    figures: &mut Figures,
) -> Result<Option<String>, ()> {
    let Some(filter) = &checked.quality else {
        return Ok(None);
    };
    let step = figures.step(StepKind::Quality);
    let mut lines = std::collections::BTreeMap::new();
    let verdict = filter.judge(text, analysis, &mut lines);
    for (rule, count) in lines {
        *step.counts.entry(format!("linesDroppedBy{rule}")).or_default() += count;
    }
    match verdict {
        Verdict::Keep(Some(text)) if text.is_empty() => step.drop("empty"),
        Verdict::Keep(edited) => {
            step.keep();
            return Ok(edited);
        }
        Verdict::Drop(rule) => step.drop(format!("{rule:?}")),
    }
    Err(())
}

/// The error of a run that dropped everything.
pub(crate) fn nothing_left(figures: &Figures) -> StageError {
    let seen: u64 = figures.sources.values().map(|source| source.documents_seen).sum();
    let message = match seen {
        0 => "the sources hold no document: check that the URIs and formats are what the files are".to_owned(),
        seen => {
            let (held_out, reasons) = (figures.held_out.documents, figures.main_reasons());
            let reasons = if reasons.is_empty() {
                "no step dropped any".to_owned()
            } else {
                format!("dropped were {reasons}")
            };
            format!("of {seen} documents none is left to train on, {held_out} are held out; {reasons}")
        }
    };
    StageError::new(FailureReason::NothingLeft, message)
}

impl Splits<SpillWriter> {
    /// Writers of the records that are published, for the passes after.
    pub(crate) fn create(scratch: &std::path::Path) -> Result<Self, ArtifactError> {
        Ok(Self {
            held_out: SpillWriter::create(scratch.join("kept-held-out"))?,
            train: SpillWriter::create(scratch.join("kept-train"))?,
        })
    }
}
