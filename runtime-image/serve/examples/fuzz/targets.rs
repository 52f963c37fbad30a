//! What is fuzzed, the seeds to start from, and the words that its input is made of.

use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::{Map, json};
use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, tiny_config, weights};
use strata_model::{ChatTemplate, Dtype, GenerationConfig, LoadedModel, ModelConfig, Vocabulary, gguf, hf};
use strata_serve::{ServeArgs, Server};

use crate::Failure;

/// The paths that a request of the first byte's value goes to.
const PATHS: [&str; 5] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/openai/deployments/tiny/chat/completions?api-version=2024-10-21",
];
const REQUEST_WORDS: &[&str] = &[
    "\"messages\":",
    "\"role\":",
    "\"content\":",
    "\"user\"",
    "\"system\"",
    "\"assistant\"",
    "\"tool\"",
    "\"prompt\":",
    "\"max_tokens\":",
    "\"max_completion_tokens\":",
    "\"temperature\":",
    "\"top_p\":",
    "\"top_k\":",
    "\"min_p\":",
    "\"seed\":",
    "\"stop\":",
    "\"n\":",
    "\"stream\":true",
    "\"stream_options\":{\"include_usage\":true}",
    "\"logprobs\":true",
    "\"top_logprobs\":",
    "\"logit_bias\":{\"1\":5}",
    "\"response_format\":{\"type\":\"json_object\"}",
    "\"json_schema\":",
    "\"tools\":[",
    "\"tool_choice\":\"required\"",
    "\"tool_calls\":",
    "\"function\":",
    "\"parameters\":{\"type\":\"object\"}",
    "\"frequency_penalty\":",
    "\"ignore_eos\":true",
    "\"chat_template_kwargs\":{",
    "\"tokens\":[",
    "\"model\":\"tiny\"",
    "<|im_end|>",
    "null",
    "true",
    "[]",
    "{}",
    "-1",
    "1e308",
    "18446744073709551616",
    "\\ud800",
    "\\u0000",
    "\u{FDD0}0\u{FDD1}",
    "é",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
];
const TEMPLATE_WORDS: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{%-",
    "-%}",
    "{% for message in messages %}",
    "{% endfor %}",
    "{% if ",
    "{% endif %}",
    "{% else %}",
    "{% set x = ",
    "{% set ns = namespace(a=0) %}",
    "{% macro m(a) %}",
    "{% endmacro %}",
    "{{ m(1) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "messages",
    "message['content']",
    "loop.index0",
    "loop.last",
    "range(",
    "raise_exception(",
    "strftime_now('%Y')",
    "|tojson",
    "|tojson(indent=4)",
    "|trim",
    "|length",
    "|join(',')",
    "|replace('a','b')",
    "|list",
    "|items",
    "|upper",
    "|selectattr('role')",
    "|map(attribute='role')",
    "|batch(2)",
    ".split(' ')",
    ".strip()",
    ".startswith('x')",
    ".format(1)",
    "['a','b']",
    "{'a':1}",
    "[::-1]",
    "[1:2]",
    " * 1000000",
    " ** ",
    " // ",
    " ~ ",
    " is defined",
    " is not none",
    " is string",
    " in ",
    "not ",
    "and ",
    "bos_token",
    "add_generation_prompt",
    "tools",
    "{% break %}",
    "{% continue %}",
    "{% raw %}",
    "{% endraw %}",
    "(",
    ")",
    "%c",
    "'",
    "\"",
    "é",
];
const FILE_WORDS: &[&str] = &[
    "llama.",
    "general.architecture",
    "general.alignment",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.token_type",
    "\"dtype\":\"F16\"",
    "\"shape\":[",
    "\"data_offsets\":[",
    "\"hidden_size\":",
    "\"num_hidden_layers\":",
    "\"vocab_size\":",
    "\"rope_scaling\":{",
    "\"rope_parameters\":{",
    "\"eos_token_id\":[",
    "\"added_tokens\":[",
    "\"type\":\"BPE\"",
    "\"merges\":[[\"a\",\"b\"]]",
    "\"normalizer\":{\"type\":\"NFC\"}",
    "\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a+)+$\"},\"behavior\":\"Isolated\",\"invert\":false}",
    "null",
    "0",
    "-1",
    "1e999",
    "18446744073709551615",
    "[",
    "]",
    "{",
    "}",
];
/// The files of a folder that are damaged; the first byte of the input chooses.
const FILES: [&str; 4] = [
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "generation_config.json",
];

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
}

