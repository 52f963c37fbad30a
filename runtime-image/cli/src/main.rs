//! One binary, one subcommand per stage: parse arguments, run, turn the result into an exit status.
//!
//! A stage runs anywhere, without Kubernetes: `strata-runtime pretrain --config stage.json`. In a pod, the operator
//! names the configuration in `STRATA_CONFIG` and reads the report from the termination message.

mod copy;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use strata_contract::{FailureReason, Stage};
use strata_harness::{CommonArguments, StageArguments};
use strata_stage::StageError;

/// The stages of a language model's life, each as a subcommand.
#[derive(Parser)]
#[command(name = "strata-runtime", version)]
struct Arguments {
    #[command(flatten)]
    common: CommonArguments,
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    strata_harness::log(&arguments.common.log_format);
    let volumes = arguments.common.volumes;
    let code = match arguments.command {
        Command::Curate(stage) => stage_of("curate", stage, volumes),
        Command::Pretrain(stage) => stage_of("pretrain", stage, volumes),
        Command::Align(stage) => stage_of("align", stage, volumes),
        Command::Quantize(stage) => stage_of("quantize", stage, volumes),
        Command::Serve(arguments) => serve::run(*arguments, &volumes),
        Command::Copy(arguments) => copy::run(&arguments),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Runs the stage that the configuration holds, which must be `command`.
fn stage_of(command: &'static str, arguments: StageArguments, volumes: PathBuf) -> i32 {
    strata_harness::run(command, arguments, volumes, |config, context| {
        if config.stage.command() != command {
            let message = format!(
                "the configuration is for stage {:?}, not {command:?}",
                config.stage.command()
            );
            return Err(StageError::new(FailureReason::ConfigInvalid, message));
        }
        match &config.stage {
            Stage::Curate(config) => strata_curate::run(config, context),
            Stage::Pretrain(config) => strata_pretrain::run(config, context),
            Stage::Align(config) => strata_align::run(config, context),
            Stage::Quantize(config) => strata_quantize::run(config, context),
        }
    })
}
