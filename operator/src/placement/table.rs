//! The accelerator table: data that ships with the operator, with what the chart's values add to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use k8s_openapi::api::core::v1::Taint;
use serde::Deserialize;
use serde_json::Value;
use strata_api::Allocation;

use super::device::DeviceKind;

/// What ships with the operator.
const BUILT_IN: &str = include_str!("accelerators.yaml");
/// Largest file of additions, in bytes.
pub const FILE_LIMIT_BYTES: u64 = 1 << 20;
/// Most rows of the table, and most declared pools.
const MAX_ROWS: usize = 256;

static DEFAULT: LazyLock<Arc<Table>> =
    LazyLock::new(|| Arc::new(Table::read("").expect("the table in the binary is tested")));

/// What is known of hardware.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Table {
    /// Currency of all prices.
    pub currency: String,
    /// Labels of nodes that the cloud may take back.
    pub spot: Vec<Label>,
    /// Labels that name a node's pool.
    pub pool_labels: Vec<String>,
    /// Signs of InfiniBand.
    pub infiniband: Infiniband,
    /// Conditions of nodes that keep work with accelerators away.
    pub unhealthy_conditions: Vec<String>,
    /// Label with the shape of the slice that a node is part of.
    pub topology_label: String,
    /// The accelerators.
    pub accelerators: Vec<Accelerator>,
    /// Pools that are there by word of the administrator: they may be at zero.
    #[serde(default)]
    pub pools: Vec<DeclaredPool>,
}

/// A label with its value.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Signs of InfiniBand.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Infiniband {
    /// Resources, of which a node has one.
    pub resources: Vec<String>,
    /// A label.
    pub label: Label,
}

/// What an engine must be compiled for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Processors.
    Cpu,
    /// NVIDIA's GPUs.
    Cuda,
    /// AMD's GPUs.
    Rocm,
    /// Google's TPUs.
    Tpu,
}

impl Family {
    /// As a message names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Cuda => "CUDA",
            Self::Rocm => "ROCm",
            Self::Tpu => "TPU",
        }
    }
}

/// A row of the table.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Accelerator {
    /// What `spec.hardware.accelerator` says.
    pub name: String,
    /// What an engine must be compiled for.
    pub family: Family,
    /// What a pod asks for; absent for the CPU.
    #[serde(default)]
    pub resource: Option<String>,
    /// What it asks for by claim; absent: it cannot.
    #[serde(default)]
    pub device: Option<DeviceKind>,
    /// Labels of nodes that have it; any one is enough.
    #[serde(default)]
    pub marks: Vec<Mark>,
    /// Taints of its nodes that its pods tolerate.
    #[serde(default)]
    pub tolerations: Vec<Tolerated>,
    /// Memory of one in bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Dense teraFLOP/s of one, by format of numbers: f32, bf16, f8.
    #[serde(default)]
    pub teraflops: BTreeMap<String, f64>,
    /// Bytes a second of its memory.
    #[serde(default)]
    pub bytes_per_second: Option<f64>,
    /// How many are joined by NVLink.
    #[serde(default)]
    pub nvlink_domain: Option<u32>,
    /// Price of one on demand.
    #[serde(default)]
    pub price_per_hour: Option<Price>,
}

/// Labels that say that a node has an accelerator.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Key of the label.
    pub key: String,
    /// Its values.
    pub values: Vec<String>,
    /// Whether the node's accelerators are joined by NVLink.
    #[serde(default)]
    pub nvlink: bool,
    /// Whether nodes of that very size have InfiniBand; absent: other signs say so.
    #[serde(default)]
    pub infiniband: Option<bool>,
}

/// A taint that is tolerated, whatever its effect.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Tolerated {
    /// Its key.
    pub key: String,
    /// Its value; absent: any.
    #[serde(default)]
    pub value: Option<String>,
}

/// An amount of money, written as a decimal text.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(try_from = "String")]
pub struct Price(pub f64);

impl TryFrom<String> for Price {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let amount: f64 = text.parse().map_err(|_| wrong_price(&text))?;
        match amount.is_finite() && amount >= 0.0 {
            true => Ok(Self(amount)),
            false => Err(wrong_price(&text)),
        }
    }
}

