//! The forward pass: rows of tokens in, logits out. Knows blocks and matrices, nothing of requests.

use std::sync::Arc;

use super::adapter::{Adapter, Adapters, Target};
use super::rules;
use strata_kernels::arena::Arena;
use strata_kernels::cpu::{Isa, isa};
use strata_kernels::infer::{
    FloatRows, Format, Input, KvDtype, KvLayer, KvLayout, Matrix, Q8Rows, Scoring, Sequence, add, attend, for_rows,
    matmul,
};
use strata_kernels::ops::activation::{gelu_mul, silu_mul, soft_cap};
use strata_kernels::ops::rms_norm::rms_norm;
use strata_kernels::ops::rope::{RopeTable, Turn, rope};
use strata_kernels::pool::{self, Pool};
use strata_model::{
    Activation, Dtype, EMBEDDING, FINAL_NORM, HEAD, ModelConfig, ModelError, Weights, feed_forward_norm, layer_name,
};

/// Rows of logits computed at once: bounds their memory whatever the batch.
const LOGIT_ROWS: usize = 32;

/// How matrices are held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As in the file, repacked; what is multiplied with a quantized matrix is rounded to 8-bit blocks.
    Stored,
    /// Everything as F32.
    Float,
}

struct Layer {
    attention_norm: Vec<f32>,
    queries: Matrix,
    keys: Matrix,
    values: Matrix,
    /// Added to queries, keys and values.
    biases: Option<[Vec<f32>; 3]>,
    /// Norms of each head of queries and of keys.
    head_norms: Option<[Vec<f32>; 2]>,
    scoring: Scoring,
    /// Which of [`Executor::ropes`].
    rope: usize,
    output: Matrix,
    /// The norm of what attention gives.
    attention_post_norm: Option<Vec<f32>>,
    feed_forward_norm: Vec<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    /// The norm of what the feed-forward part gives.
    feed_forward_post_norm: Option<Vec<f32>>,
}

/// One token in a forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The token.
    pub token: u32,
    /// Its position in its sequence.
    pub position: u32,
    /// Which of [`Batch::tables`] has its sequence's blocks.
    pub table: usize,
    /// Whether its logits are wanted.
    pub logits: bool,
}

/// What one forward pass computes. Rows of one sequence are in order, and earlier ones are computed or in the same batch.
#[derive(Debug, Default)]
pub struct Batch {
    /// The tokens.
    pub rows: Vec<Row>,
    /// The blocks of each sequence.
    pub tables: Vec<Vec<u32>>,
    /// The adapter of each sequence that has one; it may end before the tables do.
    pub adapters: Vec<Option<Arc<Adapter>>>,
}

/// Buffers of a forward pass, kept between passes.
#[derive(Default)]
struct Scratch {
    hidden: Vec<f32>,
    normed: Vec<f32>,
    inverse: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    mixed: Vec<f32>,
    projected: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    product: Vec<f32>,
    adapters: Adapters,
    rows: Rows,
    /// What a norm in place reads.
    copy: Vec<f32>,
    logits: Vec<f32>,
}

/// The input of matrices, in both forms that they take it.
#[derive(Default)]
struct Rows {
    floats: FloatRows,
    quantized: Q8Rows,
}

/// A model's weights, its key-value cache, and the buffers to run it.
pub struct Executor {
    config: ModelConfig,
    isa: Isa,
    embedding: Arc<Matrix>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: Arc<Matrix>,
    /// What turns queries and keys: in local layers perhaps another than elsewhere.
    ropes: Vec<RopeTable>,
    cache: Vec<KvLayer>,
    block_tokens: usize,
    scratch: Scratch,
}

/// Bytes that one block takes in all layers.
pub fn block_bytes(config: &ModelConfig, block_tokens: usize, dtype: KvDtype) -> usize {
    config.layers * layout(config, block_tokens, dtype).block_bytes()
}

fn layout(config: &ModelConfig, block_tokens: usize, dtype: KvDtype) -> KvLayout {
    KvLayout {
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_tokens,
        dtype,
    }
}

