//! The data set's card: a README that `datasets` reads by its YAML head and people read by its notice and figures.

use std::fmt::Write;

use serde_json::Value;
use strata_contract::{CurateConfig, Task};

use super::parquet::features;
use crate::check::Checked;
use crate::figures::{Figures, SplitFigures};

/// Licences that the hub knows, by SPDX name.
const HUB_LICENSES: [&str; 16] = [
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "CC-BY-2.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
    "GPL-3.0",
    "LGPL-3.0",
    "ODC-By",
    "ODbL",
];

/// The card's text.
pub(crate) fn write(checked: &Checked<'_>, figures: &Figures) -> String {
    let mut out = String::from("---\n");
    head(&mut out, checked.config, figures).expect("writing to a string does not fail");
    out.push_str("---\n\n");
    body(&mut out, checked, figures).expect("writing to a string does not fail");
    out
}

/// The splits that there are.
fn splits<'f>(config: &CurateConfig, figures: &'f Figures) -> Vec<(&'static str, &'f SplitFigures)> {
    let mut splits = vec![("train", &figures.train)];
    if config.held_out_percent > 0 {
        splits.push(("test", &figures.held_out));
    }
    splits
}

/// YAML; every text in it is a JSON string, which YAML reads as it is.
fn head(out: &mut String, config: &CurateConfig, figures: &Figures) -> std::fmt::Result {
    let quote = |text: &str| Value::from(text).to_string();
    let mut licenses: Vec<String> = config
        .sources
        .iter()
        .map(|source| hub_license(source.license.as_deref()))
        .collect();
    licenses.sort();
    licenses.dedup();
    writeln!(out, "license:")?;
    licenses.iter().try_for_each(|license| writeln!(out, "- {license}"))?;
    if !config.card.title.is_empty() {
        writeln!(out, "pretty_name: {}", quote(&config.card.title))?;
    }
    if !config.languages.is_empty() {
        writeln!(out, "language:")?;
        config
            .languages
            .iter()
            .try_for_each(|language| writeln!(out, "- {}", quote(&language.code)))?;
    }
    let splits = splits(config, figures);
    writeln!(out, "configs:\n- config_name: default\n  data_files:")?;
    for (name, _) in &splits {
        writeln!(
            out,
            "  - split: {name}\n    path: {}",
            quote(&format!("data/{name}-*.parquet"))
        )?;
    }
    writeln!(out, "dataset_info:\n  features:")?;
    for (name, feature) in features(config.task).as_object().into_iter().flatten() {
        match feature {
            Value::Array(items) => {
                writeln!(out, "  - name: {name}\n    list:")?;
                for (field, feature) in items.iter().filter_map(Value::as_object).flatten() {
                    writeln!(
                        out,
                        "    - name: {field}\n      dtype: {}",
                        feature["dtype"].as_str().unwrap_or("string")
                    )?;
                }
            }
            value => writeln!(
                out,
                "  - name: {name}\n    dtype: {}",
                value["dtype"].as_str().unwrap_or("string")
            )?,
        }
    }
    writeln!(out, "  splits:")?;
    for (name, split) in &splits {
        writeln!(
            out,
            "  - name: {name}\n    num_bytes: {}\n    num_examples: {}",
            split.bytes, split.documents
        )?;
    }
    Ok(())
}

fn hub_license(spdx: Option<&str>) -> String {
    match spdx {
        None => "unknown".into(),
        Some(name) if HUB_LICENSES.contains(&name) => name.to_ascii_lowercase(),
        Some(_) => "other".into(),
    }
}

