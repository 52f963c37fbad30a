//! `strata completion`: what a shell completes. Shells complete `strata` by a script of clap's; kubectl asks a program called
//! `kubectl_complete-strata` for the words that could follow.

use std::io;
use std::time::Duration;

use anyhow::Result;
use clap::{Command, ValueEnum as _};
use clap_complete::Shell;

use crate::cluster::Cluster;
use crate::output;
use crate::resource;

/// Longest wait for the cluster: somebody has pressed a key.
const PATIENCE: Duration = Duration::from_secs(2);
/// kubectl (cobra) reads it as: these words only, no files.
const NO_FILES: &str = ":4";
/// As it: files, too.
const WITH_FILES: &str = ":0";

/// For kubectl: a program of this text, on the PATH, makes `kubectl strata <TAB>` work.
const KUBECTL: &str = "#!/bin/sh\nexec kubectl-strata __complete \"$@\"\n";

/// What there is a script for.
const SHELLS: [&str; 6] = ["bash", "elvish", "fish", "powershell", "zsh", "kubectl"];

/// Who completes.
#[derive(clap::Args)]
pub struct Arguments {
    /// A shell, for `strata`; or kubectl, for `kubectl strata`: save that one as kubectl_complete-strata on the PATH.
    #[arg(value_parser = SHELLS)]
    shell: String,
}

/// Prints the script.
pub fn run(arguments: &Arguments, mut command: Command) -> Result<()> {
    match Shell::from_str(&arguments.shell, true) {
        Ok(shell) => {
            clap_complete::generate(shell, &mut command, "strata", &mut io::stdout().lock());
            Ok(())
        }
        Err(_) => output::print(KUBECTL),
    }
}

/// Prints the words that can stand at the end of `words`, whose last is what was typed of it.
pub async fn complete(words: &[String], command: &Command) -> Result<()> {
    let names = match wants_resource(words, command) {
        true => names(words).await,
        false => Vec::new(),
    };
    let mut text = candidates(words, command, &names).join("\n");
    text.push_str(if text.is_empty() { "" } else { "\n" });
    let directive = if wants_file(words) { WITH_FILES } else { NO_FILES };
    output::print(&format!("{text}{directive}\n"))
}

/// The resources of the namespace that the line so far names; none where the cluster does not answer.
async fn names(words: &[String]) -> Vec<String> {
    let value = |long: &str, short: &str| {
        let at = words.iter().position(|word| word == long || word == short)?;
        words.get(at + 1).cloned()
    };
    let cluster = Cluster {
        namespace: value("--namespace", "-n"),
        context: value("--context", "--context"),
        kubeconfig: value("--kubeconfig", "--kubeconfig").map(Into::into),
    };
    let read = async {
        let connection = cluster.connect().await?;
        anyhow::Ok(resource::snapshot(&connection).await?.into_keys().collect::<Vec<_>>())
    };
    let Ok(Ok(all)) = tokio::time::timeout(PATIENCE, read).await else {
        return Vec::new();
    };
    let chat = words.first().is_some_and(|word| word == "chat");
    all.into_iter()
        .filter(|name| !chat || name.kind == strata_operator::engine::kind::ResourceKind::InferenceService)
        .map(|name| if chat { name.name } else { name.to_string() })
        .collect()
}

/// The subcommand of the line and what stands between it and the word that is completed.
fn split<'a>(words: &'a [String], command: &'a Command) -> Option<(&'a Command, &'a [String], &'a str)> {
    let (typed, before) = words.split_last()?;
    let (name, between) = before.split_first()?;
    Some((command.find_subcommand(name)?, between, typed))
}

fn wants_resource(words: &[String], command: &Command) -> bool {
    split(words, command).is_some_and(|(subcommand, between, typed)| {
        let named = subcommand
            .get_positionals()
            .any(|arg| matches!(arg.get_value_names(), Some([name]) if name == "KIND/NAME" || name == "NAME"));
        named && !typed.starts_with('-') && !takes_value(subcommand, between.last())
    })
}

fn wants_file(words: &[String]) -> bool {
    let before = words.len().checked_sub(2).and_then(|at| words.get(at));
    before.is_some_and(|word| {
        ["-f", "--filename", "--kubeconfig", "--certificate-authority", "--trace"].contains(&word.as_str())
    })
}

/// Whether `word` is an option that the next word belongs to.
fn takes_value(command: &Command, word: Option<&String>) -> bool {
    let Some(word) = word else { return false };
    command.get_opts().any(|option| {
        let long = option
            .get_long()
            .is_some_and(|long| word.strip_prefix("--") == Some(long));
        let short = option
            .get_short()
            .is_some_and(|short| word.strip_prefix('-') == Some(&short.to_string()));
        long || short
    })
}

/// What can follow: subcommands, then the resources `names` or the options of the subcommand.
fn candidates(words: &[String], command: &Command, names: &[String]) -> Vec<String> {
    let typed = words.last().map_or("", String::as_str);
    let all: Vec<String> = match split(words, command) {
        None if words.len() > 1 => Vec::new(),
        None => {
            let subcommands = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
            subcommands.map(|subcommand| subcommand.get_name().to_owned()).collect()
        }
        Some((subcommand, between, _)) if takes_value(subcommand, between.last()) => Vec::new(),
        Some((subcommand, ..)) if typed.starts_with('-') => {
            let longs = subcommand.get_arguments().filter_map(clap::Arg::get_long);
            longs.map(|long| format!("--{long}")).collect()
        }
        Some((subcommand, ..)) => match subcommand.get_name() {
            "completion" => SHELLS.map(str::to_owned).into(),
            _ => names.to_vec(),
        },
    };
    all.into_iter()
        .filter(|word| word.to_lowercase().starts_with(&typed.to_lowercase()))
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn kubectl_is_told_what_can_follow() {
        let mut command = crate::Arguments::command();
        command.build();
        let names = ["Dataset/plays".to_owned(), "InferenceService/chat".to_owned()];
        for (line, expected) in [
            (vec!["li"], vec!["lint", "lineage"]),
            (vec!["__com"], vec![]),
            (vec!["lineage", "inf"], vec!["InferenceService/chat"]),
            (vec!["logs", "--st"], vec!["--stage"]),
            (vec!["logs", "-n", ""], vec![]),
            (vec!["completion", "kub"], vec!["kubectl"]),
            (vec!["nothing", ""], vec![]),
        ] {
            let words: Vec<String> = line.iter().map(ToString::to_string).collect();
            let mut said = candidates(&words, &command, &names);
            said.sort_by_key(|word| expected.iter().position(|wanted| wanted == word));
            assert_eq!(said, expected, "{line:?}");
        }
        let asks = |line: &[&str]| wants_resource(&line.iter().map(ToString::to_string).collect::<Vec<_>>(), &command);
        assert!(asks(&["status", ""]) && asks(&["chat", "-n", "team", "a"]));
        assert!(!asks(&["status", "-n", ""]) && !asks(&["lint", ""]) && !asks(&["status", "--w"]));
    }
}
