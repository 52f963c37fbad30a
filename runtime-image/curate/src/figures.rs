//! What every step saw, kept and dropped, and why; so that a step that does nothing cannot hide.

use std::collections::BTreeMap;

use serde::Serialize;

/// A step of curation, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum StepKind {
    Read,
    Language,
    Quality,
    PersonalData,
    ExactDuplicates,
    NearDuplicates,
}

impl StepKind {
    /// What it is called in the card.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Read => "Read",
            Self::Language => "Language",
            Self::Quality => "Quality",
            Self::PersonalData => "Personal data",
            Self::ExactDuplicates => "Exact duplicates",
            Self::NearDuplicates => "Near duplicates",
        }
    }
}

/// Figures of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Step {
    /// Records that reached it.
    pub(crate) seen: u64,
    /// Records that went on from it.
    pub(crate) kept: u64,
    /// Records that it dropped, by reason.
    pub(crate) dropped: BTreeMap<String, u64>,
    /// Bytes of text of the records that it dropped.
    pub(crate) bytes_dropped: u64,
    /// What else it counted: lines dropped by rule, pairs compared, spans found by type.
    pub(crate) counts: BTreeMap<String, u64>,
}

impl Step {
    /// Counts a record that went on.
    pub(crate) fn keep(&mut self) {
        self.seen += 1;
        self.kept += 1;
    }

    /// Records that it dropped.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.values().sum()
    }
}

/// Records and bytes, before and after.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SourceFigures {
    /// Documents found in it.
    pub(crate) documents_seen: u64,
    /// Of these, published.
    pub(crate) documents_kept: u64,
    /// Bytes of text, after extraction.
    pub(crate) bytes_seen: u64,
    /// Of these, published.
    pub(crate) bytes_kept: u64,
    /// Documents that were dropped, by step and reason.
    pub(crate) dropped: BTreeMap<StepKind, BTreeMap<String, u64>>,
}

/// Records by their number of words: key is the smallest number of a bucket, a power of two.
pub(crate) type Histogram = BTreeMap<u64, u64>;

/// Counts a record of `words` words.
pub(crate) fn count_words(histogram: &mut Histogram, words: u64) {
    let bucket = if words == 0 { 0 } else { 1 << words.ilog2() };
    *histogram.entry(bucket).or_default() += 1;
}

/// Records and bytes of a split, and its tokens if it was encoded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SplitFigures {
    /// Records.
    pub(crate) documents: u64,
    /// Bytes of text.
    pub(crate) bytes: u64,
    /// Tokens, with one that ends each document.
    pub(crate) tokens: u64,
    /// Packed sequences.
    pub(crate) sequences: u64,
}

/// All figures of a run: the content of `report.json`, which holds no text of the data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Figures {
    /// By step, in their order; a step that is not configured is not there.
    pub(crate) steps: BTreeMap<StepKind, Step>,
    /// By source.
    pub(crate) sources: BTreeMap<String, SourceFigures>,
    /// Records by identified language, before the language filter.
    pub(crate) languages: BTreeMap<String, u64>,
    /// Records by number of words, as read.
    pub(crate) words_seen: Histogram,
    /// Records by number of words, as published.
    pub(crate) words_kept: Histogram,
    /// What is published for training.
    pub(crate) train: SplitFigures,
    /// What is published for evaluation.
    pub(crate) held_out: SplitFigures,
}

impl Figures {
    /// Figures of a step.
    pub(crate) fn step(&mut self, kind: StepKind) -> &mut Step {
        self.steps.entry(kind).or_default()
    }

    /// Counts a record of `source` with `bytes` of text that a step dropped.
    pub(crate) fn drop(&mut self, kind: StepKind, reason: impl Into<String>, source: &str, bytes: u64) {
        let reason = reason.into();
        let step = self.step(kind);
        step.seen += 1;
        step.bytes_dropped += bytes;
        *step.dropped.entry(reason.clone()).or_default() += 1;
        let source = self.sources.entry(source.to_owned()).or_default();
        *source.dropped.entry(kind).or_default().entry(reason).or_default() += 1;
    }

