//! Where a workload fits, or why it does not: pure, from what is asked for and what nodes are like.
//!
//! ```text
//! spec.hardware ──Demand::read──▶ Demand ─┐
//! Nodes ──Node::read──▶ Fleet ────────────┼─▶ fit::place ──▶ Placement ──schedule──▶ the pod's affinity, tolerations,
//! ResourceSlices ──device::by_node──▶ ───┤        │                                 resources or claim
//! accelerators.yaml, the chart ──▶ Table ─┘        │
//!                                                  └─▶ Misfit: why not, and what would
//! ```
//!
//! Shape and allocatable are judged, never fullness: what else runs on a node is the scheduler's business (or Kueue's),
//! and what it says is quoted by the condition Succeeded or Available.

pub mod demand;
pub mod device;
pub mod engine;
pub mod fit;
pub mod node;
pub mod preflight;
pub mod schedule;
pub mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Affinity, Node as ApiNode, Toleration};
use k8s_openapi::api::resource::v1::ResourceSlice;
use strata_api::{Allocation, ConditionType, Hardware, PodOverrides, Reason};

pub use demand::Demand;
pub use engine::Engine;
pub use node::Node;
pub use table::{Accelerator, Family, Table};

use self::device::{Claim, Slice};
use self::preflight::{Estimate, Work};
use crate::engine::kind::{Env, Observed};
use crate::run::Runs;
use crate::run::conditions::Finding;
use crate::workload::pod::Sizes;

/// What is known of the cluster's hardware at one moment.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// What accelerators there are in the world.
    pub table: Arc<Table>,
    /// The nodes; absent where the operator may not read them.
    pub nodes: Option<Vec<Arc<Node>>>,
    /// A node of each declared pool, with how many it may have.
    pub declared: Vec<(Node, u32)>,
    /// Whether the cluster serves the API of claims, as far as is known.
    pub serves_claims: bool,
}

impl Default for Fleet {
    fn default() -> Self {
        Self::new(Table::built_in(), None)
    }
}

impl Fleet {
    /// The pools that `table` declares, and `nodes`.
    pub fn new(table: Arc<Table>, nodes: Option<Vec<Arc<Node>>>) -> Self {
        let declared = table
            .pools
            .iter()
            .map(|pool| (Node::declared(pool, &table), pool.max_nodes))
            .collect();
        Self {
            table,
            nodes,
            declared,
            serves_claims: true,
        }
    }

    /// The pools that `table` declares, and the API's `nodes` with what `slices` say of their devices.
    pub fn read(table: Arc<Table>, nodes: &[ApiNode], slices: &[ResourceSlice]) -> Self {
        let slices: Vec<Slice> = slices.iter().map(|slice| Slice::read(slice, &table)).collect();
        let mut devices = device::by_node(slices.iter());
        let facts = nodes.iter().map(|node| {
            let node = Node::read(node, &table);
            let devices = devices.remove(&node.name).unwrap_or_default();
            Arc::new(Node { devices, ..node })
        });
        let facts = facts.collect();
        Self::new(table, Some(facts))
    }

    /// The nodes that are there, as far as is known.
    pub fn there(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().flatten().map(Arc::as_ref)
    }
}

/// Where a workload goes. The scheduling rules but for `avoid` follow from the demand and the table alone, so that nodes which
/// come and go change no pod template; a run on several nodes is pinned to its pool, as an attempt is made once.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Name of the accelerator.
    pub accelerator: String,
    /// What the image must be compiled for.
    pub family: Family,
    /// The pool where it fits, by name; absent: nodes without one, or unknown.
    pub pool: Option<String>,
    /// How sure that is.
    pub seat: Seat,
    /// Nodes that it takes together.
    pub nodes: u32,
    /// Accelerators on each of them; 0 for the CPU.
    pub per_node: u32,
    /// Labels that nodes must have.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    pub tolerations: Vec<Toleration>,
    /// Other rules about nodes; [`Placement::node_affinity`] adds the sick ones.
    pub affinity: Option<Affinity>,
    /// Sick nodes, by host name.
    pub avoid: Vec<String>,
    /// What each pod asks for besides processor and memory.
    pub resources: BTreeMap<String, u32>,
    /// What each pod claims.
    pub claim: Option<Claim>,
    /// Whether the accelerators of a node are joined by NVLink.
    pub has_nvlink: bool,
    /// Memory of one accelerator, or of the part of it that is taken.
    pub accelerator_bytes: Option<u64>,
    /// The part of an accelerator that is taken: 1 for a whole one.
    pub share: f64,
    /// Price of all nodes together.
    pub price_per_hour: Option<f64>,
}

/// Why nodes are not known.
const NOT_READ: &str =
    "nodes were not read (an operator of one namespace may not; `strata plan` is given them with --nodes)";

/// How sure a placement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// There are nodes of that shape.
    There,
    /// A declared pool may grow to them.
    Grows,
    /// A declared pool has them; nodes are not read.
    Declared,
    /// Nodes are not read, and no pool is declared.
    Unknown,
}

