//! What a workload needs before it starts: memory by what it is for, how it is spread, how long it takes and what it costs.
//!
//! Estimates, each with its formula. What is refused by them is only what is certain: see [`Work::least_bytes`].

use std::fmt;

use strata_api::PlacementStatus;

use super::engine::Engine;
use super::table::Table;
use super::{Family, Placement};

/// Sizes of a decoder, as far as they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the feed-forward layer.
    pub intermediate: u64,
    /// Layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Longest sequence in tokens.
    pub context: u64,
    /// Entries of the vocabulary; 0: not known yet.
    pub vocab: u64,
    /// Whether input and output embeddings are one matrix.
    pub is_tied: bool,
}

impl ModelShape {
    /// Number of weights: attention (q, k, v, o), the three matrices of the feed-forward layer, norms, embeddings.
    pub fn parameters(&self) -> u64 {
        let Self {
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            vocab,
            ..
        } = *self;
        let kv = hidden / heads.max(1) * kv_heads;
        let layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate + 2 * hidden;
        let embeddings = vocab * hidden * if self.is_tied { 1 } else { 2 };
        layers * layer + hidden + embeddings
    }

    /// Bytes of activations that one sequence leaves for the backward pass in one layer: Korthikanti et al. 2022 (arXiv
    /// 2205.05198). `None`: our own trainer, F32 and the whole attention matrix, equation 1 with 4 bytes for 2. `Some`: 16
    /// bits, attention computed anew, shared among that many: table 2, last row but one.
    fn activations(&self, shared_among: Option<u64>) -> u64 {
        let Self {
            hidden, heads, context, ..
        } = *self;
        match shared_among {
            None => 2 * (34 * context * hidden + 5 * heads * context * context),
            Some(tensor) => 34 * context * hidden / tensor.max(1),
        }
    }
}

/// What is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// Training: every weight, or an adapter of this many weights.
    Train {
        /// The model.
        model: ModelShape,
        /// Tokens in all.
        tokens: u64,
        /// Weights of the adapter; absent: all are trained.
        adapter: Option<u64>,
    },
    /// Serving.
    Serve {
        /// Bytes of the weights as they are served; 0: not known yet.
        weights: u64,
        /// Bytes of the cache of keys and values.
        cache: u64,
    },
    /// Nothing of that kind.
    #[default]
    Other,
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Weights.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// State of the optimizer, with the master copy of the weights where there is one.
    pub optimizer: u64,
    /// What the forward pass leaves for the backward pass, of one sequence.
    pub activations: u64,
    /// Keys and values.
    pub cache: u64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.cache
    }
}

/// How a training is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallelism {
    /// Copies that each see other data.
    pub data: u64,
    /// Accelerators that share each matrix: within NVLink.
    pub tensor: u64,
    /// Accelerators that each have some of the layers.
    pub pipeline: u64,
    /// What copies share out: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
    pub zero_stage: u64,
}

impl fmt::Display for Parallelism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            data,
            tensor,
            pipeline,
            zero_stage,
        } = self;
        write!(
            f,
            "data {data} × tensor {tensor} × pipeline {pipeline}, ZeRO {zero_stage}"
        )
    }
}

/// Bytes a weight: the weight itself, its gradient, its optimizer state.
///
/// Our own trainer keeps F32 throughout, and AdamW's two moments on the host. Mixed precision as in Rajbhandari et al. 2020
/// (arXiv 1910.02054), section 3.1: 2 + 2 + 12.
fn bytes_per_weight(engine: Engine, family: Family) -> (u64, u64, u64) {
    match (engine, family) {
        (Engine::Container, Family::Cpu) => (4, 4, 8),
        (Engine::Container, _) => (2, 2, 12),
        (_, Family::Cpu) => (4, 4, 8),
        (_, _) => (4, 4, 0),
    }
}

