//! Text to tokens: training a tokenizer, packing documents into sequences, and the token files in between.
//!
//! A token file is a pair `NAME.bin`, `NAME.idx` in Megatron's format. Its sequences are what a model is trained on: each
//! holds at most the sequence length asked for, in the order of the documents. A document ends with the end-of-text
//! token, which no text can contain; so the boundaries of documents are where that token is.

mod pack;
mod token_file;
mod tokenizer;

pub use pack::Packer;
pub use token_file::{TokenFile, TokenWriter};
pub use tokenizer::{END_OF_TEXT, EncodeError, SPECIAL_TOKENS, TextTokenizer, tokenizer_config_json};
