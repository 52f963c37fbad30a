//! Held-out text on which the alignment tax is measured.

use strata_artifact::Opened;
use strata_contract::{AlignConfig, FailureReason};
use strata_evaluate::{TextSet, Window};
use strata_stage::StageError;
use strata_train::{Random, model_error};

use crate::base::Base;
use crate::records::{Split, for_each_row};

/// Size at which a piece of text ends, at the next line, for a model with room for it; about 250 tokens of English.
const PIECE_BYTES: usize = 1024;
/// Pieces that are sampled from at most; bounds the memory.
const MOST_PIECES: usize = 1 << 14;
/// Stream of the seed for the choice of pieces.
const STREAM: u64 = 1 << 34;

/// Windows of about `capabilityTokens` tokens in all. Text is cut before it is tokenized, so that the bytes of a window are
/// exact for any tokenizer.
pub(crate) fn text(dataset: &Opened, base: &Base, config: &AlignConfig) -> Result<TextSet, StageError> {
    let mut pieces = Vec::new();
    let model = base.body.config();
    // A token stands for a byte or more, so that half the context has room for what follows up to the line's end.
    let piece_bytes = PIECE_BYTES.min(model.max_positions / 2);
    for_each_row(dataset, Split::HeldOut, |record| {
        pieces.extend(cut(record.text()?, piece_bytes).map(str::to_owned));
        Ok(pieces.len() < MOST_PIECES)
    })?;
    Random::new(config.training.seed, STREAM).shuffle(&mut pieces);
    let opening = model.bos.or(base.ends().next()).unwrap_or(0);
    let mut set = TextSet::default();
    for piece in &pieces {
        if set.tokens() >= u64::from(config.evaluation.capability_tokens) {
            break;
        }
        let text = base.vocabulary.encode_literal(piece).map_err(model_error)?;
        let tokens: Vec<u32> = std::iter::once(opening).chain(text).collect();
        if tokens.len() >= 2 && tokens.len() <= model.max_positions {
            set.windows.push(Window {
                tokens,
                score_from: 1,
                bytes: piece.len() as u64,
            });
        }
    }
    match set.windows.len() {
        0 | 1 => {
            let message = format!(
                "data set {} has too little held-out text to measure on",
                dataset.resolved().name
            );
            Err(StageError::new(FailureReason::ConfigInvalid, message))
        }
        _ => Ok(set),
    }
}

/// `text` in pieces that end at a line's end once they have `piece_bytes`.
fn cut(text: &str, piece_bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let from = piece_bytes.min(rest.len());
        let end = rest.as_bytes()[from..]
            .iter()
            .position(|&byte| byte == b'\n')
            .map_or(rest.len(), |at| from + at + 1);
        let (piece, after) = rest.split_at(end);
        rest = after;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_lines_and_lose_nothing() {
        let text = "é line of some words\n".repeat(200) + "no end";
        let pieces: Vec<&str> = cut(&text, PIECE_BYTES).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() >= 4 && pieces[..pieces.len() - 1].iter().all(|piece| piece.ends_with('\n')));
        assert!(pieces.iter().all(|piece| piece.len() < PIECE_BYTES + 64));
        assert_eq!(cut("", 1).count(), 0);
    }
}
