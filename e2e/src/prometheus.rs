//! A real Prometheus on this machine that scrapes a bed as the chart's monitors say: what a dashboard or an alert asks is
//! asked of it.

mod targets;

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::bed::Bed;
use crate::bed::go::Program;
use crate::bed::network::http;
use crate::namespace::tool;
use crate::{bed::command, wait};

pub use targets::scrape_configs;

/// Longest time until it answers.
const START: Duration = Duration::from_secs(30);
/// Time between two scrapes, and two evaluations of rules: short, for tests.
const INTERVAL: &str = "1s";

/// A running Prometheus; ends when dropped, and its data with it.
#[derive(Debug)]
pub struct Prometheus {
    url: String,
    client: reqwest::Client,
    folder: tempfile::TempDir,
    _process: Child,
}

impl Prometheus {
    /// Starts one with these `scrape_configs` and this rule file.
    ///
    /// # Errors
    /// It was not compiled yet, or does not take what it is given; the message is its own.
    pub async fn start(bed: &Bed, scrape_configs: Vec<Value>, rules: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let file = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(file("rules.yaml"), rules)?;
        let configuration = json!({
            "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL, "scrape_timeout": INTERVAL},
            "rule_files": [file("rules.yaml")],
            "scrape_configs": scrape_configs,
        });
        // JSON is YAML.
        std::fs::write(file("prometheus.yaml"), configuration.to_string())?;
        let log = std::fs::File::create(file("log"))?;
        // Free now; that another program takes it in between is unlikely, and is said.
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let process = Command::new(tool(Program::Prometheus)?)
            .arg(format!("--config.file={}", file("prometheus.yaml")))
            .arg(format!("--storage.tsdb.path={}", file("data")))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .env("KUBECONFIG", bed.kubeconfig())
            .env("NO_PROXY", "*")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("cannot run prometheus")?;
        let prometheus = Self {
            url: format!("http://{address}"),
            client: http()?,
            folder,
            _process: process,
        };
        let ready = format!("{}/-/ready", prometheus.url);
        let started = wait::poll("Prometheus is ready", START, || async {
            let answer = prometheus.client.get(&ready).send().await;
            Ok(answer.is_ok_and(|answer| answer.status().is_success()).then_some(()))
        });
        started.await.with_context(|| prometheus.explain())?;
        Ok(prometheus)
    }

    /// The values of an expression now, without those that are no number.
    ///
    /// # Errors
    /// The expression is none.
    pub async fn query(&self, expression: &str) -> Result<Vec<f64>> {
        let data = self.get("query", &[("query", expression)]).await?;
        let result = data["result"].as_array().cloned().unwrap_or_default();
        let values = result
            .iter()
            .filter_map(|series| series["value"][1].as_str()?.parse().ok());
        Ok(values.filter(|value: &f64| value.is_finite()).collect())
    }

    /// The names of the metrics that an expression reads.
    ///
    /// # Errors
    /// The expression is none.
    pub async fn metrics_of(&self, expression: &str) -> Result<Vec<String>> {
        let tree = self.get("parse_query", &[("query", expression)]).await?;
        let mut names = Vec::new();
        selectors(&tree, &mut names);
        ensure!(!names.is_empty(), "{expression} reads no metric");
        Ok(names)
    }

    /// Every rule, as Prometheus has it.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn rules(&self) -> Result<Vec<Value>> {
        let data = self.get("rules", &[]).await?;
        let groups = data["groups"].as_array().cloned().unwrap_or_default();
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().cloned());
        Ok(rules.flatten().collect())
    }

    /// The alerts that are pending or firing, with their labels.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn alerts(&self) -> Result<Vec<Value>> {
        let data = self.get("alerts", &[]).await?;
        Ok(data["alerts"].as_array().cloned().unwrap_or_default())
    }

    /// What it scrapes, with the last error of each target, for a failed test.
    pub async fn targets(&self) -> String {
        let said = self.get("targets", &[("state", "active")]).await.unwrap_or_default();
        let targets = said["activeTargets"].as_array().cloned().unwrap_or_default();
        let line = |target: &Value| {
            format!(
                "{} {} {} {}",
                target["scrapePool"], target["scrapeUrl"], target["health"], target["lastError"]
            )
        };
        let lines: Vec<String> = targets.iter().map(line).collect();
        format!("targets:\n{}\n{}", lines.join("\n"), self.explain())
    }

    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value> {
        let url = reqwest::Url::parse_with_params(&format!("{}/api/v1/{path}", self.url), query)?;
        let answer: Value = self.client.get(url).send().await?.json().await?;
        ensure!(answer["status"] == "success", "{path} {query:?}: {}", answer["error"]);
        Ok(answer["data"].clone())
    }

    fn explain(&self) -> String {
        let log = self.folder.path().join("log");
        format!("Prometheus says:\n{}", command::tail_of_file(&log, 12))
    }
}

/// Walks the tree of a parsed expression.
fn selectors(tree: &Value, names: &mut Vec<String>) {
    match tree {
        Value::Object(node) => {
            if matches!(
                node.get("type").and_then(Value::as_str),
                Some("vectorSelector" | "matrixSelector")
            ) {
                names.extend(node.get("name").and_then(Value::as_str).map(str::to_owned));
            }
            node.values().for_each(|value| selectors(value, names));
        }
        Value::Array(all) => all.iter().for_each(|value| selectors(value, names)),
        _ => {}
    }
}
