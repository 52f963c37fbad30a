//! A byte-level BPE tokenizer: trained on text, kept as Hugging Face's `tokenizer.json`.

use std::sync::{Mutex, PoisonError};

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, ModelWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer, Trainer,
};

/// The token that ends a document. Text cannot contain it: written in a text, it is encoded as the characters it is.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The special tokens, ids from 0. The last two begin and end a turn of a chat; they are unused until alignment, and
/// reserved so that it need not resize the vocabulary.
pub const SPECIAL_TOKENS: [&str; 3] = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"];
/// Bytes each have a token, so a vocabulary has at least these entries.
const MIN_VOCAB_SIZE: u32 = 256 + SPECIAL_TOKENS.len() as u32;

/// Why a tokenizer could not be trained or read.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The vocabulary cannot hold the bytes and the special tokens.
    #[error("a byte-level vocabulary has at least {MIN_VOCAB_SIZE} entries, {0} are asked for: raise vocabSize")]
    VocabTooSmall(u32),
    /// The text has too few different words for the vocabulary that is asked for.
    #[error("the text yields a vocabulary of {found} entries, {asked} are asked for: lower vocabSize or add text")]
    TextTooSmall {
        /// Entries asked for.
        asked: u32,
        /// Entries that the text yields.
        found: u32,
    },
    /// The tokenizer library refused.
    #[error("tokenizer: {0}")]
    Library(#[from] tokenizers::Error),
    /// A tokenizer file without the end-of-text token.
    #[error("the tokenizer has no token {END_OF_TEXT}")]
    NoEndOfText,
}

/// A tokenizer for running text.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    end_of_text: u32,
}

impl TextTokenizer {
    /// Trains a vocabulary of exactly `vocab_size` entries on `texts`; equal texts give an equal tokenizer.
    pub fn train(texts: impl Iterator<Item = String> + Send, vocab_size: u32) -> Result<Self, EncodeError> {
        Self::train_from(texts.map(Ok), vocab_size, |error| error)
    }

    /// As [`TextTokenizer::train`], on texts that may end in an error; that error is then the result, and nothing is
    /// computed any more.
    ///
    /// Held in memory are the different words of the texts with their counts, not the texts.
    pub fn train_from<E: Send>(
        texts: impl Iterator<Item = Result<String, E>> + Send,
        vocab_size: u32,
        failed: impl Fn(EncodeError) -> E,
    ) -> Result<Self, E> {
        let library = |error| failed(EncodeError::Library(error));
        if vocab_size < MIN_VOCAB_SIZE {
            return Err(failed(EncodeError::VocabTooSmall(vocab_size)));
        }
        let special = SPECIAL_TOKENS.map(|token| AddedToken::from(token, true));
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab_size as usize)
            .show_progress(false)
            .special_tokens(special.into())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let words = ByteLevel::default().add_prefix_space(false);
        // The library asks for texts, not for results: the first error ends the texts, before the merges are worked out.
        let error: Mutex<Option<E>> = Mutex::new(None);
        let texts = texts.map_while(|text| {
            text.map_err(|found| *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(found))
                .ok()
        });
        let fed = trainer.feed(texts, |text| {
            let mut text = PreTokenizedString::from(text);
            words.pre_tokenize(&mut text)?;
            let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            Ok(splits.into_iter().map(|(word, ..)| word.to_owned()).collect())
        });
        if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        fed.map_err(library)?;
        let mut model = BPE::default();
        let special = trainer.train(&mut model).map_err(library)?;
        let mut inner = Tokenizer::new(ModelWrapper::BPE(model));
        inner.with_pre_tokenizer(Some(words));
        inner.with_decoder(Some(ByteLevel::default()));
        inner.add_special_tokens(special).map_err(library)?;
        let found = inner.get_vocab_size(true) as u32;
        if found != vocab_size {
            let asked = vocab_size;
            return Err(failed(EncodeError::TextTooSmall { asked, found }));
        }
        Self::new(inner).map_err(failed)
    }

    /// Reads a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, EncodeError> {
        Self::new(Tokenizer::from_bytes(json)?)
    }

    fn new(mut inner: Tokenizer) -> Result<Self, EncodeError> {
        let end_of_text = inner.token_to_id(END_OF_TEXT).ok_or(EncodeError::NoEndOfText)?;
        inner.set_encode_special_tokens(true);
        Ok(Self { inner, end_of_text })
    }

    /// The `tokenizer.json`.
    pub fn to_json(&self) -> Result<String, EncodeError> {
        Ok(self.inner.to_string(true)?)
    }

    /// Entries of the vocabulary, special tokens included.
    pub fn vocab_size(&self) -> u32 {
        self.inner.get_vocab_size(true) as u32
    }

    /// Id of the token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Replaces `tokens` by those of `text`, followed by the end-of-text token.
    pub fn encode_document(&self, text: &str, tokens: &mut Vec<u32>) -> Result<(), EncodeError> {
        let encoding = self.inner.encode_fast(text, false)?;
        tokens.clear();
        tokens.extend_from_slice(encoding.get_ids());
        tokens.push(self.end_of_text);
        Ok(())
    }

    /// The text of `tokens`, without special tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, EncodeError> {
        Ok(self.inner.decode(tokens, true)?)
    }

    /// Bytes of text that each token stands for, by id; 0 for special tokens. Their sum over a text's tokens is its
    /// size, which is what bits per byte divides by.
    pub fn bytes_per_token(&self) -> Vec<u32> {
        let special = self.inner.get_added_tokens_decoder();
        // The byte-level alphabet writes each byte as one character.
        let bytes = |token: String| token.chars().count() as u32;
        (0..self.vocab_size())
            .map(|id| match special.contains_key(&id) {
                true => 0,
                false => self.inner.id_to_token(id).map_or(0, bytes),
            })
            .collect()
    }
}

