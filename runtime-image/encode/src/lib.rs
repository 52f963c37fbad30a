//! Tokenizer training, packing, token files.
