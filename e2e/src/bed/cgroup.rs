//! The control group of a bed: both versions, made before the kubelet looks for it and removed when it has ended.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const ROOT: &str = "/sys/fs/cgroup";
/// What the kubelet wants to see below the root in version 2, as far as the machine has it.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Makes the group `name` in every hierarchy of this machine.
///
/// # Errors
/// The control group file system is missing or read-only.
pub fn create(name: &str) -> Result<()> {
    let root = Path::new(ROOT);
    if let Ok(available) = fs::read_to_string(root.join("cgroup.controllers")) {
        let wanted: Vec<String> = available
            .split_whitespace()
            .filter(|controller| CONTROLLERS.contains(controller))
            .map(|controller| format!("+{controller}"))
            .collect();
        let enable = |folder: &Path| {
            fs::write(folder.join("cgroup.subtree_control"), wanted.join(" "))
                .with_context(|| format!("cannot switch on {} in {}", wanted.join(" "), folder.display()))
        };
        enable(root)?;
        fs::create_dir_all(root.join(name))?;
        return enable(&root.join(name));
    }
    for hierarchy in hierarchies().context("no control groups under /sys/fs/cgroup")? {
        let folder = hierarchy.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // A new cpuset has neither CPUs nor memory nodes, and nothing can run in it.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(all) = fs::read_to_string(hierarchy.join(file)) {
                fs::write(folder.join(file), all.trim())?;
            }
        }
    }
    Ok(())
}

/// Removes the group and what is left below it. The kernel may need a moment after the last process.
///
/// # Errors
/// Something is still in it.
pub fn remove(name: &str) -> Result<()> {
    let root = Path::new(ROOT);
    let mut folders = vec![root.join(name)];
    folders.extend(hierarchies().unwrap_or_default().into_iter().map(|h| h.join(name)));
    let end = Instant::now() + Duration::from_secs(5);
    for folder in folders.into_iter().filter(|f| f.exists()) {
        while let Err(error) = remove_tree(&folder) {
            if Instant::now() > end {
                return Err(error).with_context(|| format!("cannot remove {}", folder.display()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Version 1: a folder for each controller, and the hybrid setup's `unified` one; names that stand for the same folder appear once.
fn hierarchies() -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(ROOT)?
        .filter_map(|entry| fs::canonicalize(entry.ok()?.path()).ok())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// Groups are removed from the leaves up; the files in them go by themselves.
fn remove_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}
