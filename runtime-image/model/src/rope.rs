//! Rotary frequencies: how each way to stretch a model's positions is written in files, and the numbers that it means.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::decimal;
use crate::error::{ModelError, Result};

/// How the rotary frequencies of a model differ from `theta^(-2i / dimensions)`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All are divided by `factor`.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3.1: slow ones are divided by `factor`, fast ones stay, with a ramp between.
    Llama3 {
        /// Divides slow frequencies.
        factor: f32,
        /// Wavelengths above `original_positions / low` are slow.
        low: f32,
        /// Wavelengths below `original_positions / high` are fast.
        high: f32,
        /// Positions before the stretch.
        original_positions: usize,
    },
    /// YaRN: as `Llama3` with a ramp over dimensions, and larger scores.
    Yarn {
        /// Divides slow frequencies.
        factor: f32,
        /// Positions before the stretch.
        original_positions: usize,
        /// Turns over the original positions above which a frequency stays.
        beta_fast: f32,
        /// Turns over the original positions below which a frequency is divided.
        beta_slow: f32,
        /// Multiplies queries and keys.
        attention_factor: f32,
        /// The ramp begins and ends at whole dimensions.
        truncate: bool,
    },
    /// Phi-3: each frequency is divided by a number of its own, of one list for short texts and of another for long ones.
    LongRope {
        /// Divisors for texts of up to `original_positions`.
        short: Vec<f32>,
        /// Divisors for longer texts.
        long: Vec<f32>,
        /// Multiplies queries and keys.
        attention_factor: f32,
        /// Positions before the stretch.
        original_positions: usize,
    },
    /// As GGUF stores `Llama3`: each frequency is divided by a number of its own.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// Angles per position (`dimensions / 2` of them), and the factor of their cosines and sines.
    ///
    /// `positions` is the longest text that will be computed: a cache holds keys turned by one set of frequencies, so it
    /// decides between [`RopeScaling::LongRope`]'s lists, as in llama.cpp and vLLM.
    pub fn frequencies(&self, theta: f32, dimensions: usize, positions: usize) -> (Vec<f64>, f32) {
        let half = dimensions / 2;
        let plain: Vec<f64> = (0..half)
            .map(|i| f64::from(theta).powf(-(i as f64) / half as f64))
            .collect();
        let by_divisors = |divisors: &[f32]| plain.iter().zip(divisors).map(|(f, d)| f / f64::from(*d)).collect();
        match self {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / f64::from(*factor)).collect(), 1.0),
            RopeScaling::Llama3 { .. } => (by_divisors(&self.divisors(theta, dimensions)), 1.0),
            RopeScaling::Divisors(divisors) => (by_divisors(divisors), 1.0),
            RopeScaling::LongRope {
                short,
                long,
                attention_factor,
                original_positions,
            } => {
                let divisors = if positions > *original_positions { long } else { short };
                (by_divisors(divisors), *attention_factor)
            }
            RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                let dimension = |turns: f32| {
                    let wavelength = *original_positions as f64 / (f64::from(turns) * 2.0 * std::f64::consts::PI);
                    dimensions as f64 * wavelength.ln() / (2.0 * f64::from(theta).ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dimensions as f64 - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                let divided = |(i, f): (usize, &f64)| {
                    let share = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f / f64::from(*factor) * share + f * (1.0 - share)
                };
                (plain.iter().enumerate().map(divided).collect(), *attention_factor)
            }
        }
    }

    /// What GGUF's `rope_freqs.weight` holds for [`RopeScaling::Llama3`]; empty for the others that have no such list.
    pub fn divisors(&self, theta: f32, dimensions: usize) -> Vec<f32> {
        match self {
            RopeScaling::Divisors(divisors) => divisors.clone(),
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original_positions,
            } => {
                let (factor, low, high) = (f64::from(*factor), f64::from(*low), f64::from(*high));
                let divisor = |i: usize| {
                    let frequency = f64::from(theta).powf(-2.0 * i as f64 / dimensions as f64);
                    let turns = *original_positions as f64 * frequency / (2.0 * std::f64::consts::PI);
                    let share = (turns - low) / (high - low);
                    match turns {
                        turns if turns > high => 1.0,
                        turns if turns < low => factor as f32,
                        _ => (1.0 / ((1.0 - share) / factor + share)) as f32,
                    }
                };
                (0..dimensions / 2).map(divisor).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Checks the numbers for heads of which `dimensions` are turned. `path` is named in the error.
    pub(crate) fn check(&self, dimensions: usize, path: &Path) -> Result<()> {
        let (numbers, lists): (Vec<f32>, Vec<&Vec<f32>>) = match self {
            RopeScaling::None => return Ok(()),
            RopeScaling::Linear { factor } => (vec![*factor], vec![]),
            RopeScaling::Llama3 { factor, low, high, .. } => (vec![*factor, *low, high - low], vec![]),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => (vec![*factor, *beta_fast, *beta_slow, *attention_factor], vec![]),
            RopeScaling::LongRope {
                short,
                long,
                attention_factor,
                ..
            } => (vec![*attention_factor], vec![short, long]),
            RopeScaling::Divisors(divisors) => (vec![], vec![divisors]),
        };
        let positive = |x: &f32| x.is_finite() && *x > 0.0;
        if !(numbers.iter().all(positive) && lists.iter().all(|list| list.iter().all(positive))) {
            return Err(ModelError::malformed(
                path,
                format!("rotary scaling {self:?} has a number that is not above 0"),
            ));
        }
        match lists.iter().find(|list| list.len() != dimensions / 2) {
            None => Ok(()),
            Some(list) => Err(ModelError::malformed(
                path,
                format!(
                    "{} rotary factors for {} frequencies of a head",
                    list.len(),
                    dimensions / 2
                ),
            )),
        }
    }

    /// Reads `rope_scaling` or `rope_parameters`. `top` is the configuration around it.
    pub(crate) fn from_hf(rope: &Map<String, Value>, top: &Map<String, Value>, path: &Path) -> Result<Self> {
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        let kind = kind.and_then(Value::as_str).unwrap_or("default");
        let optional = |key: &str| rope.get(key).and_then(Value::as_f64).map(|value| value as f32);
        let number = |key: &str| {
            optional(key).ok_or_else(|| {
                ModelError::malformed(path, format!("rotary scaling of type {kind:?} has no number {key}"))
            })
        };
        let positions = |key: &str| {
            let value = rope.get(key).or_else(|| top.get(key)).and_then(Value::as_u64);
            value.and_then(|value| usize::try_from(value).ok())
        };
        let most = positions("max_position_embeddings");
        let original = || {
            let found = positions("original_max_position_embeddings").or(most);
            found.filter(|value| *value > 0).ok_or_else(|| {
                ModelError::malformed(
                    path,
                    format!("rotary scaling of type {kind:?} has no original_max_position_embeddings"),
                )
            })
        };
        Ok(match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: number("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original_positions: original()?,
            },
            "yarn" => {
                let factor = number("factor")?;
                let grown = |scale: f32| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * scale * factor.ln() + 1.0
                    }
                };
                let given = |key: &str| optional(key).filter(|value| *value != 0.0);
                let inferred = match (given("mscale"), given("mscale_all_dim")) {
                    (Some(above), Some(below)) => grown(above) / grown(below),
                    _ => grown(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original_positions: original()?,
                    beta_fast: given("beta_fast").unwrap_or(32.0),
                    beta_slow: given("beta_slow").unwrap_or(1.0),
                    attention_factor: optional("attention_factor").unwrap_or(inferred),
                    truncate: rope.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                }
            }
            "longrope" | "su" => {
                let list = |key: &str| {
                    let list = rope.get(key).and_then(Value::as_array);
                    let list: Option<Vec<f32>> =
                        list.and_then(|list| list.iter().map(|x| Some(x.as_f64()? as f32)).collect());
                    list.ok_or_else(|| {
                        ModelError::malformed(
                            path,
                            format!("rotary scaling of type {kind:?} has no list of numbers {key}"),
                        )
                    })
                };
                let original_positions = original()?;
                let factor =
                    optional("factor").unwrap_or(most.unwrap_or(original_positions) as f32 / original_positions as f32);
                RopeScaling::LongRope {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    attention_factor: optional("attention_factor")
                        .unwrap_or_else(|| long_attention_factor(factor, original_positions)),
                    original_positions,
                }
            }
            other => {
                return Err(ModelError::unsupported(
                    path,
                    format!(
                        "rotary embeddings of type {other:?} are not supported; \"default\", \"linear\", \"llama3\", \
                         \"yarn\" and \"longrope\" are"
                    ),
                ));
            }
        })
    }

    /// HF's `rope_scaling`; `None` where HF has no words for it.
    pub(crate) fn to_hf(&self) -> Option<Value> {
        let numbers = |list: &[f32]| -> Vec<f64> { list.iter().map(|x| decimal(*x)).collect() };
        Some(match self {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": decimal(*factor)}),
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original_positions,
            } => json!({
                "rope_type": "llama3", "factor": decimal(*factor), "low_freq_factor": decimal(*low),
                "high_freq_factor": decimal(*high), "original_max_position_embeddings": original_positions,
            }),
            RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => json!({
                "rope_type": "yarn", "factor": decimal(*factor), "original_max_position_embeddings": original_positions,
                "beta_fast": decimal(*beta_fast), "beta_slow": decimal(*beta_slow),
                "attention_factor": decimal(*attention_factor), "truncate": truncate,
            }),
            RopeScaling::LongRope {
                short,
                long,
                attention_factor,
                original_positions,
            } => json!({
                "rope_type": "longrope", "short_factor": numbers(short), "long_factor": numbers(long),
                "attention_factor": decimal(*attention_factor), "original_max_position_embeddings": original_positions,
            }),
            RopeScaling::Divisors(_) => return None,
        })
    }
}

/// LongRoPE's factor of queries and keys where a file does not say it: `sqrt(1 + ln(factor) / ln(original positions))`.
pub(crate) fn long_attention_factor(factor: f32, original_positions: usize) -> f32 {
    match factor <= 1.0 || original_positions < 2 {
        true => 1.0,
        false => (1.0 + factor.ln() / (original_positions as f32).ln()).sqrt(),
    }
}
