//! The two executors against one another: the kernels, whose backward is written by hand, and candle, whose backward is
//! derived. Log-probabilities and the gradient of every weight and every adapter parameter agree, and none of them is zero.

#![allow(clippy::unwrap_used, reason = "in a test an unwrap is an assertion")]

use candle_core::Device;
use strata_model::{Family, ModelConfig, Variant};
use strata_train::{Batch, Body, Executor, Gradients, Keep, Lora, Random, Tape, initialize};

const CONFIG: ModelConfig = ModelConfig {
    family: Family::Llama,
    hidden_size: 24,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 6,
    intermediate_size: 40,
    vocab_size: 50,
    rope_theta: 10_000.0,
    norm_eps: 1e-5,
    tie_embeddings: true,
    max_positions: 32,
    bos: None,
    eos: Vec::new(),
    variant: Variant::PLAIN,
};

struct Case {
    kernels: Body,
    candle: Body,
    weights: Vec<f32>,
    batch: Batch,
    coefficients: Vec<f32>,
}

fn case(tie_embeddings: bool) -> Case {
    let config = ModelConfig {
        tie_embeddings,
        ..CONFIG
    };
    let kernels = Body::new(&config, Executor::Kernels);
    let mut weights = initialize(&config, kernels.layout(), 5);
    let mut random = Random::new(1, 9);
    // Away from the start of a training, so that nothing is small by chance; gains differ from 1.
    weights
        .iter_mut()
        .for_each(|w| *w = *w * 1.4 + random.normal() as f32 * 0.05);
    let mut tokens = |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(50) as u32).collect() };
    let mut batch = Batch::default();
    batch.push_text(&tokens(12), 4);
    batch.push_pair(&tokens(7), &tokens(5), &tokens(3));
    let coefficients = (0..batch.scored().len())
        .map(|i| ((i % 5) as f32 - 1.7) / 3.0)
        .collect();
    Case {
        candle: Body::new(&config, Executor::Candle(Device::Cpu)),
        kernels,
        weights,
        batch,
        coefficients,
    }
}

impl Case {
    fn log_probs(&self, body: &Body, weights: &[f32]) -> Vec<f32> {
        let weights = body.place(weights).unwrap();
        let mut tape = Tape::default();
        let log_probs = body.forward(&weights, &self.batch, &mut tape, Keep::Nothing);
        log_probs.unwrap().to_vec()
    }

    /// Forward and backward; returns the log-probabilities.
    fn pass(&self, body: &Body, weights: &[f32], keep: Keep, mut sink: Gradients) -> Vec<f32> {
        let weights = body.place(weights).unwrap();
        let mut tape = Tape::default();
        let log_probs = body.forward(&weights, &self.batch, &mut tape, keep).unwrap().to_vec();
        body.backward(&weights, &self.batch, &mut tape, &self.coefficients, &mut sink)
            .unwrap();
        log_probs
    }

    /// An adapter away from its start, drawn from `seed`.
    fn adapter(&self, seed: u64) -> (Lora, Vec<f32>) {
        let lora = Lora::new(self.kernels.layout(), 3, 6.0);
        let mut random = Random::new(seed, 2);
        let parameters = (0..lora.len()).map(|_| random.normal() as f32 * 0.2).collect();
        (lora, parameters)
    }

    /// The gradient of the adapter's parameters.
    fn adapter_gradient(&self, body: &Body, lora: &Lora, parameters: &[f32]) -> Vec<f32> {
        let mut merged = self.weights.clone();
        lora.merge(&mut merged, &self.weights, parameters);
        let mut gradients = vec![0f32; lora.len()];
        let sink = Gradients::Adapter {
            lora,
            parameters,
            gradients: &mut gradients,
        };
        self.pass(body, &merged, Keep::ForAdapters, sink);
        gradients
    }
}

