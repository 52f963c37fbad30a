//! Crashes, races, full disks and damage, against a real file system.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use strata_contract::{ArtifactKind, FailureReason, Input, Manifest, Resource, Uri};

use super::{Draft, RunFolder, Step, rfc3339};
use crate::{ArtifactError, Verify, open};

const STEPS: [Step; 5] = [
    Step::FilesChecked,
    Step::ContentSynced,
    Step::ManifestWritten,
    Step::ManifestLinked,
    Step::RunSynced,
];

fn draft() -> Draft {
    Draft {
        kind: ArtifactKind::Dataset,
        run_id: "r1".into(),
        inputs: Vec::new(),
        config: serde_json::json!({"seed": 17}),
        metrics: [("documentsKept".to_owned(), 2.0)].into(),
        gates: Vec::new(),
        facts: Default::default(),
    }
}

fn resource() -> Resource {
    Resource {
        kind: "Dataset".into(),
        namespace: String::new(),
        name: "plays".into(),
    }
}

fn folder(root: &Path) -> (Uri, RunFolder) {
    let uri = Uri::File(root.join("runs/r1"));
    let run = RunFolder::new(&uri, Path::new("/none"));
    (uri, run)
}

fn publish(run: &RunFolder, id: &str, text: &str) -> Manifest {
    let attempt = run.attempt(id).unwrap();
    attempt.write("data/train.txt", text.as_bytes()).unwrap();
    std::fs::write(attempt.place("weights.bin").unwrap(), b"1234").unwrap();
    attempt.adopt("weights.bin").unwrap();
    attempt.publish(draft(), resource(), 1).unwrap()
}

fn input(uri: &Uri, digest: Option<String>) -> Input {
    Input {
        name: "in".into(),
        uri: uri.clone(),
        digest,
        bytes: None,
        resource: None,
    }
}

#[test]
fn a_published_artifact_reads_back_verified() {
    let root = tempfile::tempdir().unwrap();
    let (uri, run) = folder(root.path());
    assert!(run.published().unwrap().is_none());
    let manifest = publish(&run, "a1", "to be");
    assert_eq!(run.published().unwrap().as_ref(), Some(&manifest));

    let opened = open(
        &input(&uri, Some(manifest.digest.clone())),
        Path::new("/none"),
        Verify::Hashes,
    )
    .unwrap();
    assert_eq!(
        std::fs::read_to_string(opened.file("data/train.txt").unwrap()).unwrap(),
        "to be"
    );
    assert_eq!(
        (opened.resolved().digest, opened.resolved().bytes),
        (Some(manifest.digest), Some(9))
    );
    assert!(matches!(opened.file("other"), Err(ArtifactError::NotFound { .. })));
}

#[test]
fn a_crash_after_any_step_leaves_no_manifest_or_a_complete_one_and_the_next_attempt_succeeds() {
    for stop in STEPS {
        let root = tempfile::tempdir().unwrap();
        let (uri, run) = folder(root.path());
        let attempt = run.attempt("a1").unwrap();
        attempt.write("data/train.txt", b"to be").unwrap();
        let crashed = attempt.publish_stepwise(draft(), resource(), 1, &mut |step| match step == stop {
            true => Err(ArtifactError::Full { path: "crash".into() }),
            false => Ok(()),
        });
        assert!(crashed.is_err());
        let complete = matches!(stop, Step::ManifestLinked | Step::RunSynced);
        assert_eq!(run.published().unwrap().is_some(), complete, "{stop:?}");

        let manifest = publish(&run, "a2", "or not to be");
        let winner = if complete {
            "attempts/a1/content"
        } else {
            "attempts/a2/content"
        };
        assert_eq!(manifest.publication.content_path, winner, "{stop:?}");
        open(&input(&uri, None), Path::new("/none"), Verify::Hashes).unwrap();
    }
}

#[test]
fn of_two_attempts_the_second_takes_over_the_first_ones_result() {
    let root = tempfile::tempdir().unwrap();
    let (uri, run) = folder(root.path());
    let late = run.attempt("late").unwrap();
    late.write("data/train.txt", b"late").unwrap();
    let first = publish(&run, "first", "first");
    assert_eq!(late.publish(draft(), resource(), 2).unwrap(), first);
    let opened = open(&input(&uri, None), Path::new("/none"), Verify::Hashes).unwrap();
    assert_eq!(
        std::fs::read_to_string(opened.file("data/train.txt").unwrap()).unwrap(),
        "first"
    );
    assert_eq!(run.attempts().unwrap(), ["first", "late"]);
    assert!(
        !run.attempt_dir("late").join("content").exists(),
        "what nobody reads takes no space"
    );
    assert!(
        run.attempt("first").is_err(),
        "what is published must not be written again"
    );
}

