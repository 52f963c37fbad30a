//! The data set's card: a README that `datasets` reads by its YAML head and people read by its notice and figures.

use std::fmt::Write;

use serde_json::Value;
use strata_contract::{CurateConfig, Task};

use super::parquet::features;
use crate::figures::Figures;

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
pub(crate) fn write(config: &CurateConfig, figures: &Figures) -> String {
    let mut out = String::from("---\n");
    head(&mut out, config, figures).expect("writing to a string does not fail");
    out.push_str("---\n\n");
    body(&mut out, config, figures).expect("writing to a string does not fail");
    out
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
    let splits: Vec<_> = [("train", &figures.train), ("test", &figures.held_out)]
        .into_iter()
        .filter(|(name, _)| *name == "train" || config.held_out_percent > 0)
        .collect();
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

fn body(out: &mut String, config: &CurateConfig, figures: &Figures) -> std::fmt::Result {
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

    writeln!(
        out,
        "\n## Steps\n\n| step | seen | kept | dropped for | counted |\n|---|--:|--:|---|---|"
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
            "| {} | {} | {} | {dropped} | {counts} |",
            kind.title(),
            step.seen,
            step.kept
        )?;
    }

    writeln!(
        out,
        "\n## Splits\n\n| split | documents | bytes | tokens |\n|---|--:|--:|--:|"
    )?;
    for (name, split) in [("train", &figures.train), ("test", &figures.held_out)] {
        let tokens = if config.encode.is_some() {
            split.tokens.to_string()
        } else {
            "–".into()
        };
        writeln!(out, "| {name} | {} | {} | {tokens} |", split.documents, split.bytes)?;
    }
    let group = match config.task {
        Task::Pretraining => "by document",
        Task::Preference => "by first human turn",
    };
    writeln!(
        out,
        "\nThe test split holds about {} % of the records, chosen {group} before anything was deduplicated or trained on them; \
         training records that equal or resemble a test record were dropped.",
        config.held_out_percent
    )
}
