//! The samples' raw data through the whole stage: each file becomes what its README says.

#![allow(clippy::unwrap_used, reason = "in a test an unwrap is an assertion")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Row, RowAccessor};
use serde_json::{Value, json};
use strata_artifact::{Opened, Verify, open};
use strata_contract::{CurateConfig, FailureReason, Input, Report, Resource, Run, Uri};
use strata_encode::{TextTokenizer, TokenFile};
use strata_stage::{StageContext, StageError};

fn data(name: &str) -> PathBuf {
    // Relative to the crate, where cargo runs tests: checkouts share one target folder.
    Path::new("../../config/samples/data")
        .join(name)
        .canonicalize()
        .unwrap()
}

fn uri(path: &Path) -> String {
    Uri::File(path.to_owned()).to_string()
}

/// The sample of running text, as `config/samples/dataset-plays.yaml` has it.
fn plays() -> Value {
    json!({
        "task": "Pretraining",
        "sources": [
            {"name": "shakespeare", "uri": uri(&data("tinyshakespeare.txt")), "format": {"text": {"splitBytes": 2000}}},
            {"name": "crawl", "uri": uri(&data("commoncrawl-sample.warc.gz")), "format": "webCrawl"},
            {"name": "pages", "license": "CC0-1.0", "uri": uri(&data("pages.warc.gz")), "format": "webCrawl"},
        ],
        "languages": [{"code": "en", "minConfidencePercent": 65}],
        "quality": {"preset": "FineWeb", "overrides": [
            {"rule": "FineWebDuplicateLineCharacters"},
            {"rule": "C4ShortLine"},
            {"rule": "GopherDuplicateLines"},
            {"rule": "GopherAlphabeticWords", "threshold": 0.7},
        ]},
        "deduplicateExact": true,
        "minHashSimilarityPercent": 80,
        "pii": "Redact",
        "heldOutPercent": 10,
        "seed": 17,
        "encode": {"vocabSize": 1024, "sequenceLengthTokens": 256, "packing": "BestFit"},
        "card": {"title": "Plays", "notice": "For demonstration."},
    })
}

fn preferences() -> Value {
    json!({
        "task": "Preference",
        "sources": [{
            "name": "harmless",
            "license": "MIT",
            "uri": uri(&data("hh-rlhf-harmless-base-test.jsonl.gz")),
            "format": "preferenceTranscripts",
        }],
        "deduplicateExact": true,
        "pii": "Redact",
        "heldOutPercent": 20,
        "seed": 17,
        "card": {"notice": "For demonstration only."},
    })
}

/// Only the pages, of which enough must be left to train on.
fn pages(change: impl FnOnce(&mut Value)) -> Value {
    let mut config = plays();
    config["sources"] = json!([config["sources"][2]]);
    config["heldOutPercent"] = json!(0);
    config.as_object_mut().unwrap().remove("encode");
    change(&mut config);
    config
}

fn context(output: &Path) -> StageContext {
    let resource = Resource {
        kind: "Dataset".into(),
        namespace: String::new(),
        name: "sample".into(),
    };
    StageContext {
        run: Run {
            id: "r1".into(),
            attempt: 1,
            resource,
            output: Uri::File(output.to_owned()),
        },
        volumes: "/none".into(),
        attempt_id: "a1".into(),
        progress: Default::default(),
        interrupt: Default::default(),
    }
}

fn run(config: &Value, output: &Path) -> Result<Report, StageError> {
    let config: CurateConfig = serde_json::from_value(config.clone()).unwrap();
    strata_curate::run(&config, &context(output))
}

fn published(config: &Value, output: &Path) -> (Report, Opened) {
    let report = run(config, output).unwrap();
    let artifact = report.artifact.clone().unwrap();
    let input = Input {
        name: "data".into(),
        uri: artifact.uri,
        digest: Some(artifact.digest),
        bytes: None,
        resource: None,
    };
    (report, open(&input, Path::new("/none"), Verify::Hashes).unwrap())
}