fn wrong_price(text: &str) -> String {
    format!("a price must be a decimal number in quotes, such as \"12.29\"; got {text:?}")
}

/// A pool that the administrator declares.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeclaredPool {
    /// Its name, as the nodes' pool label has it.
    pub name: String,
    /// Its accelerator; absent: cpu.
    #[serde(default)]
    pub accelerator: Option<String>,
    /// Accelerators of a node; 0 for the CPU.
    #[serde(default)]
    pub accelerators_per_node: u32,
    /// How pods ask for its accelerators.
    #[serde(default)]
    pub allocation: Allocation,
    /// MIG partitions of a node, by profile.
    #[serde(default)]
    pub mig: BTreeMap<String, u32>,
    /// Shape of its TPU slices.
    #[serde(default)]
    pub topology: Option<String>,
    /// Most nodes that it grows to.
    pub max_nodes: u32,
    /// Whether the cloud may take its nodes back.
    #[serde(default)]
    pub spot: bool,
    /// Whether the accelerators of a node are joined by NVLink.
    #[serde(default)]
    pub nvlink: bool,
    /// Whether its nodes are joined by InfiniBand.
    #[serde(default)]
    pub infiniband: bool,
    /// Allocatable processor cores of a node, such as "90" or "3920m".
    pub cpu: String,
    /// Allocatable memory of a node, such as 1800Gi.
    pub memory: String,
    /// Labels of its nodes besides those that say what is above.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Taints of its nodes.
    #[serde(default)]
    pub taints: Vec<Taint>,
    /// Price of a node; absent: from the accelerator's.
    #[serde(default)]
    pub price_per_hour: Option<Price>,
}

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// It is no YAML, or holds something else than a table.
    #[error("the accelerator table cannot be read: {0}")]
    Form(String),
    /// A row breaks a rule.
    #[error("the accelerator table: {0}")]
    Row(String),
}

impl Default for Table {
    fn default() -> Self {
        Self::built_in().as_ref().clone()
    }
}

impl Table {
    /// The table that ships with the operator.
    pub fn built_in() -> Arc<Self> {
        DEFAULT.clone()
    }

