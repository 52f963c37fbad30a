//! A stage that a program of another image carries out: here a shell script, on this machine, with the real shim around it.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use strata_contract::{ArtifactKind, FailureReason, Manifest, Report};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a temporary folder"));
        fs::write(place.path("prompt.txt"), "To be, or not to be").expect("an input");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn configure(&self, gates: Value) {
        let input = json!({"name": "base", "uri": format!("file://{}", self.path("prompt.txt").display())});
        let config = json!({
            "contractVersion": 1,
            "run": {"id": "r", "attempt": 1, "resource": {"kind": "InferenceService", "name": "n"},
                "output": format!("file://{}", self.path("run").display())},
            "stage": {"quantize": {"model": input, "format": "Q8_0", "gates": gates}},
            "container": {"image": "example.org/x:1", "command": ["sh"]},
        });
        fs::write(self.path("stage.json"), config.to_string()).expect("a configuration");
    }

    fn command(&self, shim: &Path, script: &str, attempt: &str) -> Command {
        let mut command = Command::new(shim);
        command.args(["run", "--monitor", "none", "--attempt-id", attempt, "--config"]);
        command
            .arg(self.path("stage.json"))
            .arg("--report")
            .arg(self.path("report.json"));
        command.arg("--exchange").arg(self.path("exchange"));
        command.args(["--", "sh", "-ec", script]);
        command
    }

    fn run(&self, script: &str, attempt: &str) -> (Option<i32>, Report) {
        let run = self
            .command(&shim(), script, attempt)
            .output()
            .expect("the shim starts");
        self.outcome(&run)
    }

    fn outcome(&self, run: &Output) -> (Option<i32>, Report) {
        let text = fs::read_to_string(self.path("report.json"));
        let text = text.unwrap_or_else(|error| panic!("no report ({error}): {run:?}"));
        (run.status.code(), serde_json::from_str(&text).expect("a report"))
    }

    fn manifest(&self) -> Option<Manifest> {
        let text = fs::read_to_string(self.path("run/manifest.json")).ok()?;
        Some(serde_json::from_str(&text).expect("a manifest"))
    }
}

fn shim() -> PathBuf {
    env!("CARGO_BIN_EXE_strata-shim").into()
}

const GOOD: &str = r#"
    mkdir "$STRATA_OUTPUT_DIR/model"
    tr a-z A-Z < "$STRATA_INPUTS_DIR/base" > "$STRATA_OUTPUT_DIR/model/weights"
    ln -s model/weights "$STRATA_OUTPUT_DIR/link"
    echo 7 > "$STRATA_STATE_DIR/checkpoint"
    echo '{"message": "it is done", "metrics": {"loss": 2.5}, "facts": {"made by": "sh"}}' > "$STRATA_RESULT_FILE"
"#;

#[test]
fn what_a_program_leaves_is_published_with_its_lineage_and_never_made_twice() {
    let place = Place::new();
    place.configure(json!([{"metric": "loss", "max": 3.0}]));
    let (code, report) = place.run(GOOD, "one");
    assert_eq!((code, report.message.as_str()), (Some(0), "it is done"));
    let manifest = place.manifest().expect("it is published");
    assert_eq!(
        Some(&manifest.digest),
        report.artifact.as_ref().map(|artifact| &artifact.digest)
    );
    assert_eq!(manifest.content.kind, ArtifactKind::QuantizedModel);
    let names: Vec<&str> = manifest.content.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["link", "model/weights"]);
    let content = place.path("run").join(&manifest.publication.content_path);
    assert_eq!(
        fs::read(content.join("model/weights")).expect("a file"),
        b"TO BE, OR NOT TO BE"
    );
    assert!(!content.join("link").is_symlink(), "what it leads to may not last");
    assert!(
        manifest.content.inputs[0].digest.is_some(),
        "the input is known by its digest"
    );
    assert_eq!(manifest.content.config["container"]["image"], "example.org/x:1");
    assert_eq!(
        (
            manifest.content.metrics["loss"],
            manifest.content.facts["made by"].as_str()
        ),
        (2.5, "sh")
    );
    assert!(
        !place.path("run/state").exists(),
        "a published run needs no checkpoints"
    );

    let (code, report) = place.run("echo again; exit 1", "two");
    assert_eq!((code, report.reused), (Some(0), true), "{report:?}");
}