fn body(out: &mut String, checked: &Checked<'_>, figures: &Figures) -> std::fmt::Result {
    let config = checked.config;
    let card = &config.card;
    let title = if card.title.is_empty() {
        "Data set"
    } else {
        card.title.as_str()
    };
    writeln!(out, "# {title}\n")?;
    if !card.notice.is_empty() {
        let lines: Vec<String> = card.notice.trim().lines().map(|line| format!("> {line}")).collect();
        writeln!(out, "{}\n", lines.join("\n"))?;
    }
    if !card.description.is_empty() {
        writeln!(out, "{}\n", card.description.trim())?;
    }
    let records = match config.task {
        Task::Pretraining => "Documents of running text (`text`)",
        Task::Preference => {
            "Pairs of conversations: `prompt`, then a better (`chosen`) and a worse (`rejected`) answer, each a list of \
             messages"
        }
    };
    writeln!(out, "{records}. Made by Strata; `report.json` has all figures.\n")?;

    writeln!(
        out,
        "## Sources\n\n| source | licence | documents seen | kept | bytes seen | kept |\n|---|---|--:|--:|--:|--:|"
    )?;
    for source in &config.sources {
        let seen = figures.sources.get(&source.name).cloned().unwrap_or_default();
        let license = source.license.as_deref().unwrap_or("unknown");
        writeln!(
            out,
            "| {} | {license} | {} | {} | {} | {} |",
            source.name, seen.documents_seen, seen.documents_kept, seen.bytes_seen, seen.bytes_kept
        )?;
    }

    writeln!(out, "\n## Configuration\n\n| what | value |\n|---|---|")?;
    for (what, value) in configuration(config) {
        writeln!(out, "| {what} | {value} |")?;
    }

    writeln!(
        out,
        "\n## Steps\n\n| step | seen | kept | bytes dropped | dropped for | counted |\n|---|--:|--:|--:|---|---|"
    )?;
    let list = |counts: &std::collections::BTreeMap<String, u64>| {
        counts
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    for (kind, step) in &figures.steps {
        let (dropped, counts) = (list(&step.dropped), list(&step.counts));
        writeln!(
            out,
            "| {} | {} | {} | {} | {dropped} | {counts} |",
            kind.title(),
            step.seen,
            step.kept,
            step.bytes_dropped
        )?;
    }

    writeln!(
        out,
        "\n## Splits\n\n| split | documents | bytes | tokens |\n|---|--:|--:|--:|"
    )?;
    for (name, split) in splits(config, figures) {
        let tokens = if config.encode.is_some() {
            split.tokens.to_string()
        } else {
            "–".into()
        };
        writeln!(out, "| {name} | {} | {} | {tokens} |", split.documents, split.bytes)?;
    }
    if let (1.., Some(percent)) = (config.held_out_percent, checked.near_percent) {
        let group = match config.task {
            Task::Pretraining => "by document",
            Task::Preference => "by first human turn",
        };
        writeln!(
            out,
            "\nThe test split holds about {} % of the records, chosen {group} before anything was deduplicated or trained \
             on them; training records that equal a test record or resemble one by {percent} % or more were dropped.",
            config.held_out_percent
        )?;
    }
    Ok(())
}

/// What was asked for, as the configuration has it.
fn configuration(config: &CurateConfig) -> Vec<(&'static str, String)> {
    let or = |words: Vec<String>, none: &str| {
        if words.is_empty() {
            none.to_owned()
        } else {
            words.join(", ")
        }
    };
    let languages = config.languages.iter();
    let languages = languages.map(|one| format!("{} from {} % confidence", one.code, one.min_confidence_percent));
    let quality = config.quality.as_ref().map(|quality| {
        let overrides = quality.overrides.iter().map(|entry| match entry.threshold {
            Some(threshold) => format!("{:?} {threshold}", entry.rule),
            None => format!("{:?} off", entry.rule),
        });
        let preset = format!("preset {:?}", quality.preset);
        [preset].into_iter().chain(overrides).collect()
    });
    let exact = config.deduplicate_exact.then(|| "equal".to_owned());
    let near = config.min_hash_similarity_percent;
    let near = near.map(|percent| format!("similar by {percent} % or more (MinHash of word 5-grams)"));
    let mut rows = vec![
        ("languages", or(languages.collect(), "all")),
        ("quality filters", or(quality.unwrap_or_default(), "none")),
        (
            "duplicates dropped",
            or(exact.into_iter().chain(near).collect(), "none"),
        ),
        ("personal data", format!("{:?}", config.pii)),
        (
            "held out",
            format!("{} %, seed {}", config.held_out_percent, config.seed),
        ),
    ];
    if let Some(encode) = &config.encode {
        rows.extend([
            ("tokenizer", format!("byte-level BPE, {} entries", encode.vocab_size)),
            (
                "sequences",
                format!("{} tokens, {:?}", encode.sequence_length_tokens, encode.packing),
            ),
        ]);
    }
    rows
}