fn rows(opened: &Opened, split: &str) -> Vec<Row> {
    let path = opened.file(&format!("data/{split}-00000-of-00001.parquet")).unwrap();
    let reader = SerializedFileReader::new(File::open(path).unwrap()).unwrap();
    reader.get_row_iter(None).unwrap().map(|row| row.unwrap()).collect()
}

fn figures(opened: &Opened) -> Value {
    serde_json::from_slice(&std::fs::read(opened.file("report.json").unwrap()).unwrap()).unwrap()
}

#[test]
fn the_plays_become_a_data_set_with_a_tokenizer_and_token_files() {
    let folder = tempfile::tempdir().unwrap();
    let (report, opened) = published(&plays(), &folder.path().join("one"));
    let metric = |name: &str| report.metrics[name];
    assert!(
        metric("documentsKept") >= 0.97 * metric("documentsSeen"),
        "{:?}",
        report.metrics
    );
    assert!(
        metric("bytesKept") >= 0.97 * metric("bytesSeen"),
        "{:?}",
        report.metrics
    );

    // The crawled page is in Aragonese, which is nobody's label here: it is dropped as not English, and counted.
    let figures = figures(&opened);
    assert_eq!(figures["sources"]["crawl"]["documentsSeen"], 1);
    assert_eq!(figures["sources"]["crawl"]["documentsKept"], 0);
    assert_eq!(figures["steps"]["language"]["dropped"]["closest to es"], 1);
    assert_eq!(figures["sources"]["crawl"]["dropped"]["language"]["closest to es"], 1);
    let bytes = |value: &Value| value.as_u64().unwrap();
    let (dropped, crawled) = (
        &figures["steps"]["language"]["bytesDropped"],
        &figures["sources"]["crawl"]["bytesSeen"],
    );
    assert!(bytes(dropped) >= bytes(crawled) && bytes(crawled) > 0, "{figures}");

    // Nothing is in both splits, and the sizes are those that the report says.
    let (train, test) = (rows(&opened, "train"), rows(&opened, "test"));
    let texts = |rows: &[Row]| {
        rows.iter()
            .map(|row| row.get_string(1).unwrap().clone())
            .collect::<BTreeSet<_>>()
    };
    assert!(texts(&train).is_disjoint(&texts(&test)));
    assert_eq!(
        (train.len() as f64, test.len() as f64),
        (metric("documentsTrain"), metric("documentsHeldOut"))
    );
    assert!(
        (0.05..0.2).contains(&(test.len() as f64 / train.len() as f64)),
        "{}",
        test.len()
    );

    // The token files hold exactly the documents, each with its end, in sequences of at most 256.
    let json = std::fs::read(opened.file("tokenizer.json").unwrap()).unwrap();
    let tokenizer = TextTokenizer::from_json(&json).unwrap();
    let lengths = tokenizer.bytes_per_token();
    for (split, rows) in [("train", &train), ("test", &test)] {
        let file = TokenFile::open(&opened.path().join("tokens").join(split)).unwrap();
        let (mut ends, mut bytes, mut tokens) = (0, 0, Vec::new());
        for index in 0..file.sequences() {
            file.sequence(index, &mut tokens).unwrap();
            assert!((1..=256).contains(&tokens.len()));
            ends += tokens.iter().filter(|&&token| token == tokenizer.end_of_text()).count();
            bytes += tokens
                .iter()
                .map(|&token| lengths[token as usize] as usize)
                .sum::<usize>();
        }
        assert_eq!(ends, rows.len(), "{split}");
        assert_eq!(
            bytes,
            rows.iter().map(|row| row.get_string(1).unwrap().len()).sum::<usize>(),
            "{split}"
        );
    }
    let tokens = TokenFile::open(&opened.path().join("tokens/train")).unwrap().tokens();
    assert_eq!(tokens as f64, metric("tokensTrain"));

    let card = std::fs::read_to_string(opened.file("README.md").unwrap()).unwrap();
    assert!(card.starts_with("---\nlicense:\n- cc0-1.0\n- unknown\n"), "{card}");
    assert!(card.find("> For demonstration.").unwrap() < card.find("## Sources").unwrap());
    for said in [
        "GopherAlphabeticWords 0.7",
        "C4ShortLine off",
        "similar by 80 %",
        "| personal data | Redact |",
        "seed 17",
        "1024 entries",
        "256 tokens, BestFit",
        "resemble one by 80 % or more were dropped",
    ] {
        assert!(card.contains(said), "{said:?} is not in {card}");
    }

    // The same again is the same, bit for bit; temporary files are gone.
    let (again, _) = published(&plays(), &folder.path().join("two"));
    assert_eq!(again.artifact.unwrap().digest, report.artifact.unwrap().digest);
    assert!(!folder.path().join("one/attempts/a1/scratch").exists());
}

