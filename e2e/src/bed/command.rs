//! Running another program: what it printed becomes part of the error when it fails.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command` to its end and returns what it wrote to standard output.
///
/// # Errors
/// The program is missing or failed; the message holds its command line and the end of what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let run = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", line(command)))?;
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    if !run.status.success() {
        let said = format!("{text}{}", String::from_utf8_lossy(&run.stderr));
        bail!("{} failed ({}):\n{}", line(command), run.status, tail(&said, 30));
    }
    Ok(text)
}

/// As [`output`], with `input` on standard input.
///
/// # Errors
/// As [`output`].
pub fn output_with_input(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", line(command)))?;
    let mut stdin = child.stdin.take().expect("standard input was asked to be a pipe");
    // The programs fed this way read all input before they write more than a pipe holds.
    stdin
        .write_all(input.as_bytes())
        .with_context(|| format!("cannot write to {}", line(command)))?;
    drop(stdin);
    let run = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    if !run.status.success() {
        bail!(
            "{} failed ({}):\n{text}{}",
            line(command),
            run.status,
            String::from_utf8_lossy(&run.stderr)
        );
    }
    Ok(text)
}

/// The last `lines` lines of `text`.
#[must_use]
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The last `lines` lines of a file, or why there are none.
#[must_use]
pub fn tail_of_file(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => tail(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("({}: {error})", path.display()),
    }
}

/// Tells the person who waits what is being done.
pub fn say(message: impl std::fmt::Display) {
    eprintln!("bed: {message}");
}

fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}