    /// That table with the additions of `text`, which has the same form: a row changes the fields that it names of the row
    /// of its name, or is a new one; other lists replace.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn read(text: &str) -> Result<Self, TableError> {
        let form = |error: &dyn std::fmt::Display| TableError::Form(error.to_string());
        let mut all: Value = serde_yaml::from_str(BUILT_IN).map_err(|error| form(&error))?;
        let more: Option<Value> = serde_yaml::from_str(text).map_err(|error| form(&error))?;
        match more {
            None | Some(Value::Null) => {}
            Some(Value::Object(more)) => {
                for (key, value) in more {
                    match (key.as_str(), value) {
                        ("accelerators", Value::Array(rows)) => add_rows(&mut all["accelerators"], rows),
                        (_, value) => all[key] = value,
                    }
                }
            }
            Some(_) => return Err(TableError::Form("it must be a map, such as `accelerators: []`".into())),
        }
        let table: Self = serde_json::from_value(all).map_err(|error| form(&error))?;
        table.check().map_err(TableError::Row)?;
        Ok(table)
    }

    /// [`Table::read`] of a file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn open(file: &Path) -> Result<Self, TableError> {
        let form = |error: std::io::Error| TableError::Form(error.to_string());
        let mut text = String::new();
        let limit = FILE_LIMIT_BYTES + 1;
        File::open(file)
            .map_err(form)?
            .take(limit)
            .read_to_string(&mut text)
            .map_err(form)?;
        match u64::try_from(text.len()).is_ok_and(|bytes| bytes < limit) {
            true => Self::read(&text),
            false => Err(TableError::Form(format!("it is larger than {FILE_LIMIT_BYTES} bytes"))),
        }
    }

    /// The row with this name.
    pub fn get(&self, name: &str) -> Option<&Accelerator> {
        self.accelerators.iter().find(|row| row.name == name)
    }

    /// The names, for messages.
    pub fn names(&self) -> String {
        let names: Vec<&str> = self.accelerators.iter().map(|row| row.name.as_str()).collect();
        names.join(", ")
    }

    fn check(&self) -> Result<(), String> {
        if self.accelerators.len() > MAX_ROWS || self.pools.len() > MAX_ROWS {
            return Err(format!(
                "more than {MAX_ROWS} accelerators or pools: leave out those that nobody uses"
            ));
        }
        for row in &self.accelerators {
            let is_cpu = row.family == Family::Cpu;
            if is_cpu != row.resource.is_none() || is_cpu != row.marks.is_empty() {
                return Err(format!(
                    "{}: all but the CPU need resource and marks, and the CPU has neither",
                    row.name
                ));
            }
        }
        for pool in &self.pools {
            let name = pool.accelerator.as_deref().unwrap_or("cpu");
            let row = self
                .get(name)
                .ok_or_else(|| format!("pool {}: no accelerator {name}; there are {}", pool.name, self.names()))?;
            let has = pool.accelerators_per_node > 0 || !pool.mig.is_empty();
            if has == (row.family == Family::Cpu) {
                return Err(format!(
                    "pool {}: acceleratorsPerNode does not go with accelerator {name}",
                    pool.name
                ));
            }
            if pool.allocation == Allocation::ResourceClaim && row.device.is_none() {
                return Err(format!(
                    "pool {}: {name} has no device, so it cannot be claimed: leave out allocation, or add device to its row of \
                     accelerators",
                    pool.name
                ));
            }
            for (field, text) in [("cpu", &pool.cpu), ("memory", &pool.memory)] {
                if crate::workload::quantity::parse(text).is_none_or(|value| value <= 0.0) {
                    return Err(format!(
                        "pool {}: {field} must be a quantity, such as 90 or 1800Gi; got {text}",
                        pool.name
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Merges rows by name.
fn add_rows(known: &mut Value, rows: Vec<Value>) {
    let Value::Array(known) = known else { return };
    for row in rows {
        let same = known
            .iter_mut()
            .find(|old| old["name"] == row["name"] && !row["name"].is_null());
        match (same, row) {
            (Some(Value::Object(old)), Value::Object(row)) => old.extend(row),
            (_, row) => known.push(row),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chart_changes_a_price_adds_an_accelerator_and_declares_a_pool() {
        let table = Table::read(
            "accelerators:\n- {name: nvidia-h100, pricePerHour: '2.5'}\n\
             - {name: gaudi3, family: Rocm, resource: habana.ai/gaudi, marks: [{key: a, values: [b]}]}\n\
             pools:\n- {name: big, accelerator: nvidia-h100, acceleratorsPerNode: 8, maxNodes: 4, cpu: '90', memory: 1800Gi}\n",
        )
        .expect("a good table");
        let h100 = table.get("nvidia-h100").expect("still there");
        assert_eq!((h100.price_per_hour, h100.nvlink_domain), (Some(Price(2.5)), Some(8)));
        assert!(table.get("gaudi3").is_some() && table.get("cpu").is_some());
        assert_eq!(table.pools[0].max_nodes, 4);
    }

    #[test]
    fn a_wrong_table_is_refused_with_what_to_write() {
        for (text, says) in [
            ("[]", "must be a map"),
            ("accelerators: [{name: x, family: Cuda}]", "need resource and marks"),
            (
                "accelerators: [{name: cpu, pricePerHour: 'free'}]",
                "decimal number in quotes",
            ),
            ("accelerators: [{name: cpu, price: '1'}]", "unknown field `price`"),
            (
                "pools: [{name: p, accelerator: h100, acceleratorsPerNode: 1, maxNodes: 1, cpu: '1', memory: 1Gi}]",
                "nvidia-h100",
            ),
            (
                "pools: [{name: p, maxNodes: 1, cpu: lots, memory: 1Gi}]",
                "such as 90 or 1800Gi",
            ),
            (
                "pools: [{name: p, acceleratorsPerNode: 2, maxNodes: 1, cpu: '1', memory: 1Gi}]",
                "does not go with",
            ),
            (
                "pools: [{name: p, allocation: ResourceClaim, maxNodes: 1, cpu: '1', memory: 1Gi}]",
                "cannot be claimed",
            ),
        ] {
            let error = Table::read(text).expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
