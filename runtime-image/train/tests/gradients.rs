//! The body against candle: the same decoder in candle's differentiable operations gives the same log-probabilities and the
//! same gradient of every weight and every adapter parameter, and none of them is zero.

#![allow(clippy::unwrap_used, reason = "in a test an unwrap is an assertion")]

use candle_core::{D, Device, IndexOp, Result, Tensor, Var};
use strata_model::{EMBEDDING, FINAL_NORM, Family, HEAD, ModelConfig, layer_name};
use strata_train::{Batch, Body, Gradients, Linear, Lora, Random, Tape, initialize};

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
};

/// The decoder over candle, for one conversation; `weight` looks a tensor up by its HF name.
fn candle_log_probs(
    config: &ModelConfig,
    weight: &dyn Fn(&str) -> Result<Tensor>,
    tokens: &[u32],
    from: usize,
) -> Result<Tensor> {
    let norm = |x: &Tensor, gain: &str| -> Result<Tensor> {
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(variance + f64::from(config.norm_eps))?.sqrt()?)?
            .broadcast_mul(&weight(gain)?)
    };
    let (rows, dim, half) = (tokens.len() - 1, config.head_dim, config.head_dim / 2);
    let angles: Vec<f32> = (0..rows * half)
        .map(|i| (i / half) as f32 * config.rope_theta.powf(-((i % half) as f32) / half as f32))
        .collect();
    let angles = Tensor::from_vec(angles, (rows, 1, half), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let rope = |x: Tensor| -> Result<Tensor> {
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[low, high], 2)
    };
    let mask: Vec<f32> = (0..rows * rows)
        .map(|i| if i % rows <= i / rows { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    let mask = Tensor::from_vec(mask, (rows, rows), &Device::Cpu)?;
    let mut x = weight(EMBEDDING)?.index_select(&Tensor::new(&tokens[..rows], &Device::Cpu)?, 0)?;
    for layer in 0..config.layers {
        let linear = |x: &Tensor, linear: Linear| x.matmul(&weight(&layer_name(layer, linear.part()))?.t()?);
        let n = norm(&x, &layer_name(layer, "input_layernorm"))?;
        let q = rope(linear(&n, Linear::Q)?.reshape((rows, config.heads, dim))?)?;
        let k = rope(linear(&n, Linear::K)?.reshape((rows, config.kv_heads, dim))?)?;
        let v = linear(&n, Linear::V)?.reshape((rows, config.kv_heads, dim))?;
        let mut heads = Vec::new();
        for head in 0..config.heads {
            let kv = head / (config.heads / config.kv_heads);
            let pick = |x: &Tensor, head: usize| x.i((.., head, ..))?.contiguous();
            let scores = (pick(&q, head)?.matmul(&pick(&k, kv)?.t()?)? / (dim as f64).sqrt())?;
            let scores = scores.broadcast_add(&mask)?;
            let exp = scores.broadcast_sub(&scores.max_keepdim(1)?.detach())?.exp()?;
            let p = exp.broadcast_div(&exp.sum_keepdim(1)?)?;
            heads.push(p.matmul(&pick(&v, kv)?)?);
        }
        x = (x + linear(&Tensor::cat(&heads, 1)?, Linear::O)?)?;
        let n = norm(&x, &layer_name(layer, "post_attention_layernorm"))?;
        let gate = linear(&n, Linear::Gate)?;
        let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
        x = (x + linear(&(silu * linear(&n, Linear::Up)?)?, Linear::Down)?)?;
    }
    let x = norm(&x, FINAL_NORM)?.narrow(0, from - 1, rows + 1 - from)?;
    let head = if config.tie_embeddings { EMBEDDING } else { HEAD };
    let logits = x.matmul(&weight(head)?.t()?)?;
    let log_sums = logits.exp()?.sum_keepdim(1)?.log()?;
    let targets = Tensor::new(&tokens[from..], &Device::Cpu)?.unsqueeze(1)?;
    logits.broadcast_sub(&log_sums)?.gather(&targets, 1)?.squeeze(1)
}

struct Case {
    config: ModelConfig,
    body: Body,
    weights: Vec<f32>,
    batch: Batch,
    /// The same texts apart: tokens and where scoring starts, in the order of the batch's questions.
    texts: Vec<(Vec<u32>, usize)>,
    coefficients: Vec<f32>,
}

fn case(tie_embeddings: bool) -> Case {
    let config = ModelConfig {
        tie_embeddings,
        ..CONFIG
    };
    let body = Body::new(&config);
    let mut weights = initialize(&config, body.layout(), 5);
    let mut random = Random::new(1, 9);
    // Away from the start of a training, so that nothing is small by chance; gains differ from 1.
    weights
        .iter_mut()
        .for_each(|w| *w = *w * 1.4 + random.normal() as f32 * 0.05);
    let mut tokens = |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(50) as u32).collect() };
    let (text, prompt, chosen, rejected) = (tokens(12), tokens(7), tokens(5), tokens(3));
    let mut batch = Batch::default();
    batch.push_text(&text, 4);
    batch.push_pair(&prompt, &chosen, &rejected);
    let texts = vec![
        (text, 4),
        ([prompt.clone(), chosen].concat(), 7),
        ([prompt, rejected].concat(), 7),
    ];
    let coefficients = (0..batch.scored().len())
        .map(|i| ((i % 5) as f32 - 1.7) / 3.0)
        .collect();
    Case {
        config,
        body,
        weights,
        batch,
        texts,
        coefficients,
    }
}

