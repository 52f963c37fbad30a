//! The forward pass in candle's operations, for devices that the kernels, which are CPU code, cannot reach.
//!
//! Weights stay quantized on the device and are multiplied there by candle's kernels; attention over the paged cache is a kernel
//! of our own. It has the same blocks and batches as [`super::executor::Executor`], so scheduler, prefix cache and HTTP are one
//! code. What it lacks, it refuses when it is made.

mod attention;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{D, DType, Device, Module, Result, Tensor};
use strata_kernels::infer::{KvDtype, Scoring};
use strata_model::{
    Activation, Dtype, EMBEDDING, FINAL_NORM, HEAD, ModelConfig, Weights, feed_forward_norm, layer_name,
};

use super::executor::Batch;
use super::rules;
use crate::error::ServeError;
use attention::{MOST_HEAD_DIM, PagedAttention};

/// A weight matrix on the device, as it is stored.
enum Linear {
    Quantized(QMatMul),
    Float(Tensor),
}

struct Layer {
    attention_norm: Tensor,
    /// Queries, keys, values.
    qkv: [Linear; 3],
    biases: Option<[Tensor; 3]>,
    /// Norms of each head of queries and of keys.
    head_norms: Option<[Tensor; 2]>,
    scoring: Scoring,
    /// Which of [`CandleExecutor::ropes`].
    rope: usize,
    output: Linear,
    attention_post_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    feed_forward_post_norm: Option<Tensor>,
    /// `[blocks · block_tokens, kv_heads · head_dim]` each.
    keys: Tensor,
    values: Tensor,
}

/// A model's weights and its key-value cache on a device of candle.
pub struct CandleExecutor {
    config: ModelConfig,
    device: Device,
    /// Rows are looked up, so they are floats.
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
    head: Linear,
    /// Cosines and sines, `[positions, rotary_dim / 2]`.
    ropes: Vec<(Tensor, Tensor)>,
    block_tokens: usize,
    weight_bytes: usize,
}

/// What the layers of one forward pass share.
struct Pass {
    tables: Tensor,
    rows: Tensor,
    /// Each row's place in the cache, as wide as keys and values.
    slots: Tensor,
    /// Of each of [`CandleExecutor::ropes`], the rows' cosines and sines: `[rows, 1, rotary_dim / 2]`.
    angles: Vec<(Tensor, Tensor)>,
}