impl Work {
    /// Bytes without which it cannot be, on all accelerators together: no activations, as those can be computed anew.
    pub fn least_bytes(&self, engine: Engine, family: Family) -> u64 {
        let (weight, gradient, optimizer) = bytes_per_weight(engine, family);
        match *self {
            Self::Train {
                model, adapter: None, ..
            } => model.parameters() * (weight + gradient + optimizer),
            Self::Train {
                model,
                adapter: Some(adapter),
                ..
            } => model.parameters() * weight + adapter * (gradient + optimizer),
            Self::Serve { weights, cache } => weights + cache,
            Self::Other => 0,
        }
    }

    /// Memory of one accelerator of a training that is spread like that.
    fn memory(&self, engine: Engine, family: Family, spread: Parallelism) -> Memory {
        let (weight, gradient, optimizer) = bytes_per_weight(engine, family);
        let Parallelism {
            data,
            tensor,
            pipeline,
            zero_stage,
        } = spread;
        match *self {
            Self::Train { model, adapter, .. } => {
                let mine = model.parameters().div_ceil(tensor * pipeline);
                let trained = adapter.map_or(mine, |adapter| adapter.div_ceil(tensor * pipeline));
                let share = |stage: u64| if zero_stage >= stage { data } else { 1 };
                // Of one micro-batch of one sequence; a pipeline has as many under way as stages, each with its layers.
                let layers = model.layers * model.activations((engine == Engine::Container).then_some(tensor));
                let logits = model.context * model.vocab * 4 / tensor;
                Memory {
                    weights: (mine * weight).div_ceil(share(3)),
                    gradients: (trained * gradient).div_ceil(share(2)),
                    optimizer: (trained * optimizer).div_ceil(share(1)),
                    activations: layers + logits,
                    cache: 0,
                }
            }
            Self::Serve { weights, cache } => Memory {
                weights: weights.div_ceil(tensor),
                cache: cache.div_ceil(tensor),
                ..Memory::default()
            },
            Self::Other => Memory::default(),
        }
    }

    /// Floating-point operations in all: 6 a token and weight for forward and backward pass (Kaplan et al. 2020, arXiv
    /// 2001.08361) and 12 × layers × width × length a token for attention (Chowdhery et al. 2022, arXiv 2204.02311,
    /// appendix B). With an adapter: a pass of the reference, and no gradients of frozen weights: 6 again.
    fn operations(&self) -> Option<f64> {
        match *self {
            Self::Train { model, tokens, .. } => {
                let a_token = 6 * model.parameters() + 12 * model.layers * model.hidden * model.context;
                Some(a_token as f64 * tokens as f64)
            }
            _ => None,
        }
    }
}

/// What is expected of a placed workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// How it is spread.
    pub parallelism: Parallelism,
    /// Memory of one accelerator (or of the node, on the CPU).
    pub memory: Memory,
    /// What one has; absent: not in the table.
    pub has_bytes: Option<u64>,
    /// Length in hours, where the table has figures.
    pub hours: Option<f64>,
    /// What hours were worked out from.
    pub assumption: Option<String>,
    /// Price of all nodes together.
    pub price_per_hour: Option<f64>,
    /// What it costs in all.
    pub cost: Option<f64>,
}

/// What is expected of `work` at `placement`.
pub fn estimate(work: &Work, engine: Engine, placement: &Placement, table: &Table) -> Estimate {
    let row = table.get(&placement.accelerator);
    let has_bytes = placement.accelerator_bytes;
    let total = u64::from(placement.per_node.max(1)) * u64::from(placement.nodes);
    let parallelism = spread(work, engine, placement, total, has_bytes);
    let profile = engine.profile();
    let teraflops = row.and_then(|row| row.teraflops.get(profile.precision));
    // A partition of a GPU has as many sevenths as it says.
    let hours = work.operations().zip(teraflops).map(|(operations, teraflops)| {
        let speed = teraflops * 1e12 * placement.share * total as f64 * f64::from(profile.efficiency_percent) / 100.0;
        operations / speed / 3600.0
    });
    let assumption = hours.and(teraflops).map(|teraflops| {
        format!(
            "{} % of {teraflops} teraFLOP/s ({})",
            profile.efficiency_percent, profile.precision
        )
    });
    Estimate {
        memory: work.memory(engine, placement.family, parallelism),
        parallelism,
        has_bytes,
        hours,
        assumption,
        price_per_hour: placement.price_per_hour,
        cost: hours.zip(placement.price_per_hour).map(|(hours, price)| hours * price),
    }
}

