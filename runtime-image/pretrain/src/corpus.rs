//! The training data as one indexable corpus, in an order that is a function of the seed.

use std::collections::BTreeMap;

use strata_artifact::Opened;
use strata_contract::FailureReason;
use strata_encode::{TextTokenizer, TokenFile};
use strata_evaluate::TextSet;
use strata_stage::StageError;
use strata_train::Random;

/// The tokenizer's file in a data set.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Stem of the token files that are trained on.
const TRAIN: &str = "tokens/train";
/// Stem of the token files that are held out.
const HELD_OUT: &str = "tokens/test";
/// Held-out tokens that are evaluated at most.
const HELD_OUT_TOKENS: u64 = 1 << 18;
/// Stream of the seed from which the order of an epoch comes; epoch `n` takes `ORDER_STREAM + n`.
const ORDER_STREAM: u64 = 1 << 32;

/// The sequences of all data sets, one after another.
pub(crate) struct Corpus {
    files: Vec<TokenFile>,
    /// Number of sequences before each file, and in all.
    starts: Vec<u64>,
    seed: u64,
}

impl Corpus {
    /// Opens the token files of `datasets`.
    pub(crate) fn open(datasets: &[Opened], seed: u64) -> Result<Self, StageError> {
        let files = datasets
            .iter()
            .map(|dataset| token_file(dataset, TRAIN))
            .collect::<Result<Vec<_>, _>>()?;
        Self::new(files, seed)
    }

    fn new(files: Vec<TokenFile>, seed: u64) -> Result<Self, StageError> {
        let mut starts = vec![0];
        for file in &files {
            starts.push(starts[starts.len() - 1] + file.sequences());
        }
        let corpus = Self { files, starts, seed };
        if corpus.sequences() == 0 || corpus.files.iter().all(|file| file.tokens() < 2) {
            return Err(StageError::new(
                FailureReason::ConfigInvalid,
                "the data sets have no tokens to train on",
            ));
        }
        Ok(corpus)
    }

    /// Number of sequences.
    pub(crate) fn sequences(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Replaces `tokens` by sequence `index`.
    pub(crate) fn read(&self, index: u64, tokens: &mut Vec<u32>) -> Result<(), StageError> {
        let file = self.starts.partition_point(|&start| start <= index) - 1;
        Ok(self.files[file].sequence(index - self.starts[file], tokens)?)
    }

    /// A reader from sample number `sample` on.
    fn samples(&self, sample: u64) -> Samples<'_> {
        Samples {
            corpus: self,
            next: sample,
            epoch: None,
            order: Vec::new(),
        }
    }

    /// A reader of pieces of at most `context + 1` tokens from `position` on.
    pub(crate) fn pieces(&self, position: Position, context: usize) -> Result<Pieces<'_>, StageError> {
        let mut samples = self.samples(position.sample);
        let mut sequence = Vec::new();
        if position.offset > 0 {
            samples.take(&mut sequence)?;
        }
        Ok(Pieces {
            samples,
            sequence,
            length: context + 1,
            offset: position.offset,
            tokens: position.tokens,
        })
    }
}

/// A place in the seed's order of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Number of the next sample, or of the one that is read in part.
    pub(crate) sample: u64,
    /// Tokens of that sample that were taken.
    pub(crate) offset: usize,
    /// Tokens taken since the start of the run.
    pub(crate) tokens: u64,
}

impl Position {
    const NOTE: &str = "position";

    /// What a checkpoint keeps beside the sample.
    pub(crate) fn notes(self) -> BTreeMap<String, Vec<f64>> {
        BTreeMap::from([(Self::NOTE.to_owned(), vec![self.offset as f64, self.tokens as f64])])
    }

    pub(crate) fn from_notes(sample: u64, notes: &BTreeMap<String, Vec<f64>>) -> Self {
        let number = |i: usize| {
            notes
                .get(Self::NOTE)
                .and_then(|note| note.get(i))
                .copied()
                .unwrap_or_default()
        };
        Self {
            sample,
            offset: number(0) as usize,
            tokens: number(1) as u64,
        }
    }
}

/// The samples cut to the model's context, one piece after another: a sequence may be longer than a whole step.
pub(crate) struct Pieces<'a> {
    samples: Samples<'a>,
    sequence: Vec<u32>,
    length: usize,
    offset: usize,
    tokens: u64,
}

impl Pieces<'_> {
    /// Where the next piece begins.
    pub(crate) fn position(&self) -> Position {
        match self.offset {
            0 => Position {
                sample: self.samples.next,
                offset: 0,
                tokens: self.tokens,
            },
            offset => Position {
                sample: self.samples.next - 1,
                offset,
                tokens: self.tokens,
            },
        }
    }

    /// The next piece of at least two tokens.
    pub(crate) fn take(&mut self) -> Result<&[u32], StageError> {
        for _ in 0..=self.samples.corpus.sequences() {
            if self.offset == 0 {
                self.samples.take(&mut self.sequence)?;
            }
            let start = self.offset;
            let end = self.sequence.len().min(start + self.length);
            // What is left of a sequence but cannot be trained on is passed over.
            self.offset = if self.sequence.len() - end > 1 { end } else { 0 };
            self.tokens += (end - start) as u64;
            if end - start > 1 {
                return Ok(&self.sequence[start..end]);
            }
        }
        Err(StageError::new(
            FailureReason::ConfigInvalid,
            "every sequence of the data sets has one token: there is nothing to predict",
        ))
    }
}

