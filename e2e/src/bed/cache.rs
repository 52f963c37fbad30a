//! Where things that outlive a bed are kept: programs by version, images, downloads.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};

/// `$STRATA_CACHE`, or `~/.cache/strata`.
#[must_use]
pub fn root() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/strata");
    std::env::var_os("STRATA_CACHE")
        .filter(|v| !v.is_empty())
        .map_or_else(home, PathBuf::from)
}

/// Holds `name` for this process until the guard is dropped; another one that wants it waits.
///
/// # Errors
/// The cache cannot be written.
pub fn lock(name: &str) -> Result<File> {
    let path = root().join(format!("{name}.lock"));
    let take = || {
        fs::create_dir_all(root())?;
        let file = File::create(&path)?;
        file.lock()?;
        Ok::<_, std::io::Error>(file)
    };
    take().with_context(|| format!("cannot lock {}", path.display()))
}

/// Compiled Go programs: `bin/NAME-VERSION`.
#[must_use]
pub fn programs() -> PathBuf {
    root().join("bin")
}

/// OCI image tars.
#[must_use]
pub fn images() -> PathBuf {
    root().join("images")
}

/// Files fetched from a package registry.
#[must_use]
pub fn models() -> PathBuf {
    root().join("models")
}