#[test]
fn each_page_becomes_what_the_readme_says() {
    let folder = tempfile::tempdir().unwrap();
    let (report, opened) = published(&pages(|_| {}), folder.path());
    let kept: BTreeMap<String, String> = rows(&opened, "train")
        .iter()
        .map(|row| {
            (
                row.get_string(3).unwrap().rsplit('/').next().unwrap().to_owned(),
                row.get_string(1).unwrap().clone(),
            )
        })
        .collect();
    // In the order of the file, globe-mirrored.html comes first; the other two are its duplicates.
    let names: Vec<&str> = kept.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["globe-mirrored.html", "players-wanted.html", "prompt-book.html"]
    );
    let steps = figures(&opened)["steps"].clone();
    assert_eq!(steps["nearDuplicates"]["dropped"], json!({"duplicate": 1}), "{steps}");
    assert_eq!(steps["exactDuplicates"]["dropped"], json!({"duplicate": 1}), "{steps}");
    assert_eq!(report.metrics["droppedByQuality"], 1.0);

    let card = std::fs::read_to_string(opened.file("README.md").unwrap()).unwrap();
    assert!(
        !card.contains("| test |") && !card.contains("test split"),
        "nothing is held out: {card}"
    );

    let wanted = &kept["players-wanted.html"];
    assert!(
        wanted.contains("write to\n<EMAIL> or ring") || wanted.contains("write to <EMAIL> or ring"),
        "{wanted}"
    );
    assert!(
        wanted.contains("at <PHONE> on a weekday") && !wanted.contains("1632"),
        "{wanted}"
    );
    assert_eq!(report.metrics["piiSpansRedacted"], 2.0);

    let globe = &kept["globe-mirrored.html"];
    assert!(
        globe.starts_with("The first Globe\n\nThe first Globe stood on the south bank"),
        "{globe}"
    );
    assert!(globe.contains("\n\nThe fire\n\n"), "{globe}");
    assert!(
        !kept
            .values()
            .any(|text| text.contains("Home") || text.contains("feed") || text.contains("<p"))
    );
}

