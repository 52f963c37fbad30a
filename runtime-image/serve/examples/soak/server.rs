//! The server under test: a process of its own, so that its memory is its own; and the adapters that it is given.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, tiny_config, weights};
use strata_model::{Dtype, GenerationConfig, ModelConfig, hf};
use tokio::process::{Child, Command};

use crate::{Failure, peft};

const START: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// Far fewer blocks than the running requests ask for, so that some lose theirs; a queue and a disk that overflow.
const FLAGS: &str = "--max-num-seqs 16 --max-num-batched-tokens 256 --max-num-waiting 24 --kv-cache-memory-bytes 500000 \
                     --enable-prefix-caching --body-timeout 2 --shutdown-delay 0 --enable-lora --enable-lora-updates --max-loras 3";
/// Adapters to swap: more than the server takes at once.
const ADAPTERS: usize = 5;

pub(crate) struct Server {
    child: Child,
    url: String,
    client: reqwest::Client,
    _model: tempfile::TempDir,
    adapters: Vec<tempfile::TempDir>,
}

/// What the server says of itself when nobody asks anything of it any more.
pub(crate) struct Idle {
    /// Share of the cache's blocks that still belong to somebody.
    pub(crate) lost_blocks_share: f64,
    pub(crate) generated_tokens: f64,
    pub(crate) preemptions: f64,
}

impl Server {
    pub(crate) async fn start(program: &Path) -> Result<Server, Failure> {
        let folder = tempfile::tempdir()?;
        let config = ModelConfig {
            max_positions: 1024,
            ..tiny_config()
        };
        let generation = GenerationConfig {
            eos: config.eos.clone(),
            ..GenerationConfig::default()
        };
        let files = hf::Folder {
            config: &config,
            weights: &weights(&config, 11),
            dtype: Dtype::F32,
            tokenizer_json: &byte_tokenizer(),
            chat_template: Some(CHAT_TEMPLATE),
            generation: &generation,
        };
        hf::write(folder.path(), &files)?;
        let adapters: Vec<tempfile::TempDir> = (0..ADAPTERS)
            .map(|_| Ok(tempfile::tempdir()?))
            .collect::<Result<_, Failure>>()?;
        for (seed, folder) in adapters.iter().enumerate() {
            peft::write(folder.path(), &config, seed as u64 + 1, 4, "all");
        }
        // Freed at once; nobody else takes it in the meantime on a machine that is not full of servers.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new(program)
            .args(["serve", "--host", "127.0.0.1", "--port", &port.to_string()])
            .args(["--served-model-name", "tiny", "--report", "/dev/null", "--model"])
            .arg(folder.path())
            .args(FLAGS.split_whitespace())
            .args(["--kv-spill-bytes", "4000000", "--kv-spill-dir"])
            .arg(folder.path())
            .stdout(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut server = Server {
            child,
            url: format!("http://127.0.0.1:{port}"),
            client: reqwest::Client::new(),
            _model: folder,
            adapters,
        };
        let deadline = Instant::now() + START;
        loop {
            let answer = server.client.get(format!("{}/ready", server.url)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(server);
            }
            if let Some(status) = server.ended()? {
                return Err(format!("the server ended with {status} at its start").into());
            }
            if Instant::now() > deadline {
                return Err("the server did not become ready".into());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Folders of the adapters.
    pub(crate) fn adapters(&self) -> Vec<PathBuf> {
        self.adapters.iter().map(|folder| folder.path().to_owned()).collect()
    }

    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>, Failure> {
        Ok(self.child.try_wait()?)
    }

    pub(crate) fn resident_bytes(&self) -> Result<f64, Failure> {
        let id = self.child.id().ok_or("the server has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes: f64 = line
            .and_then(|line| line.trim().strip_suffix("kB"))
            .ok_or("no VmRSS")?
            .trim()
            .parse()?;
        Ok(kilobytes * 1024.0)
    }

    /// Waits until nothing runs or waits, and returns what is still in use then.
    pub(crate) async fn until_idle(&self, within: Duration) -> Result<Idle, Failure> {
        let deadline = Instant::now() + within;
        loop {
            let text = self
                .client
                .get(format!("{}/metrics", self.url))
                .send()
                .await?
                .text()
                .await?;
            let metric = |name: &str| -> Result<f64, Failure> {
                let line = text.lines().find(|line| line.starts_with(&format!("vllm:{name}{{")));
                let value = line
                    .and_then(|line| line.rsplit(' ').next())
                    .ok_or_else(|| format!("no metric {name}"))?;
                Ok(value.parse()?)
            };
            let idle = Idle {
                lost_blocks_share: metric("kv_cache_usage_perc")?,
                generated_tokens: metric("generation_tokens_total")?,
                preemptions: metric("num_preemptions_total")?,
            };
            let busy = metric("num_requests_running")? + metric("num_requests_waiting")?;
            // What is not given back by the deadline is lost.
            if (busy == 0.0 && idle.lost_blocks_share == 0.0) || Instant::now() > deadline {
                return Ok(idle);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Asks it to end, as Kubernetes does.
    pub(crate) async fn stop(mut self, within: Duration) -> Result<ExitStatus, Failure> {
        let id = self.child.id().ok_or("the server has ended")?;
        Command::new("kill").arg(id.to_string()).status().await?;
        Ok(tokio::time::timeout(within, self.child.wait())
            .await
            .map_err(|_| "the server did not end at SIGTERM")??)
    }
}