/// The way to spread that moves the least data and fits: copies first, then matrices within NVLink, then layers, then
/// weights shared out.
fn spread(work: &Work, engine: Engine, placement: &Placement, total: u64, has_bytes: Option<u64>) -> Parallelism {
    let alone = Parallelism {
        data: total,
        tensor: 1,
        pipeline: 1,
        zero_stage: 0,
    };
    let (Work::Train { model, .. }, Some(has)) = (work, has_bytes) else {
        return match work {
            Work::Serve { .. } => Parallelism {
                data: 1,
                tensor: total,
                pipeline: 1,
                zero_stage: 0,
            },
            _ => alone,
        };
    };
    let domain = if placement.has_nvlink {
        u64::from(placement.per_node)
    } else {
        1
    };
    let powers = |most: u64| {
        (0..=12)
            .map(|power| 1_u64 << power)
            .take_while(move |size| *size <= most)
    };
    let mut ways = Vec::new();
    for zero_stage in [0, 1, 3] {
        for pipeline in powers(model.layers).filter(|stages| model.layers.is_multiple_of(*stages)) {
            for tensor in powers(domain).filter(|ways| model.heads.is_multiple_of(*ways)) {
                let model_size = tensor * pipeline;
                if total.is_multiple_of(model_size) {
                    let data = total / model_size;
                    // There is nothing to share out among one.
                    if zero_stage == 0 || data > 1 {
                        ways.push(Parallelism {
                            data,
                            tensor,
                            pipeline,
                            zero_stage,
                        });
                    }
                }
            }
        }
    }
    // Sharing the optimizer's state costs no more traffic than copies do, so it comes before splitting the model.
    let cost = |way: &Parallelism| (way.zero_stage == 3, way.pipeline, way.tensor, way.zero_stage);
    ways.sort_by_key(cost);
    let needs = |way: &Parallelism| work.memory(engine, placement.family, *way).total();
    ways.iter()
        .find(|way| needs(way) <= has)
        .or_else(|| ways.iter().min_by_key(|way| needs(way)))
        .copied()
        .unwrap_or(alone)
}

impl Estimate {
    /// Whether it fits with activations, as far as is known.
    pub fn fits(&self) -> bool {
        self.has_bytes.is_none_or(|has| self.memory.total() <= has)
    }

