//! `bed`: a real one-node Kubernetes on this machine, for the demo, the tests and trials.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use strata_e2e::bed::slot::Slot;
use strata_e2e::bed::{Bed, command, go, supervise};
use strata_e2e::image::catalog;

#[derive(Parser)]
#[command(about = "A real one-node Kubernetes on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs Debian packages and compiles the Go programs that are missing.
    Build {
        /// Also what only the tests run: helm, kubeconform and the like.
        #[arg(long)]
        tools: bool,
        /// Also Kueue and JobSet.
        #[arg(long)]
        queues: bool,
        /// Also Argo CD.
        #[arg(long)]
        argo_cd: bool,
    },
    /// Starts a bed; one that runs and is healthy is left alone.
    Up(Where),
    /// Ends a bed and removes all its files.
    Down(Where),
    /// Builds Strata's images and gives them to a running bed.
    Images(Where),
    /// Fetches the model of the samples, which tests of the runtime read too, and prints where it is.
    Model,
    /// Sends Strata's images to a registry.
    Push {
        /// Host and path, as `registry.example.org/team`.
        #[arg(long)]
        registry: String,
    },
    /// Prints what a shell needs to use a bed: `eval "$(bed env --slot 2)"`.
    Env(Where),
    /// The first process of a bed; `up` starts it.
    #[command(hide = true)]
    Supervise { plan: PathBuf },
}

#[derive(clap::Args)]
struct Where {
    /// Which of the beds of this machine: 0 is the demo's, 1 the tests', 2 to 9 are free.
    #[arg(long, default_value = "0")]
    slot: Slot,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::say(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    // The first process of a bed waits for children in plain loops: no threads, no runtime.
    if let Command::Supervise { plan } = command {
        return supervise::run(&plan);
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(async {
            match command {
                Command::Build { tools, queues, argo_cd } => {
                    Bed::build()?;
                    if tools {
                        go::build(&go::TOOLS)?;
                    }
                    if queues {
                        go::build(&go::QUEUES)?;
                    }
                    if argo_cd { go::build(&go::ARGO_CD) } else { Ok(()) }
                }
                Command::Up(at) => Bed::new(at.slot).up().await,
                Command::Down(at) => Bed::new(at.slot).down(),
                Command::Images(at) => Bed::new(at.slot).import(&catalog::STRATA).map(drop),
                Command::Model => {
                    print_model(&catalog::model()?);
                    Ok(())
                }
                Command::Push { registry } => catalog::push(&registry).map(drop),
                Command::Env(at) => {
                    print_environment(&Bed::new(at.slot));
                    Ok(())
                }
                Command::Supervise { .. } => unreachable!("handled above"),
            }
        })
}

#[allow(clippy::print_stdout, reason = "the shell evaluates what this prints")]
fn print_environment(bed: &Bed) {
    println!("export KUBECONFIG={}", bed.kubeconfig().display());
    println!("export STRATA_E2E={}", bed.slot());
    println!("export PATH={}:$PATH", kubectl_folder().display());
}

#[allow(clippy::print_stdout, reason = "a script reads what this prints")]
fn print_model(path: &Path) {
    println!("{}", path.display());
}

fn kubectl_folder() -> PathBuf {
    let mut path = go::path(go::Program::Kubectl);
    path.pop();
    path
}