pub(crate) enum Target {
    Requests {
        runtime: tokio::runtime::Runtime,
        client: reqwest::Client,
        url: String,
    },
    Gguf(PathBuf),
    Folder(PathBuf),
    Template(Box<Vocabulary>),
}

/// So small that most of a file is its header.
fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        intermediate_size: 32,
        tie_embeddings: true,
        ..tiny_config()
    }
}

fn generation() -> GenerationConfig {
    GenerationConfig {
        eos: config().eos,
        ..GenerationConfig::default()
    }
}

fn write_folder(to: &Path) -> Result<(), Failure> {
    let config = config();
    let files = hf::Folder {
        config: &config,
        weights: &weights(&config, 11),
        dtype: Dtype::F32,
        tokenizer_json: &byte_tokenizer(),
        chat_template: Some(CHAT_TEMPLATE),
        generation: &generation(),
    };
    Ok(hf::write(to, &files)?)
}

impl Target {
    pub(crate) fn new(name: &str, folder: &Path) -> Result<Target, Failure> {
        let work = folder.join("work");
        if work.exists() {
            std::fs::remove_dir_all(&work)?;
        }
        std::fs::create_dir_all(&work)?;
        Ok(match name {
            "requests" => {
                write_folder(&work)?;
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()?;
                let line = format!(
                    "serve --served-model-name tiny --host 127.0.0.1 --port 0 --model {}",
                    work.display()
                );
                let arguments = Cli::parse_from(line.split_whitespace()).serve;
                let server = runtime.block_on(Server::start(arguments))?;
                let url = format!("http://{}", server.address());
                runtime.spawn(server.run_until(std::future::pending()));
                // Also for plain HTTP, since reqwest has TLS in this workspace.
                let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
                let client = reqwest::Client::new();
                let ready = async {
                    while !client.get(format!("{url}/ready")).send().await?.status().is_success() {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    }
                    Ok::<(), reqwest::Error>(())
                };
                runtime.block_on(ready)?;
                Target::Requests { runtime, client, url }
            }
            "gguf" => Target::Gguf(work.join("model.gguf")),
            "folder" => Target::Folder(work),
            "template" => Target::Template(Box::new(Vocabulary::from_json(&byte_tokenizer())?)),
            other => return Err(format!("no target {other}").into()),
        })
    }

