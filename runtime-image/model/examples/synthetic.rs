//! Writes a GGUF file in Q8_0 with random weights and another model's tokenizer, for measurements that need a size and no
//! sense: `cargo run -p strata-model --example synthetic -- TOKENIZER_MODEL OUT.gguf`.

use strata_model::gguf::{Texts, write};
use strata_model::{Dtype, LoadedModel, MemoryWeights, ModelConfig, ModelError, RawTensor, Weights, tensors};

/// Random tensors, each made when it is asked for: all at once would take 5 GB.
struct Random {
    shapes: MemoryWeights,
}

impl Random {
    fn new(config: &ModelConfig) -> Self {
        let shapes = tensors(config)
            .into_iter()
            .map(|tensor| (tensor.name, (tensor.shape, Vec::new())));
        Random {
            shapes: MemoryWeights(shapes.collect()),
        }
    }
}

impl Weights for Random {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.shape(name)
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>, ModelError> {
        let mut raw = self.shapes.raw(name)?;
        raw.bytes = self.f32(name)?.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(raw)
    }

    fn dtype(&self, name: &str) -> Result<Dtype, ModelError> {
        self.shapes.dtype(name)
    }

    fn f32(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let shape = self.shapes.raw(name)?.shape;
        let count: usize = shape.iter().product();
        if shape.len() == 1 {
            return Ok(vec![1.0; count]);
        }
        let scale = 1.7 / (shape[1] as f32).sqrt();
        let mut state = name
            .bytes()
            .fold(1u64, |state, byte| state.wrapping_mul(31).wrapping_add(byte.into()))
            | 1;
        Ok((0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                scale * ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
            })
            .collect())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(tokenizer), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("give the model with the tokenizer, and the file to write".into());
    };
    let tokenizer = LoadedModel::open(tokenizer.as_ref())?;
    let config = ModelConfig {
        hidden_size: 2048,
        layers: 24,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate_size: 5632,
        tie_embeddings: true,
        ..tokenizer.config.clone()
    };
    let texts = Texts {
        tokenizer_json: &tokenizer.tokenizer_json,
        chat_template: None,
        generation: &tokenizer.generation,
    };
    write(
        out.as_ref(),
        "synth-1b",
        &config,
        &Random::new(&config),
        texts,
        Dtype::Q8_0,
    )?;
    Ok(())
}
