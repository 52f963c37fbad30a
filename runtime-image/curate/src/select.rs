//! The second pass: duplicates go, what is left is written. The held-out records come first, so that a training record
//! that resembles one of them is the one that goes.

use std::io;
use std::path::Path;

use strata_artifact::{ArtifactError, Attempt};
use strata_contract::CurateConfig;
use strata_stage::{StageContext, StageError};

use crate::check::Checked;
use crate::dedup::{ExactDuplicates, NearDuplicates};
use crate::figures::{DUPLICATE, Figures, OVERLAP, StepKind, count_words};
use crate::filter::{Splits, interrupted};
use crate::publish::RecordWriter;
use crate::spill::{Selected, Spill, Spilled, unnamed_file};

/// Looks for duplicates among what was kept before.
struct Duplicates<'c> {
    config: &'c CurateConfig,
    exact: ExactDuplicates,
    near: Option<NearDuplicates>,
    /// How many of the kept records are held out, as the exact and the near search number them; `None` while they are
    /// read.
    held_out: Option<(u32, u32)>,
}

impl Duplicates<'_> {
    /// Whether the record is new; if not, why it goes is counted.
    ///
    /// That a training record resembles a held-out one is looked for in any case, duplicates within a split only if the
    /// configuration says so.
    fn keep(&mut self, spilled: &Spilled, figures: &mut Figures) -> io::Result<bool> {
        let within_exact = self.config.deduplicate_exact;
        let within_near = self.config.min_hash_similarity_percent.is_some();
        let training = self.held_out.is_some();
        let overlap = training && self.config.held_out_percent > 0;
        let (exact_held_out, near_held_out) = self.held_out.unwrap_or_default();
        let mut judge = |kind: StepKind, found: Option<u32>, held_out: u32, within: bool| {
            let reason = match found {
                Some(of) if of < held_out => OVERLAP,
                Some(_) if within => DUPLICATE,
                _ => {
                    figures.step(kind).keep();
                    return true;
                }
            };
            let bytes = spilled.record.body.bytes();
            figures.drop(kind, reason, &spilled.record.source, bytes);
            false
        };
        if within_exact || overlap {
            let found = self.exact.find(spilled.digest);
            if !judge(StepKind::ExactDuplicates, found, exact_held_out, within_exact) {
                return Ok(false);
            }
        }
        if within_exact || !training {
            self.exact.add(spilled.digest);
        }
        let (Some(near), Some(signature)) = (&mut self.near, &spilled.signature) else {
            return Ok(true);
        };
        if within_near || overlap {
            let found = near.find(signature)?;
            if !judge(StepKind::NearDuplicates, found, near_held_out, within_near) {
                return Ok(false);
            }
        }
        if within_near || !training {
            near.add(signature)?;
        }
        Ok(true)
    }

    /// From here on the records are for training.
    fn held_out_are_done(&mut self) {
        let near = self.near.as_ref().map_or(0, NearDuplicates::kept);
        self.held_out = Some((self.exact.kept(), near));
    }
}

/// Selects from the filtered records and writes the Parquet files; returns what was kept.
pub(crate) fn select(
    checked: &Checked<'_>,
    context: &StageContext,
    attempt: &Attempt,
    scratch: &Path,
    filtered: Splits<Spill>,
    figures: &mut Figures,
) -> Result<Splits<Selected>, StageError> {
    let reached = figures.steps.values().last().map_or(0, |step| step.kept);
    context.progress.start("dropping duplicates", "documents", reached);
    let near = match checked.near_percent {
        None => None,
        Some(percent) => Some(NearDuplicates::new(percent, unnamed_file(&scratch.join("signatures"))?)),
    };
    let mut selection = Selection {
        context,
        attempt,
        duplicates: Duplicates {
            config: checked.config,
            exact: ExactDuplicates::default(),
            near,
            held_out: None,
        },
        figures,
    };
    let held_out = match checked.config.held_out_percent {
        0 => Vec::new(),
        _ => selection.write("test", &filtered.held_out)?,
    };
    selection.duplicates.held_out_are_done();
    let train = selection.write("train", &filtered.train)?;
    if let Some(near) = &selection.duplicates.near {
        let counts = &mut selection.figures.step(StepKind::NearDuplicates).counts;
        let found = near.figures;
        counts.extend([
            ("pairsCompared".to_owned(), found.pairs),
            ("pairsSimilar".to_owned(), found.matches),
        ]);
    }
    let selected = |spill, kept| Selected { spill, kept };
    Ok(Splits {
        held_out: selected(filtered.held_out, held_out),
        train: selected(filtered.train, train),
    })
}

struct Selection<'s> {
    context: &'s StageContext,
    attempt: &'s Attempt,
    duplicates: Duplicates<'s>,
    figures: &'s mut Figures,
}

impl Selection<'_> {
    /// Writes the records of a split that are no duplicates; which those are.
    fn write(&mut self, name: &str, filtered: &Spill) -> Result<Vec<bool>, StageError> {
        let Self {
            context,
            attempt,
            duplicates,
            figures,
        } = self;
        let relative = format!("data/{name}-00000-of-00001.parquet");
        let path = attempt.place(&relative)?;
        let mut parquet = RecordWriter::new(duplicates.config.task, attempt.file(&relative)?)
            .map_err(|error| ArtifactError::writing(&path, error))?;
        let mut kept = Vec::new();
        for spilled in filtered.read() {
            if context.interrupt.is_set() {
                return Err(interrupted());
            }
            context.progress.add(1);
            let spilled = spilled?;
            let keep = duplicates
                .keep(&spilled, figures)
                .map_err(|error| ArtifactError::writing(&path, error))?;
            kept.push(keep);
            if !keep {
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
            parquet
                .push(spilled.record)
                .map_err(|error| ArtifactError::writing(&path, error))?;
        }
        let file = parquet.finish().map_err(|error| ArtifactError::writing(&path, error))?;
        file.finish()?;
        Ok(kept)
    }
}
