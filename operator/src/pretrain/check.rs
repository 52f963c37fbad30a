//! From a PretrainJob's spec to the configuration of the stage `pretrain`.

use strata_api::{Common, Decimal, Llama, PretrainJob, Schedule};
use strata_contract::{Input, LlamaShape, PretrainConfig, PretrainTraining, Stage, Task};

use crate::engine::kind::{Observed, Ref, ResourceKind};
use crate::placement::preflight::{ModelShape, Work};
use crate::run::fields::{checkpoint, decimal, gates, unsigned};
use crate::run::{Engine, InputRef, RunKind, Runs};
use crate::workload::pod::Sizes;

impl RunKind for PretrainJob {}

impl Runs for PretrainJob {
    const RUN_KIND: ResourceKind = ResourceKind::PretrainJob;
    const SIZES: Sizes = Sizes {
        cpu_millis: 1000,
        memory_mib: 1024,
        memory_limit_mib: 3072,
    };

    fn common(&self) -> &Common {
        &self.spec.common
    }

    fn engine(&self) -> Result<Engine<'_>, String> {
        let engine = self.spec.engine.as_ref();
        Engine::of(
            "candle",
            engine.and_then(|engine| engine.candle.as_ref()),
            engine.and_then(|engine| engine.container.as_ref()),
        )
    }

    fn shape(&self) -> Option<ModelShape> {
        let shape = shape(&self.spec.model.llama).ok()?;
        Some(ModelShape {
            hidden: shape.hidden_size.into(),
            intermediate: shape.intermediate_size.into(),
            layers: shape.layers.into(),
            heads: shape.heads.into(),
            kv_heads: shape.kv_heads.into(),
            context: shape.context_tokens.into(),
            vocab: 0,
            is_tied: shape.tie_embeddings,
        })
    }

    fn work(&self, observed: &Observed) -> Work {
        let Some(model) = self.shape() else { return Work::Other };
        let vocab = crate::run::refs(self)
            .iter()
            .find_map(|to| observed.upstream.get(to)?.vocab_size);
        Work::Train {
            model: ModelShape {
                vocab: vocab.unwrap_or(0).into(),
                ..model
            },
            tokens: self.spec.training.tokens.unsigned_abs(),
            adapter: None,
        }
    }

    fn inputs(&self) -> Vec<InputRef> {
        let dataset =
            |reference: &strata_api::Reference| InputRef::artifact(&reference.name, ResourceKind::Dataset, reference);
        self.spec.datasets.iter().map(dataset).collect()
    }

    fn stage(&self, inputs: &[Input]) -> Result<Stage, String> {
        let spec = &self.spec;
        let training = &spec.training;
        if training.batch_tokens < i64::from(spec.model.llama.context_tokens) {
            return Err(format!(
                "spec.training.batchTokens ({}) must hold at least one sequence of spec.model.llama.contextTokens ({})",
                training.batch_tokens, spec.model.llama.context_tokens
            ));
        }
        let weight_decay = training.weight_decay.clone().unwrap_or_else(|| Decimal::from("0.1"));
        let evaluate = spec.evaluate.clone().unwrap_or_default();
        Ok(Stage::Pretrain(PretrainConfig {
            datasets: inputs.to_vec(),
            model: shape(&spec.model.llama)?,
            training: PretrainTraining {
                tokens: unsigned("spec.training.tokens", training.tokens)?,
                batch_tokens: unsigned("spec.training.batchTokens", training.batch_tokens)?,
                learning_rate: learning_rate(&training.learning_rate)?,
                warmup_percent: unsigned("spec.training.warmupPercent", training.warmup_percent.unwrap_or(2))?,
                schedule: schedule(training.schedule),
                weight_decay: decimal("spec.training.weightDecay", &weight_decay)?,
                seed: unsigned("spec.training.seed", training.seed.unwrap_or(0))?,
            },
            checkpoint: checkpoint(spec.checkpoint.as_ref())?,
            gates: gates(&evaluate.gates)?,
        }))
    }

    fn fits(&self, observed: &Observed) -> Result<(), String> {
        for dataset in &self.spec.datasets {
            let from = Ref {
                kind: ResourceKind::Dataset,
                name: dataset.name.clone(),
            };
            match observed.upstream.get(&from).and_then(|upstream| upstream.dataset) {
                Some((Task::Preference, _)) => {
                    return Err(format!(
                        "{from} has task Preference; a PretrainJob needs task Pretraining"
                    ));
                }
                Some((Task::Pretraining, false)) => {
                    return Err(format!("{from} makes no token files: add spec.encode to it"));
                }
                Some((Task::Pretraining, true)) | None => {}
            }
        }
        Ok(())
    }
}

/// The shape with everything that the spec may leave out.
fn shape(llama: &Llama) -> Result<LlamaShape, String> {
    let hidden_size: u32 = unsigned("spec.model.llama.hiddenSize", llama.hidden_size)?;
    let heads: u32 = unsigned("spec.model.llama.heads", llama.heads)?;
    let kv_heads: u32 = unsigned("spec.model.llama.kvHeads", llama.kv_heads.unwrap_or(llama.heads))?;
    if !hidden_size.is_multiple_of(heads) || !heads.is_multiple_of(kv_heads) {
        return Err("spec.model.llama: heads must divide hiddenSize, and kvHeads must divide heads".into());
    }
    let intermediate_size = match llama.intermediate_size {
        Some(size) => unsigned("spec.model.llama.intermediateSize", size)?,
        None => (hidden_size * 8).div_ceil(3).next_multiple_of(32),
    };
    Ok(LlamaShape {
        hidden_size,
        intermediate_size,
        layers: unsigned("spec.model.llama.layers", llama.layers)?,
        heads,
        kv_heads,
        context_tokens: unsigned("spec.model.llama.contextTokens", llama.context_tokens)?,
        tie_embeddings: llama.tie_embeddings.unwrap_or(true),
    })
}

/// A learning rate, which must be above 0.
///
/// # Errors
/// A sentence that names the field.
pub fn learning_rate(value: &Decimal) -> Result<f64, String> {
    let field = "spec.training.learningRate";
    match decimal(field, value)? {
        rate if rate > 0.0 => Ok(rate),
        _ => Err(format!("{field} must be above 0, such as \"3e-4\"; got {value}")),
    }
}

/// The course of the learning rate, Cosine where the spec does not say.
pub fn schedule(schedule: Option<Schedule>) -> strata_contract::Schedule {
    match schedule.unwrap_or_default() {
        Schedule::Cosine => strata_contract::Schedule::Cosine,
        Schedule::Constant => strata_contract::Schedule::Constant,
    }
}