fn assert_close(name: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let scale = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() < 2e-4 * (scale + 0.1),
            "{name}[{i}]: {got}, candle says {expected}"
        );
    }
    assert!(
        expected.iter().any(|x| x.abs() > 1e-6),
        "{name} has no gradient to compare"
    );
}

#[test]
fn every_weight_gets_the_gradient_that_candle_gives_it() {
    for tie_embeddings in [true, false] {
        let case = case(tie_embeddings);
        // What was there stays: gradients are added.
        let (mut got, mut expected) = (vec![0.25f32; case.weights.len()], vec![0f32; case.weights.len()]);
        let log_probs = case.pass(&case.kernels, &case.weights, Keep::ForAll, Gradients::All(&mut got));
        let by_candle = case.pass(&case.candle, &case.weights, Keep::ForAll, Gradients::All(&mut expected));
        assert_close("log-probabilities", &log_probs, &by_candle);
        for body in [&case.kernels, &case.candle] {
            let kept = if std::ptr::eq(body, &case.kernels) {
                &log_probs
            } else {
                &by_candle
            };
            let name = body.executor().name();
            assert_eq!(
                &case.log_probs(body, &case.weights),
                kept,
                "{name}: keeping changes nothing"
            );
        }
        got.iter_mut().for_each(|gradient| *gradient -= 0.25);
        for (tensor, range) in case.kernels.layout().tensors() {
            assert_close(&tensor.name, &got[range.clone()], &expected[range.clone()]);
        }
    }
}

#[test]
fn every_adapter_parameter_gets_the_gradient_that_candle_gives_it() {
    let case = case(true);
    let (lora, parameters) = case.adapter(2);
    let got = case.adapter_gradient(&case.kernels, &lora, &parameters);
    let expected = case.adapter_gradient(&case.candle, &lora, &parameters);
    for (name, _, range) in lora.tensors() {
        assert_close(&name, &got[range.clone()], &expected[range]);
    }
}

/// Merging and the chain rule through it are the same in both executors: this is what holds them to the definition.
#[test]
fn an_adapters_gradient_is_the_slope_of_the_objective() {
    let case = case(true);
    let (lora, parameters) = case.adapter(3);
    let gradient = case.adapter_gradient(&case.kernels, &lora, &parameters);
    let objective = |parameters: &[f32]| -> f64 {
        let mut merged = case.weights.clone();
        lora.merge(&mut merged, &case.weights, parameters);
        let log_probs = case.log_probs(&case.kernels, &merged);
        let terms = log_probs.iter().zip(&case.coefficients);
        terms.map(|(&p, &c)| f64::from(p) * f64::from(c)).sum()
    };
    for (name, _, range) in lora.tensors() {
        let steepest = range
            .max_by(|&i, &j| gradient[i].abs().total_cmp(&gradient[j].abs()))
            .unwrap();
        let moved = |by: f32| {
            let mut parameters = parameters.clone();
            parameters[steepest] += by;
            objective(&parameters)
        };
        let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        let got = f64::from(gradient[steepest]);
        assert!(
            (got - slope).abs() < 0.02 * slope.abs() + 1e-3,
            "{name}: {got}, the slope is {slope}"
        );
    }
}

#[test]
fn a_fresh_adapter_is_the_reference_and_only_b_has_a_gradient() {
    let case = case(true);
    let lora = Lora::new(case.kernels.layout(), 3, 6.0);
    let parameters = lora.initialize(7);
    let mut merged = case.weights.clone();
    lora.merge(&mut merged, &case.weights, &parameters);
    assert_eq!(merged, case.weights);
    for body in [&case.kernels, &case.candle] {
        let gradients = case.adapter_gradient(body, &lora, &parameters);
        for (name, _, range) in lora.tensors() {
            let moved = gradients[range].iter().any(|g| *g != 0.0);
            assert_eq!(moved, name.contains("lora_B"), "{name} by {}", body.executor().name());
        }
    }
}