#[test]
fn an_attempt_that_lives_while_another_publishes_changes_nothing_of_it() {
    let root = tempfile::tempdir().unwrap();
    let (uri, run) = folder(root.path());
    let late = run.attempt("late").unwrap();
    let mut file = late.file("data/train.txt").unwrap();
    let first = publish(&run, "first", "first");
    // The winner removed the folder of this file.
    file.write_all(b"late").unwrap();
    assert!(file.finish().is_err());
    late.write("data/test.txt", b"late").unwrap();
    assert_eq!(late.publish(draft(), resource(), 2).unwrap(), first);
    open(&input(&uri, None), Path::new("/none"), Verify::Hashes).unwrap();
}

#[test]
fn a_figure_that_is_none_is_an_error_that_names_it() {
    for value in [f64::NAN, f64::INFINITY] {
        let root = tempfile::tempdir().unwrap();
        let (_, run) = folder(root.path());
        let mut draft = draft();
        draft.metrics.insert("bitsPerByte".into(), value);
        let error = run.attempt("a1").unwrap().publish(draft, resource(), 1).unwrap_err();
        assert!(error.to_string().contains("bitsPerByte"), "{error}");
        assert_eq!(run.published().unwrap(), None);
    }
}

#[test]
fn damage_is_found_and_named() {
    type Damage = (&'static str, fn(&Path), Verify);
    let damage: [Damage; 4] = [
        (
            "truncated",
            |content| std::fs::write(content.join("data/train.txt"), "to").unwrap(),
            Verify::Sizes,
        ),
        (
            "flipped",
            |content| std::fs::write(content.join("data/train.txt"), "to bf").unwrap(),
            Verify::Hashes,
        ),
        (
            "missing",
            |content| std::fs::remove_file(content.join("weights.bin")).unwrap(),
            Verify::Sizes,
        ),
        (
            "manifest",
            |content| {
                let path = content.join("../../../manifest.json");
                let text = std::fs::read_to_string(&path)
                    .unwrap()
                    .replace("\"seed\": 17", "\"seed\": 18");
                std::fs::write(path, text).unwrap();
            },
            Verify::Sizes,
        ),
    ];
    for (what, damage, verify) in damage {
        let root = tempfile::tempdir().unwrap();
        let (uri, run) = folder(root.path());
        let manifest = publish(&run, "a1", "to be");
        damage(&run.path().join(&manifest.publication.content_path));
        let error = open(&input(&uri, None), Path::new("/none"), verify).unwrap_err();
        let expected = if what == "missing" {
            FailureReason::InputNotFound
        } else {
            FailureReason::InputCorrupt
        };
        assert_eq!(error.reason(), expected, "{what}: {error}");
    }
    // A flipped bit that the size does not show is found when the file is asked for.
    let root = tempfile::tempdir().unwrap();
    let (uri, run) = folder(root.path());
    publish(&run, "a1", "to be");
    std::fs::write(run.path().join("attempts/a1/content/data/train.txt"), "to bf").unwrap();
    let opened = open(&input(&uri, None), Path::new("/none"), Verify::Sizes).unwrap();
    assert!(opened.file("weights.bin").is_ok());
    assert_eq!(
        opened.file("data/train.txt").unwrap_err().reason(),
        FailureReason::InputCorrupt
    );
}

#[test]
fn another_artifact_than_the_one_asked_for_is_refused_and_an_unpublished_one_not_found() {
    let root = tempfile::tempdir().unwrap();
    let (uri, run) = folder(root.path());
    let mut asked = input(&uri, Some("sha256:00".into()));
    asked.resource = Some(resource());
    let error = open(&asked, Path::new("/none"), Verify::Sizes).unwrap_err();
    assert_eq!(error.reason(), FailureReason::InputNotFound, "{error}");
    assert!(error.to_string().contains("Dataset plays has not published"), "{error}");
    publish(&run, "a1", "to be");
    let error = open(&asked, Path::new("/none"), Verify::Sizes).unwrap_err();
    assert_eq!(error.reason(), FailureReason::InputCorrupt, "{error}");
}

#[test]
fn plain_files_and_folders_get_a_digest_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("a.txt"), "abc").unwrap();
    let file = input(&Uri::File(root.path().join("a.txt")), None);
    let opened = open(&file, Path::new("/none"), Verify::Sizes).unwrap();
    let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(
        (opened.resolved().digest.as_deref(), opened.resolved().bytes),
        (Some(abc), Some(3))
    );
    assert!(opened.manifest().is_none());

    std::fs::create_dir(root.path().join("sub")).unwrap();
    std::fs::write(root.path().join("sub/b.txt"), "b").unwrap();
    let folder = input(&Uri::File(root.path().to_owned()), None);
    let before = open(&folder, Path::new("/none"), Verify::Sizes).unwrap().resolved();
    std::fs::write(root.path().join("sub/b.txt"), "c").unwrap();
    let changed = open(&before, Path::new("/none"), Verify::Sizes).unwrap_err();
    assert_eq!(changed.reason(), FailureReason::InputCorrupt, "{changed}");
}

