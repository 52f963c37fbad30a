//! What a node is like, read from the API's Node, or from a pool that the administrator declared.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node as ApiNode, Taint};
use strata_api::Allocation;

use super::device::{self, DeviceKind, Devices};
use super::table::{DeclaredPool, Family, Mark, Table};
use crate::workload::quantity;

/// Facts about a node, as far as placement sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its name; of a declared pool: the pool's.
    pub name: String,
    /// Value of its label kubernetes.io/hostname.
    pub hostname: String,
    /// The label that names its pool, with the name.
    pub pool: Option<(String, String)>,
    /// Name of its accelerator: a row of the table.
    pub accelerator: String,
    /// Processor time that pods can have, in thousandths of a core.
    pub cpu_millis: f64,
    /// Memory that pods can have, in bytes.
    pub memory_bytes: f64,
    /// Extended resources that pods can have.
    pub resources: BTreeMap<String, u32>,
    /// Devices that pods can claim.
    pub devices: Devices,
    /// Shape of the TPU slice that it is part of.
    pub topology: Option<String>,
    /// Whether the cloud may take it back.
    pub is_spot: bool,
    /// Whether its accelerators are joined by NVLink.
    pub has_nvlink: bool,
    /// Whether it has InfiniBand.
    pub has_infiniband: bool,
    /// What keeps work with accelerators away: conditions that are True, or `NotReady`.
    pub sick: Vec<String>,
    /// Whether somebody cordoned it.
    pub is_cordoned: bool,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// Price of it, where the administrator declared one.
    pub price_per_hour: Option<f64>,
}

impl Node {
    /// Reads the API's Node. What it offers by claims is not in it: see [`device::by_node`].
    pub fn read(node: &ApiNode, table: &Table) -> Self {
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let name = node.metadata.name.clone().unwrap_or_default();
        let spec = node.spec.clone().unwrap_or_default();
        let status = node.status.clone().unwrap_or_default();
        let allocatable = status.allocatable.unwrap_or_default();
        let amount = |key: &str| {
            allocatable
                .get(key)
                .and_then(|value| quantity::parse(&value.0))
                .unwrap_or(0.0)
        };
        let resources: BTreeMap<String, u32> = allocatable
            .keys()
            .filter(|key| key.contains('/'))
            .map(|key| (key.clone(), amount(key) as u32))
            .collect();
        let (accelerator, mark) = accelerator(&labels, table);
        let conditions = status.conditions.unwrap_or_default();
        let sick = conditions.iter().filter_map(|condition| {
            let is_known = table.unhealthy_conditions.contains(&condition.type_);
            match (condition.type_.as_str(), condition.status.as_str()) {
                ("Ready", "True") => None,
                ("Ready", _) => Some("NotReady".to_owned()),
                (kind, "True") if is_known => Some(kind.to_owned()),
                _ => None,
            }
        });
        let pool = table
            .pool_labels
            .iter()
            .find_map(|key| Some((key.clone(), labels.get(key)?.clone())));
        let declared = pool
            .as_ref()
            .and_then(|(_, pool)| table.pools.iter().find(|declared| declared.name == *pool));
        let is_marked = |label: &super::table::Label| labels.get(&label.key) == Some(&label.value);
        let by_size = mark.and_then(|mark| mark.infiniband);
        Self {
            hostname: labels.get("kubernetes.io/hostname").unwrap_or(&name).clone(),
            pool,
            accelerator,
            cpu_millis: amount("cpu") * 1000.0,
            memory_bytes: amount("memory"),
            topology: labels.get(&table.topology_label).cloned(),
            is_spot: table.spot.iter().any(is_marked),
            has_nvlink: mark.is_some_and(|mark| mark.nvlink),
            has_infiniband: table
                .infiniband
                .resources
                .iter()
                .any(|key| resources.get(key).is_some_and(|count| *count > 0))
                || by_size.unwrap_or_else(|| is_marked(&table.infiniband.label)),
            resources,
            devices: Devices::new(),
            sick: sick.collect(),
            is_cordoned: spec.unschedulable.unwrap_or(false),
            taints: spec.taints.unwrap_or_default(),
            price_per_hour: declared.and_then(|pool| pool.price_per_hour).map(|price| price.0),
            labels,
            name,
        }
    }

    /// A node of a declared pool.
    pub fn declared(pool: &DeclaredPool, table: &Table) -> Self {
        let accelerator = pool.accelerator.clone().unwrap_or_else(|| "cpu".into());
        let row = table.get(&accelerator).filter(|_| pool.accelerators_per_node > 0);
        let count = pool.accelerators_per_node;
        let (mut resources, mut devices) = (BTreeMap::new(), Devices::new());
        match pool.allocation {
            Allocation::DevicePlugin => {
                let whole = row.and_then(|row| row.resource.clone());
                resources.extend(whole.map(|resource| (resource, count)));
                resources.extend(pool.mig.iter().map(|(profile, count)| (mig_resource(profile), *count)));
            }
            Allocation::ResourceClaim => {
                let whole = row.and_then(|row| row.device.as_ref());
                devices.extend(whole.map(|kind| device::declared(kind, count)));
                let parts = pool.mig.iter();
                devices.extend(parts.map(|(profile, count)| device::declared(&DeviceKind::mig(profile), *count)));
            }
        }
        Self {
            name: pool.name.clone(),
            hostname: String::new(),
            // The label by which its nodes are found is the first that fits; gangs are pinned by it.
            pool: Some((pool_label(pool, table), pool.name.clone())),
            accelerator,
            cpu_millis: quantity::parse(&pool.cpu).unwrap_or(0.0) * 1000.0,
            memory_bytes: quantity::parse(&pool.memory).unwrap_or(0.0),
            resources,
            devices,
            topology: pool.topology.clone(),
            is_spot: pool.spot,
            has_nvlink: pool.nvlink,
            has_infiniband: pool.infiniband,
            sick: Vec::new(),
            is_cordoned: false,
            labels: pool.labels.clone(),
            taints: pool.taints.clone(),
            price_per_hour: pool.price_per_hour.map(|price| price.0),
        }
    }

    /// Name of its pool.
    pub fn pool_name(&self) -> Option<&str> {
        self.pool.as_ref().map(|(_, name)| name.as_str())
    }
}

/// What a pod asks for to get a part of a GPU.
pub fn mig_resource(profile: &str) -> String {
    format!("nvidia.com/mig-{profile}")
}

/// Key of the label that names a declared pool on its nodes: the one that it is declared with, else AKS's.
fn pool_label(pool: &DeclaredPool, table: &Table) -> String {
    let known = table.pool_labels.iter().find(|key| pool.labels.contains_key(*key));
    known.or(table.pool_labels.first()).cloned().unwrap_or_default()
}

/// The accelerator that the labels name, by the first mark that has more to say than that it is there.
fn accelerator<'a>(labels: &BTreeMap<String, String>, table: &'a Table) -> (String, Option<&'a Mark>) {
    let has = |mark: &&Mark| labels.get(&mark.key).is_some_and(|value| mark.values.contains(value));
    for row in &table.accelerators {
        let mut marks: Vec<&Mark> = row.marks.iter().filter(has).collect();
        marks.sort_by_key(|mark| (mark.infiniband.is_none(), !mark.nvlink));
        if let Some(mark) = marks.first() {
            return (row.name.clone(), Some(mark));
        }
    }
    let cpu = table.accelerators.iter().find(|row| row.family == Family::Cpu);
    (cpu.map_or_else(|| "cpu".into(), |row| row.name.clone()), None)
}