impl Placement {
    /// The condition Placed.
    pub fn finding(&self) -> Finding {
        let what = match self.per_node {
            0 => self.accelerator.clone(),
            each if self.claim.is_some() => format!("{each} {} by claim", self.accelerator),
            each => format!("{each} {}", self.accelerator),
        };
        let where_ = match &self.pool {
            Some(pool) => format!("pool {pool}"),
            None => "nodes without a pool".into(),
        };
        let nodes = match self.nodes {
            1 => "1 node".to_owned(),
            count => format!("{count} nodes"),
        };
        let (reason, message) = match self.seat {
            Seat::There => (Reason::Fits, format!("{where_}: {nodes} with {what}")),
            Seat::Grows => (
                Reason::WaitingForNodes,
                format!("{where_} may grow to {nodes} with {what}; there are none now, and the pods wait for them"),
            ),
            Seat::Declared => (
                Reason::Fits,
                format!("{where_}, as it is declared: {nodes} with {what}; {NOT_READ}"),
            ),
            Seat::Unknown => (
                Reason::NodesUnknown,
                format!("{nodes} with {what}: no declared pool says whether there are any, and {NOT_READ}"),
            ),
        };
        Finding::new(ConditionType::Placed, reason, message)
    }
}

/// Why a workload fits nowhere, and what would fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// In a word.
    pub reason: Reason,
    /// In a sentence that says what to write or do instead.
    pub message: String,
}

impl Misfit {
    fn invalid(message: String) -> Self {
        Self {
            reason: Reason::SpecInvalid,
            message,
        }
    }

    /// The condition Placed.
    pub fn finding(&self) -> Finding {
        Finding::new(ConditionType::Placed, self.reason, self.message.clone())
    }
}

/// Number and noun.
pub(crate) fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        more => format!("{more} {noun}s"),
    }
}

/// What a workload asks for and what it computes.
#[derive(Clone, Debug)]
pub struct Wants {
    /// What it is to compute on; absent: anything.
    pub hardware: Option<Hardware>,
    /// What the user set on pods.
    pub pod: PodOverrides,
    /// What a pod asks for without the user's word.
    pub sizes: Sizes,
    /// What computes.
    pub engine: Engine,
    /// What is computed.
    pub work: Work,
}

/// Where it goes, and what is expected of that.
#[derive(Clone, Debug, PartialEq)]
pub struct Preflight {
    /// Where.
    pub placement: Placement,
    /// What is expected.
    pub estimate: Estimate,
}

impl Wants {
    /// What the run of `resource` asks for.
    pub fn of_run<T: Runs>(resource: &T, observed: &Observed) -> Self {
        Self {
            hardware: resource.hardware().cloned(),
            pod: resource.common().pod.clone().unwrap_or_default(),
            sizes: T::SIZES,
            engine: Engine::of(resource.engine()),
            work: resource.work(observed),
        }
    }

    /// Where it goes, and what is expected of that. Without `spec.hardware`, as if that said `{}`.
    ///
    /// # Errors
    /// Why nowhere.
    pub fn preflight(&self, fleet: &Fleet) -> Result<Preflight, Misfit> {
        let hardware = self.hardware.clone().unwrap_or_default();
        let mut demand = Demand::read(&hardware, &self.pod, self.sizes, self.engine).map_err(Misfit::invalid)?;
        let row = fleet.table.get(&demand.accelerator);
        if let Some(resource) = row.and_then(|row| self.asked_twice(demand.allocation, row)) {
            return Err(Misfit::invalid(format!(
                "spec.pod.resources asks for {resource}, and spec.hardware.allocation claims accelerators: leave one of them out"
            )));
        }
        let family = row.map_or(Family::Cpu, |row| row.family);
        demand.accelerator_bytes = Some(self.work.least_bytes(self.engine, family));
        let placement = fit::place(&demand, fleet, engine::OFFERED)?;
        let estimate = preflight::estimate(&self.work, self.engine, &placement, &fleet.table);
        Ok(Preflight { placement, estimate })
    }

    /// The resource of accelerators that the user asks for beside a claim: no node has both.
    fn asked_twice(&self, allocation: Allocation, row: &Accelerator) -> Option<&String> {
        let vendor = row.resource.as_ref()?.split_inclusive('/').next()?;
        let asked = self
            .pod
            .resources
            .as_ref()
            .filter(|_| allocation == Allocation::ResourceClaim)?;
        let lists = [&asked.requests, &asked.limits].into_iter().flatten();
        lists.flat_map(BTreeMap::keys).find(|name| name.starts_with(vendor))
    }
}

/// Where the run of `resource` goes; absent: anywhere, as it has no `spec.hardware`.
///
/// # Errors
/// Why nowhere.
pub fn of_run<T: Runs>(resource: &T, observed: &Observed) -> Result<Option<Preflight>, Misfit> {
    match resource.hardware() {
        None => Ok(None),
        Some(_) => Wants::of_run(resource, observed).preflight(&observed.fleet).map(Some),
    }
}

/// The image of Strata's own that computes there.
///
/// # Errors
/// The operator has none.
pub fn image(placement: Option<&Placement>, env: &Env) -> Result<String, Misfit> {
    match (placement, &env.runtime_image_cuda) {
        (
            Some(Placement {
                family: Family::Cuda, ..
            }),
            Some(image),
        ) => Ok(image.clone()),
        (Some(placement), None) if placement.family == Family::Cuda => Err(Misfit {
            reason: Reason::ImageMissing,
            message: format!(
                "{} needs a runtime image that is compiled for CUDA: set the chart's value runtimeImageCuda, or the operator's \
                 flag --runtime-image-cuda",
                placement.accelerator
            ),
        }),
        _ => Ok(env.runtime_image.clone()),
    }
}