impl CandleExecutor {
    /// Copies the weights to `device` and makes a cache of `blocks` blocks there. `positions` bounds the length of a sequence.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        weights: &dyn Weights,
        kv_dtype: KvDtype,
        block_tokens: usize,
        blocks: usize,
        positions: usize,
    ) -> std::result::Result<Self, ServeError> {
        let kv = match kv_dtype {
            KvDtype::F32 => DType::F32,
            KvDtype::F16 => DType::F16,
            KvDtype::Q8 => return Err(refused("a cache of 8 bits (--kv-cache-dtype q8); take f16")),
        };
        if config.head_dim > MOST_HEAD_DIM {
            return Err(refused(&format!(
                "heads of {} dimensions; {MOST_HEAD_DIM} at most",
                config.head_dim
            )));
        }
        Loader {
            device,
            config,
            weights,
            bytes: 0,
        }
        .load(kv, block_tokens, blocks, positions)
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weights that computing one token reads.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Copies all of block `from` over block `to`.
    pub fn copy_block(&mut self, from: u32, to: u32) -> Result<()> {
        let slots = |block: u32| block as usize * self.block_tokens;
        for cache in self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values]) {
            let copy = cache.narrow(0, slots(from), self.block_tokens)?.copy()?;
            cache.slice_set(&copy, 0, slots(to))?;
        }
        Ok(())
    }

    /// Computes a batch. `logits` gets, for each row that wants them and in order, the row's index and its logits.
    pub fn forward(&mut self, batch: &Batch, mut logits: impl FnMut(usize, &[f32])) -> Result<()> {
        if batch.rows.is_empty() {
            return Ok(());
        }
        let tokens: Vec<u32> = batch.rows.iter().map(|row| row.token).collect();
        let tokens = Tensor::new(tokens, &self.device)?;
        let mut x = self.embedding.index_select(&tokens, 0)?.to_dtype(DType::F32)?;
        if self.config.family.spec().scales_embedding {
            x = (x * (self.config.hidden_size as f64).sqrt())?;
        }
        let pass = self.pass(batch)?;
        for layer in &self.layers {
            x = self.layer(layer, &pass, x)?;
        }
        let wanted: Vec<u32> = (0..batch.rows.len() as u32)
            .filter(|row| batch.rows[*row as usize].logits)
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let x = x.index_select(&Tensor::new(wanted.as_slice(), &self.device)?, 0)?;
        let mut all = self.head.forward(&self.norm(&x, &self.final_norm)?)?;
        if let Some(cap) = self.config.variant.logit_soft_cap.map(f64::from) {
            all = ((all / cap)?.tanh()? * cap)?;
        }
        for (row, values) in wanted.iter().zip(all.to_vec2::<f32>()?) {
            logits(*row as usize, &values);
        }
        Ok(())
    }

    fn pass(&self, batch: &Batch) -> Result<Pass> {
        let longest = batch.tables.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let tables = batch.tables.iter().flat_map(|table| {
            let filled = table.iter().copied().chain(std::iter::repeat(0));
            filled.take(longest)
        });
        let (size, width) = (self.block_tokens, self.config.kv_heads * self.config.head_dim);
        let ends = batch.rows.iter().flat_map(|row| [row.table as u32, row.position + 1]);
        let slots = batch.rows.iter().map(|row| {
            let position = row.position as usize;
            batch.tables[row.table][position / size] * size as u32 + (position % size) as u32
        });
        let positions = Tensor::from_iter(batch.rows.iter().map(|row| row.position), &self.device)?;
        let of_rows = |table: &Tensor| table.index_select(&positions, 0)?.unsqueeze(1);
        Ok(Pass {
            tables: Tensor::from_iter(tables, &self.device)?.reshape((batch.tables.len(), longest))?,
            rows: Tensor::from_iter(ends, &self.device)?.reshape((batch.rows.len(), 2))?,
            slots: Tensor::from_iter(slots, &self.device)?
                .unsqueeze(1)?
                .broadcast_as((batch.rows.len(), width))?
                .contiguous()?,
            angles: self
                .ropes
                .iter()
                .map(|(cos, sin)| Ok((of_rows(cos)?, of_rows(sin)?)))
                .collect::<Result<_>>()?,
        })
    }

    fn layer(&self, layer: &Layer, pass: &Pass, x: Tensor) -> Result<Tensor> {
        let ModelConfig {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        let normed = self.norm(&x, &layer.attention_norm)?;
        let project = |i: usize| {
            let product = layer.qkv[i].forward(&normed)?;
            match &layer.biases {
                Some(biases) => product.broadcast_add(&biases[i]),
                None => Ok(product),
            }
        };
        let turned = |i: usize, heads: usize| {
            let mut x = project(i)?.reshape((x.dim(0)?, heads, head_dim))?;
            if let Some(norms) = &layer.head_norms {
                x = self.norm(&x, &norms[i])?;
            }
            turn(&x, &pass.angles[layer.rope])?.flatten_from(1)?.contiguous()
        };
        let (queries, keys, values) = (turned(0, heads)?, turned(1, kv_heads)?, project(2)?);
        let stored = layer.keys.dtype();
        layer.keys.scatter_set(&pass.slots, &keys.to_dtype(stored)?, 0)?;
        layer
            .values
            .scatter_set(&pass.slots, &values.contiguous()?.to_dtype(stored)?, 0)?;
        let attention = PagedAttention {
            tables: pass.tables.clone(),
            rows: pass.rows.clone(),
            kv_heads,
            head_dim,
            block_tokens: self.block_tokens,
            scoring: layer.scoring,
        };
        let mixed = queries.apply_op3_no_bwd(&layer.keys, &layer.values, &attention)?;
        let added = self.post_norm(layer.output.forward(&mixed)?, &layer.attention_post_norm)?;
        let x = (x + added)?;

        let normed = self.norm(&x, &layer.feed_forward_norm)?;
        let gate = layer.gate.forward(&normed)?;
        let gate = match self.config.family.spec().activation {
            Activation::Silu => gate.silu()?,
            // candle's `gelu` is the form with tanh.
            Activation::GeluTanh => gate.gelu()?,
        };
        let product = (gate * layer.up.forward(&normed)?)?;
        x + self.post_norm(layer.down.forward(&product)?, &layer.feed_forward_post_norm)?
    }

    fn norm(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + f64::from(self.config.norm_eps))?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(gain)
    }

    fn post_norm(&self, x: Tensor, gain: &Option<Tensor>) -> Result<Tensor> {
        match gain {
            Some(gain) => self.norm(&x, gain),
            None => Ok(x),
        }
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Linear::Quantized(matrix) => matrix.forward(x),
            Linear::Float(matrix) => x.to_dtype(matrix.dtype())?.matmul(&matrix.t()?)?.to_dtype(DType::F32),
        }
    }
}