/// The `tokenizer_config.json` that lets `transformers` load a `tokenizer.json` by its folder.
pub fn tokenizer_config_json(model_max_length: u32) -> String {
    format!(
        "{{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"bos_token\": \"{END_OF_TEXT}\",\n  \
         \"eos_token\": \"{END_OF_TEXT}\",\n  \"pad_token\": \"{END_OF_TEXT}\",\n  \
         \"clean_up_tokenization_spaces\": false,\n  \"model_max_length\": {model_max_length}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> impl Iterator<Item = String> + Send {
        (0..400).map(|i| {
            format!(
                "Speech {}: the king's own word, naïve {} — said thrice.\n",
                i % 37,
                i * i % 101
            )
        })
    }

    #[test]
    fn training_is_deterministic_and_text_survives_the_round_trip() {
        let tokenizer = TextTokenizer::train(texts(), 300).unwrap();
        assert_eq!(
            tokenizer.to_json().unwrap(),
            TextTokenizer::train(texts(), 300).unwrap().to_json().unwrap()
        );
        let read = TextTokenizer::from_json(tokenizer.to_json().unwrap().as_bytes()).unwrap();
        assert_eq!((read.vocab_size(), read.end_of_text()), (300, 0));
        let lengths = read.bytes_per_token();
        for text in [
            "the king's own word",
            " naïve\n\n  日本 \u{1f600}",
            "say <|endoftext|> and <|im_start|>",
            "",
        ] {
            let mut tokens = Vec::new();
            read.encode_document(text, &mut tokens).unwrap();
            assert_eq!(
                tokens.iter().filter(|&&token| token < 3).count(),
                1,
                "only the end is a special token"
            );
            assert_eq!(tokens.last(), Some(&0));
            assert_eq!(read.decode(&tokens).unwrap(), text);
            assert_eq!(
                tokens
                    .iter()
                    .map(|&token| lengths[token as usize] as usize)
                    .sum::<usize>(),
                text.len()
            );
        }
    }

    #[test]
    fn a_vocabulary_that_cannot_be_is_refused() {
        assert!(matches!(
            TextTokenizer::train(texts(), 200),
            Err(EncodeError::VocabTooSmall(200))
        ));
        let few = || ["one two".to_owned()].into_iter();
        assert!(matches!(
            TextTokenizer::train(few(), 5000),
            Err(EncodeError::TextTooSmall { asked: 5000, .. })
        ));
    }

    #[test]
    fn an_error_among_the_texts_ends_training_before_the_merges() {
        // So few texts could not yield this vocabulary: that error would come after the merges.
        let texts = [Ok("one two".to_owned()), Err("stop"), Ok("three".to_owned())];
        let trained = TextTokenizer::train_from(texts.into_iter(), 60_000, |_| "merged");
        assert_eq!(trained.err(), Some("stop"));
    }

    #[test]
    fn the_configuration_for_transformers_is_json() {
        let config: serde_json::Value = serde_json::from_str(&tokenizer_config_json(256)).unwrap();
        assert_eq!(
            (&config["eos_token"], &config["model_max_length"]),
            (&END_OF_TEXT.into(), &256.into())
        );
    }
}
