//! Pretrains a small model on one text file, without curation: `cargo run -p strata-pretrain --example from_text -- TEXT OUT
//! [KEY=VALUE]…`, where a key is a field of the training or the model (`learningRate=3e-3`, `hiddenSize=192`).
//!
//! The last tenth of the text is held out. It shows what hyper-parameters reach, in minutes.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use strata_contract::{PretrainConfig, Run, Uri};
use strata_encode::{Packer, TextTokenizer, TokenWriter};
use strata_stage::StageContext;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_target(false).with_ansi(false).init();
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: from_text TEXT OUT [KEY=VALUE]…";
    let (text, out) = (
        arguments.next().ok_or(usage)?,
        PathBuf::from(arguments.next().ok_or(usage)?),
    );
    let dataset = out.join("dataset");
    write_dataset(&fs::read_to_string(text)?, &dataset)?;
    let mut config = json!({
        "datasets": [{ "name": "text", "uri": Uri::File(fs::canonicalize(&dataset)?) }],
        "model": {
            "hiddenSize": 192, "intermediateSize": 512, "layers": 4, "heads": 6, "kvHeads": 2, "contextTokens": 256,
            "tieEmbeddings": true
        },
        "training": {
            "tokens": 1_000_000, "batchTokens": 1024, "learningRate": 3e-3, "warmupPercent": 5, "schedule": "Cosine",
            "weightDecay": 0.1, "seed": 17
        },
        "checkpoint": { "everySeconds": 30, "keep": 2 }
    });
    for argument in arguments {
        let (key, value) = argument.split_once('=').ok_or(usage)?;
        let section = if config["training"].get(key).is_some() {
            "training"
        } else {
            "model"
        };
        config[section][key] = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    }
    let config: PretrainConfig = serde_json::from_value(config)?;
    let run: Run = serde_json::from_value(json!({
        "id": "example", "attempt": 1, "resource": { "kind": "PretrainJob", "name": "example" },
        "output": Uri::File(fs::canonicalize(&out)?.join("run"))
    }))?;
    let context = StageContext {
        run,
        volumes: out,
        attempt_id: "local".into(),
        progress: Default::default(),
        interrupt: Default::default(),
    };
    let report = strata_pretrain::run(&config, &context)?;
    tracing::info!(metrics = ?report.metrics, "{}", report.message);
    Ok(())
}

/// Tokenizer and token files of `text`, as the curate stage leaves them.
fn write_dataset(text: &str, folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(folder.join("tokens"))?;
    let scenes: Vec<&str> = text.split("\n\n").collect();
    let split = scenes.len() * 9 / 10;
    let tokenizer = TextTokenizer::train(scenes[..split].iter().map(|scene| scene.to_string()), 2048)?;
    fs::write(folder.join("tokenizer.json"), tokenizer.to_json()?)?;
    for (name, scenes) in [("train", &scenes[..split]), ("test", &scenes[split..])] {
        let mut writer = TokenWriter::new(Vec::new(), tokenizer.vocab_size());
        let mut packer = Packer::new(strata_contract::Packing::BestFit, 256);
        let mut tokens = Vec::new();
        // Documents of about 4 KiB, as the sample's data set has them.
        for document in scenes.chunks(40) {
            tokenizer.encode_document(&document.join("\n\n"), &mut tokens)?;
            packer.push(&tokens, &mut |sequence| writer.push(sequence))?;
        }
        packer.finish(&mut |sequence| writer.push(sequence))?;
        let mut idx = Vec::new();
        fs::write(folder.join(format!("tokens/{name}.bin")), writer.finish(&mut idx)?)?;
        fs::write(folder.join(format!("tokens/{name}.idx")), idx)?;
    }
    Ok(())
}
