//! What the four kinds share: references, storage, pods, gates, numbers.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::{EnvVar, LocalObjectReference, ResourceRequirements, Toleration};
use kube::KubeSchema;
use kube::core::cel::{Message, Rule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Hardware;

/// Rule of a union: exactly one of `fields` is set.
///
/// The message is a choice between whole texts: the server cannot bound what `string(int)` costs and would refuse the CRD.
pub(crate) fn exactly_one(fields: &[&str]) -> Rule {
    let count = |field: &&str| format!("(has(self.{field}) ? 1 : 0)");
    let sum = fields.iter().map(count).collect::<Vec<_>>().join(" + ");
    let text = |got: usize| format!("'exactly one of {} must be set, got {got}'", fields.join(", "));
    let message = (2..fields.len()).rev().fold(text(fields.len()), |rest, got| {
        format!("{sum} == {got} ? {} : {rest}", text(got))
    });
    Rule::new(format!("{sum} == 1")).message(Message::Expression(format!("{sum} == 0 ? {} : {message}", text(0))))
}

/// The rule of an object's name; the message is also that of the operator's `check`.
pub(crate) fn name_rule() -> Rule {
    Rule::new("self.metadata.name.matches('^[a-z][-a-z0-9]*$') && size(self.metadata.name) <= 48").message(NAME_RULE)
}

/// What an object's name must be.
pub const NAME_RULE: &str = "metadata.name must begin with a letter, hold only a-z, 0-9 and '-', and have at most 48 characters: Jobs, Services and labels are named after it";

/// The rule of a decimal number that must be above 0.
pub(crate) fn above_zero(example: &str) -> [Rule; 1] {
    let message = format!("must be above 0, such as \"{example}\"");
    [Rule::new("self.matches('^[0-9.]*[1-9]')").message(Message::Message(message))]
}

/// The rule of a length of time.
fn longer_than_zero() -> [Rule; 1] {
    [Rule::new("self.matches('[1-9]')").message("must be longer than 0, such as 30m")]
}

/// The rule of a short length of time.
fn no_latency() -> [Rule; 1] {
    [Rule::new("self.matches('[1-9]')").message("must be longer than 0, such as 500ms")]
}

/// The rule of a place in storage.
fn plain_path() -> [Rule; 1] {
    [Rule::new("!self.matches('^pvc://[^/]+(/.*)?/(/|[.][.]?(/|$))')")
        .message("the path must not hold '.', '..' or empty parts: write pvc://CLAIM/FOLDER/FILE")]
}

/// A decimal number, written as a string so that no tool rounds it on its way: `"0.1"`, `"3e-4"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Decimal(
    #[schemars(length(max = 32), regex(pattern = r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?$"))] pub String,
);

impl Decimal {
    /// The number's value; `None` if the text is no finite number (the CRD's schema refuses such a text).
    pub fn value(&self) -> Option<f64> {
        self.0.parse().ok().filter(|value: &f64| value.is_finite())
    }
}

impl From<&str> for Decimal {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A length of time such as `30s`, `10m`, `1h30m`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Duration(
    #[schemars(
        length(max = 32),
        regex(pattern = r"^([0-9]{1,6}(h|m|s))+$"),
        extend("x-kubernetes-validations" = longer_than_zero())
    )]
    pub String,
);

impl Duration {
    /// The length in seconds; `None` if the text is no duration (the CRD's schema refuses such a text).
    pub fn seconds(&self) -> Option<u64> {
        let mut total: u64 = 0;
        let mut number: Option<u64> = None;
        for c in self.0.chars() {
            if let Some(digit) = c.to_digit(10) {
                number = Some(number.unwrap_or(0).checked_mul(10)?.checked_add(digit.into())?);
                continue;
            }
            let unit_seconds = match c {
                'h' => 3600,
                'm' => 60,
                's' => 1,
                _ => return None,
            };
            total = total.checked_add(number.take()?.checked_mul(unit_seconds)?)?;
        }
        (number.is_none() && !self.0.is_empty()).then_some(total)
    }
}

impl From<&str> for Duration {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// A short length of time such as `500ms`, `2s`, `1.5s`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Latency(
    #[schemars(
        length(max = 16),
        regex(pattern = r"^[0-9]{1,6}(\.[0-9]{1,3})?(ms|s)$"),
        extend("x-kubernetes-validations" = no_latency())
    )]
    pub String,
);

impl Latency {
    /// The length in seconds; `None` if the text is none (the CRD's schema refuses such a text).
    pub fn seconds(&self) -> Option<f64> {
        let (number, unit) = match self.0.strip_suffix("ms") {
            Some(number) => (number, 1e-3),
            None => (self.0.strip_suffix('s')?, 1.0),
        };
        let is_plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
        number
            .parse::<f64>()
            .ok()
            .filter(|_| is_plain)
            .map(|number| number * unit)
    }
}

