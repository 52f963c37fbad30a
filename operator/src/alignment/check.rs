//! From an AlignmentJob's spec to the configuration of the stage `align`.

use strata_api::{AlignmentJob, Common};
use strata_contract::{AlignConfig, AlignEvaluation, AlignMethod, AlignTraining, Input, Lora, Stage, Task};

use crate::engine::kind::{Observed, Ref, ResourceKind};
use crate::placement::preflight::{ModelShape, Work};
use crate::pretrain::check::{learning_rate, schedule};
use crate::run::fields::{checkpoint, decimal, gates, unsigned};
use crate::run::{Engine, InputRef, RunKind, Runs, Source};
use crate::workload::pod::Sizes;

/// Tokens of held-out text where the spec does not say.
const DEFAULT_CAPABILITY_TOKENS: i32 = 8192;
/// Share of the steps that warm up where the spec does not say.
const DEFAULT_WARMUP_PERCENT: i32 = 10;

impl RunKind for AlignmentJob {}

impl Runs for AlignmentJob {
    const RUN_KIND: ResourceKind = ResourceKind::AlignmentJob;
    const SIZES: Sizes = Sizes {
        cpu_millis: 1000,
        memory_mib: 2048,
        memory_limit_mib: 6144,
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

    fn work(&self, observed: &Observed) -> Work {
        let spec = &self.spec;
        let base = InputRef::model("base", &spec.base).and_then(|input| match input.source {
            Source::Artifact { from, .. } => observed.upstream.get(&from),
            Source::Plain(_) => None,
        });
        let Some(model) = base.and_then(|base| base.shape) else {
            return Work::Other;
        };
        let rank = u64::from(spec.adapter.lora.rank.unsigned_abs());
        // Two thin matrices beside each of the seven of a layer.
        let kv = model.hidden / model.heads.max(1) * model.kv_heads;
        let sides = 2 * (2 * model.hidden) + 2 * (model.hidden + kv) + 3 * (model.hidden + model.intermediate);
        let training = &spec.training;
        Work::Train {
            model: ModelShape {
                context: training.max_pair_tokens.unsigned_abs().into(),
                ..model
            },
            // A pair is two sequences, each at most that long.
            tokens: u64::from(training.pairs.unsigned_abs()) * 2 * u64::from(training.max_pair_tokens.unsigned_abs()),
            adapter: Some(model.layers * sides * rank),
        }
    }

    /// The base first, then the text for the alignment tax, if any, then the preferences.
    fn inputs(&self) -> Vec<InputRef> {
        let spec = &self.spec;
        let base = InputRef::model("base", &spec.base);
        let capability = spec.evaluate.capability.as_ref();
        let capability =
            capability.map(|capability| InputRef::artifact("capability", ResourceKind::Dataset, &capability.dataset));
        let dataset =
            |reference: &strata_api::Reference| InputRef::artifact(&reference.name, ResourceKind::Dataset, reference);
        base.into_iter()
            .chain(capability)
            .chain(spec.datasets.iter().map(dataset))
            .collect()
    }

    fn stage(&self, inputs: &[Input]) -> Result<Stage, String> {
        let spec = &self.spec;
        let training = &spec.training;
        let mut inputs = inputs.iter().cloned();
        let base = InputRef::model("base", &spec.base).and_then(|_| inputs.next());
        let base = base.ok_or("spec.base: exactly one of pretrainJob, alignmentJob, uri must be set")?;
        let capability = spec.evaluate.capability.as_ref().and_then(|_| inputs.next());
        let tokens = spec
            .evaluate
            .capability
            .as_ref()
            .and_then(|capability| capability.tokens);
        let beta = decimal("spec.method.dpo.beta", &spec.method.dpo.beta)?;
        if beta <= 0.0 {
            return Err(format!(
                "spec.method.dpo.beta must be above 0, such as \"0.1\"; got {beta}"
            ));
        }
        let lora = &spec.adapter.lora;
        let alpha = match &lora.alpha {
            Some(alpha) => decimal("spec.adapter.lora.alpha", alpha)?,
            None => 2.0 * f64::from(lora.rank),
        };
        Ok(Stage::Align(AlignConfig {
            base,
            datasets: inputs.collect(),
            method: AlignMethod::Dpo { beta },
            adapter: Lora {
                rank: unsigned("spec.adapter.lora.rank", lora.rank)?,
                alpha,
            },
            training: AlignTraining {
                pairs: unsigned("spec.training.pairs", training.pairs)?,
                max_pair_tokens: unsigned("spec.training.maxPairTokens", training.max_pair_tokens)?,
                batch_pairs: unsigned("spec.training.batchPairs", training.batch_pairs)?,
                learning_rate: learning_rate(&training.learning_rate)?,
                warmup_percent: unsigned(
                    "spec.training.warmupPercent",
                    training.warmup_percent.unwrap_or(DEFAULT_WARMUP_PERCENT),
                )?,
                schedule: schedule(training.schedule),
                seed: unsigned("spec.training.seed", training.seed.unwrap_or(0))?,
            },
            evaluation: AlignEvaluation {
                held_out_pairs: unsigned("spec.evaluate.heldOutPairs", spec.evaluate.held_out_pairs)?,
                capability,
                capability_tokens: unsigned(
                    "spec.evaluate.capability.tokens",
                    tokens.unwrap_or(DEFAULT_CAPABILITY_TOKENS),
                )?,
            },
            checkpoint: checkpoint(spec.checkpoint.as_ref())?,
            gates: gates(&spec.evaluate.gates)?,
        }))
    }

    fn fits(&self, observed: &Observed) -> Result<(), String> {
        let capability = self
            .spec
            .evaluate
            .capability
            .iter()
            .map(|capability| &capability.dataset);
        let wanted = capability
            .map(|dataset| (dataset, Task::Pretraining, "spec.evaluate.capability.dataset"))
            .chain(
                self.spec
                    .datasets
                    .iter()
                    .map(|dataset| (dataset, Task::Preference, "spec.datasets")),
            );
        for (dataset, task, field) in wanted {
            let from = Ref {
                kind: ResourceKind::Dataset,
                name: dataset.name.clone(),
            };
            let known = observed.upstream.get(&from).and_then(|upstream| upstream.dataset);
            if let Some((is, _)) = known.filter(|(is, _)| *is != task) {
                return Err(format!("{from} has task {is:?}; {field} needs task {task:?}"));
            }
        }
        Ok(())
    }
}
