//! The training data as one indexable corpus, in an order that is a function of the seed.

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

    /// A reader of the samples from number `samples` on.
    pub(crate) fn samples(&self, samples: u64) -> Samples<'_> {
        Samples {
            corpus: self,
            next: samples,
            epoch: None,
            order: Vec::new(),
        }
    }
}

/// The samples in order, epoch after epoch: in each, every sequence once, shuffled anew.
pub(crate) struct Samples<'a> {
    corpus: &'a Corpus,
    next: u64,
    epoch: Option<u64>,
    order: Vec<u64>,
}

impl Samples<'_> {
    /// Samples taken so far, since the start of the run.
    pub(crate) fn taken(&self) -> u64 {
        self.next
    }

    /// Replaces `tokens` by the next sample.
    pub(crate) fn take(&mut self, tokens: &mut Vec<u32>) -> Result<(), StageError> {
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
}
