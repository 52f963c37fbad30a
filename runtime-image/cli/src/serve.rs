//! `serve`: finds the model that a URI names, then is the server.

use std::path::Path;

use strata_artifact::{Verify, open};
use strata_contract::{EXIT_BAD_INPUT, EXIT_DONE, EXIT_RETRY, Input, Uri};
use strata_serve::ServeArgs;
use strata_stage::StageError;

/// What is served, and how. `--model` also takes the URI of a published artifact.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    server: ServeArgs,
    /// With a URI in `--model`: the digest that its artifact must have.
    #[arg(long)]
    digest: Option<String>,
}

/// Serves until SIGTERM; the exit status is the contract's.
pub(crate) fn run(mut arguments: Arguments, volumes: &Path) -> i32 {
    if let Some(uri) = arguments
        .server
        .model
        .to_str()
        .and_then(|text| text.parse::<Uri>().ok())
    {
        match resolve(uri, arguments.digest, volumes) {
            Ok(path) => arguments.server.model = path,
            Err(error) => {
                tracing::error!(reason = ?error.reason, "{} {}", error.message, error.reason.remedy());
                return error.reason.exit_code();
            }
        }
    } else if arguments.digest.is_some() {
        tracing::error!("--digest needs a URI in --model: a plain file or folder has no digest to compare");
        return EXIT_BAD_INPUT;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start threads");
            return EXIT_RETRY;
        }
    };
    match runtime.block_on(strata_serve::run(arguments.server)) {
        Ok(()) => EXIT_DONE,
        Err(error) => {
            tracing::error!("{error}");
            EXIT_RETRY
        }
    }
}

/// The folder of the artifact's files. Their hashes were verified when they were made; a server that starts in a second
/// verifies digest and sizes.
fn resolve(uri: Uri, digest: Option<String>, volumes: &Path) -> Result<std::path::PathBuf, StageError> {
    let input = Input {
        name: "model".into(),
        uri,
        digest,
        bytes: None,
        resource: None,
    };
    Ok(open(&input, volumes, Verify::Sizes)?.path().to_owned())
}
