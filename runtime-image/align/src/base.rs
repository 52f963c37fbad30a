//! The model to start from, ready for training.

use std::path::Path;

use serde_json::Value;
use strata_model::{ChatTemplate, Dtype, GenerationConfig, LoadedModel, Vocabulary, tensors};
use strata_stage::StageError;
use strata_train::{Body, Executor, load, model_error};

/// A base model: F32 weights, tokenizer, chat template.
pub(crate) struct Base {
    pub(crate) body: Body,
    pub(crate) weights: Vec<f32>,
    pub(crate) vocabulary: std::sync::Arc<Vocabulary>,
    pub(crate) tokenizer_json: Value,
    pub(crate) template: ChatTemplate,
    pub(crate) generation: GenerationConfig,
    /// The quantized formats among its tensors, such as `Q4_1, Q8_0`.
    pub(crate) quantized_from: Option<String>,
}

impl Base {
    /// Reads a GGUF file or an HF folder.
    pub(crate) fn load(path: &Path) -> Result<Self, StageError> {
        let mut model = LoadedModel::open(path).map_err(model_error)?;
        model.config.check_trainable(path).map_err(model_error)?;
        // A pretrained model has no template yet; the one that it is aligned with is published with the result.
        let template = match model.chat_template.take() {
            Some(template) => template,
            None => model.plain_template().map_err(model_error)?,
        };
        let body = Body::new(&model.config, Executor::detect()?);
        let weights = load(body.layout(), model.weights.as_ref()).map_err(model_error)?;
        let mut found = Vec::new();
        for tensor in tensors(&model.config) {
            let dtype = model.weights.dtype(&tensor.name).map_err(model_error)?;
            if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) && !found.contains(&dtype.name()) {
                found.push(dtype.name());
            }
        }
        found.sort_unstable();
        Ok(Self {
            body,
            weights,
            vocabulary: model.vocabulary,
            tokenizer_json: model.tokenizer_json,
            template,
            generation: model.generation,
            quantized_from: (!found.is_empty()).then(|| found.join(", ")),
        })
    }

    /// Tokens that end a turn.
    pub(crate) fn ends(&self) -> impl Iterator<Item = u32> + '_ {
        self.body.config().eos.iter().chain(&self.generation.eos).copied()
    }
}
