//! The last pass: a tokenizer from the training records, and both splits as token files.

use strata_artifact::{ArtifactError, Attempt};
use strata_contract::{EncodeConfig, FailureReason};
use strata_encode::{EncodeError, Packer, TextTokenizer, TokenWriter, tokenizer_config_json};
use strata_stage::{StageContext, StageError};

use crate::figures::{Figures, SplitFigures};
use crate::filter::{Splits, interrupted};
use crate::spill::Selected;

/// Most text that a tokenizer is trained on: more changes no vocabulary, and its different words are held in memory.
const TRAINING_LIMIT_BYTES: u128 = 256 * 1024 * 1024;

/// Trains the tokenizer and writes `tokenizer.json` and the token files.
pub(crate) fn encode(
    config: &EncodeConfig,
    context: &StageContext,
    attempt: &Attempt,
    kept: &Splits<Selected>,
    has_held_out: bool,
    figures: &mut Figures,
) -> Result<(), StageError> {
    context
        .progress
        .start("training the tokenizer", "documents", figures.train.documents);
    let tokenizer = train(config, context, &kept.train, figures.train.bytes)?;
    let json = tokenizer.to_json().map_err(failed)?;
    attempt.write("tokenizer.json", json.as_bytes())?;
    let tokenizer_config = tokenizer_config_json(config.sequence_length_tokens);
    attempt.write("tokenizer_config.json", tokenizer_config.as_bytes())?;

    context.progress.start(
        "encoding",
        "documents",
        figures.train.documents + figures.held_out.documents,
    );
    write_tokens(
        "train",
        config,
        context,
        attempt,
        &tokenizer,
        &kept.train,
        &mut figures.train,
    )?;
    if has_held_out {
        write_tokens(
            "test",
            config,
            context,
            attempt,
            &tokenizer,
            &kept.held_out,
            &mut figures.held_out,
        )?;
    }
    Ok(())
}

/// Trains the tokenizer on the records, of which there are `bytes` of text.
fn train(
    config: &EncodeConfig,
    context: &StageContext,
    records: &Selected,
    bytes: u64,
) -> Result<TextTokenizer, StageError> {
    // Of more text the same share of every source, by the records' hashes.
    let is_drawn = |digest: u128| (u128::from(digest as u64) * u128::from(bytes)) >> 64 < TRAINING_LIMIT_BYTES;
    let texts = records.read().filter_map(|spilled| {
        context.progress.add(1);
        match spilled {
            _ if context.interrupt.is_set() => Some(Err(interrupted())),
            Ok(spilled) => is_drawn(spilled.digest).then(|| Ok(spilled.record.body.text())),
            Err(error) => Some(Err(error.into())),
        }
    });
    TextTokenizer::train_from(texts, config.vocab_size, failed)
}

fn write_tokens(
    name: &str,
    config: &EncodeConfig,
    context: &StageContext,
    attempt: &Attempt,
    tokenizer: &TextTokenizer,
    records: &Selected,
    figures: &mut SplitFigures,
) -> Result<(), StageError> {
    let (bin, idx) = (format!("tokens/{name}.bin"), format!("tokens/{name}.idx"));
    let path = attempt.place(&bin)?;
    let writing = |error| ArtifactError::writing(&path, error);
    let mut writer = TokenWriter::new(attempt.file(&bin)?, tokenizer.vocab_size());
    let mut packer = Packer::new(config.packing, config.sequence_length_tokens);
    let mut tokens = Vec::new();
    for spilled in records.read() {
        if context.interrupt.is_set() {
            return Err(interrupted());
        }
        tokenizer
            .encode_document(&spilled?.record.body.text(), &mut tokens)
            .map_err(failed)?;
        packer
            .push(&tokens, &mut |sequence| writer.push(sequence))
            .map_err(writing)?;
        context.progress.add(1);
    }
    packer.finish(&mut |sequence| writer.push(sequence)).map_err(writing)?;
    (figures.tokens, figures.sequences) = (writer.tokens(), writer.sequences());
    let mut idx = attempt.file(&idx)?;
    writer.finish(&mut idx).map_err(writing)?.finish()?;
    idx.finish()?;
    Ok(())
}

fn failed(error: EncodeError) -> StageError {
    let reason = match error {
        EncodeError::VocabTooSmall(_) | EncodeError::TextTooSmall { .. } => FailureReason::ConfigInvalid,
        EncodeError::Library(_) | EncodeError::NoEndOfText => FailureReason::Internal,
    };
    StageError::new(reason, error.to_string())
}
