//! `spec.hardware`: what the pods of a resource compute on.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the pods of a resource compute on. Without, they run on any node with room for them, on its CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.accelerator) || !(has(self.acceleratorsPerNode) || has(self.topology) || has(self.migProfile) || has(self.interconnect))")
        .message("acceleratorsPerNode, topology, migProfile and interconnect are about an accelerator: write accelerator, such as nvidia-h100"),
    validation = Rule::new("!has(self.accelerator) || self.accelerator != 'cpu' || !(has(self.acceleratorsPerNode) || has(self.topology) || has(self.migProfile))")
        .message("accelerator cpu has no acceleratorsPerNode, topology or migProfile: leave them out, or name another accelerator"),
    validation = Rule::new("!has(self.topology) || !(has(self.migProfile) || has(self.acceleratorsPerNode))")
        .message("topology is that of a whole TPU slice, which says how many chips there are: leave out acceleratorsPerNode and migProfile"),
    validation = Rule::new("!has(self.migProfile) || !has(self.interconnect) || !has(self.interconnect.nvlink)")
        .message("a MIG partition has no NVLink: leave out interconnect.nvlink, or migProfile"),
    validation = Rule::new("!has(self.allocation) || self.allocation != 'ResourceClaim' || (has(self.accelerator) && self.accelerator != 'cpu')")
        .message("allocation ResourceClaim claims accelerators: write accelerator, such as nvidia-h100, or leave allocation out"),
    validation = Rule::new("!has(self.allocation) || self.allocation != 'ResourceClaim' || !has(self.topology)")
        .message("a TPU slice, which topology names, is not claimed: leave out allocation")
)]
pub struct Hardware {
    /// Name of an accelerator in the operator's table, such as nvidia-h100, google-tpu-v5e, or cpu (default cpu).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub accelerator: Option<String>,
    /// Accelerators of one pod, all on one node (default 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub accelerators_per_node: Option<i32>,
    /// Nodes that one run, or one replica, computes on together (default 1; with `topology`: those of the slice).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub node_count: Option<i32>,
    /// Shape of a TPU slice in chips, such as 2x4. A slice is taken whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 16),
        regex(pattern = r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?$")
    )]
    pub topology: Option<String>,
    /// A part of a GPU instead of a whole one, in NVIDIA's words, such as 1g.10gb.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = r"^[1-7]g\.[1-9][0-9]{0,2}gb(\.me)?$"))]
    pub mig_profile: Option<String>,
    /// What must or should connect the accelerators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interconnect: Option<Interconnect>,
    /// Whether nodes that the cloud may take back are used (default OnDemand: they are not).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Capacity")]
    pub capacity: Option<Capacity>,
    /// How pods ask for their accelerators (default DevicePlugin).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Allocation")]
    pub allocation: Option<Allocation>,
}

/// What connects accelerators.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Interconnect {
    /// NVLink between the GPUs of a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Need")]
    pub nvlink: Option<Need>,
    /// InfiniBand between nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Need")]
    pub infiniband: Option<Need>,
}

/// How much something is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Need {
    /// Nodes without it are not used.
    Required,
    /// Nodes with it are used first.
    Preferred,
}

/// Whether nodes that the cloud may take back are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Capacity {
    /// Only nodes that stay.
    #[default]
    OnDemand,
    /// Only spot nodes.
    Spot,
    /// Spot nodes first, others where there is no room on them.
    Any,
}

/// How pods ask for their accelerators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Allocation {
    /// As a resource of a device plugin, such as nvidia.com/gpu.
    #[default]
    DevicePlugin,
    /// By a ResourceClaim for devices of a DRA driver (resource.k8s.io/v1: Kubernetes 1.34 or later).
    ResourceClaim,
}
