//! Where a model's tensors stand in its files: a name of HF or GGUF, and the rows of what a family fuses.

use std::collections::HashMap;
use std::ops::Range;

use crate::config::ModelConfig;
use crate::family::{Role, stored_tensors};

/// Where each tensor stands in a model's files: names, and rows of a fused tensor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places(HashMap<String, Place>);

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// HF's name of the stored tensor.
    pub(crate) hf: String,
    /// GGUF's name of it.
    pub(crate) gguf: String,
    /// What it is for.
    pub(crate) role: Role,
    /// Which rows, and of how many.
    rows: Range<usize>,
    of: usize,
}

impl Places {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let mut all = HashMap::new();
        for tensor in stored_tensors(config) {
            let mut start = 0;
            for part in &tensor.parts {
                let place = Place {
                    hf: tensor.hf_name.clone(),
                    gguf: tensor.gguf_name.clone(),
                    role: tensor.role,
                    rows: start..start + part.shape[0],
                    of: tensor.shape[0],
                };
                start = place.rows.end;
                all.insert(part.name.clone(), place);
            }
        }
        Places(all)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Place> {
        self.0.get(name)
    }
}

impl Place {
    /// The shape of the part, given that of the whole; a whole of other rows is shown as it is, for the error.
    pub(crate) fn shape(&self, mut stored: Vec<usize>) -> Vec<usize> {
        if stored.first() == Some(&self.of) {
            stored[0] = self.rows.len();
        }
        stored
    }

    /// The bytes of the part, given those of the whole (whose shape was checked when it was opened).
    pub(crate) fn bytes<'a>(&self, stored: &'a [u8]) -> &'a [u8] {
        let row = stored.len() / self.of;
        &stored[self.rows.start * row..self.rows.end * row]
    }
}
