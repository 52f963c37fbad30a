//! How results are written: text for people, JSON for programs. Both go to standard output, everything else to standard error.

use std::io::{self, Write as _};

use anyhow::Result;
use serde::Serialize;

/// How results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Writes `value`.
pub fn write<T: Serialize>(format: Format, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    match format {
        Format::Text => print(&text(value)),
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(value)?)),
    }
}

/// Writes a piece of text at once, so that what is streamed is seen.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Tells the person who waits what is waited for.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "strata: {text}");
}

/// Whether `error` is only that the reader of the output went away, as `head` does.
pub fn is_closed(error: &anyhow::Error) -> bool {
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    error.chain().any(closed)
}

/// Columns of the terminal; none where standard output is none. Asked at each draw: a person may change it.
pub fn columns() -> Option<usize> {
    // SAFETY: a zeroed winsize is a valid value for the kernel to fill, and it outlives the call.
    unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        let known = libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) == 0 && size.ws_col > 0;
        known.then_some(usize::from(size.ws_col))
    }
}
