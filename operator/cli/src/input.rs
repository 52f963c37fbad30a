//! Files that a command is given: bounded, and - is standard input.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Reads a text. One that is too long is cut one byte beyond `limit_bytes`, by which its reader knows.
///
/// # Errors
/// It cannot be read, or is no UTF-8.
pub fn read(path: &Path, limit_bytes: u64) -> io::Result<String> {
    let limit = limit_bytes + 1;
    let mut text = String::new();
    match path == Path::new("-") {
        true => io::stdin().take(limit).read_to_string(&mut text)?,
        false => File::open(path)?.take(limit).read_to_string(&mut text)?,
    };
    Ok(text)
}
