//! Whether a configuration can be carried out, before anything is read.

use std::collections::BTreeSet;

use strata_contract::{CurateConfig, FailureReason, SourceFormat, Task};
use strata_stage::StageError;

use crate::language;
use crate::quality::QualityFilter;
use crate::source::DOCUMENT_LIMIT_BYTES;

/// A configuration that can be carried out.
pub(crate) struct Checked<'c> {
    pub(crate) config: &'c CurateConfig,
    pub(crate) quality: Option<QualityFilter>,
    /// Similarity of near duplicates, if any are looked for: those of held-out records always are.
    pub(crate) near_percent: Option<u8>,
}

/// Similarity from which a training record is too close to a held-out one, where the configuration names none.
const OVERLAP_PERCENT: u8 = 80;
/// Largest size at which a text is split: a document may be longer, up to its next blank line.
const SPLIT_LIMIT_BYTES: u64 = DOCUMENT_LIMIT_BYTES / 2;

/// Checks `config`; the error says what to write instead.
pub(crate) fn check(config: &CurateConfig) -> Result<Checked<'_>, StageError> {
    let invalid = |message: String| Err(StageError::new(FailureReason::ConfigInvalid, message));
    if config.sources.is_empty() {
        return invalid("there is no source: name at least one".into());
    }
    let mut names = BTreeSet::new();
    for source in &config.sources {
        if !names.insert(&source.name) {
            return invalid(format!(
                "two sources are named {:?}: give each its own name",
                source.name
            ));
        }
        let pairs = source.format == SourceFormat::PreferenceTranscripts;
        match (config.task, pairs) {
            (Task::Pretraining, true) => {
                return invalid(format!(
                    "source {:?} holds preference transcripts: they are read with task Preference",
                    source.name
                ));
            }
            (Task::Preference, false) => {
                return invalid(format!(
                    "source {:?} holds no pairs: task Preference reads the format PreferenceTranscripts",
                    source.name
                ));
            }
            _ => {}
        }
        if let SourceFormat::Text {
            split_bytes: Some(bytes),
        } = source.format
            && !(1..=SPLIT_LIMIT_BYTES).contains(&bytes)
        {
            return invalid(format!(
                "source {:?} is split at {bytes} bytes: leave splitBytes out, or set 1 to {SPLIT_LIMIT_BYTES}, as a \
                 document of over {DOCUMENT_LIMIT_BYTES} bytes is dropped",
                source.name
            ));
        }
    }
    for language in &config.languages {
        if !language::is_known(&language.code) {
            return invalid(format!(
                "language {:?} cannot be identified; known are {}",
                language.code,
                language::known_codes()
            ));
        }
        if language.min_confidence_percent > 100 {
            return invalid(format!(
                "the confidence for language {:?} is over 100 percent",
                language.code
            ));
        }
    }
    let quality = match (&config.quality, config.task) {
        (None, _) => None,
        (Some(_), Task::Preference) => {
            return invalid("quality rules judge running text: leave quality out with task Preference".into());
        }
        (Some(quality), Task::Pretraining) => match QualityFilter::new(quality) {
            Ok(filter) => Some(filter),
            Err(rule) => {
                return invalid(format!(
                    "preset {:?} has no rule {rule:?}: leave that override out",
                    quality.preset
                ));
            }
        },
    };
    if !config
        .min_hash_similarity_percent
        .is_none_or(|percent| (1..=100).contains(&percent))
    {
        return invalid("the similarity of near duplicates must be from 1 to 100 percent".into());
    }
    if config.held_out_percent > 90 {
        return invalid("at most 90 percent can be held out".into());
    }
    match (&config.encode, config.task) {
        (Some(_), Task::Preference) => {
            return invalid("preferences are encoded by the model that is aligned: leave encode out".into());
        }
        (Some(encode), _) if encode.sequence_length_tokens < 2 => {
            return invalid("a sequence has at least 2 tokens: raise sequenceLengthTokens".into());
        }
        _ => {}
    }
    let near_percent = config
        .min_hash_similarity_percent
        .or((config.held_out_percent > 0).then_some(OVERLAP_PERCENT));
    Ok(Checked {
        config,
        quality,
        near_percent,
    })
}
