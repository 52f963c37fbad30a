//! The server's life: listen, load, serve, drain.
//!
//! ```text
//! listening ──loaded──▶ ready ──SIGTERM──▶ leaving ──delay──▶ draining ──▶ exit 0
//! /ready    503           200                503                503
//! requests  503           answered           answered           running ones finish, new ones get 503
//! ```

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strata_kernels::cgroup::memory_limit_bytes;
use strata_model::bert::Bert;
use strata_model::{LoadedModel, ModelConfig};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use crate::adapters::{AdapterError, Adapters};
use crate::args::{LoraModule, ServeArgs};
use crate::connections::{self, Bounds};
#[cfg(feature = "cuda")]
use crate::engine::candle::CandleExecutor;
use crate::engine::encoder::{Embedder, Encoder};
use crate::engine::executor::{Executor, Precision, block_bytes};
use crate::engine::{Disk, Drafter, Engine, Forms, Forward, Speculation};
use crate::error::ServeError;
use crate::http::{self, Admission, Embeds, Keys, Loaded, ResponseStore, Served, State};
use crate::metrics::Metrics;
use crate::schedule::Limits;
use crate::tls;

/// How long connections get to close after the last request ended.
const CLOSE: Duration = Duration::from_secs(3);
/// How often a drain looks whether requests are left.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// A server that listens; the model loads in the background.
pub struct Server {
    address: SocketAddr,
    state: Arc<State>,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
    loading: tokio::task::JoinHandle<Result<oneshot::Receiver<()>, ServeError>>,
    delay: Duration,
    timeout: Duration,
}