/// Log-probabilities by candle in the order of the batch, and their sum weighted by the coefficients.
fn candle_objective(case: &Case, weight: &dyn Fn(&str) -> Result<Tensor>) -> Result<(Vec<f32>, Tensor)> {
    let parts = case
        .texts
        .iter()
        .map(|(tokens, from)| candle_log_probs(&case.config, weight, tokens, *from));
    let log_probs = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
    let coefficients = Tensor::new(case.coefficients.as_slice(), &Device::Cpu)?;
    Ok((log_probs.to_vec1()?, (log_probs * coefficients)?.sum_all()?))
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
        let vars: Vec<(String, Var)> = case
            .body
            .layout()
            .tensors()
            .iter()
            .map(|(tensor, range)| {
                let values = case.weights[range.clone()].to_vec();
                let var =
                    Tensor::from_vec(values, tensor.shape.as_slice(), &Device::Cpu).and_then(|t| Var::from_tensor(&t));
                (tensor.name.clone(), var.unwrap())
            })
            .collect();
        let weight = |name: &str| {
            Ok(vars
                .iter()
                .find(|(found, _)| found == name)
                .unwrap()
                .1
                .as_tensor()
                .clone())
        };
        let (expected, objective) = candle_objective(&case, &weight).unwrap();
        let expected_gradients = objective.backward().unwrap();

        let mut tape = Tape::default();
        let got = case.body.forward(&case.weights, &case.batch, &mut tape, true).to_vec();
        assert_close("log-probabilities", &got, &expected);
        let without = case
            .body
            .forward(&case.weights, &case.batch, &mut Tape::default(), false)
            .to_vec();
        assert_eq!(got, without, "keeping for backward changes nothing");
        let mut gradients = vec![0f32; case.weights.len()];
        case.body.backward(
            &case.weights,
            &case.batch,
            &mut tape,
            &case.coefficients,
            &mut Gradients::All(&mut gradients),
        );
        for ((tensor, range), (_, var)) in case.body.layout().tensors().iter().zip(&vars) {
            let expected = expected_gradients
                .get(var)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            assert_close(&tensor.name, &gradients[range.clone()], &expected);
        }
    }
}

#[test]
fn every_adapter_parameter_gets_the_gradient_that_candle_gives_it() {
    let case = case(true);
    let layout = case.body.layout();
    let lora = Lora::new(layout, 3, 6.0);
    let mut random = Random::new(2, 2);
    let parameters: Vec<f32> = (0..lora.len()).map(|_| random.normal() as f32 * 0.2).collect();
    let vars: Vec<(String, Var)> = lora
        .tensors()
        .into_iter()
        .map(|(name, shape, range)| {
            let var =
                Tensor::from_vec(parameters[range].to_vec(), shape, &Device::Cpu).and_then(|t| Var::from_tensor(&t));
            (name, var.unwrap())
        })
        .collect();
    let weight = |name: &str| -> Result<Tensor> {
        let (tensor, range) = layout.tensors().iter().find(|(tensor, _)| tensor.name == name).unwrap();
        let base = Tensor::from_vec(
            case.weights[range.clone()].to_vec(),
            tensor.shape.as_slice(),
            &Device::Cpu,
        )?;
        let adapter = |part: &str| {
            let name = format!(
                "base_model.model.{}",
                name.replace(".weight", &format!(".{part}.weight"))
            );
            vars.iter()
                .find(|(found, _)| *found == name)
                .map(|(_, var)| var.as_tensor().clone())
        };
        match (adapter("lora_A"), adapter("lora_B")) {
            (Some(a), Some(b)) => base + (b.matmul(&a)? * 2.0)?,
            _ => Ok(base),
        }
    };
    let (expected, objective) = candle_objective(&case, &weight).unwrap();
    let expected_gradients = objective.backward().unwrap();

    let mut merged = case.weights.clone();
    lora.merge(&mut merged, &case.weights, &parameters);
    let mut tape = Tape::default();
    assert_close(
        "log-probabilities",
        case.body.forward(&merged, &case.batch, &mut tape, true),
        &expected,
    );
    let mut gradients = vec![0f32; lora.len()];
    let mut sink = Gradients::Adapter {
        lora: &lora,
        parameters: &parameters,
        gradients: &mut gradients,
    };
    case.body
        .backward(&merged, &case.batch, &mut tape, &case.coefficients, &mut sink);
    for ((name, _, range), (_, var)) in lora.tensors().into_iter().zip(&vars) {
        let expected = expected_gradients
            .get(var)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        assert_close(&name, &gradients[range], &expected);
    }
}

#[test]
fn a_fresh_adapter_is_the_reference_and_only_b_has_a_gradient() {
    let case = case(true);
    let lora = Lora::new(case.body.layout(), 3, 6.0);
    let parameters = lora.initialize(7);
    let mut merged = case.weights.clone();
    lora.merge(&mut merged, &case.weights, &parameters);
    assert_eq!(merged, case.weights);
    let mut tape = Tape::default();
    case.body.forward(&merged, &case.batch, &mut tape, true);
    let mut gradients = vec![0f32; lora.len()];
    let mut sink = Gradients::Adapter {
        lora: &lora,
        parameters: &parameters,
        gradients: &mut gradients,
    };
    case.body
        .backward(&merged, &case.batch, &mut tape, &case.coefficients, &mut sink);
    for (name, _, range) in lora.tensors() {
        let moved = gradients[range].iter().any(|g| *g != 0.0);
        assert_eq!(moved, name.contains("lora_B"), "{name}");
    }
}
