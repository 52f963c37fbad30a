//! A model's tensors in one flat buffer, in the order of `strata_model::tensors`: so the optimizer, the gradient norm and a
//! checkpoint each take one slice.

use std::borrow::Cow;
use std::ops::Range;

use strata_model::{
    Dtype, EMBEDDING, FINAL_NORM, HEAD, ModelConfig, ModelError, RawTensor, Role, TensorSpec, Weights, layer_name,
    tensors,
};

use crate::Random;

/// The linear layers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output of the attention.
    O,
    /// Gate of the feed-forward part.
    Gate,
    /// Its input.
    Up,
    /// Its output.
    Down,
}

impl Linear {
    /// All of them, in the order of the model's tensors.
    pub const ALL: [Linear; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its part of the tensor's name: `self_attn.q_proj`.
    pub fn part(self) -> &'static str {
        [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ][self as usize]
    }
}

/// A matrix `[outputs, inputs]` in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    pub(crate) range: Range<usize>,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
}

/// Where a block's tensors are.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    pub(crate) input_norm: Range<usize>,
    pub(crate) post_norm: Range<usize>,
    pub(crate) linears: [Matrix; 7],
}

impl Block {
    pub(crate) fn linear(&self, linear: Linear) -> &Matrix {
        &self.linears[linear as usize]
    }
}

/// Where each tensor of a model is in the flat buffer.
#[derive(Clone, Debug)]
pub struct Layout {
    tensors: Vec<(TensorSpec, Range<usize>)>,
    pub(crate) embedding: Range<usize>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) final_norm: Range<usize>,
    /// The output matrix; the embedding where the two are tied.
    pub(crate) head: Range<usize>,
}

impl Layout {
    /// The layout of a model of this shape.
    pub fn new(config: &ModelConfig) -> Self {
        let mut end = 0;
        let tensors: Vec<_> = tensors(config)
            .into_iter()
            .map(|tensor| {
                let start = end;
                end += tensor.elements();
                (tensor, start..end)
            })
            .collect();
        let find = |name: &str| {
            let found = tensors.iter().find(|(tensor, _)| tensor.name == name);
            found
                .map(|(tensor, range)| (tensor.shape.clone(), range.clone()))
                .expect("the family's table has every tensor of its shape")
        };
        let range = |name: &str| find(name).1;
        let blocks = (0..config.layers)
            .map(|layer| Block {
                input_norm: range(&layer_name(layer, "input_layernorm")),
                post_norm: range(&layer_name(layer, "post_attention_layernorm")),
                linears: Linear::ALL.map(|linear| {
                    let (shape, range) = find(&layer_name(layer, linear.part()));
                    Matrix {
                        range,
                        outputs: shape[0],
                        inputs: shape[1],
                    }
                }),
            })
            .collect();
        let embedding = range(EMBEDDING);
        let head = if config.tie_embeddings {
            embedding.clone()
        } else {
            range(HEAD)
        };
        Self {
            embedding,
            blocks,
            final_norm: range(FINAL_NORM),
            head,
            tensors,
        }
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.tensors.last().map_or(0, |(_, range)| range.end)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Each tensor with its place.
    pub fn tensors(&self) -> &[(TensorSpec, Range<usize>)] {
        &self.tensors
    }

    /// Ranges of the buffer that weight decay applies to: matrices, not gains; neighbours are joined.
    pub fn decayed(&self) -> Vec<(Range<usize>, bool)> {
        let mut all: Vec<(Range<usize>, bool)> = Vec::new();
        for (tensor, range) in &self.tensors {
            let decayed = !matches!(tensor.role, Role::Norm | Role::Bias);
            match all.last_mut() {
                Some((last, same)) if *same == decayed => last.end = range.end,
                _ => all.push((range.clone(), decayed)),
            }
        }
        all
    }
}

/// Fresh weights: normal with deviation `1 / sqrt(3 · inputs)`, which is 0.02 at a width of 768 and what narrow models need
/// to learn from the first step; the matrices that write to the residual stream scaled by `1 / sqrt(2 · layers)` (Radford
/// et al. 2019); gains 1.
pub fn initialize(config: &ModelConfig, layout: &Layout, seed: u64) -> Vec<f32> {
    let mut weights = vec![0f32; layout.len()];
    let mut random = Random::new(seed, 0);
    let residual = 1.0 / (2.0 * config.layers as f64).sqrt();
    for (tensor, range) in &layout.tensors {
        let writes_residual = tensor.name.contains("o_proj") || tensor.name.contains("down_proj");
        let inputs = tensor.shape[tensor.shape.len() - 1] as f64;
        let deviation = if writes_residual { residual } else { 1.0 } / (3.0 * inputs).sqrt();
        match tensor.role {
            Role::Norm => weights[range.clone()].fill(1.0),
            Role::Bias => {}
            _ => weights[range.clone()]
                .iter_mut()
                .for_each(|w| *w = (random.normal() * deviation) as f32),
        }
    }
    weights
}

/// Reads stored weights into a flat buffer, converted to F32.
pub fn load(layout: &Layout, weights: &dyn Weights) -> Result<Vec<f32>, ModelError> {
    let mut flat = vec![0f32; layout.len()];
    for (tensor, range) in &layout.tensors {
        let raw = weights.raw(&tensor.name)?;
        raw.dtype.to_f32(&raw.bytes, &mut flat[range.clone()]);
    }
    Ok(flat)
}

/// A flat buffer under the tensors' names, for the writers of `strata_model`.
#[derive(Clone, Copy)]
pub struct Named<'a> {
    /// Where each tensor is.
    pub layout: &'a Layout,
    /// The buffer.
    pub values: &'a [f32],
}

impl<'a> Named<'a> {
    fn find(&self, name: &str) -> Option<(&'a TensorSpec, &'a [f32])> {
        let (tensor, range) = self.layout.tensors.iter().find(|(tensor, _)| tensor.name == name)?;
        Some((tensor, &self.values[range.clone()]))
    }

    fn get(&self, name: &str) -> Result<(&'a TensorSpec, &'a [f32]), ModelError> {
        self.find(name).ok_or_else(|| ModelError::Malformed {
            path: name.into(),
            what: "the model has no such tensor".into(),
        })
    }
}

impl Weights for Named<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.find(name).map(|(tensor, _)| tensor.shape.clone())
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>, ModelError> {
        let (tensor, values) = self.get(name)?;
        Ok(RawTensor {
            dtype: Dtype::F32,
            shape: tensor.shape.clone(),
            bytes: Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        })
    }

    fn dtype(&self, name: &str) -> Result<Dtype, ModelError> {
        self.get(name).map(|_| Dtype::F32)
    }

    fn f32(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.get(name).map(|(_, values)| values.to_vec())
    }
}