/// Turns the first dimensions of each head by its row's angles: the first half of them with the second.
fn turn(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = cos.dim(D::Minus1)?;
    let (low, high) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_low = (low.broadcast_mul(cos)? - high.broadcast_mul(sin)?)?;
    let turned_high = (high.broadcast_mul(cos)? + low.broadcast_mul(sin)?)?;
    let rest = x.dim(D::Minus1)? - 2 * half;
    let rest = x.narrow(D::Minus1, 2 * half, rest)?;
    Tensor::cat(&[turned_low, turned_high, rest], D::Minus1)
}

/// Copies weights to the device.
struct Loader<'a> {
    device: &'a Device,
    config: &'a ModelConfig,
    weights: &'a dyn Weights,
    bytes: usize,
}

impl Loader<'_> {
    fn load(
        mut self,
        kv: DType,
        block_tokens: usize,
        blocks: usize,
        positions: usize,
    ) -> std::result::Result<CandleExecutor, ServeError> {
        let (config, device) = (self.config, self.device);
        let spec = config.family.spec();
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let name = |part: &str| layer_name(layer, part);
            let bias = |part: &str| format!("model.layers.{layer}.self_attn.{part}.bias");
            let (scoring, rope) = rules::scoring(config, layer);
            let shape = (blocks * block_tokens, config.kv_heads * config.head_dim);
            let cache = || Tensor::zeros(shape, kv, device).map_err(failed);
            layers.push(Layer {
                attention_norm: self.gain(&name("input_layernorm"))?,
                biases: match spec.qkv_bias {
                    true => Some([
                        self.vector(&bias("q_proj"), 0.0)?,
                        self.vector(&bias("k_proj"), 0.0)?,
                        self.vector(&bias("v_proj"), 0.0)?,
                    ]),
                    false => None,
                },
                head_norms: match spec.qk_norm {
                    true => Some([
                        self.gain(&name("self_attn.q_norm"))?,
                        self.gain(&name("self_attn.k_norm"))?,
                    ]),
                    false => None,
                },
                scoring,
                rope,
                attention_post_norm: match spec.post_norms {
                    true => Some(self.gain(&name("post_attention_layernorm"))?),
                    false => None,
                },
                feed_forward_post_norm: match spec.post_norms {
                    true => Some(self.gain(&name("post_feedforward_layernorm"))?),
                    false => None,
                },
                qkv: [
                    self.matrix(&name("self_attn.q_proj"))?,
                    self.matrix(&name("self_attn.k_proj"))?,
                    self.matrix(&name("self_attn.v_proj"))?,
                ],
                output: self.matrix(&name("self_attn.o_proj"))?,
                feed_forward_norm: self.gain(&name(feed_forward_norm(config.family)))?,
                gate: self.matrix(&name("mlp.gate_proj"))?,
                up: self.matrix(&name("mlp.up_proj"))?,
                down: self.matrix(&name("mlp.down_proj"))?,
                keys: cache()?,
                values: cache()?,
            });
        }
        let embedding = self.floats(EMBEDDING)?;
        let head = self.matrix(if config.tie_embeddings { EMBEDDING } else { HEAD })?;
        let ropes = rules::rotations(config, positions)
            .map(|(frequencies, scale)| {
                let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
                let (cos, sin): (Vec<f32>, Vec<f32>) = angles
                    .map(|angle| {
                        (
                            (angle.cos() * f64::from(scale)) as f32,
                            (angle.sin() * f64::from(scale)) as f32,
                        )
                    })
                    .unzip();
                let table = |numbers: Vec<f32>| Tensor::from_vec(numbers, (positions, frequencies.len()), device);
                Ok((table(cos)?, table(sin)?))
            })
            .collect::<Result<_>>()
            .map_err(failed)?;
        let final_norm = self.gain(FINAL_NORM)?;
        self.weights.release();
        Ok(CandleExecutor {
            device: device.clone(),
            embedding,
            layers,
            final_norm,
            head,
            ropes,
            block_tokens,
            weight_bytes: self.bytes,
            config: config.clone(),
        })
    }

    fn vector(&self, name: &str, added: f32) -> std::result::Result<Tensor, ServeError> {
        let mut values = self.weights.f32(name)?;
        values.iter_mut().for_each(|value| *value += added);
        Tensor::new(values, self.device).map_err(failed)
    }

    fn gain(&self, name: &str) -> std::result::Result<Tensor, ServeError> {
        self.vector(name, self.config.family.spec().norm_offset)
    }

    fn matrix(&mut self, name: &str) -> std::result::Result<Linear, ServeError> {
        let raw = self.weights.raw(name)?;
        let quantized = match raw.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                let matrix = self.floats(name)?;
                self.bytes += matrix.elem_count() * matrix.dtype().size_in_bytes();
                return Ok(Linear::Float(matrix));
            }
            Dtype::Q8_0 => GgmlDType::Q8_0,
            Dtype::Q4_0 => GgmlDType::Q4_0,
            Dtype::Q4_1 => GgmlDType::Q4_1,
            Dtype::Q4K => GgmlDType::Q4K,
            Dtype::Q6K => GgmlDType::Q6K,
        };
        self.bytes += raw.bytes.len();
        let storage = QStorage::from_data(raw.bytes, self.device, quantized).map_err(failed)?;
        let tensor = QTensor::new(storage, raw.shape).map_err(failed)?;
        Ok(Linear::Quantized(QMatMul::from_qtensor(tensor).map_err(failed)?))
    }

    /// A matrix as floats: in its own type on a GPU, in F32 on a CPU, where candle multiplies no BF16.
    fn floats(&self, name: &str) -> std::result::Result<Tensor, ServeError> {
        let raw = self.weights.raw(name)?;
        let dtype = match (self.device.is_cuda(), raw.dtype) {
            (false, _) | (_, Dtype::F32) => DType::F32,
            (true, Dtype::BF16) => DType::BF16,
            (true, _) => DType::F16,
        };
        let values = Tensor::from_vec(self.weights.f32(name)?, raw.shape, self.device);
        values.and_then(|values| values.to_dtype(dtype)).map_err(failed)
    }
}

fn failed(error: candle_core::Error) -> ServeError {
    ServeError::Device(error.to_string())
}

fn refused(what: &str) -> ServeError {
    ServeError::Arguments(format!("serving on a GPU does not have {what}"))
}
