//! The command line of `strata-runtime serve`, named as in `vllm serve` where it means the same.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use strata_kernels::infer::KvDtype;

use crate::engine::Speculation;

/// Number type of the key-value cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheDtype {
    /// Half floats.
    #[default]
    #[value(alias = "auto", alias = "float16")]
    F16,
    /// 32-bit floats.
    #[value(alias = "float32")]
    F32,
    /// 8-bit numbers with a scale for up to 32 of them: half the memory of half floats.
    #[value(alias = "int8")]
    Q8,
}

impl CacheDtype {
    pub(crate) fn kernel(self) -> KvDtype {
        match self {
            CacheDtype::F16 => KvDtype::F16,
            CacheDtype::F32 => KvDtype::F32,
            CacheDtype::Q8 => KvDtype::Q8,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            CacheDtype::F16 => "float16",
            CacheDtype::F32 => "float32",
            CacheDtype::Q8 => "q8",
        }
    }
}

/// A key that clients must present. It is never shown: neither in a log nor in an error.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(pub(crate) String);

impl FromStr for ApiKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "" => Err("the key is empty"),
            key => Ok(ApiKey(key.to_owned())),
        }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// An adapter and its name: `NAME=PATH`, or vLLM's JSON.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraModule {
    /// What requests call it.
    pub name: String,
    /// The folder that PEFT wrote, or a URI of where it is.
    pub path: PathBuf,
    /// With a URI: the digest that its artifact must have.
    pub digest: Option<String>,
}

impl FromStr for LoraModule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let module = match text.split_once('=') {
            _ if text.starts_with('{') => serde_json::from_str(text).map_err(|error| error.to_string())?,
            Some((name, path)) => LoraModule {
                name: name.to_owned(),
                path: path.into(),
                digest: None,
            },
            None => return Err("write NAME=PATH, or {\"name\": NAME, \"path\": PATH}".to_owned()),
        };
        match module.name.is_empty() || module.path.as_os_str().is_empty() {
            true => Err("neither name nor path may be empty".to_owned()),
            false => Ok(module),
        }
    }
}

impl ServeArgs {
    /// Whether clients may load adapters.
    pub(crate) fn adapter_updates(&self) -> bool {
        let said = std::env::var("VLLM_ALLOW_RUNTIME_LORA_UPDATING");
        let said = said.is_ok_and(|value| ["1", "true"].contains(&value.to_lowercase().as_str()));
        self.enable_lora && (self.enable_lora_updates || said)
    }
}

/// Arguments of the server.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Hugging Face folder, GGUF file, or folder with one GGUF file.
    #[arg(long)]
    pub model: PathBuf,
    /// Names under which the model is served; the first one stands in responses and metrics. Default: the name of the file or folder.
    #[arg(long, num_args = 1..=16)]
    pub served_model_name: Vec<String>,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    pub host: String,
    /// Port to listen on; 0 takes any free one.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Key that clients must present, as `Authorization: Bearer KEY` or `api-key: KEY`; may be given several times. Default: what
    /// VLLM_API_KEY or STRATA_API_KEY holds, and without either, anybody is answered. Other users of the machine see arguments:
    /// prefer --api-key-file.
    #[arg(long)]
    pub api_key: Vec<ApiKey>,
    /// File with one key a line, accepted besides those of --api-key; read again when it changes.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// Certificate chain as PEM: serve HTTPS instead of HTTP. Read again when it or the key changes.
    #[arg(long, requires = "ssl_keyfile")]
    pub ssl_certfile: Option<PathBuf>,
    /// Private key of --ssl-certfile as PEM.
    #[arg(long, requires = "ssl_certfile")]
    pub ssl_keyfile: Option<PathBuf>,
    /// The most tokens of a prompt and its answer together. Default: what the model was made for, cut to what the cache holds.
    #[arg(long)]
    pub max_model_len: Option<usize>,
    /// Requests computed at once.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_num_seqs: u32,
    /// Tokens computed in one step.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_num_batched_tokens: u32,
    /// Requests that may wait; more are refused with status 429.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pub max_num_waiting: u32,
    /// Tokens in a block of the cache.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub block_size: u32,
    /// Memory for keys and values, in bytes. Default: room for every running request at full length, at most a quarter of the memory limit.
    #[arg(long)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Reuse the computed beginnings of earlier prompts.
    #[arg(long)]
    pub enable_prefix_caching: bool,
    /// Folder on a disk for beginnings of prompts that --kv-cache-memory-bytes has no more room for: they are read back instead of
    /// computed again. They lie in a file without a name, which ends with the server.
    #[arg(long, requires = "kv_spill_bytes", requires = "enable_prefix_caching")]
    pub kv_spill_dir: Option<PathBuf>,
    /// The most bytes in --kv-spill-dir.
    #[arg(long, requires = "kv_spill_dir")]
    pub kv_spill_bytes: Option<u64>,
    /// Guess tokens ahead and check several in one step; answers do not change. A JSON object, as in vLLM:
    /// {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2} guesses from the text
    /// itself, {"method": "draft_model", "model": PATH, "num_speculative_tokens": 3} with a smaller model of the same tokens.
    #[arg(long)]
    pub speculative_config: Option<Speculation>,
    /// Number type of keys and values.
    #[arg(long, value_enum, default_value_t = CacheDtype::F16)]
    pub kv_cache_dtype: CacheDtype,
    /// Accept LoRA adapters.
    #[arg(long)]
    pub enable_lora: bool,
    /// Adapters to load at the start, each as NAME=PATH of a folder that PEFT wrote, or as {"name": NAME, "path": PATH}.
    #[arg(long, num_args = 1.., requires = "enable_lora")]
    pub lora_modules: Vec<LoraModule>,
    /// The most adapters in memory; those that were unloaded count until their last request ends.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_loras: u32,
    /// The highest rank of an adapter.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_lora_rank: u32,
    /// Let clients load adapters from any path that the server may read, and unload them. VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 says
    /// the same.
    #[arg(long, requires = "enable_lora")]
    pub enable_lora_updates: bool,
    /// Connections at once; more wait until one ends.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_connections: u32,
    /// Seconds that a client gets to send the headers of a request, from the connection or the answer before on; then the
    /// connection is closed.
    #[arg(long, default_value_t = 75, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub header_timeout: u64,
    /// Seconds that a client gets to send the body of a request.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub body_timeout: u64,
    /// Seconds after SIGTERM in which new requests are still answered: until every load balancer knows that this server is not
    /// ready, some send more.
    #[arg(long, default_value_t = 5)]
    pub shutdown_delay: u64,
    /// Seconds that running requests get to finish after that.
    #[arg(long, default_value_t = 30)]
    pub shutdown_timeout: u64,
}
