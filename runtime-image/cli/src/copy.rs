//! `copy`: brings files that an image carries (sample data, a model) onto a volume, once.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use strata_contract::{EXIT_DONE, EXIT_RETRY};

/// Deepest folder that is copied: sample data is shallow, and a link in a circle must end.
const DEPTH_LIMIT: usize = 16;

/// What is copied where.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Folder to copy from.
    #[arg(long)]
    from: PathBuf,
    /// Folder to copy to; made if it is not there.
    #[arg(long)]
    to: PathBuf,
}

/// Copies; a file that is there as it should be is left alone, so that whoever reads it is not disturbed.
pub(crate) fn run(arguments: &Arguments) -> i32 {
    match copy_folder(&arguments.from, &arguments.to, DEPTH_LIMIT) {
        Ok(copied) => {
            tracing::info!(copied, to = %arguments.to.display(), "files copied");
            EXIT_DONE
        }
        Err(error) => {
            tracing::error!(
                "cannot copy {} to {}: {error}",
                arguments.from.display(),
                arguments.to.display()
            );
            EXIT_RETRY
        }
    }
}

fn copy_folder(from: &Path, to: &Path, depth: usize) -> io::Result<u64> {
    if depth == 0 {
        return Err(io::Error::other(format!("{} is nested too deeply", from.display())));
    }
    fs::create_dir_all(to)?;
    let mut copied = 0;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let metadata = fs::metadata(entry.path())?;
        if metadata.is_dir() {
            copied += copy_folder(&entry.path(), &target, depth - 1)?;
        } else if !is_copy(&entry.path(), &target, metadata.len())? {
            copy_file(&entry.path(), &target)?;
            copied += 1;
        }
    }
    Ok(copied)
}

/// Whether `to` has the size and the hash of `from`.
fn is_copy(from: &Path, to: &Path, size_bytes: u64) -> io::Result<bool> {
    if fs::metadata(to).map_or(true, |there| there.len() != size_bytes) {
        return Ok(false);
    }
    let hash = |path| strata_artifact::hash_file(path).map_err(io::Error::other);
    Ok(hash(from)? == hash(to)?)
}

/// Under another name first, so that nobody ever reads half a file.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let mut source = File::open(from)?;
    let mut target = File::create(&partial)?;
    io::copy(&mut source, &mut target)?;
    target.sync_all()?;
    fs::rename(&partial, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_copy_copies_nothing_and_mends_a_file_that_differs() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("models")).expect("folders are made");
        fs::write(from.join("models/a"), "weights").expect("a file is written");
        fs::write(from.join("b"), "text").expect("a file is written");
        assert_eq!(copy_folder(&from, &to, 4).expect("a copy"), 2);
        assert_eq!(copy_folder(&from, &to, 4).expect("a copy"), 0);
        for damaged in ["wei", "weighTs"] {
            fs::write(to.join("models/a"), damaged).expect("a file is damaged");
            assert_eq!(copy_folder(&from, &to, 4).expect("a copy"), 1);
            assert_eq!(fs::read_to_string(to.join("models/a")).expect("it is there"), "weights");
        }
        assert!(copy_folder(&from, &to, 1).is_err());
    }
}
