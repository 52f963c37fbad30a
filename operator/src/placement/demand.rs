//! What a workload asks for, parsed from `spec.hardware` and `spec.pod`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use strata_api::{Allocation, Capacity, Hardware, Need, PodOverrides};

use super::engine::Engine;
use crate::workload::pod::Sizes;
use crate::workload::quantity;

/// What one pod, or one pod on each of several nodes, asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// Name of a row of the table.
    pub accelerator: String,
    /// Accelerators on each node; absent: 1, or what the slice has.
    pub per_node: Option<u32>,
    /// Nodes taken together; absent: 1, or those of the slice.
    pub nodes: Option<u32>,
    /// Shape of the TPU slice.
    pub topology: Option<Topology>,
    /// The part of a GPU.
    pub mig_profile: Option<String>,
    /// Whether NVLink is needed.
    pub nvlink: Option<Need>,
    /// Whether InfiniBand is needed.
    pub infiniband: Option<Need>,
    /// Whether nodes are used that the cloud may take back.
    pub capacity: Capacity,
    /// How it asks for its accelerators.
    pub allocation: Allocation,
    /// What computes.
    pub engine: Engine,
    /// Processor time of each pod in thousandths of a core.
    pub cpu_millis: f64,
    /// Memory of each pod in bytes.
    pub memory_bytes: f64,
    /// Labels that the user wants of nodes.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the user tolerates.
    pub tolerations: Vec<Toleration>,
    /// Least memory of all accelerators together, in bytes, where it is known.
    pub accelerator_bytes: Option<u64>,
}

/// Shape of a TPU slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// As it is written, which is also the label's value.
    pub text: String,
    /// Its chips.
    pub chips: u32,
}

impl Topology {
    /// Reads a shape such as `2x4`.
    pub fn read(text: &str) -> Option<Self> {
        let sides: Vec<u32> = text.split('x').map(|side| side.parse().ok()).collect::<Option<_>>()?;
        let chips = sides
            .iter()
            .try_fold(1_u32, |product, side| product.checked_mul(*side))?;
        ((2..=3).contains(&sides.len()) && chips > 0).then(|| Self {
            text: text.to_owned(),
            chips,
        })
    }
}

impl Demand {
    /// Reads `spec.hardware`.
    ///
    /// # Errors
    /// A sentence that names the field and says what to write.
    pub fn read(hardware: &Hardware, pod: &PodOverrides, sizes: Sizes, engine: Engine) -> Result<Self, String> {
        let number = |field: &str, value: Option<i32>| {
            value
                .map(|value| {
                    u32::try_from(value)
                        .ok()
                        .filter(|value| *value > 0)
                        .ok_or_else(|| format!("spec.hardware.{field} must be above 0; got {value}"))
                })
                .transpose()
        };
        let topology = hardware.topology.as_deref().map(|text| {
            Topology::read(text).ok_or_else(|| format!("spec.hardware.topology must be like 2x4 or 2x2x4; got {text}"))
        });
        let interconnect = hardware.interconnect.clone().unwrap_or_default();
        let requested = |resource: &str| {
            let requests = pod.resources.as_ref()?;
            let lists = [&requests.requests, &requests.limits];
            lists
                .into_iter()
                .flatten()
                .find_map(|list| quantity::parse(&list.get(resource)?.0))
        };
        Ok(Self {
            accelerator: hardware.accelerator.clone().unwrap_or_else(|| "cpu".into()),
            per_node: number("acceleratorsPerNode", hardware.accelerators_per_node)?,
            nodes: number("nodeCount", hardware.node_count)?,
            topology: topology.transpose()?,
            mig_profile: hardware.mig_profile.clone(),
            nvlink: interconnect.nvlink,
            infiniband: interconnect.infiniband,
            capacity: hardware.capacity.unwrap_or_default(),
            allocation: hardware.allocation.unwrap_or_default(),
            engine,
            cpu_millis: requested("cpu").map_or(f64::from(sizes.cpu_millis), |cores| cores * 1000.0),
            memory_bytes: requested("memory").unwrap_or(f64::from(sizes.memory_mib) * 1_048_576.0),
            node_selector: pod.node_selector.clone(),
            tolerations: pod.tolerations.clone(),
            accelerator_bytes: None,
        })
    }
}
