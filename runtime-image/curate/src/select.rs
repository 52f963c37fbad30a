//! The second pass: duplicates go, personal data is dealt with, what is left is written. The held-out records come first,
//! so that a training record that resembles one of them is the one that goes.

use strata_artifact::{ArtifactError, Attempt};
use strata_contract::PiiAction;
use strata_stage::{StageContext, StageError};

use crate::check::Checked;
use crate::dedup::{ExactDuplicates, NearDuplicates};
use crate::figures::{Figures, OVERLAP, SPANS_FOUND, SPANS_REDACTED, StepKind, count_words};
use crate::filter::{Splits, interrupted};
use crate::publish::RecordWriter;
use crate::spill::{Spill, SpillWriter, Spilled};

/// Looks for duplicates among what was kept before.
struct Duplicates {
    exact: Option<ExactDuplicates>,
    near: Option<NearDuplicates>,
    /// How many of the kept records are held out, as the exact and the near search number them.
    held_out: (u32, u32),
}

impl Duplicates {
    /// Whether the record is new; if not, why it goes is counted.
    fn keep(&mut self, spilled: &Spilled, figures: &mut Figures) -> std::io::Result<bool> {
        let reason = |of: u32, held_out: u32| if of < held_out { OVERLAP } else { "duplicate" };
        if let Some(exact) = &mut self.exact {
            let step = figures.step(StepKind::ExactDuplicates);
            if let Some(of) = exact.insert(spilled.digest) {
                step.drop(reason(of, self.held_out.0));
                return Ok(false);
            }
            step.keep();
        }
        if let (Some(near), Some(signature)) = (&mut self.near, &spilled.signature) {
            let step = figures.step(StepKind::NearDuplicates);
            if let Some(of) = near.insert(signature)? {
                step.drop(reason(of, self.held_out.1));
                return Ok(false);
            }
            step.keep();
        }
        Ok(true)
    }

    /// From here on the records are for training.
    fn held_out_are_done(&mut self) {
        let kept = |of: Option<u32>| of.unwrap_or_default();
        self.held_out = (
            kept(self.exact.as_ref().map(ExactDuplicates::kept)),
            kept(self.near.as_ref().map(NearDuplicates::kept)),
        );
    }
}

/// Selects from the filtered records and writes the Parquet files; returns what was kept.
pub(crate) fn select(
    checked: &Checked<'_>,
    context: &StageContext,
    attempt: &Attempt,
    scratch: &std::path::Path,
    filtered: &Splits<Spill>,
    figures: &mut Figures,
) -> Result<Splits<Spill>, StageError> {
    let config = checked.config;
    let reached = |figures: &Figures| figures.steps.values().last().map_or(0, |step| step.kept);
    context
        .progress
        .start("dropping duplicates", "documents", reached(figures));
    let near = match config.min_hash_similarity_percent {
        None => None,
        Some(percent) => {
            let path = scratch.join("signatures");
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path);
            Some(NearDuplicates::new(
                percent,
                file.map_err(|error| ArtifactError::writing(&path, error))?,
            ))
        }
    };
    let exact = config.deduplicate_exact.then(ExactDuplicates::default);
    let mut duplicates = Duplicates {
        exact,
        near,
        held_out: (0, 0),
    };
    let mut kept = Splits::<SpillWriter>::create(scratch)?;
    if config.held_out_percent > 0 {
        write_split(
            "test",
            &filtered.held_out,
            &mut kept.held_out,
            checked,
            context,
            attempt,
            &mut duplicates,
            figures,
        )?;
    }
    duplicates.held_out_are_done();
    write_split(
        "train",
        &filtered.train,
        &mut kept.train,
        checked,
        context,
        attempt,
        &mut duplicates,
        figures,
    )?;
    if let Some(near) = &duplicates.near {
        let counts = &mut figures.step(StepKind::NearDuplicates).counts;
        let found = near.figures;
        counts.extend([
            ("pairsCompared".to_owned(), found.pairs),
            ("pairsSimilar".to_owned(), found.matches),
        ]);
    }
    Ok(Splits {
        held_out: kept.held_out.finish()?,
        train: kept.train.finish()?,
    })
}

#[allow(
    clippy::too_many_arguments,
    reason = "called twice, by one function, with what that one has at hand"
)]
fn write_split(
    name: &str,
    filtered: &Spill,
    kept: &mut SpillWriter,
    checked: &Checked<'_>,
    context: &StageContext,
    attempt: &Attempt,
    duplicates: &mut Duplicates,
    figures: &mut Figures,
) -> Result<(), StageError> {
    let config = checked.config;
    let relative = format!("data/{name}-00000-of-00001.parquet");
    let path = attempt.place(&relative)?;
    let writing = |error| ArtifactError::writing(&path, error);
    let mut parquet = RecordWriter::new(config.task, attempt.file(&relative)?).map_err(writing)?;
    for spilled in filtered.read()? {
        if context.interrupt.is_set() {
            return Err(interrupted());
        }
        context.progress.add(1);
        let mut spilled = spilled?;
        if !duplicates
            .keep(&spilled, figures)
            .map_err(|error| ArtifactError::writing(&path, error))?
        {
            continue;
        }
        if !treat_personal_data(config.pii, &mut spilled, figures) {
            continue;
        }
        let bytes = spilled.record.body.bytes();
        let source = figures.sources.entry(spilled.record.source.clone()).or_default();
        source.documents_kept += 1;
        source.bytes_kept += bytes;
        let split = if name == "train" {
            &mut figures.train
        } else {
            &mut figures.held_out
        };
        split.documents += 1;
        split.bytes += bytes;
        count_words(&mut figures.words_kept, spilled.words);
        kept.push(&spilled)?;
        parquet.push(spilled.record).map_err(writing)?;
    }
    parquet.finish().map_err(writing)?.finish()?;
    Ok(())
}

/// Counts and redacts personal data; false if the record is to be dropped for it.
fn treat_personal_data(action: PiiAction, spilled: &mut Spilled, figures: &mut Figures) -> bool {
    let step = figures.step(StepKind::PersonalData);
    let kinds = spilled.record.body.personal_data();
    for kind in &kinds {
        *step.counts.entry(format!("{}{SPANS_FOUND}", kind.name())).or_default() += 1;
    }
    match action {
        PiiAction::Drop if !kinds.is_empty() => {
            step.drop("personalData");
            return false;
        }
        PiiAction::Redact if !kinds.is_empty() => {
            spilled.record.body.redact();
            for kind in &kinds {
                *step
                    .counts
                    .entry(format!("{}{SPANS_REDACTED}", kind.name()))
                    .or_default() += 1;
            }
        }
        PiiAction::Keep | PiiAction::Drop | PiiAction::Redact => {}
    }
    step.keep();
    true
}