/// The samples in order, epoch after epoch: in each, every sequence once, shuffled anew.
struct Samples<'a> {
    corpus: &'a Corpus,
    next: u64,
    epoch: Option<u64>,
    order: Vec<u64>,
}

impl Samples<'_> {
    /// Replaces `tokens` by the next sample.
    fn take(&mut self, tokens: &mut Vec<u32>) -> Result<(), StageError> {
        let count = self.corpus.sequences();
        let epoch = self.next / count;
        if self.epoch != Some(epoch) {
            self.order = (0..count).collect();
            Random::new(self.corpus.seed, ORDER_STREAM + epoch).shuffle(&mut self.order);
            self.epoch = Some(epoch);
        }
        let index = self.order[(self.next % count) as usize];
        self.next += 1;
        self.corpus.read(index, tokens)
    }
}

fn token_file(dataset: &Opened, stem: &str) -> Result<TokenFile, StageError> {
    dataset.file(&format!("{stem}.idx"))?;
    let bin = dataset.file(&format!("{stem}.bin"))?;
    Ok(TokenFile::open(&bin.with_extension(""))?)
}

/// The held-out text of all data sets as windows of the model's context.
pub(crate) fn held_out(datasets: &[Opened], tokenizer: &TextTokenizer, context: usize) -> Result<TextSet, StageError> {
    let bytes = tokenizer.bytes_per_token();
    let mut text = TextSet::default();
    let mut tokens = Vec::new();
    for dataset in datasets
        .iter()
        .filter(|dataset| dataset.has(&format!("{HELD_OUT}.idx")))
    {
        let file = token_file(dataset, HELD_OUT)?;
        for index in 0..file.sequences() {
            if text.tokens() >= HELD_OUT_TOKENS {
                return Ok(text);
            }
            file.sequence(index, &mut tokens)?;
            // A window has one token more than the model computes: the last is only asked for.
            text.push(&tokens, tokenizer.end_of_text(), context + 1, |token| {
                bytes.get(token as usize).copied().map_or(0, u64::from)
            });
        }
    }
    match text.bytes() {
        0 => Err(StageError::new(
            FailureReason::ConfigInvalid,
            "no data set has a held-out part to evaluate on: raise spec.curate.heldOutPercent of one",
        )),
        _ => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_encode::TokenWriter;

    fn corpus(folder: &std::path::Path, sizes: &[u32], seed: u64) -> Corpus {
        let mut next = 0;
        let files = sizes.iter().enumerate().map(|(i, &size)| {
            let stem = folder.join(format!("file{i}"));
            let mut writer = TokenWriter::new(Vec::new(), 2048);
            for _ in 0..size {
                writer.push(&[next, 7]).unwrap();
                next += 1;
            }
            let mut idx = Vec::new();
            std::fs::write(stem.with_extension("bin"), writer.finish(&mut idx).unwrap()).unwrap();
            std::fs::write(stem.with_extension("idx"), idx).unwrap();
            TokenFile::open(&stem).unwrap()
        });
        Corpus::new(files.collect(), seed).unwrap()
    }

    fn take(samples: &mut Samples, count: usize) -> Vec<u32> {
        let mut tokens = Vec::new();
        (0..count)
            .map(|_| {
                samples.take(&mut tokens).unwrap();
                tokens[0]
            })
            .collect()
    }

    #[test]
    fn every_sample_comes_once_an_epoch_in_an_order_of_its_own_also_after_a_resume() {
        let folder = tempfile::tempdir().unwrap();
        let corpus = corpus(folder.path(), &[3, 0, 8], 17);
        let all = take(&mut corpus.samples(0), 33);
        let epochs: Vec<&[u32]> = all.chunks(11).collect();
        for epoch in &epochs {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..11).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        for at in [0, 1, 10, 11, 20] {
            assert_eq!(
                take(&mut corpus.samples(at as u64), 12),
                all[at..at + 12],
                "resumed at {at}"
            );
        }
    }

    #[test]
    fn a_sequence_longer_than_the_context_is_taken_in_pieces_and_resumed_within() {
        let folder = tempfile::tempdir().unwrap();
        let stem = folder.path().join("long");
        let mut writer = TokenWriter::new(Vec::new(), 2048);
        for sequence in [&(0..10).collect::<Vec<u32>>()[..], &[99], &[100, 101, 102]] {
            writer.push(sequence).unwrap();
        }
        let mut idx = Vec::new();
        std::fs::write(stem.with_extension("bin"), writer.finish(&mut idx).unwrap()).unwrap();
        std::fs::write(stem.with_extension("idx"), idx).unwrap();
        let corpus = Corpus::new(vec![TokenFile::open(&stem).unwrap()], 3).unwrap();
        let mut pieces = corpus.pieces(Position::default(), 3).unwrap();
        let mut seen: Vec<(Position, Vec<u32>)> = Vec::new();
        for _ in 0..8 {
            let position = pieces.position();
            seen.push((position, pieces.take().unwrap().to_vec()));
        }
        let mut first_epoch: Vec<Vec<u32>> = seen[..4].iter().map(|(_, piece)| piece.clone()).collect();
        first_epoch.sort();
        assert_eq!(
            first_epoch,
            [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9], vec![100, 101, 102]]
        );
        for (i, (position, _)) in seen.iter().enumerate() {
            let notes = position.notes();
            let mut resumed = corpus.pieces(Position::from_notes(position.sample, &notes), 3).unwrap();
            for (_, piece) in &seen[i..] {
                assert_eq!(resumed.take().unwrap(), piece, "from piece {i}");
            }
            assert_eq!(resumed.position(), pieces.position());
        }
    }
}
