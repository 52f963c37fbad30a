//! GGUF: the file format of llama.cpp, versions 2 and 3, little endian. Read as views, written so that llama.cpp loads it.

mod model;
mod parse;
mod tokenizer;
mod write;

pub(crate) use model::open_all;
pub use model::{GgufModel, open};
pub use parse::{Array, Gguf, TensorInfo, Value};
pub use write::{Tokenizer, write};

use crate::dtype::Dtype;

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT: usize = 32;

/// GGUF's numbers for the element types that this engine has.
const DTYPES: [(u32, Dtype); 6] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Q4_0),
    (3, Dtype::Q4_1),
    (8, Dtype::Q8_0),
    (30, Dtype::BF16),
];
