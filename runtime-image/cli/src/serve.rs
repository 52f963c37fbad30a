//! `serve`: finds the model that a URI names, then is the server.

use std::fs;
use std::path::{Path, PathBuf};

use strata_artifact::{Opened, Verify};
use strata_contract::{EXIT_BAD_INPUT, EXIT_DONE, EXIT_RETRY, Input, Uri};
use strata_serve::{LoraModule, ServeArgs, ServeError, Server, Speculation, terminated};
use strata_stage::StageError;

/// Where an aligned model's artifact has its adapter.
const ADAPTER_FOLDER: &str = "adapter";
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

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
    let found = tokio::task::spawn_blocking(move || {
        find(&mut server, digest, &volumes)?;
        Ok::<_, Failure>(server)
    });
    let server = tokio::select! {
        found = found => found.map_err(|error| Failure {
            message: format!("the model could not be read: {error}"),
            code: EXIT_RETRY,
        })??,
        () = &mut stop => return Ok(()),
    };
    Ok(Server::start(server).await?.run_until(stop).await?)
}

/// Something to be read, if it is named by a URI: of plain files and folders there is no digest to compare.
fn input(what: &str, path: &Path, digest: Option<String>) -> Result<Option<Input>, Failure> {
    match (path.to_str().and_then(|text| text.parse::<Uri>().ok()), digest) {
        (Some(uri), digest) => Ok(Some(Input {
            name: what.to_owned(),
            uri,
            digest,
            bytes: None,
            resource: None,
        })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Failure {
            message: format!(
                "the digest of {what} needs a URI: {} is a plain file or folder, which has none to compare",
                path.display()
            ),
            code: EXIT_BAD_INPUT,
        }),
    }
}

/// Puts the folders of this machine in the place of URIs.
fn find(server: &mut ServeArgs, digest: Option<String>, volumes: &Path) -> Result<(), Failure> {
    let open = |input, verify| strata_artifact::open(&input, volumes, verify).map_err(StageError::from);
    let mut base = None;
    if let Some(input) = input("the model", &server.model, digest)? {
        // Reading costs no time of its own: the weights are read from the volume now instead of by the first request.
        let model = open(input, Verify::Hashes)?;
        server.model = model.path().to_owned();
        base = origin(&model, "model");
    }
    for LoraModule { name, path, digest } in &mut server.lora_modules {
        let Some(input) = input(&format!("the adapter {name}"), path, digest.take())? else {
            continue;
        };
        // What lies beside the adapter, such as the merged model, is not read.
        let adapter = open(input, Verify::Sizes)?;
        if let (Some(served), Some(trained)) = (&base, origin(&adapter, "base"))
            && *served != trained
        {
            tracing::warn!(
                name,
                served,
                trained,
                "the adapter was trained on another version of the model"
            );
        }
        let folder = Path::new(match adapter.manifest() {
            Some(_) => ADAPTER_FOLDER,
            None => "",
        });
        for file in ADAPTER_FILES {
            adapter
                .file(&folder.join(file).to_string_lossy())
                .map_err(StageError::from)?;
        }
        *path = adapter.path().join(folder);
    }
    if let Some(Speculation::DraftModel { model, digest, .. }) = &mut server.speculative_config
        && let Some(input) = input("the draft model", model, digest.take())?
    {
        *model = open(input, Verify::Hashes)?.path().to_owned();
    }
    Ok(())
}

/// Digest of what an artifact was made from.
fn origin(artifact: &Opened, name: &str) -> Option<String> {
    let inputs = &artifact.manifest()?.content.inputs;
    inputs.iter().find(|input| input.name == name)?.digest.clone()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use strata_artifact::{Attempt, Draft, RunFolder};
    use strata_contract::{ArtifactKind, Manifest, Resource};

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
            (
                &["--model", empty, "--digest", "sha256:0"],
                64,
                "the digest of the model needs a URI",
            ),
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

    fn publish(attempt: Attempt, kind: &str, name: &str) -> Manifest {
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
            kind: kind.into(),
            namespace: String::new(),
            name: name.into(),
        };
        attempt.publish(draft, resource, 1).expect("a publication")
    }

    #[test]
    fn a_model_that_is_not_what_was_published_is_not_served() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let uri = Uri::File(root.path().join("run"));
        let run = RunFolder::new(&uri, root.path());
        let attempt = run.attempt("a").expect("an attempt");
        attempt.write("model.gguf", b"the weights").expect("a file");
        let manifest = publish(attempt, "InferenceService", "chat");
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

    #[test]
    fn an_adapter_is_found_in_what_an_alignment_published_and_verified_and_nothing_beside_it_is_read() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let uri = Uri::File(root.path().join("run"));
        let run = RunFolder::new(&uri, root.path());
        let attempt = run.attempt("a").expect("an attempt");
        for file in [
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "model.safetensors",
        ] {
            attempt.write(file, file.as_bytes()).expect("a file");
        }
        let manifest = publish(attempt, "AlignmentJob", "polite");
        let content = run.path().join(&manifest.publication.content_path);
        let damage = |file: &str| {
            let text = fs::read_to_string(content.join(file)).expect("a published file");
            fs::remove_file(content.join(file)).expect("published files are read-only");
            fs::write(content.join(file), text.to_uppercase()).expect("damage of the same size");
        };
        let find = |path: &str, digest: &str| {
            let module = serde_json::json!({"name": "polite", "path": path, "digest": digest}).to_string();
            let line = ["serve", "--model", "m", "--enable-lora", "--lora-modules", &module];
            let mut server = Cli::parse_from(line).arguments.server;
            find(&mut server, None, root.path()).map(|()| server.lora_modules[0].path.clone())
        };
        let uri = uri.to_string();
        damage("model.safetensors");
        assert_eq!(find(&uri, &manifest.digest).ok(), Some(content.join("adapter")));
        for (path, digest, words) in [
            (&*uri, "sha256:0", "asked for is sha256:0"),
            ("/plain", &manifest.digest, "a plain file or folder"),
        ] {
            let failure = find(path, digest).expect_err(words);
            assert!(
                failure.code == EXIT_BAD_INPUT && failure.message.contains(words),
                "{}",
                failure.message
            );
        }
        damage("adapter/adapter_model.safetensors");
        let failure = find(&uri, &manifest.digest).expect_err("it is damaged");
        assert!(
            failure.message.contains("adapter_model.safetensors is damaged"),
            "{}",
            failure.message
        );
    }
}