/// Resolves at SIGTERM or SIGINT; they count from the call on.
pub fn terminated() -> Result<impl Future<Output = ()>, ServeError> {
    let system = |source| ServeError::System {
        what: "cannot wait for signals",
        source,
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}

impl Server {
    /// Listens and begins to load the model.
    pub async fn start(args: ServeArgs) -> Result<Self, ServeError> {
        let address = format!("{}:{}", args.host, args.port);
        let listen = |source| ServeError::Listen {
            address: address.clone(),
            source,
        };
        let listener = TcpListener::bind(&address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let admission = Admission::new(Duration::from_secs(args.body_timeout));
        let variable = |name: &str| std::env::var(name).ok();
        let keys = Keys::new(&args.api_key, variable, args.api_key_file.clone()).await?;
        let certificate = match (&args.ssl_certfile, &args.ssl_keyfile) {
            (Some(certificate), Some(key)) => Some(tls::certificate(certificate.clone(), key.clone()).await?),
            _ => None,
        };
        tracing::info!(%address, tls = certificate.is_some(), keys = keys.is_some(), "listening");
        let state = Arc::new(State::new(admission, keys));
        let (stop, stopped) = watch::channel(false);
        let router = http::router(state.clone());
        let bounds = Bounds {
            most: args.max_connections as usize,
            headers: Duration::from_secs(args.header_timeout),
        };
        let serving = tokio::spawn(connections::serve(listener, certificate, router, bounds, stopped));
        let delay = Duration::from_secs(args.shutdown_delay);
        let timeout = Duration::from_secs(args.shutdown_timeout);
        let loading = tokio::task::spawn_blocking({
            let state = state.clone();
            move || {
                let (loaded, ended) = load(&args)?;
                state.set_loaded(loaded);
                Ok(ended)
            }
        });
        Ok(Server {
            address,
            state,
            stop,
            serving,
            loading,
            delay,
            timeout,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` resolves and for the shutdown delay after, then lets running requests finish within the
    /// shutdown timeout.
    pub async fn run_until(mut self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        tokio::pin!(shutdown);
        let died = |_| ServeError::EngineDied;
        let mut ended = tokio::select! {
            loaded = &mut self.loading => loaded.map_err(died)??,
            () = &mut shutdown => return self.drain().await,
        };
        tokio::select! {
            () = &mut shutdown => self.drain().await,
            _ = &mut ended => Err(ServeError::EngineDied),
        }
    }

    async fn drain(self) -> Result<(), ServeError> {
        self.state.leave();
        if self.state.loaded().is_some() {
            tracing::info!(delay_seconds = self.delay.as_secs(), "leaving");
            tokio::time::sleep(self.delay).await;
        }
        self.state.close();
        let in_flight = || self.state.loaded().map_or(0, Loaded::in_flight);
        tracing::info!(
            in_flight = in_flight(),
            timeout_seconds = self.timeout.as_secs(),
            "draining"
        );
        let deadline = Instant::now() + self.timeout;
        while in_flight() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        if let Some(loaded) = self.state.loaded().filter(|loaded| loaded.in_flight() > 0) {
            tracing::warn!(
                in_flight = loaded.in_flight(),
                "the shutdown timeout is over: ending the rest"
            );
            loaded.abort_all();
        }
        self.stop.send_replace(true);
        // Responses that are being written get out; a client that does not read them cannot hold the process.
        let _ = tokio::time::timeout(CLOSE, self.serving).await;
        tracing::info!("stopped");
        Ok(())
    }
}

/// Loads the model for what its architecture says that it does.
fn load(args: &ServeArgs) -> Result<(Loaded, oneshot::Receiver<()>), ServeError> {
    match Bert::is_at(&args.model) {
        true => load_encoder(args).map(|(embeds, ended)| (Loaded::Embeds(embeds), ended)),
        false => load_generator(args).map(|(served, ended)| (Loaded::Generates(Box::new(served)), ended)),
    }
}

fn names(args: &ServeArgs) -> Vec<String> {
    match args.served_model_name.is_empty() {
        true => vec![default_name(&args.model)],
        false => args.served_model_name.clone(),
    }
}

fn thread(source: std::io::Error) -> ServeError {
    ServeError::System {
        what: "cannot start the engine's thread",
        source,
    }
}

fn load_encoder(args: &ServeArgs) -> Result<(Embeds, oneshot::Receiver<()>), ServeError> {
    let begin = Instant::now();
    if args.kv_spill_dir.is_some() {
        let message =
            "--kv-spill-dir is for models that generate: an encoder keeps nothing between steps; leave it out";
        return Err(ServeError::Arguments(message.to_owned()));
    }
    let model = Bert::open(&args.model)?;
    let most = model.config.max_positions;
    let max_model_len = match args.max_model_len {
        None => model.config.max_tokens,
        Some(len) if (1..=most).contains(&len) => len,
        Some(len) => {
            let message = format!("--max-model-len {len} is not possible: the model has {most} positions");
            return Err(ServeError::Arguments(message));
        }
    };
    let names = names(args);
    let limits = Limits {
        max_sequences: args.max_num_seqs as usize,
        max_batched_tokens: args.max_num_batched_tokens as usize,
        max_waiting: args.max_num_waiting as usize,
        block_tokens: args.block_size as usize,
        blocks: 0, // an encoder keeps nothing between steps
        prefix_caching: false,
        spill_slots: 0,
    };
    let metrics = Arc::new(Metrics::new(&names[0], &limits, max_model_len, "float32")?);
    let encoder = Encoder::new(&model)?;
    let most_in_flight = limits.max_sequences + limits.max_waiting;
    let (embedder, ended) =
        Embedder::start(encoder, most_in_flight, limits.max_batched_tokens, metrics.clone()).map_err(thread)?;
    tracing::info!(
        model = names[0],
        dimensions = model.config.hidden_size,
        max_model_len,
        seconds = begin.elapsed().as_secs_f64(),
        "model loaded"
    );
    let embeds = Embeds {
        names,
        max_model_len,
        vocab_size: model.config.vocab_size,
        dimensions: model.config.hidden_size,
        vocabulary: model.vocabulary,
        embedder,
        metrics,
        created: http::unix_seconds(),
    };
    Ok((embeds, ended))
}

fn load_generator(args: &ServeArgs) -> Result<(Served, oneshot::Receiver<()>), ServeError> {
    let begin = Instant::now();
    let model = LoadedModel::open(&args.model)?;
    let draft = draft_model(args, &model)?;
    let configs: Vec<&ModelConfig> = [&model].into_iter().chain(&draft).map(|model| &model.config).collect();
    let limits = limits(args, &configs, memory_limit_bytes())?;
    let max_model_len = max_model_len(args, &model.config, &limits)?;
    let executor = |model: &LoadedModel| executor(args, model, &limits, max_model_len);
    let speculation = match &args.speculative_config {
        None => None,
        Some(speculation) => {
            let drafter = Drafter::new(speculation, draft.as_ref().map(executor).transpose()?);
            drafter.map(|drafter| (drafter, speculation.drafts()))
        }
    };
    let mut executor = executor(&model)?;
    let names = names(args);
    let metrics = Arc::new(Metrics::new(
        &names[0],
        &limits,
        max_model_len,
        args.kv_cache_dtype.name(),
    )?);
    tracing::info!(
        model = names[0],
        parameters = model.config.parameters(),
        weight_bytes = executor.weight_bytes(),
        max_model_len,
        blocks = limits.blocks,
        isa = strata_kernels::cpu::isa().name(),
        threads = strata_kernels::pool::global().threads(),
        seconds = begin.elapsed().as_secs_f64(),
        "model loaded"
    );
    let disk = match &args.kv_spill_dir {
        None => None,
        Some(_) if executor.on_cpu().is_none() => {
            let message = "--kv-spill-dir is for a cache in memory: blocks do not leave a GPU yet; leave it out";
            return Err(ServeError::Arguments(message.to_owned()));
        }
        Some(folder) => {
            let bytes = cache_block_bytes(args, &configs);
            Some(Disk::start(folder, bytes, limits.spill_slots, metrics.clone())?)
        }
    };
    let (engine, ended) = Engine::start(
        executor,
        speculation,
        disk,
        model.vocabulary.clone(),
        limits,
        metrics.clone(),
    )
    .map_err(thread)?;
    let eos = model.generation.eos.clone();
    let forms = Forms::new(model.vocabulary.clone(), model.config.vocab_size, eos);
    let most = if args.enable_lora { args.max_loras as usize } else { 0 };
    let adapters = Adapters::new(&model.config, &names, most, args.max_lora_rank as usize);
    for LoraModule { name, path, .. } in &args.lora_modules {
        adapters.load(name, path).map_err(|error| match error {
            AdapterError::Model(error) => ServeError::Model(error),
            other => ServeError::Arguments(format!("--lora-modules: {other}")),
        })?;
    }
    if args.enable_lora {
        metrics.enable_adapters(most);
    }
    let served = Served {
        adapters,
        adapter_updates: args.adapter_updates(),
        names,
        max_model_len,
        config: model.config,
        vocabulary: model.vocabulary,
        chat_template: model.chat_template,
        generation: model.generation,
        engine,
        forms,
        metrics,
        responses: ResponseStore::default(),
        created: http::unix_seconds(),
    };
    Ok((served, ended))
}

/// What computes the model: the GPU, in a build for it and where the pod has one; else the kernels.
fn executor(
    args: &ServeArgs,
    model: &LoadedModel,
    limits: &Limits,
    positions: usize,
) -> Result<Box<dyn Forward>, ServeError> {
    let (config, weights, dtype) = (&model.config, &*model.weights, args.kv_cache_dtype.kernel());
    let (size, blocks) = (limits.block_tokens, limits.blocks);
    #[cfg(feature = "cuda")]
    if Path::new("/dev/nvidiactl").exists() {
        if args.enable_lora {
            let message = "adapters (--enable-lora) are not computed on a GPU yet: merge the adapter into the model";
            return Err(ServeError::Arguments(message.to_owned()));
        }
        let device = candle_core::Device::new_cuda(0).map_err(|error| ServeError::Device(error.to_string()))?;
        let executor = CandleExecutor::new(&device, config, weights, dtype, size, blocks, positions)?;
        return Ok(Box::new(executor));
    }
    let executor = Executor::new(config, weights, Precision::Stored, dtype, size, blocks, positions)?;
    Ok(Box::new(executor))
}

/// The model that guesses, if there is one: it must know exactly the tokens of the one that is served.
fn draft_model(args: &ServeArgs, model: &LoadedModel) -> Result<Option<LoadedModel>, ServeError> {
    let Some(Speculation::DraftModel { model: path, .. }) = &args.speculative_config else {
        return Ok(None);
    };
    let draft = LoadedModel::open(path)?;
    let wrong = |what: String| {
        let path = path.display();
        ServeError::Arguments(format!(
            "{path} cannot draft for {}: {what}; use a model of the same family, or method ngram",
            args.model.display()
        ))
    };
    let (small, large) = (draft.config.vocab_size, model.config.vocab_size);
    let differs = |id: &u32| draft.vocabulary.token_text(*id) != model.vocabulary.token_text(*id);
    if small != large || draft.vocabulary.size() != model.vocabulary.size() {
        return Err(wrong(format!("it has {small} tokens and not {large}")));
    }
    if let Some(id) = (0..model.vocabulary.size() as u32).find(differs) {
        return Err(wrong(format!("token {id} is not the same text in both")));
    }
    let needed = args.max_model_len.unwrap_or(model.config.max_positions);
    if draft.config.max_positions < needed {
        return Err(wrong(format!(
            "it has {} positions, fewer than the {needed} of --max-model-len",
            draft.config.max_positions
        )));
    }
    Ok(Some(draft))
}

/// The name of the file or folder without what says only that it is a model.
fn default_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().map_or_else(
        || "model".to_owned(),
        |name| name.to_string_lossy().trim_end_matches(".gguf").to_owned(),
    )
}

/// Bytes that a block takes in the caches of all models.
fn cache_block_bytes(args: &ServeArgs, configs: &[&ModelConfig]) -> usize {
    let (block_tokens, dtype) = (args.block_size as usize, args.kv_cache_dtype.kernel());
    let of = |config: &&ModelConfig| block_bytes(config, block_tokens, dtype);
    configs.iter().map(of).sum()
}

/// How many blocks the cache has, for the served model, which comes first, and whatever runs beside it. `memory` is what the
/// container may use.
fn limits(args: &ServeArgs, configs: &[&ModelConfig], memory: Option<u64>) -> Result<Limits, ServeError> {
    let block_tokens = args.block_size as usize;
    let block = cache_block_bytes(args, configs);
    let per_sequence = args
        .max_model_len
        .unwrap_or(configs[0].max_positions)
        .div_ceil(block_tokens);
    let bytes = match args.kv_cache_memory_bytes {
        Some(bytes) => bytes,
        None => {
            let all = (per_sequence * args.max_num_seqs as usize) as u64 * block as u64;
            memory.map_or(all, |memory| all.min(memory / 4))
        }
    };
    let blocks_of = |option: &str, bytes: u64| match bytes / block as u64 {
        0 => Err(ServeError::Arguments(format!(
            "{option} {bytes} holds no block of {block} bytes; give it at least that"
        ))),
        blocks => Ok(usize::try_from(blocks).unwrap_or(usize::MAX).min(u32::MAX as usize)),
    };
    let spilled = args.kv_spill_bytes.map(|bytes| blocks_of("--kv-spill-bytes", bytes));
    Ok(Limits {
        max_sequences: args.max_num_seqs as usize,
        max_batched_tokens: args.max_num_batched_tokens as usize,
        max_waiting: args.max_num_waiting as usize,
        block_tokens,
        blocks: blocks_of("--kv-cache-memory-bytes", bytes)?,
        prefix_caching: args.enable_prefix_caching,
        spill_slots: spilled.transpose()?.unwrap_or(0),
    })
}

fn max_model_len(args: &ServeArgs, config: &ModelConfig, limits: &Limits) -> Result<usize, ServeError> {
    let holds = limits.blocks * limits.block_tokens;
    match args.max_model_len {
        None => Ok(config.max_positions.min(holds)),
        Some(len) if len == 0 || len > config.max_positions => Err(ServeError::Arguments(format!(
            "--max-model-len {len} is not possible: the model has {} positions",
            config.max_positions
        ))),
        Some(len) if len > holds => Err(ServeError::Arguments(format!(
            "the cache holds {holds} tokens, less than --max-model-len {len}; raise --kv-cache-memory-bytes or lower --max-model-len"
        ))),
        Some(len) => Ok(len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use strata_model::synthetic::tiny_config;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn args(more: &str) -> ServeArgs {
        Cli::parse_from(format!("serve --model m {more}").split_whitespace()).serve
    }

    #[test]
    fn the_cache_is_sized_from_the_arguments_or_the_memory() {
        // tiny: 2 layers × 2 × 2 heads × 16 × 2 bytes = 256 bytes a token, 4096 a block; 256 positions.
        let config = tiny_config();
        for (more, memory, blocks, len) in [
            ("", None, 32 * 16, Ok(256)),
            ("--max-num-seqs 2", None, 32, Ok(256)),
            ("", Some(4096 * 40), 10, Ok(160)),
            ("--kv-cache-memory-bytes 20480", Some(1), 5, Ok(80)),
            ("--kv-cache-memory-bytes 20480 --max-model-len 80", None, 5, Ok(80)),
            (
                "--kv-cache-memory-bytes 20480 --max-model-len 81",
                None,
                5,
                Err("raise --kv-cache-memory-bytes"),
            ),
            ("--max-model-len 257", None, 32 * 17, Err("the model has 256 positions")),
            ("--kv-cache-dtype f32 --max-num-seqs 1", None, 16, Ok(256)),
            // 16 bytes and a scale of 2 for each of the 8 heads of a token: 144 bytes, 2304 a block.
            ("--kv-cache-dtype q8", Some(2304 * 40), 10, Ok(160)),
        ] {
            let args = args(more);
            let limits = limits(&args, &[&config], memory).unwrap();
            assert_eq!(limits.blocks, blocks, "{more}");
            match (max_model_len(&args, &config, &limits), len) {
                (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{more}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{more}: {error}"),
                (got, _) => panic!("{more}: {got:?}"),
            }
        }
        assert!(limits(&args("--kv-cache-memory-bytes 100"), &[&config], None).is_err());
        let spill = |bytes: u64| format!("--enable-prefix-caching --kv-spill-dir d --kv-spill-bytes {bytes}");
        let slots = |bytes: u64| limits(&args(&spill(bytes)), &[&config], None).map(|limits| limits.spill_slots);
        assert_eq!(slots(4096 * 7 + 4095).ok(), Some(7));
        let error = slots(4095).unwrap_err().to_string();
        assert!(
            error.contains("--kv-spill-bytes 4095 holds no block of 4096"),
            "{error}"
        );
    }

    #[test]
    fn spilling_needs_a_folder_a_size_and_the_prefix_cache() {
        for (more, missing) in [
            ("--kv-spill-dir d --enable-prefix-caching", "--kv-spill-bytes"),
            ("--kv-spill-bytes 1 --enable-prefix-caching", "--kv-spill-dir"),
            ("--kv-spill-dir d --kv-spill-bytes 1", "--enable-prefix-caching"),
        ] {
            let parsed = Cli::try_parse_from(format!("serve --model m {more}").split_whitespace());
            let error = parsed.err().expect("it is refused").to_string();
            assert!(error.contains("required") && error.contains(missing), "{more}: {error}");
        }
    }
}
