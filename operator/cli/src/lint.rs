//! `strata lint`: manifests judged offline, with the server's words.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use clap::ValueEnum;
use serde::Serialize;
use strata_lint::{Finding, INPUT_LIMIT_BYTES, Severity, lint};

use crate::input;

/// What to judge, and how to say it.
#[derive(clap::Args)]
pub struct Arguments {
    /// File, folder (its .yaml, .yml and .json files, at any depth) or - for standard input; can be repeated.
    #[arg(short = 'f', long = "filename", required = true)]
    files: Vec<PathBuf>,
    /// How findings are written.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A line for each finding.
    Text,
    /// One JSON list.
    Json,
}

/// A finding and the file that it is about.
#[derive(Serialize)]
struct Located<'a> {
    file: &'a str,
    #[serde(flatten)]
    finding: &'a Finding,
}

/// Exit status 0 if the server would accept all, 1 if it would refuse any, 2 if a file cannot be read.
pub fn run(arguments: &Arguments) -> ExitCode {
    match judge(&arguments.files, arguments.output, &mut io::stdout().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let _ = writeln!(io::stderr(), "strata: {error}");
            ExitCode::from(2)
        }
    }
}

/// Judges `files` and writes what there is to say; whether the server would accept all of them.
fn judge(files: &[PathBuf], output: Output, out: &mut impl Write) -> io::Result<bool> {
    let mut judged = Vec::new();
    for file in files {
        for file in expand(file)? {
            let text = input::read(&file, INPUT_LIMIT_BYTES as u64)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.display())))?;
            judged.push((file.display().to_string(), lint(&text)));
        }
    }
    let all: Vec<Located> = judged
        .iter()
        .flat_map(|(file, findings)| findings.iter().map(|finding| Located { file, finding }))
        .collect();
    match output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?,
        Output::Text => {
            for Located { file, finding } in &all {
                writeln!(out, "{file}:{finding}")?;
            }
        }
    }
    Ok(all.iter().all(|located| located.finding.severity == Severity::Note))
}

/// The files that `path` stands for.
fn expand(path: &Path) -> io::Result<Vec<PathBuf>> {
    if path == Path::new("-") || !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut entries = fs::read_dir(path)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort();
    let mut files = Vec::new();
    for entry in entries {
        let manifest = entry.extension().and_then(|extension| extension.to_str());
        // A link could lead in a circle.
        if entry.is_dir() && !entry.is_symlink() {
            files.extend(expand(&entry)?);
        } else if matches!(manifest, Some("yaml" | "yml" | "json")) {
            files.push(entry);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_judged_and_the_verdict_is_the_exit_status() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let good = "apiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: a}\nspec: {model: {uri: pvc://raw/m.gguf}}\n";
        fs::create_dir(folder.path().join("sub")).expect("a folder");
        fs::write(folder.path().join("sub/good.yaml"), good).expect("a file");
        fs::write(folder.path().join("README.md"), "not a manifest").expect("a file");
        let files = [folder.path().to_owned()];
        let mut out = Vec::new();
        assert!(judge(&files, Output::Text, &mut out).expect("readable"));
        assert!(out.is_empty());

        fs::write(folder.path().join("bad.yml"), good.replace("uri", "url")).expect("a file");
        assert!(!judge(&files, Output::Json, &mut out).expect("readable"));
        let findings: serde_json::Value = serde_json::from_slice(&out).expect("JSON");
        assert_eq!(findings[0]["object"], "InferenceService/a");
        assert!(
            findings[0]["file"]
                .as_str()
                .is_some_and(|file| file.ends_with("bad.yml"))
        );
    }
}
