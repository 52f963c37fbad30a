//! What every program that carries out a stage has around it: the same arguments, the same logs, `/progress` and `/metrics`,
//! the signal to stop, the look for a result of before, the report. `strata-runtime` and `strata-shim` stand on it.

mod monitor;
mod run;

use std::path::PathBuf;

use strata_contract::{ATTEMPT_ENV, CONFIG_ENV, VOLUMES_DIR, VOLUMES_ENV};

pub use run::run;

/// What every subcommand is started with.
#[derive(clap::Args, Debug)]
pub struct CommonArguments {
    /// How log lines are written.
    #[arg(long, global = true, default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,
    /// Folder under which a `pvc://CLAIM/…` URI finds its claim.
    #[arg(long, global = true, env = VOLUMES_ENV, default_value = VOLUMES_DIR)]
    pub volumes: PathBuf,
}

/// What a stage is started with.
#[derive(clap::Args, Debug)]
pub struct StageArguments {
    /// The configuration: JSON as in docs/reference/contract.schema.json.
    #[arg(long, env = CONFIG_ENV)]
    pub config: PathBuf,
    /// Where the report is written when the stage ends.
    #[arg(long, default_value = "/dev/termination-log")]
    pub report: PathBuf,
    /// Unique id of this attempt; names its output folder.
    #[arg(long, env = ATTEMPT_ENV, default_value = "local")]
    pub attempt_id: String,
    /// Address of /metrics and /progress; `none` serves nothing.
    #[arg(long, default_value = "0.0.0.0:9090")]
    pub monitor: String,
}

/// Log lines on standard output, as `format` says: `text` or `json`.
pub fn log(format: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match format {
        "json" => logs.json().init(),
        _ => logs.with_ansi(false).init(),
    }
}
