//! A tokenizer that knows which text may become a special token: the model's own, never a user's.

use std::collections::HashSet;

use serde_json::Value;
use tokenizers::normalizer::Range;
use tokenizers::tokenizer::{Model, Normalizer, PreTokenizer};
use tokenizers::{AddedVocabulary, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, Tokenizer};

use crate::chat::Rendered;
use crate::error::{ModelError, Result};

/// The texts of the special tokens that chat templates refer to by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SpecialTexts {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
}

/// A tokenizer with its special tokens.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    /// The added tokens without the special ones.
    literal: AddedVocabulary,
    special_ids: HashSet<u32>,
    special_texts: Vec<String>,
}

fn failed(error: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer(error.to_string())
}

impl Vocabulary {
    /// Reads the object of a `tokenizer.json`.
    pub fn from_json(json: &Value) -> Result<Self> {
        Self::from_bytes(json.to_string().as_bytes())
    }

    /// Reads the text of a `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(failed)?;
        // A served prompt is refused when it is too long, never cut silently.
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        let special: Vec<(u32, String)> = tokenizer
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (*id, token.content.clone()))
            .collect();
        let (ids, texts): (HashSet<u32>, Vec<String>) = special.into_iter().unzip();
        let mut literal = tokenizer.get_added_vocabulary().clone();
        literal.set_encode_special_tokens(true);
        Ok(Vocabulary {
            tokenizer,
            literal,
            special_ids: ids,
            special_texts: texts,
        })
    }

    /// The tokenizer inside.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// One more than the largest token id.
    pub fn size(&self) -> usize {
        self.tokenizer
            .get_vocab(true)
            .values()
            .map(|id| *id as usize + 1)
            .max()
            .unwrap_or(0)
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    pub(crate) fn special_texts(&self) -> &[String] {
        &self.special_texts
    }

    /// The ids of `text`, in which special tokens are recognised: for text that the caller vouches for, such as a raw
    /// completion prompt. `add_special` adds what the tokenizer puts around a text (a begin token, say).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        Ok(self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(failed)?
            .get_ids()
            .to_vec())
    }

    /// The ids of `text` with no special token among them, whatever the text says: HF's with `encode_special_tokens`.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>> {
        let normalizer = self.tokenizer.get_normalizer();
        self.plain_ids(self.literal.extract_and_normalize(normalizer, text))
    }

    /// The ids of `text` with no added token in it. `first`: no other text stands before it, which some pre-tokenizers ask.
    fn encode_between(&self, text: &str, first: bool) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut normalized = match first {
            true => NormalizedString::from(text),
            false => NormalizedString::from(format!(" {text}"))
                .slice(Range::Original(1..))
                .expect("the text follows one byte"),
        };
        if let Some(normalizer) = self.tokenizer.get_normalizer() {
            normalizer.normalize(&mut normalized).map_err(failed)?;
        }
        self.plain_ids(normalized.into())
    }

    /// The ids of normalized pieces, of which those without tokens are plain text.
    fn plain_ids(&self, mut pieces: PreTokenizedString) -> Result<Vec<u32>> {
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.tokenizer.get_model();
        pieces
            .tokenize(|piece| {
                let tokens = model.tokenize(piece.get())?;
                if !tokens.iter().any(|token| self.is_special(token.id)) {
                    return Ok(tokens);
                }
                // Only a model that joins plain text to a special token comes here: a character alone cannot be one.
                let mut apart = Vec::new();
                for character in piece.get().chars() {
                    apart.extend(model.tokenize(character.encode_utf8(&mut [0; 4]))?);
                }
                apart.retain(|token| !self.is_special(token.id));
                Ok(apart)
            })
            .map_err(failed)?;
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
        Ok(pieces
            .into_iter()
            .flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id))
            .collect())
    }

    /// The ids of a rendered chat: special tokens where the template wrote them, plain text where a user did. Other added
    /// tokens (`<think>`, say) are what they are without a mark, wherever they stand.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>> {
        let Some(mark) = rendered.mark() else {
            return self.encode(rendered.marked_text(), false);
        };
        let text = rendered.marked_text();
        let pieces = self
            .tokenizer
            .get_added_vocabulary()
            .extract_and_normalize(self.tokenizer.get_normalizer(), text);
        let mut ids = Vec::new();
        let mut plain_from = 0;
        for (_, (start, end), tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            // Pieces of plain text have no tokens yet.
            if let Some(added) = tokens
                .iter()
                .flatten()
                .next()
                .filter(|_| !text[start..end].contains(mark))
            {
                ids.extend(self.encode_between(&text[plain_from..start].replace(mark, ""), plain_from == 0)?);
                ids.push(added.id);
                plain_from = end;
            }
        }
        ids.extend(self.encode_between(&text[plain_from..].replace(mark, ""), plain_from == 0)?);
        Ok(ids)
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special).map_err(failed)
    }

    /// The token's text as it would appear in an answer; lone bytes of a character appear as U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        let text = self.decode(&[id], false).unwrap_or_default();
        // SentencePiece's decoders take away the space that the first token of a text begins with.
        let spaced = self
            .tokenizer
            .id_to_token(id)
            .is_some_and(|token| token.starts_with('▁'));
        if spaced && !text.starts_with(' ') {
            format!(" {text}")
        } else {
            text
        }
    }
}