    /// As the status shows it.
    pub fn status(&self, placement: &Placement, table: &Table) -> PlacementStatus {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let money = |value: f64| format!("{value:.2}");
        let count = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
        PlacementStatus {
            accelerator: placement.accelerator.clone(),
            pool: placement.pool.clone(),
            nodes: count(placement.nodes),
            accelerators_per_node: Some(count(placement.per_node)).filter(|each| *each > 0),
            parallelism: (self.parallelism.data * self.parallelism.tensor * self.parallelism.pipeline > 1)
                .then(|| self.parallelism.to_string()),
            needed_bytes: Some(number(self.memory.total())).filter(|bytes| *bytes > 0),
            available_bytes: self.has_bytes.map(number),
            estimated_hours: self.hours.map(|hours| format!("{hours:.2}")),
            estimated_cost: self.cost.map(money),
            price_per_hour: self.price_per_hour.map(money),
            currency: self.price_per_hour.map(|_| table.currency.clone()),
            assumption: self.assumption.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 2 70B: 68,976,648,192 weights by its published checkpoint.
    const LLAMA_70B: ModelShape = ModelShape {
        hidden: 8192,
        intermediate: 28_672,
        layers: 80,
        heads: 64,
        kv_heads: 8,
        context: 4096,
        vocab: 32_000,
        is_tied: false,
    };

    fn placement(nodes: u32, per_node: u32) -> Placement {
        Placement {
            accelerator: "nvidia-h100".into(),
            family: Family::Cuda,
            nodes,
            per_node,
            has_nvlink: true,
            accelerator_bytes: Some(80_000_000_000),
            share: 1.0,
            price_per_hour: Some(98.32 * f64::from(nodes)),
            pool: None,
            seat: super::super::Seat::There,
            node_selector: Default::default(),
            tolerations: Vec::new(),
            affinity: None,
            avoid: Vec::new(),
            resources: Default::default(),
            claim: None,
        }
    }

    #[test]
    fn weights_are_counted_as_the_published_model_has_them() {
        assert_eq!(LLAMA_70B.parameters(), 68_976_648_192);
    }

    #[test]
    fn a_training_is_spread_so_that_it_fits_with_the_least_traffic() {
        let work = |layers: u64| Work::Train {
            model: ModelShape { layers, ..LLAMA_70B },
            tokens: 1_000_000_000,
            adapter: None,
        };
        for (layers, nodes, each, expect) in [
            // 2 billion weights: whole on each.
            (2, 1, 8, "data 8 × tensor 1 × pipeline 1, ZeRO 0"),
            // 7 billion: the optimizer's state is shared out.
            (8, 1, 8, "data 8 × tensor 1 × pipeline 1, ZeRO 1"),
            // 70 billion: matrices within the node, layers over nodes.
            (80, 8, 8, "data 8 × tensor 8 × pipeline 1, ZeRO 1"),
        ] {
            let estimate = estimate(
                &work(layers),
                Engine::Container,
                &placement(nodes, each),
                &Table::default(),
            );
            assert_eq!(
                estimate.parallelism.to_string(),
                expect,
                "{layers} layers: {:?}",
                estimate.memory
            );
            assert!(estimate.fits());
        }
        let one = estimate(&work(80), Engine::Container, &placement(1, 8), &Table::default());
        assert!(
            !one.fits(),
            "70 billion weights need more than 8 × 80 GB: {:?}",
            one.memory
        );
    }

    #[test]
    fn hours_and_cost_follow_from_the_stated_efficiency() {
        let work = Work::Train {
            model: LLAMA_70B,
            tokens: 1_000_000_000,
            adapter: None,
        };
        let estimate = estimate(&work, Engine::Container, &placement(8, 8), &Table::default());
        // 64 H100 at 40 % of 989 teraFLOP/s.
        let operations = (6.0 * 68_976_648_192.0 + 12.0 * 80.0 * 8192.0 * 4096.0) * 1e9;
        let hours = operations / (64.0 * 0.4 * 989e12) / 3600.0;
        let close = |value: Option<f64>, expect: f64| value.is_some_and(|value| (value / expect - 1.0).abs() < 1e-9);
        assert!(close(estimate.hours, hours), "{:?} {hours}", estimate.hours);
        assert!(close(estimate.cost, hours * 98.32 * 8.0));
        assert_eq!(estimate.assumption.as_deref(), Some("40 % of 989 teraFLOP/s (bf16)"));
    }

    #[test]
    fn serving_needs_weights_and_cache() {
        let work = Work::Serve {
            weights: 70 << 30,
            cache: 20 << 30,
        };
        assert_eq!(work.least_bytes(Engine::Candle, Family::Cuda), 90 << 30);
        assert!(!estimate(&work, Engine::Candle, &placement(1, 1), &Table::default()).fits());
        assert!(estimate(&work, Engine::Container, &placement(1, 2), &Table::default()).fits());
    }
}
