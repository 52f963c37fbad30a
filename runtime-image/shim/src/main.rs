//! `strata-shim`: carries out a stage with a program of the user's image, from inside of that image.
//!
//! ```text
//! init container, Strata's image:   strata-shim inject /strata/shim      copies itself, with its libraries
//! container, the user's image:      strata-shim run -- PROGRAM ARGUMENTS
//!
//!   published before? ──▶ that report
//!     └ no ──▶ inputs verified and linked ──▶ PROGRAM ──▶ exit 0 ──▶ files hashed, gates judged, manifest ──▶ report
//!                                                └──▶ else ──▶ report of the failure
//! ```
//!
//! So the author of an image needs to know folders and exit statuses, and nothing of hashes, manifests and reports; and an
//! image cannot publish by halves. docs/stage-contract.md is the author's page.

mod child;
mod inject;
mod locate;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use strata_contract::EXCHANGE_DIR;
use strata_harness::{CommonArguments, StageArguments};

/// Runs a program of another image under Strata's stage contract.
#[derive(Parser)]
#[command(name = "strata-shim", version)]
struct Arguments {
    #[command(flatten)]
    common: CommonArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Copies this program and the libraries that it needs into a folder, from which it starts in any image.
    Inject {
        /// The folder.
        folder: PathBuf,
    },
    /// Carries out the stage with a program.
    Run {
        #[command(flatten)]
        stage: StageArguments,
        /// Folder of what program and shim hand each other.
        #[arg(long, default_value = EXCHANGE_DIR)]
        exchange: PathBuf,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
    /// Checks that a model is there as it was published, and makes a link to its files.
    Locate(locate::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    strata_harness::log(&arguments.common.log_format);
    let volumes = arguments.common.volumes;
    let code = match arguments.command {
        Command::Inject { folder } => inject::run(&folder),
        Command::Run {
            stage,
            exchange,
            program,
        } => strata_harness::run("container", stage, volumes, |config, context| {
            stage::run(config, context, &exchange, &program)
        }),
        Command::Locate(arguments) => locate::run(&arguments, &volumes),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
