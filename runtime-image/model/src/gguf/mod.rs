//! GGUF: the file format of llama.cpp, versions 2 and 3, little endian. Read as views, written so that llama.cpp loads it.

mod model;
mod parse;
mod rope;
mod spm;
mod tokenizer;
mod write;

pub(crate) use model::open_all;
pub use model::{GgufModel, open};
pub use parse::{Array, Gguf, TensorInfo, Value};
pub use write::{Texts, write};

use crate::dtype::Dtype;

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT: usize = 32;

/// Our key for a whole `generation_config.json`: GGUF itself has no place for more than two end tokens, nor for sampling.
const GENERATION: &str = "strata.generation_config";

/// GGUF's numbers for the element types that this engine has.
const DTYPES: [(u32, Dtype); 8] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Q4_0),
    (3, Dtype::Q4_1),
    (8, Dtype::Q8_0),
    (12, Dtype::Q4K),
    (14, Dtype::Q6K),
    (30, Dtype::BF16),
];

/// GGUF's names for the common element types that this engine does not have.
const OTHER_DTYPES: [(u32, &str); 8] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (13, "Q5_K"),
    (20, "IQ4_NL"),
    (23, "IQ4_XS"),
    (39, "MXFP4"),
];
