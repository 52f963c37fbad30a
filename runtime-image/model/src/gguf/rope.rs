//! Scaled rotary embeddings in GGUF: some by name and numbers, some as a tensor of divisors.

use std::path::Path;

use super::parse::Gguf;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::rope::{RopeScaling, long_attention_factor};

/// Divisors of [`RopeScaling::Llama3`].
pub(super) const DIVISORS: &str = "rope_freqs.weight";
/// Divisors of [`RopeScaling::LongRope`].
pub(super) const LONG: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// What the file says for architecture `arch`.
pub(super) fn read(file: &Gguf, arch: &str, max_positions: usize) -> Result<RopeScaling> {
    let path = file.path();
    let float = |key: &str| {
        file.float(&format!("{arch}.rope.scaling.{key}"))
            .map(|value| value as f32)
    };
    let original = file.unsigned(&format!("{arch}.rope.scaling.original_context_length"));
    let original_positions = original
        .and_then(|value| usize::try_from(value).ok())
        .unwrap_or(max_positions);
    let kind = file.string(&format!("{arch}.rope.scaling.type")).unwrap_or("none");
    if file.tensor(LONG[0]).is_some() || file.tensor(LONG[1]).is_some() {
        let factor = max_positions as f32 / original_positions.max(1) as f32;
        return Ok(RopeScaling::LongRope {
            short: list(file, LONG[0])?,
            long: list(file, LONG[1])?,
            attention_factor: float("attn_factor").unwrap_or_else(|| long_attention_factor(factor, original_positions)),
            original_positions,
        });
    }
    let factor = || {
        float("factor").ok_or_else(|| {
            ModelError::malformed(
                path,
                format!("rotary scaling of type {kind:?} has no {arch}.rope.scaling.factor"),
            )
        })
    };
    let divisors = file.tensor(DIVISORS).map(|_| list(file, DIVISORS)).transpose()?;
    match (kind, divisors) {
        ("none", None) => Ok(RopeScaling::None),
        ("none", Some(divisors)) => Ok(RopeScaling::Divisors(divisors)),
        ("linear", None) => Ok(RopeScaling::Linear { factor: factor()? }),
        ("yarn", None) => {
            let factor = factor()?;
            let grown = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            Ok(RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast: float("yarn_beta_fast").unwrap_or(32.0),
                beta_slow: float("yarn_beta_slow").unwrap_or(1.0),
                attention_factor: float("attn_factor").unwrap_or(1.0) * grown,
                truncate: true,
            })
        }
        (kind, _) => Err(ModelError::unsupported(
            path,
            format!(
                "rotary scaling of type {kind:?} is not supported; \"none\", \"linear\", \"yarn\" and \"longrope\" are"
            ),
        )),
    }
}

fn list(file: &Gguf, name: &str) -> Result<Vec<f32>> {
    let path = file.path();
    let info = file
        .tensor(name)
        .ok_or_else(|| ModelError::malformed(path, format!("tensor {name} is missing")))?;
    let dtype = info
        .dtype()
        .map_err(|what| ModelError::unsupported(path, format!("tensor {name}: {what}")))?;
    let mut values = vec![0.0; info.shape.iter().product()];
    dtype.to_f32(file.tensor_bytes(info), &mut values);
    Ok(values)
}

/// Tensors of divisors that a file needs for the model, `(name, values)`.
pub(super) fn tensors(config: &ModelConfig) -> Vec<(&'static str, Vec<f32>)> {
    match &config.variant.rope {
        RopeScaling::LongRope { short, long, .. } => vec![(LONG[0], short.clone()), (LONG[1], long.clone())],
        other => {
            let divisors = other.divisors(config.rope_theta, config.rotary_dim());
            if divisors.is_empty() {
                Vec::new()
            } else {
                vec![(DIVISORS, divisors)]
            }
        }
    }
}

/// What a file says by name: `(type, numbers by key, original positions)`.
#[derive(Debug, Default)]
pub(super) struct Named {
    pub(super) kind: Option<&'static str>,
    pub(super) numbers: Vec<(&'static str, f32)>,
    pub(super) original_positions: Option<usize>,
}

pub(super) fn named(config: &ModelConfig, path: &Path) -> Result<Named> {
    Ok(match &config.variant.rope {
        RopeScaling::None | RopeScaling::Divisors(_) | RopeScaling::Llama3 { .. } => Named::default(),
        RopeScaling::Linear { factor } => Named {
            kind: Some("linear"),
            numbers: vec![("factor", *factor)],
            original_positions: None,
        },
        RopeScaling::LongRope {
            attention_factor,
            original_positions,
            ..
        } => Named {
            kind: None,
            numbers: vec![("attn_factor", *attention_factor)],
            original_positions: Some(*original_positions),
        },
        RopeScaling::Yarn {
            factor,
            original_positions,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => {
            if !truncate {
                return Err(ModelError::unsupported(
                    path,
                    "YaRN with \"truncate\": false cannot be written to GGUF: serve the HF folder",
                ));
            }
            let grown = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            Named {
                kind: Some("yarn"),
                numbers: vec![
                    ("factor", *factor),
                    ("attn_factor", attention_factor / grown),
                    ("yarn_beta_fast", *beta_fast),
                    ("yarn_beta_slow", *beta_slow),
                ],
                original_positions: Some(*original_positions),
            }
        }
    })
}
