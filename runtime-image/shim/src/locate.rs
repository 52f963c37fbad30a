//! Before a serving container starts: is the model there, as it was published? Then a link leads to its files.
//!
//! The operator opens no URI, so it cannot know the folder of the attempt that published; the manifest does.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use strata_artifact::{Verify, open};
use strata_contract::{EXIT_DONE, FailureReason, Input, Uri};
use strata_stage::StageError;

/// What is looked for, and where the link is made.
#[derive(clap::Args, Debug)]
pub struct Arguments {
    /// The model: folder of the run that published it, or a plain file or folder.
    #[arg(long)]
    model: Uri,
    /// The digest that it must have; without, it is a plain file or folder, and only has to be there.
    #[arg(long)]
    digest: Option<String>,
    /// The link.
    #[arg(long)]
    link: PathBuf,
    /// Where it is said what is wrong.
    #[arg(long, default_value = "/dev/termination-log")]
    report: PathBuf,
}

/// Looks; the exit status is the contract's.
pub fn run(arguments: &Arguments, volumes: &Path) -> i32 {
    match locate(arguments, volumes) {
        Ok(path) => {
            tracing::info!(model = %path.display(), link = %arguments.link.display(), "the model is there");
            EXIT_DONE
        }
        Err(error) => {
            tracing::error!(reason = ?error.reason, "{}", error.message);
            // The log says it too.
            let _ = fs::write(&arguments.report, &error.message);
            error.reason.exit_code()
        }
    }
}

fn locate(arguments: &Arguments, volumes: &Path) -> Result<PathBuf, StageError> {
    let path = match &arguments.digest {
        Some(digest) => {
            let input = Input {
                name: "model".into(),
                uri: arguments.model.clone(),
                digest: Some(digest.clone()),
                bytes: None,
                resource: None,
            };
            // The manifest holds what it says by its digest, and the files by their sizes: reading all of a large model here
            // would take as long as loading it.
            open(&input, volumes, Verify::Sizes)?.path().to_owned()
        }
        None => arguments.model.local_path(volumes),
    };
    if !path.exists() {
        let message = format!("{} names nothing: {} is not there", arguments.model, path.display());
        return Err(StageError::new(FailureReason::InputNotFound, message));
    }
    let failed = |error: std::io::Error| {
        let message = format!("cannot make the link {}: {error}", arguments.link.display());
        StageError::new(FailureReason::Internal, message)
    };
    if let Some(folder) = arguments.link.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    match fs::remove_file(&arguments.link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    symlink(&path, &arguments.link).map_err(failed)?;
    Ok(path)
}