/// The text of tokens that arrive one by one; no character is given out before its last byte is there.
#[derive(Clone, Debug, Default)]
pub struct TokenText {
    /// The tokens since the one before the last piece that was given out: some decoders look back one token.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    shown: usize,
    /// Whether special tokens give text.
    special: bool,
}

/// A character has at most 4 bytes, so a longer run of tokens that does not end on one is not text.
const MAX_PENDING: usize = 8;

impl TokenText {
    /// No text yet; special tokens give theirs only with `special`.
    pub fn new(special: bool) -> Self {
        TokenText {
            special,
            ..TokenText::default()
        }
    }

    /// For an answer to a prompt that ends with `last`: whether its first token begins with a space may depend on that.
    pub fn after(mut self, vocabulary: &Vocabulary, last: Option<u32>) -> Self {
        let whole = |id: &u32| !vocabulary.token_text(*id).contains('\u{FFFD}');
        self.ids = last.filter(whole).into_iter().collect();
        self.shown = self.ids.len();
        self
    }

    /// Takes the next token; returns the text that is now complete, possibly empty.
    pub fn push(&mut self, vocabulary: &Vocabulary, id: u32) -> Result<String> {
        self.ids.push(id);
        let pending = self.ids.len() - self.shown < MAX_PENDING;
        let text = match self.new_text(vocabulary)? {
            Some(text) if !(pending && text.ends_with('\u{FFFD}')) => text,
            _ if pending => return Ok(String::new()),
            _ => vocabulary.decode(&self.ids[self.shown..], !self.special)?,
        };
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// The text that was held back, when no more tokens come.
    pub fn finish(&mut self, vocabulary: &Vocabulary) -> Result<String> {
        let text = match self.new_text(vocabulary)? {
            Some(text) => text,
            None => vocabulary.decode(&self.ids[self.shown..], !self.special)?,
        };
        self.shown = self.ids.len();
        Ok(text)
    }

    /// What the tokens that were not shown add to those that were; `None` while they spoil it: SentencePiece's decoder gives up
    /// on a whole run of bytes while the last character of the run is incomplete.
    fn new_text(&self, vocabulary: &Vocabulary) -> Result<Option<String>> {
        let before = vocabulary.decode(&self.ids[..self.shown], !self.special)?;
        let all = vocabulary.decode(&self.ids, !self.special)?;
        Ok(all.strip_prefix(before.as_str()).map(str::to_owned))
    }
}
