//! `strata`: what a user runs beside kubectl, each subcommand a file.

mod lint;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tools for Strata's resources.
#[derive(Parser)]
#[command(name = "strata", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Judges manifests as the API server would, without one. Exits 1 if it would refuse any, 2 if one cannot be read.
    Lint(lint::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Lint(arguments) => lint::run(&arguments),
    }
}
