//! The first pass: every document is read, identified, judged and described, alone; survivors go to files by split.

use std::collections::BTreeMap;

use strata_contract::{CurateConfig, FailureReason, Input, PiiAction};
use strata_stage::{StageContext, StageError};

use crate::check::Checked;
use crate::dedup::Signature;
use crate::figures::{Figures, SPANS_FOUND, SPANS_REDACTED, SourceFigures, StepKind, count_words, most};
use crate::hash::digest;
use crate::language;
use crate::quality::{Analysis, QualityFilter};
use crate::record::{Body, Record, impersonal_origin, is_held_out, parse_pair};
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
        if let Some(error) = nothing_read(&source.name, figures) {
            return Err(error);
        }
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
        Ok(body) => body,
        Err(reason) => {
            figures.drop(StepKind::Read, reason, source, 0);
            return None;
        }
    };
    seen.bytes_seen += body.bytes();
    figures.step(StepKind::Read).keep();

    let text = body.text();
    let analysis = Analysis::new(&text);
    count_words(&mut figures.words_seen, analysis.words() as u64);
    let digest_of = |analysis: &Analysis<'_>| {
        let words: Vec<[u8; 8]> = analysis.normalized().iter().map(|word| word.to_le_bytes()).collect();
        digest(words.iter().map(|word| &word[..]))
    };
    let mut digest = digest_of(&analysis);
    let held_out = is_held_out(body.group(digest), config.seed, config.held_out_percent);

    let identified = language::identify(&text);
    *figures.languages.entry(identified.code.to_owned()).or_default() += 1;
    match judge_language(config, identified) {
        None => {}
        Some(Ok(())) => figures.step(StepKind::Language).keep(),
        Some(Err(reason)) => {
            figures.drop(StepKind::Language, reason, source, body.bytes());
            return None;
        }
    }

    let edited = match &checked.quality {
        None => None,
        Some(quality) => match edit(quality, &text, &analysis, figures) {
            Ok(edited) => edited,
            Err(reason) => {
                figures.drop(StepKind::Quality, reason, source, body.bytes());
                return None;
            }
        },
    };
    // Only a text that lost some is split into words again.
    let again = edited.as_deref().map(Analysis::new);
    let analysis = again.as_ref().unwrap_or(&analysis);
    if let Some(quality) = &checked.quality {
        if let Err(rule) = quality.judge_rest(edited.as_deref().unwrap_or(&text), analysis) {
            figures.drop(StepKind::Quality, format!("{rule:?}"), source, body.bytes());
            return None;
        }
        figures.step(StepKind::Quality).keep();
    }
    if again.is_some() {
        digest = digest_of(analysis);
    }
    let signature = checked.near_percent.map(|_| Signature::new(analysis.normalized()));
    let words = analysis.words() as u64;
    if let Some(text) = edited {
        body = Body::Text(text);
    }
    // Before anything is compared: a record that is dropped for it must not take another with it.
    if !treat_personal_data(config.pii, &mut body, source, figures) {
        return None;
    }
    let (language, language_score) = (identified.code.to_owned(), identified.confidence);
    let origin = match config.pii {
        PiiAction::Keep => document.origin,
        PiiAction::Redact | PiiAction::Drop => impersonal_origin(&document.origin),
    };
    let record = Record {
        id,
        source: source.into(),
        origin,
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

/// Whether a text is in a language to keep; the error is the reason in the figures, and `None` that any is kept.
fn judge_language(config: &CurateConfig, found: language::Identified) -> Option<Result<(), String>> {
    if config.languages.is_empty() {
        return None;
    }
    Some(
        match config.languages.iter().find(|language| language.code == found.code) {
            Some(language) if found.confidence * 100.0 >= f64::from(language.min_confidence_percent) => Ok(()),
            Some(language) => Err(format!("{} below {} %", language.code, language.min_confidence_percent)),
            None => Err(format!("closest to {}", found.code)),
        },
    )
}

/// The text without the lines that a rule drops (`None`: it keeps all), or why the document is dropped.
fn edit(
    quality: &QualityFilter,
    text: &str,
    analysis: &Analysis<'_>,
    figures: &mut Figures,
) -> Result<Option<String>, String> {
    let reason = |rule| format!("{rule:?}");
    quality.judge_whole(text, analysis).map_err(reason)?;
    let mut lines = BTreeMap::new();
    let edited = quality.drop_lines(text, &mut lines).map_err(reason);
    let counts = &mut figures.step(StepKind::Quality).counts;
    for (rule, count) in lines {
        *counts.entry(format!("linesDroppedBy{rule}")).or_default() += count;
    }
    match edited? {
        Some(text) if text.is_empty() => Err("empty".into()),
        edited => Ok(edited),
    }
}

/// Counts and redacts personal data; false if the record is dropped for it.
fn treat_personal_data(action: PiiAction, body: &mut Body, source: &str, figures: &mut Figures) -> bool {
    let bytes = body.bytes();
    let kinds = body.personal_data(action == PiiAction::Redact);
    let step = figures.step(StepKind::PersonalData);
    for kind in &kinds {
        *step.counts.entry(format!("{}{SPANS_FOUND}", kind.name())).or_default() += 1;
        if action == PiiAction::Redact {
            let redacted = format!("{}{SPANS_REDACTED}", kind.name());
            *step.counts.entry(redacted).or_default() += 1;
        }
    }
    if action == PiiAction::Drop && !kinds.is_empty() {
        figures.drop(StepKind::PersonalData, "personalData", source, bytes);
        return false;
    }
    step.keep();
    true
}

/// The error of a source that was read and in which nothing is that could be kept.
fn nothing_read(source: &str, figures: &Figures) -> Option<StageError> {
    let empty = SourceFigures::default();
    let found = figures.sources.get(source).unwrap_or(&empty);
    let unread: Vec<(u64, String)> = found
        .dropped
        .get(&StepKind::Read)
        .into_iter()
        .flatten()
        .map(|(reason, count)| (*count, reason.clone()))
        .collect();
    (found.documents_seen == unread.iter().map(|(count, _)| count).sum::<u64>()).then(|| {
        let what = match found.documents_seen {
            0 => "it is empty".to_owned(),
            seen => format!("of {seen} records none could be read, {}", most(unread)),
        };
        let message =
            format!("source {source:?} holds no document: {what}. Check that its URI and format fit its files");
        StageError::new(FailureReason::NothingLeft, message)
    })
}

/// The error of a run that dropped everything.
pub(crate) fn nothing_left(figures: &Figures) -> StageError {
    let seen: u64 = figures.sources.values().map(|source| source.documents_seen).sum();
    let (held_out, reasons) = (figures.held_out.documents, figures.main_reasons());
    let reasons = if reasons.is_empty() {
        "no step dropped any".to_owned()
    } else {
        format!("dropped were {reasons}")
    };
    let message = format!("of {seen} documents none is left to train on, {held_out} are held out; {reasons}");
    StageError::new(FailureReason::NothingLeft, message)
}