#[test]
fn the_checked_in_crawl_holds_the_checked_in_pages() {
    let mut warc = String::new();
    MultiGzDecoder::new(File::open(data("pages.warc.gz")).unwrap())
        .read_to_string(&mut warc)
        .unwrap();
    let pages: Vec<PathBuf> = std::fs::read_dir(data("pages"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(pages.len(), 6);
    for page in pages {
        let html = std::fs::read_to_string(&page).unwrap();
        assert!(warc.contains(&html), "{}: run the example make_warc", page.display());
    }
}

#[test]
fn preferences_are_split_by_first_question_and_stay_out_of_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let (report, opened) = published(&preferences(), folder.path());
    let (train, test) = (rows(&opened, "train"), rows(&opened, "test"));
    assert_eq!(train.len() + test.len(), 2303);
    assert_eq!(
        report.metrics["droppedUnreadable"], 9.0,
        "4 empty answers, 5 pairs of different prompts"
    );
    let first = |row: &Row| {
        use parquet::record::ListAccessor;
        let prompt = row.get_list(1).unwrap();
        prompt.get_group(0).unwrap().get_string(1).unwrap().to_lowercase()
    };
    let questions = |rows: &[Row]| rows.iter().map(first).collect::<BTreeSet<_>>();
    assert!(questions(&train).is_disjoint(&questions(&test)));
    assert!((0.15..0.25).contains(&(test.len() as f64 / 2303.0)), "{}", test.len());

    // No conversation's text outside of the Parquet files: not in report, card, manifest or message.
    let said = [
        serde_json::to_string(&report).unwrap(),
        serde_json::to_string(opened.manifest().unwrap()).unwrap(),
        std::fs::read_to_string(opened.file("report.json").unwrap()).unwrap(),
        std::fs::read_to_string(opened.file("README.md").unwrap()).unwrap(),
    ]
    .concat()
    .to_lowercase();
    let long = |question: &&String| question.len() > 20;
    assert!(
        questions(&train)
            .iter()
            .chain(&questions(&test))
            .filter(long)
            .all(|question| !said.contains(question.as_str()))
    );
}

#[test]
fn a_training_record_that_resembles_a_held_out_one_is_the_one_that_goes() {
    // Over the seeds each of the three alike pages is held out sometimes; never is one in train while another is in test,
    // whether or not duplicates within a split are dropped.
    for deduplicate in [true, false] {
        let mut overlaps = 0.0;
        for seed in 0..12 {
            let folder = tempfile::tempdir().unwrap();
            let config = pages(|config| {
                config["seed"] = json!(seed);
                config["heldOutPercent"] = json!(40);
                config["quality"] = Value::Null;
                if !deduplicate {
                    config["deduplicateExact"] = json!(false);
                    config["minHashSimilarityPercent"] = Value::Null;
                }
            });
            let (report, opened) = match run(&config, folder.path()) {
                Err(error) if error.reason == FailureReason::NothingLeft => continue,
                _ => published(&config, &folder.path().join("again")),
            };
            let globes = |split: &str| {
                rows(&opened, split)
                    .iter()
                    .filter(|row| row.get_string(3).unwrap().contains("globe"))
                    .count()
            };
            let (train, test) = (globes("train"), globes("test"));
            assert!(train == 0 || test == 0, "seed {seed}: {train} and {test}");
            assert!(!deduplicate || train + test == 1, "seed {seed}: {train} and {test}");
            overlaps += report.metrics["droppedAsHeldOutOverlap"];
        }
        assert!(overlaps > 0.0);
    }
}

#[test]
fn a_record_that_is_dropped_for_personal_data_takes_no_other_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("two.jsonl");
    let line = |end: &str| {
        let words: String = (0..200).map(|n| format!("word{n} ")).collect();
        json!({"text": format!("{words}{end}")}).to_string() + "\n"
    };
    std::fs::write(&file, line("write to bob@globe.example") + &line("write to us")).unwrap();
    let config = pages(|c| {
        c["sources"] = json!([{"name": "s", "uri": uri(&file), "format": {"jsonl": {"textField": "text"}}}]);
        c["quality"] = Value::Null;
        c["languages"] = json!([]);
        c["pii"] = json!("Drop");
    });
    let (report, opened) = published(&config, &folder.path().join("run"));
    assert_eq!(report.metrics["droppedForPii"], 1.0);
    assert_eq!(rows(&opened, "train")[0].get_string(0).unwrap(), "s-000000002");
}

