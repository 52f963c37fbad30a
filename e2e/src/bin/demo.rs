//! `demo`: one real model's whole life on a real cluster. `make demo` and `make demo-down` run it.

use std::process::ExitCode;

use clap::Parser;
use strata_e2e::bed::command;
use strata_e2e::demo::{self, Cluster};

/// One real model's whole life on a real cluster.
#[derive(Parser)]
struct Arguments {
    /// Empty: a cluster on this machine. `current`: that of the current kubectl context.
    #[arg(long, default_value = "")]
    cluster: String,
    /// With `--cluster current`: where the images go that it pulls.
    #[arg(long, default_value = "")]
    registry: String,
    /// With `--cluster current`: the class of the claims; ReadWriteMany where there are several nodes.
    #[arg(long, default_value = "")]
    storage_class: String,
    /// Remove all that the demo made, instead.
    #[arg(long)]
    down: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match Cluster::from_names(&arguments.cluster, &arguments.registry, &arguments.storage_class) {
        Ok(cluster) if arguments.down => demo::down(&cluster).await,
        Ok(cluster) => demo::run(&cluster).await,
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::say(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
