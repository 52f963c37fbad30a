//! Adapters as PEFT writes them, and what merging one into a model gives.

use std::path::Path;

use serde_json::{Map, json};
use strata_model::synthetic::MemoryWeights;
use strata_model::{Dtype, ModelConfig, Role, Weights, hf, stored_tensors};

/// Writes an adapter of all matrices whose name contains `target` (`all`: every one), large enough to change every token.
pub fn write(folder: &Path, config: &ModelConfig, seed: u64, rank: usize, target: &str) {
    let adapter_config = json!({
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_rslora": false, "use_dora": false, "bias": "none",
        "fan_in_fan_out": false, "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}, "task_type": "CAUSAL_LM",
    });
    std::fs::write(folder.join("adapter_config.json"), adapter_config.to_string()).unwrap();
    let mut tensors = Vec::new();
    for tensor in stored_tensors(config) {
        if tensor.role == Role::Linear && (target == "all" || tensor.hf_name.contains(target)) {
            let stem = tensor.hf_name.strip_suffix(".weight").unwrap();
            let name = |which: &str| format!("base_model.model.{stem}.{which}.weight");
            tensors.push((name("lora_A"), vec![rank, tensor.shape[1]]));
            tensors.push((name("lora_B"), vec![tensor.shape[0], rank]));
        }
    }
    let mut state = seed;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let shapes = tensors.clone();
    let mut sizes = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>());
    let path = folder.join("adapter_model.safetensors");
    hf::write_safetensors(&path, &tensors, Dtype::F32, &Map::new(), |_| {
        Ok((0..sizes.next().unwrap())
            .map(|_| 0.15 * number())
            .collect::<Vec<f32>>())
    })
    .unwrap();
}

/// `w + alpha / rank · B · A` for each adapted matrix.
#[allow(dead_code, reason = "one of the two tests that share this file merges")]
pub fn merged(folder: &Path, config: &ModelConfig, base: &MemoryWeights) -> MemoryWeights {
    let adapter = hf::Safetensors::open_file(&folder.join("adapter_model.safetensors")).unwrap();
    let mut merged = base.clone();
    for tensor in stored_tensors(config) {
        let stem = tensor.hf_name.strip_suffix(".weight").unwrap_or_default();
        let name = |which: &str| format!("base_model.model.{stem}.{which}.weight");
        let Some(shape) = adapter.shape(&name("lora_A")) else {
            continue;
        };
        let (rank, columns) = (shape[0], shape[1]);
        let (a, b) = (
            adapter.f32(&name("lora_A")).unwrap(),
            adapter.f32(&name("lora_B")).unwrap(),
        );
        let mut row = 0;
        for part in &tensor.parts {
            let values = &mut merged.0.get_mut(&part.name).unwrap().1;
            for values in values.chunks_exact_mut(columns) {
                for (column, value) in values.iter_mut().enumerate() {
                    let sum: f64 = (0..rank)
                        .map(|i| f64::from(b[row * rank + i]) * f64::from(a[i * columns + column]))
                        .sum();
                    *value += (2.0 * sum) as f32;
                }
                row += 1;
            }
        }
    }
    merged
}