    pub(crate) fn words(&self) -> &'static [&'static str] {
        match self {
            Target::Requests { .. } => REQUEST_WORDS,
            Target::Template(_) => TEMPLATE_WORDS,
            Target::Gguf(_) | Target::Folder(_) => FILE_WORDS,
        }
    }

    pub(crate) fn seeds(&self) -> Result<Vec<Vec<u8>>, Failure> {
        Ok(match self {
            Target::Requests { .. } => {
                let message = json!([{ "role": "system", "content": "a" }, { "role": "user", "content": [{ "type": "text", "text": "b<|im_end|>" }] }]);
                let bodies = [
                    (0, json!({ "model": "tiny", "messages": message, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"] })),
                    (0, json!({ "messages": message, "stream": true, "stream_options": { "include_usage": true }, "logprobs": true, "top_logprobs": 2, "max_tokens": 2 })),
                    (0, json!({ "messages": message, "max_tokens": 2, "tools": [{ "type": "function", "function": { "name": "f", "parameters": {} } }], "n": 2 })),
                    (0, json!({ "messages": message, "max_tokens": 9, "response_format": { "type": "json_schema", "json_schema": { "name": "s", "schema": { "type": "object" } } } })),
                    (1, json!({ "prompt": "abc", "max_tokens": 3, "logprobs": 1, "frequency_penalty": 0.1, "ignore_eos": true })),
                    (1, json!({ "prompt": [1, 2, 3], "max_tokens": 3, "top_k": 4, "stream": true })),
                    (2, json!({ "messages": message, "return_token_strs": true })),
                    (3, json!({ "tokens": [104, 256, 105] })),
                    (4, json!({ "messages": message, "max_tokens": 2 })),
                ];
                bodies.iter().map(|(path, body)| [vec![*path], body.to_string().into_bytes()].concat()).collect()
            }
            Target::Gguf(path) => {
                let (config, tokenizer) = (config(), byte_tokenizer());
                let texts = gguf::Texts {
                    tokenizer_json: &tokenizer,
                    chat_template: Some(CHAT_TEMPLATE),
                    generation: &generation(),
                };
                let mut seeds = Vec::new();
                for dtype in [Dtype::Q8_0, Dtype::F16] {
                    gguf::write(path, "seed", &config, &weights(&config, 11), texts, dtype)?;
                    seeds.push(std::fs::read(path)?);
                }
                seeds
            }
            Target::Folder(folder) => {
                write_folder(folder)?;
                let seed = |(i, name)| Ok([vec![i as u8], std::fs::read(folder.join(name))?].concat());
                FILES.iter().enumerate().map(seed).collect::<Result<_, std::io::Error>>()?
            }
            Target::Template(_) => [
                CHAT_TEMPLATE,
                "{%- if tools %}{{ tools | tojson(indent=4) }}{% endif %}{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m['content'] | trim }}{% endfor %}",
                "{% set ns = namespace(found=false) %}{% for m in messages[::-1] %}{% if not ns.found and m.content.startswith('b') %}{% set ns.found = true %}{{ raise_exception('x') }}{% endif %}{% endfor %}",
                "{% macro turn(m) %}{{ m.role.upper() ~ ':' ~ m.content.split(' ')[0] }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}{{ bos_token }}",
            ]
            .map(|text| text.as_bytes().to_vec())
            .to_vec(),
        })
    }

    /// Gives the target an input. Errors are what it must not do; what it refuses is fine.
    pub(crate) fn run(&mut self, input: &[u8]) -> Result<(), Failure> {
        match self {
            Target::Requests { runtime, client, url } => {
                let (path, body) = input.split_first().unwrap_or((&0, &[]));
                let url = format!("{url}{}", PATHS[*path as usize % PATHS.len()]);
                let ask = async {
                    let answer = client.post(url).body(body.to_vec()).send().await?;
                    let status = answer.status();
                    Ok::<_, reqwest::Error>((status, answer.bytes().await?))
                };
                let (status, body) = runtime.block_on(ask)?;
                let text = String::from_utf8(body.to_vec())?;
                if status.is_server_error() {
                    return Err(format!("status {status}: {text}").into());
                }
                Ok(())
            }
            Target::Gguf(path) => {
                std::fs::write(&*path, input)?;
                read(path);
                Ok(())
            }
            Target::Folder(folder) => {
                let (file, bytes) = input.split_first().unwrap_or((&0, &[]));
                let path = folder.join(FILES[*file as usize % FILES.len()]);
                let whole = std::fs::read(&path)?;
                std::fs::write(&path, bytes)?;
                read(folder);
                std::fs::write(&path, whole)?;
                Ok(())
            }
            Target::Template(vocabulary) => {
                let Ok(template) =
                    ChatTemplate::from_source(&String::from_utf8_lossy(input), Some("<|im_start|>"), None)
                else {
                    return Ok(());
                };
                let messages = [
                    json!({ "role": "system", "content": "a" }),
                    json!({ "role": "user", "content": "b c<|im_end|>" }),
                ];
                let tools =
                    json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }]);
                if let Ok(rendered) = template.render(vocabulary, &messages, Some(&tools), true, &Map::new()) {
                    vocabulary.encode_rendered(&rendered)?;
                }
                Ok(())
            }
        }
    }
}

/// Opens a model and everything in it, as whoever serves it does.
fn read(path: &Path) {
    if let Ok(model) = LoadedModel::open(path) {
        for tensor in strata_model::tensors(&model.config) {
            // A tensor that cannot be read is refused; that it is refused here is as good.
            let _ = model.weights.f32(&tensor.name);
        }
        let _ = model.vocabulary.encode("a b\u{e9} <|im_end|>", true);
    }
}
