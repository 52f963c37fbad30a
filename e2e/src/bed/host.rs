//! What beds change on the machine itself: noted by the first that comes up, undone when the last is down.
//!
//! A bed's namespaces hold nearly all of it. Two things they cannot hold: the kubelet's kernel settings, of which the
//! machine has one each, and the folders that a bed mounts something on, which must exist outside too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::bed::cache;
use crate::bed::slot::Slot;

/// What the kubelet sets, below `/proc/sys`.
const SETTINGS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// How the machine was.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Before {
    /// Folders that were not there.
    missing: Vec<PathBuf>,
    settings: BTreeMap<String, String>,
}

/// Makes those of `folders` that are missing, and notes how the machine was. The caller's bed has its state folder.
///
/// # Errors
/// A folder cannot be made, or the note not be written.
pub fn prepare(folders: &[&Path]) -> Result<()> {
    let _alone = cache::lock("host")?;
    let mut before = read().unwrap_or_else(|| Before {
        missing: Vec::new(),
        settings: SETTINGS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), fs::read_to_string(setting(name)).ok()?)))
            .collect(),
    });
    for folder in folders.iter().filter(|folder| !folder.exists()) {
        fs::create_dir_all(folder)?;
        before.missing.push(folder.to_path_buf());
    }
    Ok(fs::write(note(), serde_json::to_vec_pretty(&before)?)?)
}

/// Brings the machine back to what [`prepare`] noted, unless a bed is left. What does not let itself be undone is left:
/// a folder that something was put into, a setting of a machine that allows no writing.
///
/// # Errors
/// The note cannot be removed.
pub fn restore() -> Result<()> {
    let _alone = cache::lock("host")?;
    // Removing a folder would unmount it in the bed that uses it.
    if Slot::all().any(|slot| slot.state().exists()) {
        return Ok(());
    }
    let Some(before) = read() else { return Ok(()) };
    for folder in before.missing {
        let _ = fs::remove_dir(folder);
    }
    for (name, value) in before.settings {
        let _ = fs::write(setting(&name), value);
    }
    Ok(fs::remove_file(note())?)
}

fn read() -> Option<Before> {
    serde_json::from_slice(&fs::read(note()).ok()?).ok()
}

fn note() -> PathBuf {
    cache::root().join("bed/host.json")
}

fn setting(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}
