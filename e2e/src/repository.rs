//! Where the files of this repository are: looked up when a program runs, not when it was compiled, since checkouts
//! share one target folder, and a program that another one compiled would look there.

use std::path::PathBuf;

/// `path` in the repository around the working folder: cargo tests run in their crate, the Makefile at the root.
#[must_use]
pub fn path(path: &str) -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    let root = here.ancestors().find(|folder| folder.join("charts/strata").is_dir());
    root.unwrap_or(&here).join(path)
}