    fn dropped(&self, kinds: &[StepKind]) -> u64 {
        kinds
            .iter()
            .filter_map(|kind| self.steps.get(kind))
            .map(Step::dropped)
            .sum()
    }

    /// The metrics by name, as gates and reports know them.
    pub(crate) fn metrics(&self) -> BTreeMap<String, f64> {
        use StepKind::{ExactDuplicates, Language, NearDuplicates, PersonalData, Quality, Read};
        let counts = |kind: StepKind, suffix: &str| -> u64 {
            let counts = self.steps.get(&kind).into_iter().flat_map(|step| &step.counts);
            counts
                .filter(|(name, _)| name.ends_with(suffix))
                .map(|(_, count)| count)
                .sum()
        };
        let overlap = |kind: StepKind| {
            self.steps
                .get(&kind)
                .and_then(|step| step.dropped.get(OVERLAP))
                .copied()
                .unwrap_or_default()
        };
        let total = |of: fn(&SourceFigures) -> u64| self.sources.values().map(of).sum::<u64>();
        let mut metrics = BTreeMap::from([
            ("documentsSeen", total(|source| source.documents_seen)),
            ("documentsKept", total(|source| source.documents_kept)),
            ("documentsTrain", self.train.documents),
            ("documentsHeldOut", self.held_out.documents),
            ("droppedUnreadable", self.dropped(&[Read])),
            ("droppedByLanguage", self.dropped(&[Language])),
            ("droppedByQuality", self.dropped(&[Quality])),
            ("droppedAsDuplicate", self.dropped(&[ExactDuplicates, NearDuplicates])),
            (
                "droppedAsHeldOutOverlap",
                overlap(ExactDuplicates) + overlap(NearDuplicates),
            ),
            ("droppedForPii", self.dropped(&[PersonalData])),
            ("piiSpansFound", counts(PersonalData, SPANS_FOUND)),
            ("piiSpansRedacted", counts(PersonalData, SPANS_REDACTED)),
            ("bytesSeen", total(|source| source.bytes_seen)),
            ("bytesKept", total(|source| source.bytes_kept)),
        ]);
        if self.train.tokens > 0 {
            metrics.extend([
                ("tokensTrain", self.train.tokens),
                ("tokensHeldOut", self.held_out.tokens),
                ("sequencesTrain", self.train.sequences),
                ("sequencesHeldOut", self.held_out.sequences),
            ]);
        }
        let mut metrics: BTreeMap<String, f64> = metrics
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value as f64))
            .collect();
        if self.train.tokens > 0 {
            metrics.insert(
                "bytesPerToken".into(),
                self.train.bytes as f64 / self.train.tokens as f64,
            );
        }
        metrics
    }

    /// The reasons that dropped most, in words.
    pub(crate) fn main_reasons(&self) -> String {
        let all = self
            .steps
            .iter()
            .flat_map(|(kind, step)| step.dropped.iter().map(move |reason| (kind, reason)));
        let reasons = all.map(|(kind, (reason, count))| (*count, format!("{reason} ({})", kind.title())));
        most(reasons.collect())
    }
}

/// The reasons that dropped most, in words.
pub(crate) fn most(mut reasons: Vec<(u64, String)>) -> String {
    reasons.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    let words = reasons
        .iter()
        .take(5)
        .map(|(count, reason)| format!("{count} for {reason}"));
    words.collect::<Vec<_>>().join(", ")
}

/// Reason: a training record equals or resembles a held-out one.
pub(crate) const OVERLAP: &str = "heldOutOverlap";
/// Reason: a record equals or resembles one before it.
pub(crate) const DUPLICATE: &str = "duplicate";
/// Ends the names of counts of spans that were found.
pub(crate) const SPANS_FOUND: &str = "SpansFound";
/// Ends the names of counts of spans that were replaced by tags.
pub(crate) const SPANS_REDACTED: &str = "SpansRedacted";
