//! `strata`: what a user runs beside kubectl, each subcommand a file. Under the name `kubectl-strata` it is a plugin of kubectl.

mod chat;
mod cluster;
mod completion;
mod input;
mod lineage;
mod lint;
mod logs;
mod output;
mod plan;
mod replay;
mod resource;
mod status;
mod tree;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

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
    /// Says what the operator would of hardware before anything starts: nodes, memory, price, or what would fit. Exits 1 if
    /// something fits nowhere, 2 if a file cannot be read.
    Plan(plan::Arguments),
    /// Shows the resources of a namespace as a tree: what waits for what, how far it is, what holds it up.
    Status(status::Arguments),
    /// Shows what an artifact was made from: each input by digest, back to the raw files.
    Lineage(lineage::Arguments),
    /// Shows the log of the pods that serve, or of the current attempt of the stage.
    Logs(logs::Arguments),
    /// Talks to an InferenceService, through the API server.
    Chat(chat::Arguments),
    /// Shows what the operator's scaling would have done with a recorded load.
    Replay(replay::Arguments),
    /// Prints what makes a shell, or kubectl, complete commands and names.
    Completion(completion::Arguments),
    /// The words that can follow, for kubectl.
    #[command(name = "__complete", hide = true)]
    Complete {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

fn main() -> ExitCode {
    let mut words = Arguments::command();
    if is_plugin() {
        // Help then says what was typed.
        words = words.bin_name("kubectl strata");
    }
    let matches = words.get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let outcome = match arguments.command {
        Command::Lint(arguments) => return lint::run(&arguments),
        Command::Plan(arguments) => return plan::run(&arguments),
        Command::Status(arguments) => run(status::run(arguments)),
        Command::Lineage(arguments) => run(lineage::run(arguments)),
        Command::Logs(arguments) => run(logs::run(arguments)),
        Command::Chat(arguments) => run(chat::run(arguments)),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Completion(arguments) => completion::run(&arguments, Arguments::command()),
        Command::Complete { words } => {
            let mut command = Arguments::command();
            command.build();
            run(completion::complete(&words, &command))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn is_plugin() -> bool {
    let path = std::env::args_os().next().map(std::path::PathBuf::from);
    path.is_some_and(|path| path.file_stem().is_some_and(|stem| stem == "kubectl-strata"))
}

/// Runs a command that talks to a cluster.
fn run(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(command);
    // A thread that waits for the next line of standard input waits for ever.
    runtime.shutdown_background();
    outcome
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    #[test]
    fn krew_gets_a_manifest_with_the_hash_of_the_archive() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("strata-linux-amd64.tar.gz");
        std::fs::write(&archive, "x\n").unwrap();
        let render = |archive: &Path| {
            let script = Path::new("../../config/krew/render");
            let words = ["v0.1.0", "https://example.org", "https://example.org/v0.1.0/"];
            let run = Command::new(script).args(words).arg(archive).output().unwrap();
            (run.status.success(), String::from_utf8(run.stdout).unwrap())
        };
        let (rendered, text) = render(&archive);
        let manifest: serde_json::Value = serde_yaml::from_str(&text).unwrap();
        assert!(rendered && manifest["spec"]["version"] == "v0.1.0", "{text}");
        let platform = &manifest["spec"]["platforms"][0];
        assert_eq!(platform["uri"], "https://example.org/v0.1.0/strata-linux-amd64.tar.gz");
        assert_eq!(
            platform["selector"]["matchLabels"],
            serde_json::json!({"os": "linux", "arch": "amd64"})
        );
        // printf 'x\n' | sha256sum
        let hash = "73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac";
        assert_eq!(platform["sha256"], hash);
        assert!(!render(&folder.path().join("strata.zip")).0);
    }
}
