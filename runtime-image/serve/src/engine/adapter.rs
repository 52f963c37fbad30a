//! LoRA adapters in a forward pass: several in one batch, each applied to the rows that ask for it and to no other.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strata_kernels::arena::Arena;
use strata_kernels::cpu::Isa;
use strata_kernels::infer::{FloatRows, Format, Input, Matrix, Q8Rows, matmul};
use strata_kernels::pool::{self, Pool};
use strata_model::{LoraWeights, ModelConfig, ModelError, layer_name};

/// A matrix of a block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Queries,
    Keys,
    Values,
    Output,
    Gate,
    Up,
    Down,
}

/// The matrices' names, in the order of [`Target`].
const TARGETS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

#[derive(Debug)]
struct Delta {
    down: Matrix,
    up: Matrix,
}

/// A loaded adapter. It lives as long as somebody holds it: an adapter that is unloaded while requests use it ends with them.
#[derive(Debug)]
pub struct Adapter {
    name: String,
    /// Of this load: no other one in this process has it.
    id: u64,
    layers: Vec<[Option<Delta>; TARGETS.len()]>,
}

impl Adapter {
    /// Loads the adapter in `folder` for a model of `config`; see [`LoraWeights::open`].
    pub fn load(name: &str, folder: &Path, config: &ModelConfig, max_rank: usize) -> Result<Self, ModelError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let LoraWeights { rank, parts } = LoraWeights::open(folder, config, max_rank)?;
        let arena = Arena::default();
        let pack = |values: &[f32], columns: usize| {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            Matrix::pack(
                pool::global(),
                &arena,
                Format::F32,
                values.len() / columns,
                columns,
                &bytes,
            )
        };
        let mut layers: Vec<[Option<Delta>; TARGETS.len()]> = (0..config.layers).map(|_| Default::default()).collect();
        for part in parts {
            let place = (0..config.layers)
                .flat_map(|layer| (0..TARGETS.len()).map(move |target| (layer, target)))
                .find(|(layer, target)| layer_name(*layer, TARGETS[*target]) == part.name);
            let (layer, target) = place.expect("the reader gives matrices of blocks only");
            layers[layer][target] = Some(Delta {
                down: pack(&part.down, part.down.len() / rank),
                up: pack(&part.up, rank),
            });
        }
        Ok(Adapter {
            name: name.to_owned(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            layers,
        })
    }

    /// The name by which requests ask for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What tells its keys and values from all others: a prompt's beginning is found again only under the same load of the
    /// same adapter.
    pub fn salt(&self) -> [u8; 8] {
        self.id.to_le_bytes()
    }
}

/// The adapters of a batch with their rows, and memory to apply them.
#[derive(Default)]
pub(super) struct Adapters {
    groups: Vec<(Arc<Adapter>, Vec<usize>)>,
    gathered: Vec<f32>,
    inputs: FloatRows,
    inner: Vec<f32>,
    inner_rows: FloatRows,
    added: Vec<f32>,
    unused: Q8Rows,
}

impl Adapters {
    /// Takes the adapter of each row of the next batch.
    pub(super) fn set<'a>(&mut self, rows: impl Iterator<Item = Option<&'a Arc<Adapter>>>) {
        self.groups.clear();
        for (row, adapter) in rows.enumerate() {
            let Some(adapter) = adapter else { continue };
            match self.groups.iter_mut().find(|(other, _)| other.id == adapter.id) {
                Some((_, rows)) => rows.push(row),
                None => self.groups.push((adapter.clone(), vec![row])),
            }
        }
    }

    /// Lets go of the batch's adapters: one that was unloaded is not held until the next batch comes.
    pub(super) fn clear(&mut self) {
        self.groups.clear();
    }

    /// Adds to `outs` what the adapters of layer `layer` give for `x` (rows of `columns`). Costs nothing without adapters.
    pub(super) fn apply(
        &mut self,
        pool: &Pool,
        isa: Isa,
        layer: usize,
        x: &[f32],
        columns: usize,
        outs: &mut [(Target, &mut [f32])],
    ) {
        for (adapter, rows) in &self.groups {
            let deltas = &adapter.layers[layer];
            if outs.iter().all(|(target, _)| deltas[*target as usize].is_none()) {
                continue;
            }
            self.gathered.clear();
            for row in rows {
                self.gathered.extend_from_slice(&x[row * columns..(row + 1) * columns]);
            }
            self.inputs.fill(pool, columns, &self.gathered);
            for (target, out) in outs.iter_mut() {
                let Some(Delta { down, up }) = &deltas[*target as usize] else {
                    continue;
                };
                let (rank, outputs) = (up.columns(), up.rows());
                self.inner.resize(rows.len() * rank, 0.0);
                let input = Input {
                    floats: &self.inputs,
                    quantized: &self.unused,
                };
                matmul(pool, isa, input, &mut [(down, self.inner.as_mut_slice())]);
                self.inner_rows.fill(pool, rank, &self.inner);
                self.added.resize(rows.len() * outputs, 0.0);
                let input = Input {
                    floats: &self.inner_rows,
                    quantized: &self.unused,
                };
                matmul(pool, isa, input, &mut [(up, self.added.as_mut_slice())]);
                for (row, added) in rows.iter().zip(self.added.chunks_exact(outputs)) {
                    strata_kernels::infer::add(&mut out[row * outputs..(row + 1) * outputs], added);
                }
            }
        }
    }
}