#[test]
fn links_in_a_plain_folder_are_hashed_as_their_files_or_refused() {
    use std::os::unix::fs::symlink;
    // As the cache of Hugging Face's hub has it.
    let root = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (root.path().join("blobs"), root.path().join("snapshot"));
    std::fs::create_dir(&blobs).unwrap();
    std::fs::create_dir(&snapshot).unwrap();
    std::fs::write(blobs.join("1"), "weights").unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    symlink("../blobs/1", snapshot.join("model.safetensors")).unwrap();
    let opened = |digest| {
        open(
            &input(&Uri::File(snapshot.clone()), digest),
            Path::new("/none"),
            Verify::Sizes,
        )
    };
    let before = opened(None).unwrap().resolved();
    assert_eq!(before.bytes, Some(9));
    std::fs::write(blobs.join("1"), "changed").unwrap();
    assert_eq!(opened(before.digest).unwrap_err().reason(), FailureReason::InputCorrupt);

    for (target, words) in [
        ("../blobs", "a link to a folder"),
        ("../blobs/2", "a file that is missing"),
    ] {
        symlink(target, snapshot.join("other")).unwrap();
        let error = opened(None).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        std::fs::remove_file(snapshot.join("other")).unwrap();
    }
}

#[test]
fn an_unfinished_file_leaves_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let (_, run) = folder(root.path());
    let attempt = run.attempt("a1").unwrap();
    let mut file = attempt.file("data/x").unwrap();
    file.write_all(b"half").unwrap();
    drop(file);
    assert_eq!(
        std::fs::read_dir(attempt.content_dir().join("data")).unwrap().count(),
        0
    );

    // A killed attempt cannot clean up after itself; the next one does.
    std::fs::write(attempt.content_dir().join("data/y.partial"), "half").unwrap();
    run.attempt("a2").unwrap();
    assert_eq!(
        std::fs::read_dir(attempt.content_dir().join("data")).unwrap().count(),
        0
    );
    for name in ["../x", "/etc/x", "a//b", "x.partial", ""] {
        assert!(
            matches!(attempt.file(name), Err(ArtifactError::Name { .. })),
            "{name:?}"
        );
    }
}

#[test]
fn whatever_figures_an_artifact_has_its_digest_holds_when_it_is_read() {
    let root = tempfile::tempdir().unwrap();
    let (uri, run) = folder(root.path());
    let attempt = run.attempt("a1").unwrap();
    let mut draft = draft();
    let mut figure = 0.1;
    for index in 0..2000i32 {
        // Figures of all digits, from 1e-40 to 1e40.
        figure = (figure * 1103.515245 + 0.12345) % 1.0;
        draft
            .metrics
            .insert(format!("m{index}"), figure * 10f64.powi(index % 81 - 40));
    }
    let manifest = attempt.publish(draft, resource(), 1).unwrap();
    assert_eq!(run.published().unwrap(), Some(manifest));
    open(&input(&uri, None), Path::new("/none"), Verify::Sizes).unwrap();
}

#[test]
fn a_newer_manifest_is_refused_with_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let (_, run) = folder(root.path());
    std::fs::create_dir_all(run.path()).unwrap();
    std::fs::write(
        run.path().join("manifest.json"),
        r#"{"contractVersion": 999, "shape": "unknown"}"#,
    )
    .unwrap();
    let error = run.published().unwrap_err();
    assert_eq!(error.reason(), FailureReason::ConfigInvalid);
    assert!(error.to_string().contains("use an image of that release"), "{error}");
}

#[test]
fn times_are_written_in_utc() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_827_696, "2000-02-29T12:34:56Z"),
        (1_795_484_181, "2026-11-24T01:36:21Z"),
        (4_107_542_399, "2100-02-28T23:59:59Z"),
    ] {
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
    }
}
