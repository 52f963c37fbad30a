//! `serve`: finds the model that a URI names, then is the server.

use std::fs;
use std::path::{Path, PathBuf};

use strata_artifact::{Verify, open};
use strata_contract::{EXIT_BAD_INPUT, EXIT_DONE, EXIT_RETRY, Input, Uri};
use strata_serve::{ServeArgs, ServeError, Server, terminated};
use strata_stage::StageError;

/// What is served, and how. `--model` also takes the URI of a published artifact.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    server: ServeArgs,
    /// With a URI in `--model`: the digest that its artifact must have.
    #[arg(long)]
    digest: Option<String>,
    /// Where it is written why the server could not start or go on.
    #[arg(long, default_value = "/dev/termination-log")]
    report: PathBuf,
}

/// Why the server could not start or go on: a sentence for a person, and the exit status.
struct Failure {
    message: String,
    code: i32,
}

impl From<StageError> for Failure {
    fn from(error: StageError) -> Self {
        Failure {
            message: format!("{}. {}", error.message, error.reason.remedy()),
            code: error.reason.exit_code(),
        }
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        Failure {
            message: error.to_string(),
            code: match error.is_bad_input() {
                true => EXIT_BAD_INPUT,
                false => EXIT_RETRY,
            },
        }
    }
}

/// Serves until SIGTERM; the exit status is the contract's.
pub(crate) fn run(arguments: Arguments, volumes: &Path) -> i32 {
    let report = arguments.report.clone();
    let Err(failure) = start(arguments, volumes) else {
        return EXIT_DONE;
    };
    tracing::error!("{}", failure.message);
    // The operator quotes it. Started by hand, nobody made the file, and the log has the sentence too.
    if let Err(error) = fs::write(&report, &failure.message) {
        tracing::debug!(path = %report.display(), %error, "the report could not be written");
    }
    failure.code
}

fn start(arguments: Arguments, volumes: &Path) -> Result<(), Failure> {
    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = threads.map_err(|error| Failure {
        message: format!("cannot start threads: {error}"),
        code: EXIT_RETRY,
    })?;
    let result = runtime.block_on(serve(arguments, volumes.to_owned()));
    // A model that is still being read when SIGTERM comes holds up nothing.
    runtime.shutdown_background();
    result
}

async fn serve(arguments: Arguments, volumes: PathBuf) -> Result<(), Failure> {
    let Arguments { mut server, digest, .. } = arguments;
    let stop = terminated()?;
    tokio::pin!(stop);
    if let Some(uri) = server.model.to_str().and_then(|text| text.parse::<Uri>().ok()) {
        let found = tokio::task::spawn_blocking(move || resolve(uri, digest, &volumes));
        server.model = tokio::select! {
            found = found => found.map_err(|error| Failure {
                message: format!("the model could not be read: {error}"),
                code: EXIT_RETRY,
            })??,
            () = &mut stop => return Ok(()),
        };
    } else if digest.is_some() {
        return Err(Failure {
            message: "--digest needs a URI in --model: a plain file or folder has no digest to compare".into(),
            code: EXIT_BAD_INPUT,
        });
    }
    Ok(Server::start(server).await?.run_until(stop).await?)
}

/// The folder of the artifact's files, with their hashes verified. Reading costs no time of its own: the weights are read from
/// the volume now instead of by the first request.
fn resolve(uri: Uri, digest: Option<String>, volumes: &Path) -> Result<PathBuf, StageError> {
    let input = Input {
        name: "model".into(),
        uri,
        digest,
        bytes: None,
        resource: None,
    };
    Ok(open(&input, volumes, Verify::Hashes)?.path().to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use strata_artifact::{Draft, RunFolder};
    use strata_contract::{ArtifactKind, Resource};

    use super::*;

    /// What a test gives stands last and counts.
    #[derive(Parser)]
    #[command(args_override_self = true)]
    struct Cli {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// Runs a server that cannot start; its exit status, and what a pod's status would say.
    fn fail(folder: &Path, more: &[&str]) -> (i32, String) {
        let report = folder.join("termination-log");
        let report_text = report.to_str().expect("UTF-8");
        let line = ["serve", "--host", "127.0.0.1", "--port", "0", "--report", report_text];
        let arguments = Cli::parse_from(line.iter().chain(more)).arguments;
        let code = run(arguments, folder);
        (code, fs::read_to_string(report).expect("a report"))
    }

    #[test]
    fn a_server_that_cannot_start_leaves_a_plain_sentence_and_says_whether_to_try_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let empty = folder.path().join("empty");
        fs::create_dir(&empty).expect("a folder");
        let empty = empty.to_str().expect("UTF-8");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = taken.local_addr().expect("an address").port().to_string();
        for (more, code, words) in [
            (&["--model", empty][..], 64, "missing"),
            (&["--model", empty, "--digest", "sha256:0"], 64, "--digest needs a URI"),
            (&["--model", "pvc://claim/model"], 70, "there is nothing at"),
            (
                &["--model", empty, "--port", &port],
                70,
                "choose another --host or --port",
            ),
        ] {
            let (got, report) = fail(folder.path(), more);
            assert_eq!(got, code, "{more:?}: {report}");
            assert!(report.contains(words) && !report.contains(['{', '\n']), "{report}");
        }
    }

    #[test]
    fn a_model_that_is_not_what_was_published_is_not_served() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let uri = Uri::File(root.path().join("run"));
        let run = RunFolder::new(&uri, root.path());
        let attempt = run.attempt("a").expect("an attempt");
        attempt.write("model.gguf", b"the weights").expect("a file");
        let draft = Draft {
            kind: ArtifactKind::Model,
            run_id: "r".into(),
            inputs: Vec::new(),
            config: serde_json::json!({}),
            metrics: Default::default(),
            gates: Vec::new(),
            facts: Default::default(),
        };
        let resource = Resource {
            kind: "InferenceService".into(),
            namespace: String::new(),
            name: "chat".into(),
        };
        let manifest = attempt.publish(draft, resource, 1).expect("a publication");
        let file = run.path().join(&manifest.publication.content_path).join("model.gguf");
        fs::remove_file(&file).expect("published files are read-only");
        fs::write(&file, "The weights").expect("damage of the same size");
        let (uri, digest) = (uri.to_string(), manifest.digest);
        let (code, report) = fail(root.path(), &["--model", &uri, "--digest", &digest]);
        assert_eq!(code, 64, "{report}");
        assert!(
            report.contains("model.gguf is damaged: its manifest says sha256"),
            "{report}"
        );
    }
}