impl From<&str> for Latency {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// A place in storage: `pvc://CLAIM/PATH`, a path in a PersistentVolumeClaim of the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct DataUri(
    #[schemars(
        length(max = 512),
        regex(pattern = r"^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^\s]*)?$"),
        extend("x-kubernetes-validations" = plain_path())
    )]
    pub String,
);

impl From<&str> for DataUri {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// A resource of a kind that the field's name says, in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reference {
    /// Its name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Pins one published artifact of it; without, the last published one is used and followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub digest: Option<String>,
}

/// A model that something starts from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["pretrainJob", "alignmentJob", "uri"]))]
pub struct ModelSource {
    /// The model that a PretrainJob published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pretrain_job: Option<Reference>,
    /// The model that an AlignmentJob published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_job: Option<Reference>,
    /// A GGUF file, or a folder in Hugging Face layout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<DataUri>,
}

/// A bound on one metric; a result outside of it is not published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.min) || has(self.max)").message("a gate needs min, max or both"))]
pub struct Gate {
    /// Name of the metric; the page of each kind in the docs lists them.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z][a-zA-Z0-9]*$"))]
    pub metric: String,
    /// Smallest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<Decimal>,
    /// Largest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Decimal>,
}

/// Where results are published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// Folder for the artifacts of this resource's runs. The claim is never deleted by Strata.
    pub uri: DataUri,
}

/// What a user may set on the pods that a resource starts. Everything else about a pod is Strata's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodOverrides {
    /// ServiceAccount of the pods; without, the namespace's `default`. Its token is not mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub service_account_name: Option<String>,
    /// Secrets to pull images with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Priority class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub priority_class_name: Option<String>,
    /// Runtime class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub runtime_class_name: Option<String>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), inner(length(max = 63)))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// Requests and limits of the container; the kind's page says what it asks for without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// More environment variables of the container; names that begin with `STRATA_` are Strata's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-validations" = [
        Rule::new("self.all(variable, !variable.name.startsWith('STRATA_'))")
            .message("names that begin with STRATA_ are Strata's: choose another"),
    ]))]
    pub env: Vec<EnvVar>,
    /// More labels of the pods; names of the group `strata.dev` are Strata's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(inner(length(max = 63)), extend("maxProperties" = 32, "x-kubernetes-validations" = [
        Rule::new("self.all(key, !key.startsWith('strata.dev/') && !(key in ['app.kubernetes.io/name', \
             'app.kubernetes.io/instance', 'app.kubernetes.io/component', 'app.kubernetes.io/managed-by', \
             'app.kubernetes.io/part-of']))")
            .message("keys that begin with strata.dev/, and app.kubernetes.io/name, instance, component, managed-by and part-of, are set by Strata: choose another"),
    ]))]
    pub labels: BTreeMap<String, String>,
    /// More annotations of the pods; names of the group `strata.dev` are Strata's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(inner(length(max = 4096)), extend("maxProperties" = 32, "x-kubernetes-validations" = [
        Rule::new("self.all(key, !key.startsWith('strata.dev/'))")
            .message("keys that begin with strata.dev/ are set by Strata: choose another"),
    ]))]
    pub annotations: BTreeMap<String, String>,
}

/// What every kind's spec holds besides its own fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Common {
    /// Stops the work and frees its pods until it is false again; what was saved is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
    /// Where results are published; without, the operator's default (`defaultStorage` in the chart's values).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
    /// Attempts that may fail before the run is given up (default 3). Interruptions do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub retries: Option<i32>,
    /// Longest time that one attempt may take; without, there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Duration>,
    /// Raise it to run again although nothing else changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub run_generation: Option<i64>,
    /// Who decides when work begins; without, it begins at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<crate::Scheduler>,
    /// What the pods compute on. Of an InferenceService: the serving pods; what prepares the weights needs a CPU only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<Hardware>,
    /// Settings of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodOverrides>,
}

/// Course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Schedule {
    /// Half a cosine down to a tenth of the peak.
    #[default]
    Cosine,
    /// Stays at the peak.
    Constant,
}

/// What is saved while training, so that a killed pod loses little.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// Time between two checkpoints (default 10m).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<Duration>,
    /// Number of checkpoints kept (default 2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub keep: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read() {
        for (text, seconds) in [
            ("30s", Some(30)),
            ("1h30m", Some(5400)),
            ("", None),
            ("5", None),
            ("m", None),
            ("3d", None),
        ] {
            assert_eq!(Duration::from(text).seconds(), seconds, "{text}");
        }
    }
    #[test]
    fn latencies_are_read() {
        for (text, seconds) in [
            ("500ms", Some(0.5)),
            ("2s", Some(2.0)),
            ("1.5s", Some(1.5)),
            ("5", None),
            ("1m", None),
            ("-1s", None),
            ("infs", None),
        ] {
            assert_eq!(Latency::from(text).seconds(), seconds, "{text}");
        }
    }
}