impl Executor {
    /// Loads the weights into the kernels' layout and makes a cache of `blocks` blocks. `positions` bounds the length of a
    /// sequence.
    pub fn new(
        config: &ModelConfig,
        weights: &dyn Weights,
        precision: Precision,
        kv_dtype: KvDtype,
        block_tokens: usize,
        blocks: usize,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let arena = Arena::default();
        let load = |name: &str| matrix(&arena, weights, name, precision);
        let spec = config.family.spec();
        let gain = |name: &str| -> Result<Vec<f32>, ModelError> {
            let mut gain = weights.f32(name)?;
            if spec.norm_offset != 0.0 {
                gain.iter_mut().for_each(|gain| *gain += spec.norm_offset);
            }
            Ok(gain)
        };
        let layers = (0..config.layers)
            .map(|layer| {
                let load = |part: &str| load(&layer_name(layer, part));
                let gain = |part: &str| gain(&layer_name(layer, part));
                let bias = |part: &str| weights.f32(&format!("model.layers.{layer}.{part}.bias"));
                let post = |part: &str| spec.post_norms.then(|| gain(part)).transpose();
                let (scoring, rope) = rules::scoring(config, layer);
                Ok(Layer {
                    attention_norm: gain("input_layernorm")?,
                    biases: match spec.qkv_bias {
                        true => Some([
                            bias("self_attn.q_proj")?,
                            bias("self_attn.k_proj")?,
                            bias("self_attn.v_proj")?,
                        ]),
                        false => None,
                    },
                    head_norms: match spec.qk_norm {
                        true => Some([gain("self_attn.q_norm")?, gain("self_attn.k_norm")?]),
                        false => None,
                    },
                    scoring,
                    rope,
                    attention_post_norm: post("post_attention_layernorm")?,
                    feed_forward_post_norm: post("post_feedforward_layernorm")?,
                    queries: load("self_attn.q_proj")?,
                    keys: load("self_attn.k_proj")?,
                    values: load("self_attn.v_proj")?,
                    output: load("self_attn.o_proj")?,
                    feed_forward_norm: gain(feed_forward_norm(config.family))?,
                    gate: load("mlp.gate_proj")?,
                    up: load("mlp.up_proj")?,
                    down: load("mlp.down_proj")?,
                })
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        let embedding = Arc::new(load(EMBEDDING)?);
        let head = if config.tie_embeddings {
            embedding.clone()
        } else {
            Arc::new(load(HEAD)?)
        };
        let final_norm = gain(FINAL_NORM)?;
        weights.release();
        let layout = layout(config, block_tokens, kv_dtype);
        Ok(Executor {
            isa: isa(),
            embedding,
            layers,
            final_norm,
            head,
            ropes: rules::rotations(config, positions)
                .map(|(frequencies, scale)| {
                    RopeTable::from_frequencies(positions, config.head_dim, &frequencies, scale)
                })
                .collect(),
            cache: (0..config.layers).map(|_| KvLayer::new(layout, blocks)).collect(),
            block_tokens,
            config: config.clone(),
            scratch: Scratch::default(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weights that computing one token reads.
    pub fn weight_bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            let Layer {
                queries,
                keys,
                values,
                output,
                gate,
                up,
                down,
                ..
            } = layer;
            [queries, keys, values, output, gate, up, down]
                .iter()
                .map(|matrix| matrix.size_bytes())
                .sum::<usize>()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.head.size_bytes()
    }

    /// Copies what a block of the cache holds into another one.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        self.cache.iter_mut().for_each(|layer| layer.copy_block(from, to));
    }

    /// Bytes that one block takes in all layers.
    pub fn block_bytes(&self) -> usize {
        self.cache.iter().map(KvLayer::block_bytes).sum()
    }

    /// Copies what a block holds to `bytes`, which are [`Executor::block_bytes`].
    pub fn save_block(&self, block: u32, bytes: &mut [u8]) {
        let each = bytes.len() / self.cache.len();
        let layers = self.cache.iter().zip(bytes.chunks_exact_mut(each));
        layers.for_each(|(layer, bytes)| layer.save_block(block, bytes));
    }

    /// Makes a block what [`Executor::save_block`] gave.
    pub fn load_block(&mut self, block: u32, bytes: &[u8]) {
        let each = bytes.len() / self.cache.len();
        let layers = self.cache.iter_mut().zip(bytes.chunks_exact(each));
        layers.for_each(|(layer, bytes)| layer.load_block(block, bytes));
    }

    /// Computes a batch. `logits` gets, for each row that wants them and in order, the row's index and its logits.
    pub fn forward(&mut self, batch: &Batch, mut logits: impl FnMut(usize, &[f32])) {
        let Executor {
            config,
            isa,
            embedding,
            layers,
            final_norm,
            head,
            ropes,
            cache,
            block_tokens,
            scratch: s,
        } = self;
        let (rows, hidden, pool) = (batch.rows.len(), config.hidden_size, pool::global());
        if rows == 0 {
            return;
        }
        let (width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let positions: Vec<u32> = batch.rows.iter().map(|row| row.position).collect();
        let sequences: Vec<Sequence<'_>> = batch
            .rows
            .iter()
            .map(|row| Sequence {
                table: &batch.tables[row.table],
                len: row.position as usize + 1,
            })
            .collect();
        let slots: Vec<(u32, usize)> = batch
            .rows
            .iter()
            .map(|row| {
                let position = row.position as usize;
                (
                    batch.tables[row.table][position / *block_tokens],
                    position % *block_tokens,
                )
            })
            .collect();
        for (buffer, size) in [
            (&mut s.hidden, hidden),
            (&mut s.normed, hidden),
            (&mut s.inverse, 1),
            (&mut s.queries, width),
            (&mut s.keys, kv_width),
            (&mut s.values, kv_width),
            (&mut s.mixed, width),
            (&mut s.projected, hidden),
            (&mut s.gate, config.intermediate_size),
            (&mut s.up, config.intermediate_size),
            (&mut s.product, config.intermediate_size),
        ] {
            buffer.resize(rows * size, 0.0);
        }

        for (row, out) in batch.rows.iter().zip(s.hidden.chunks_exact_mut(hidden)) {
            embedding.row(row.token as usize, out);
        }
        let spec = config.family.spec();
        if spec.scales_embedding {
            let scale = (hidden as f32).sqrt();
            s.hidden.iter_mut().for_each(|x| *x *= scale);
        }
        s.adapters
            .set(batch.rows.iter().map(|row| batch.adapters.get(row.table)?.as_ref()));
        for (index, (layer, cache)) in layers.iter().zip(cache).enumerate() {
            let norm = |row: usize, out: &mut [f32]| {
                let x = &s.hidden[row * hidden..(row + 1) * hidden];
                rms_norm(out, &mut [0.0], x, &layer.attention_norm, config.norm_eps);
            };
            let input = s.rows.input(
                pool,
                *isa,
                &mut s.normed,
                hidden,
                &[&layer.queries, &layer.keys, &layer.values],
                norm,
            );
            let mut products = [
                (&layer.queries, s.queries.as_mut_slice()),
                (&layer.keys, s.keys.as_mut_slice()),
                (&layer.values, s.values.as_mut_slice()),
            ];
            matmul(pool, *isa, input, &mut products);
            s.adapters.apply(
                pool,
                *isa,
                index,
                &s.normed,
                hidden,
                &mut [
                    (Target::Queries, s.queries.as_mut_slice()),
                    (Target::Keys, s.keys.as_mut_slice()),
                    (Target::Values, s.values.as_mut_slice()),
                ],
            );
            if let Some(biases) = &layer.biases {
                for (values, bias) in [&mut s.queries, &mut s.keys, &mut s.values].into_iter().zip(biases) {
                    values.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
                }
            }
            if let Some([queries, keys]) = &layer.head_norms {
                norm_in_place(&mut s.queries, &mut s.copy, queries, config.norm_eps);
                norm_in_place(&mut s.keys, &mut s.copy, keys, config.norm_eps);
            }
            let table = &ropes[layer.rope];
            rope(&mut s.queries, &positions, table, Turn::Forward);
            rope(&mut s.keys, &positions, table, Turn::Forward);
            cache.write(pool, &slots, &s.keys, &s.values);
            attend(pool, *isa, cache, &layer.scoring, &s.queries, &sequences, &mut s.mixed);
            let input = s
                .rows
                .input(pool, *isa, &mut s.mixed, width, &[&layer.output], |_, _| ());
            matmul(pool, *isa, input, &mut [(&layer.output, s.projected.as_mut_slice())]);
            let outs = &mut [(Target::Output, s.projected.as_mut_slice())];
            s.adapters.apply(pool, *isa, index, &s.mixed, width, outs);
            if let Some(gain) = &layer.attention_post_norm {
                norm_in_place(&mut s.projected, &mut s.copy, gain, config.norm_eps);
            }
            for_rows(pool, &mut s.hidden, hidden, |row, x| {
                add(x, &s.projected[row * hidden..(row + 1) * hidden])
            });

            let norm = |row: usize, out: &mut [f32]| {
                let x = &s.hidden[row * hidden..(row + 1) * hidden];
                rms_norm(out, &mut [0.0], x, &layer.feed_forward_norm, config.norm_eps);
            };
            let input = s
                .rows
                .input(pool, *isa, &mut s.normed, hidden, &[&layer.gate, &layer.up], norm);
            matmul(
                pool,
                *isa,
                input,
                &mut [(&layer.gate, s.gate.as_mut_slice()), (&layer.up, s.up.as_mut_slice())],
            );
            let outs = &mut [(Target::Gate, s.gate.as_mut_slice()), (Target::Up, s.up.as_mut_slice())];
            s.adapters.apply(pool, *isa, index, &s.normed, hidden, outs);
            let inner = config.intermediate_size;
            let gated = |row: usize, out: &mut [f32]| {
                let at = row * inner..(row + 1) * inner;
                match spec.activation {
                    Activation::Silu => silu_mul(out, &s.gate[at.clone()], &s.up[at]),
                    Activation::GeluTanh => gelu_mul(out, &s.gate[at.clone()], &s.up[at]),
                }
            };
            let input = s.rows.input(pool, *isa, &mut s.product, inner, &[&layer.down], gated);
            matmul(pool, *isa, input, &mut [(&layer.down, s.projected.as_mut_slice())]);
            let outs = &mut [(Target::Down, s.projected.as_mut_slice())];
            s.adapters
                .apply(pool, *isa, index, &s.product, config.intermediate_size, outs);
            if let Some(gain) = &layer.feed_forward_post_norm {
                norm_in_place(&mut s.projected, &mut s.copy, gain, config.norm_eps);
            }
            for_rows(pool, &mut s.hidden, hidden, |row, x| {
                add(x, &s.projected[row * hidden..(row + 1) * hidden])
            });
        }

        let wanted: Vec<usize> = (0..rows).filter(|row| batch.rows[*row].logits).collect();
        for some in wanted.chunks(LOGIT_ROWS) {
            for (i, row) in some.iter().enumerate() {
                let (to, from) = (i * hidden..(i + 1) * hidden, row * hidden..(row + 1) * hidden);
                s.projected[to].copy_from_slice(&s.hidden[from]);
            }
            let last = &s.projected[..some.len() * hidden];
            let normed = &mut s.normed[..some.len() * hidden];
            rms_norm(normed, &mut s.inverse[..some.len()], last, final_norm, config.norm_eps);
            s.logits.resize(some.len() * config.vocab_size, 0.0);
            let input = s.rows.input(pool, *isa, normed, hidden, &[head], |_, _| ());
            matmul(pool, *isa, input, &mut [(&**head, s.logits.as_mut_slice())]);
            if let Some(cap) = config.variant.logit_soft_cap {
                soft_cap(&mut s.logits, cap);
            }
            for (row, values) in some.iter().zip(s.logits.chunks_exact(config.vocab_size)) {
                logits(*row, values);
            }
        }
        s.adapters.clear();
    }
}

impl Rows {
    /// The input as the matrices that it goes to need it: each row of `values` is made by `make` and stays there as floats.
    fn input(
        &mut self,
        pool: &Pool,
        isa: Isa,
        values: &mut [f32],
        columns: usize,
        matrices: &[&Matrix],
        make: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Input<'_> {
        if matrices.iter().any(|matrix| matrix.format().is_quantized()) {
            self.quantized.fill(pool, isa, columns, values, make);
        } else {
            for_rows(pool, values, columns, make);
        }
        if matrices.iter().any(|matrix| !matrix.format().is_quantized()) {
            self.floats.fill(pool, columns, values);
        }
        Input {
            floats: &self.floats,
            quantized: &self.quantized,
        }
    }
}

/// Normalizes rows as wide as `gain` where they lie; `copy` is memory for that.
fn norm_in_place(values: &mut [f32], copy: &mut Vec<f32>, gain: &[f32], eps: f32) {
    copy.clear();
    copy.extend_from_slice(values);
    copy.resize(values.len() + values.len() / gain.len(), 0.0);
    let (read, inverse) = copy.split_at_mut(values.len());
    rms_norm(values, inverse, read, gain, eps);
}

pub(super) fn matrix(
    arena: &Arena,
    weights: &dyn Weights,
    name: &str,
    precision: Precision,
) -> Result<Matrix, ModelError> {
    let raw = weights.raw(name)?;
    let (rows, columns) = (raw.shape[0], raw.shape[1]);
    let format = match raw.dtype {
        Dtype::F32 => Format::F32,
        Dtype::F16 => Format::F16,
        Dtype::BF16 => Format::BF16,
        Dtype::Q8_0 => Format::Q8_0,
        Dtype::Q4_0 => Format::Q4_0,
        Dtype::Q4_1 => Format::Q4_1,
        Dtype::Q4K => Format::Q4K,
        Dtype::Q6K => Format::Q6K,
    };
    let pool = pool::global();
    if precision == Precision::Stored || !format.is_quantized() {
        return Ok(Matrix::pack(pool, arena, format, rows, columns, &raw.bytes));
    }
    let mut values = vec![0.0; rows * columns];
    raw.dtype.to_f32(&raw.bytes, &mut values);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Ok(Matrix::pack(pool, arena, Format::F32, rows, columns, &bytes))
}
