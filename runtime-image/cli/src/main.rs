//! One binary, one subcommand per stage: parse arguments, run, turn the result into an exit status.
//!
//! A stage runs anywhere, without Kubernetes: `strata-runtime pretrain --config stage.json`. In a pod, the operator
//! names the configuration in `STRATA_CONFIG` and reads the report from the termination message.

mod copy;
mod harness;
mod monitor;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use strata_contract::{CONFIG_ENV, VOLUMES_DIR, VOLUMES_ENV};

/// The stages of a language model's life, each as a subcommand.
#[derive(Parser)]
#[command(name = "strata-runtime", version)]
struct Arguments {
    /// How log lines are written.
    #[arg(long, global = true, default_value = "text", value_parser = ["text", "json"])]
    log_format: String,
    /// Folder under which a `pvc://CLAIM/…` URI finds its claim.
    #[arg(long, global = true, env = VOLUMES_ENV, default_value = VOLUMES_DIR)]
    volumes: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Raw sources to a published data set.
    Curate(StageArguments),
    /// Token files to a model.
    Pretrain(StageArguments),
    /// A model and preferences to an aligned model.
    Align(StageArguments),
    /// A model to the file that is served, judged again.
    Quantize(StageArguments),
    /// Serves a model with the OpenAI API.
    Serve(Box<serve::Arguments>),
    /// Copies a folder of files that are not there yet, each atomically.
    Copy(copy::Arguments),
}

/// What a stage is started with.
#[derive(clap::Args)]
struct StageArguments {
    /// The configuration: JSON as in docs/reference/contract.schema.json.
    #[arg(long, env = CONFIG_ENV)]
    config: PathBuf,
    /// Where the report is written when the stage ends.
    #[arg(long, default_value = "/dev/termination-log")]
    report: PathBuf,
    /// Unique id of this attempt; names its output folder.
    #[arg(long, env = strata_contract::ATTEMPT_ENV, default_value = "local")]
    attempt_id: String,
    /// Address of /metrics and /progress; `none` serves nothing.
    #[arg(long, default_value = "0.0.0.0:9090")]
    monitor: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match arguments.log_format.as_str() {
        "json" => logs.json().init(),
        _ => logs.with_ansi(false).init(),
    }
    let volumes = arguments.volumes;
    let code = match arguments.command {
        Command::Curate(stage) => harness::run("curate", stage, volumes),
        Command::Pretrain(stage) => harness::run("pretrain", stage, volumes),
        Command::Align(stage) => harness::run("align", stage, volumes),
        Command::Quantize(stage) => harness::run("quantize", stage, volumes),
        Command::Serve(arguments) => serve::run(*arguments, &volumes),
        Command::Copy(arguments) => copy::run(&arguments),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
