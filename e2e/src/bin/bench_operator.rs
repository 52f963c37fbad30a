//! `bench-operator`: ten thousand resources on a thousand nodes that are not there. `make bench-operator` runs it.

use std::process::ExitCode;

use clap::Parser;
use strata_e2e::bed::command;
use strata_e2e::bed::slot::Slot;
use strata_e2e::bench::{Size, run};

/// How the operator does with many resources, beside Kubernetes' own Job controller.
#[derive(Parser)]
struct Arguments {
    /// Which bed to use. What runs in it is taken down.
    #[arg(long)]
    slot: Slot,
    /// Resources, a quarter of each kind.
    #[arg(long, default_value_t = 10_000)]
    resources: usize,
    /// Nodes.
    #[arg(long, default_value_t = 1_000)]
    nodes: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { slot, resources, nodes } = Arguments::parse();
    match run(slot, Size { resources, nodes }).await {
        Ok(text) => {
            print(&text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            command::say(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stdout, reason = "the last line is read by a program")]
fn print(text: &str) {
    println!("{text}");
}