#[test]
fn what_cannot_be_carried_out_says_why_and_publishes_nothing() {
    let truncated = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(data("commoncrawl-sample.warc.gz")).unwrap();
    let warc = truncated.path().join("cut.warc.gz");
    std::fs::write(&warc, &bytes[..bytes.len() / 2]).unwrap();
    let cut = uri(&warc);
    let missing = uri(&truncated.path().join("none/*.warc.gz"));
    let empty = truncated.path().join("empty.jsonl");
    std::fs::write(&empty, "\n").unwrap();
    let statuses = truncated.path().join("statuses.warc");
    let gone = "HTTP/1.1 410 Gone\r\n\r\n";
    let record = format!(
        "WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {}\r\n\r\n{gone}\r\n\r\n",
        gone.len()
    );
    std::fs::write(&statuses, record).unwrap();
    let also = |c: &mut Value, path: &Path, format: Value| {
        let source = json!({"name": "also", "uri": uri(path), "format": format});
        c["sources"].as_array_mut().unwrap().push(source);
    };
    let cases: [(FailureReason, &str, Value); 12] = [
        (
            FailureReason::NothingLeft,
            "source \"also\" holds no document: it is empty",
            pages(|c| also(c, &empty, json!({"jsonl": {"textField": "text"}}))),
        ),
        (
            FailureReason::NothingLeft,
            "source \"also\" holds no document: of 1 records none could be read, 1 for httpStatus",
            pages(|c| also(c, &statuses, json!("webCrawl"))),
        ),
        (
            FailureReason::ConfigInvalid,
            "set 1 to 5242880",
            pages(|c| also(c, &empty, json!({"text": {"splitBytes": 20_000_000}}))),
        ),
        (
            FailureReason::InputCorrupt,
            "cut.warc.gz is damaged at",
            pages(|c| c["sources"][0]["uri"] = json!(cut)),
        ),
        (
            FailureReason::InputNotFound,
            "none",
            pages(|c| c["sources"][0]["uri"] = json!(missing)),
        ),
        (
            FailureReason::ConfigInvalid,
            "known are",
            pages(|c| c["languages"][0]["code"] = json!("xx")),
        ),
        (
            FailureReason::ConfigInvalid,
            "has no rule C4ShortLine",
            pages(|c| c["quality"]["preset"] = json!("Gopher")),
        ),
        (
            FailureReason::ConfigInvalid,
            "task Preference reads",
            pages(|c| c["task"] = json!("Preference")),
        ),
        (
            FailureReason::NothingLeft,
            "closest to en",
            pages(|c| c["languages"][0]["code"] = json!("de")),
        ),
        (
            FailureReason::GateFailed,
            "documentsKept is 3",
            pages(|c| c["gates"] = json!([{"metric": "documentsKept", "min": 100}])),
        ),
        (
            FailureReason::ConfigInvalid,
            "lower vocabSize",
            pages(|c| c["encode"] = json!({"vocabSize": 60000, "sequenceLengthTokens": 256, "packing": "Concatenate"})),
        ),
        (FailureReason::NothingLeft, "1 are held out; no step dropped any", {
            // The only document is held out.
            let file = truncated.path().join("same.jsonl");
            let line = |text: &str| json!({"text": text}).to_string() + "\n";
            std::fs::write(
                &file,
                line("All the world's a stage, and all the men and women merely players."),
            )
            .unwrap();
            pages(|c| {
                c["sources"] = json!([{"name": "s", "uri": uri(&file), "format": {"jsonl": {"textField": "text"}}}]);
                c["quality"] = Value::Null;
                c["heldOutPercent"] = json!(90);
                c["seed"] = json!(3);
            })
        }),
    ];
    for (reason, words, config) in cases {
        let output = tempfile::tempdir().unwrap();
        let error = run(&config, output.path()).unwrap_err();
        assert_eq!(error.reason, reason, "{error}");
        assert!(error.message.contains(words), "{words:?} is not in {error}");
        assert!(!output.path().join("manifest.json").exists());
    }
}

#[test]
fn a_stage_that_is_asked_to_stop_stops() {
    let folder = tempfile::tempdir().unwrap();
    let context = context(folder.path());
    context.interrupt.set();
    let config: CurateConfig = serde_json::from_value(plays()).unwrap();
    let error = strata_curate::run(&config, &context).unwrap_err();
    assert_eq!(error.reason, FailureReason::Interrupted);
    assert!(!folder.path().join("manifest.json").exists());
}