#[test]
fn the_exit_status_decides_whether_to_try_again_and_the_program_says_why() {
    let say = |reason: &str, code: i32| {
        format!(r#"echo '{{"failure": "{reason}", "message": "so it is"}}' > "$STRATA_RESULT_FILE"; exit {code}"#)
    };
    for (script, code, reason, words) in [
        (
            "exit 64".to_owned(),
            64,
            FailureReason::ConfigInvalid,
            "sh ended with status 64",
        ),
        (say("InputCorrupt", 64), 64, FailureReason::InputCorrupt, "so it is"),
        (say("StorageFull", 64), 64, FailureReason::ConfigInvalid, "so it is"),
        (
            "exit 3".to_owned(),
            70,
            FailureReason::Internal,
            "sh ended with status 3",
        ),
        (say("Diverged", 1), 64, FailureReason::Diverged, "so it is"),
        ("exit 75".to_owned(), 75, FailureReason::Interrupted, "status 75"),
        (
            "kill -9 $$".to_owned(),
            70,
            FailureReason::Internal,
            "perhaps for its memory",
        ),
        (
            "true".to_owned(),
            64,
            FailureReason::ConfigInvalid,
            "left no file in STRATA_OUTPUT_DIR",
        ),
        (
            "echo no > \"$STRATA_RESULT_FILE\"".to_owned(),
            64,
            FailureReason::ConfigInvalid,
            "is no result",
        ),
        (
            "echo x > \"$STRATA_OUTPUT_DIR/x\"".to_owned(),
            64,
            FailureReason::GateFailed,
            "loss was not measured",
        ),
    ] {
        let place = Place::new();
        place.configure(json!([{"metric": "loss", "max": 3.0}]));
        let (got, report) = place.run(&script, "one");
        assert_eq!(
            (got, report.failure),
            (Some(code), Some(reason)),
            "{script}: {report:?}"
        );
        assert!(report.message.contains(words), "{script}: {}", report.message);
        assert!(place.manifest().is_none(), "{script}");
    }
    let place = Place::new();
    place.configure(json!([]));
    let mut command = Command::new(shim());
    command
        .args(["run", "--monitor", "none", "--config"])
        .arg(place.path("stage.json"));
    command
        .arg("--report")
        .arg(place.path("report.json"))
        .arg("--exchange")
        .arg(place.path("exchange"));
    let run = command
        .args(["--", "no-such-program"])
        .output()
        .expect("the shim starts");
    let (code, report) = place.outcome(&run);
    assert_eq!(code, Some(64), "{report:?}");
    assert!(
        report
            .message
            .contains("cannot start \"no-such-program\" in this image"),
        "{}",
        report.message
    );
}

#[test]
fn a_stop_reaches_the_program_which_goes_on_from_what_it_saved() {
    let place = Place::new();
    place.configure(json!([]));
    let script = r#"
        if [ -e "$STRATA_STATE_DIR/step" ]; then cp "$STRATA_STATE_DIR/step" "$STRATA_OUTPUT_DIR/result"; exit 0; fi
        trap 'echo 41 > "$STRATA_STATE_DIR/step"; exit 75' TERM
        echo half > "$STRATA_OUTPUT_DIR/half"
        while true; do sleep 0.05; done
    "#;
    let mut child = place.command(&shim(), script, "one").spawn().expect("the shim starts");
    let half = place.path("run/attempts/one/content/half");
    let end = Instant::now() + Duration::from_secs(60);
    while !half.exists() {
        assert!(Instant::now() < end, "the program never began");
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: a plain system call on a child that has not been waited for.
    unsafe { libc::kill(i32::try_from(child.id()).expect("an id"), libc::SIGTERM) };
    let status = child.wait().expect("it ends");
    assert_eq!((status.code(), status.signal()), (Some(75), None));

    // The same attempt, started again, as a suspended Job's is.
    let (code, report) = place.run(script, "one");
    assert_eq!(code, Some(0), "{report:?}");
    let manifest = place.manifest().expect("it is published");
    let names: Vec<&str> = manifest.content.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["result"], "what the first life left by halves is gone");
}

#[test]
fn of_several_nodes_only_node_0_publishes() {
    let place = Place::new();
    place.configure(json!([]));
    let run = |rank: &str| {
        let mut command = place.command(&shim(), "echo x > \"$STRATA_OUTPUT_DIR/of-$STRATA_NODE_RANK\"", "one");
        let run = command
            .envs([("STRATA_NODE_RANK", rank), ("STRATA_NODE_COUNT", "2")])
            .output();
        place.outcome(&run.expect("the shim starts"))
    };
    let (code, report) = run("1");
    assert_eq!((code, report.artifact), (Some(0), None));
    assert!(place.manifest().is_none());
    let (code, report) = run("0");
    assert!(code == Some(0) && report.artifact.is_some(), "{report:?}");
}

#[test]
fn the_shim_starts_from_a_folder_that_holds_all_it_needs() {
    let place = Place::new();
    place.configure(json!([]));
    let folder = place.path("shim");
    let copied = Command::new(shim())
        .arg("inject")
        .arg(&folder)
        .status()
        .expect("the shim starts");
    assert!(copied.success());
    let usual = place.command(&shim(), GOOD, "one");
    let arguments: Vec<_> = usual.get_args().map(ToOwned::to_owned).collect();
    let mut command = Command::new(folder.join("ld.so"));
    // As in an image without a C library of its own: nothing else is looked at.
    command
        .arg("--inhibit-cache")
        .arg("--library-path")
        .arg(&folder)
        .arg(folder.join("strata-shim"));
    let run = command.args(arguments).output().expect("the loader starts");
    let (code, report) = place.outcome(&run);
    assert_eq!(code, Some(0), "{report:?}");
}

#[test]
fn a_model_is_found_by_its_digest_and_another_is_not_served() {
    let place = Place::new();
    place.configure(json!([]));
    place.run(GOOD, "one");
    let manifest = place.manifest().expect("it is published");
    let locate = |model: &str, digest: Option<&str>| {
        let mut command = Command::new(shim());
        command
            .args(["locate", "--model", model, "--link"])
            .arg(place.path("model/current"));
        command.arg("--report").arg(place.path("words"));
        command.args(digest.map(|digest| ["--digest", digest]).into_iter().flatten());
        command.status().expect("the shim starts").code()
    };
    let run = format!("file://{}", place.path("run").display());
    assert_eq!(locate(&run, Some(&manifest.digest)), Some(0));
    assert!(place.path("model/current/model/weights").is_file());
    assert_eq!(locate(&run, Some(&format!("sha256:{}", "0".repeat(64)))), Some(64));
    let plain = format!("file://{}", place.path("prompt.txt").display());
    assert_eq!(locate(&plain, None), Some(0));
    assert!(place.path("model/current").is_file());
    let absent = format!("file://{}", place.path("nowhere").display());
    assert_eq!(locate(&absent, None), Some(70));
    assert!(
        fs::read_to_string(place.path("words"))
            .expect("words")
            .contains("nowhere")
    );
}
