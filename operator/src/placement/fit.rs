//! From a demand and a fleet to a placement, or to what would fit.
//!
//! The answer does not depend on the order of nodes, and another node never takes an answer away: nodes are judged one by
//! one, and a pool does when enough of its nodes do.

mod words;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use strata_api::{Allocation, Capacity, Need, Reason};

use super::device::{self, Claim, DeviceKind};
use super::node::{Node, mig_resource};
use super::schedule::{self, tolerates};
use super::table::{Accelerator, Family, Table};
use super::{Demand, Engine, Fleet, Misfit, Placement, Seat, count};
use words::{nearest, sick};

/// Most nodes that a pod template names to keep away from; more sick nodes than this are another problem.
const MOST_AVOIDED: usize = 64;
/// Chips of a host of a TPU slice with several hosts, where no node says it.
const CHIPS_PER_HOST: u32 = 4;

/// Why a node does not do, the nearest to doing last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Gap {
    /// It has another accelerator.
    Accelerator,
    /// Its labels are not what the user wants.
    Labels,
    /// It has a taint that nobody tolerates.
    Taint,
    /// It is a spot node, or is not one.
    Capacity,
    /// It is part of a slice of another shape.
    Topology,
    /// It has no such partition of a GPU.
    Partition,
    /// It has fewer accelerators.
    TooFew,
    /// Its accelerators are not joined by NVLink.
    Nvlink,
    /// It has no InfiniBand.
    Infiniband,
    /// It has less memory or fewer processors for pods.
    Size,
    /// Somebody cordoned it.
    Cordoned,
    /// It is sick.
    Sick,
}

/// A demand with everything decided that does not depend on nodes.
pub struct Shape<'a> {
    demand: &'a Demand,
    table: &'a Table,
    row: &'a Accelerator,
    /// What a pod asks for; absent for the CPU.
    asks: Option<Asks>,
    /// How many of it; absent: all chips of the node, as it is a slice's.
    per_node: Option<u32>,
    nodes: Option<u32>,
}

/// What a pod asks for.
enum Asks {
    /// A resource of a device plugin.
    Resource(String),
    /// Devices, by claim.
    Devices(DeviceKind),
}

/// Where `demand` goes; `engines` are those that the resource could name instead.
///
/// # Errors
/// Why nowhere, and what would fit.
pub fn place(demand: &Demand, fleet: &Fleet, engines: &[Engine]) -> Result<Placement, Misfit> {
    let shape = shape(demand, fleet)?;
    let (per_node, nodes) = shape.guess();
    demand
        .engine
        .supports(shape.row.family, per_node, nodes, engines)
        .map_err(|message| misfit(Reason::EngineUnsupported, message))?;
    if matches!(shape.asks, Some(Asks::Devices(_))) && !fleet.serves_claims {
        let message = "the cluster serves no resource.k8s.io/v1, by which accelerators are claimed: write allocation: DevicePlugin, \
                       or upgrade it to Kubernetes 1.34 or later";
        return Err(misfit(Reason::NoNodeFits, message.into()));
    }
    memory(&shape, fleet, per_node, nodes)?;

    let there = || fleet.there().map(|node| (node, 1));
    if let Some(choice) = choices(&shape, &fleet.table, there(), &[]).first() {
        return Ok(placement(&shape, fleet, Some(choice), Seat::There));
    }
    let declared = || fleet.declared.iter().map(|(node, most)| (node, *most));
    if let Some(choice) = choices(&shape, &fleet.table, declared(), &[]).first() {
        let seat = match fleet.nodes {
            Some(_) => Seat::Grows,
            None => Seat::Declared,
        };
        return Ok(placement(&shape, fleet, Some(choice), seat));
    }
    if fleet.nodes.is_none() && fleet.declared.is_empty() {
        return Ok(placement(&shape, fleet, None, Seat::Unknown));
    }
    if !choices(&shape, &fleet.table, there(), &[Gap::Sick, Gap::Cordoned]).is_empty() {
        return Err(misfit(Reason::WaitingForNodes, sick(&shape, fleet)));
    }
    Err(misfit(Reason::NoNodeFits, nearest(&shape, fleet)))
}

/// The nodes of `fleet` that do by themselves, in any order; a run on several takes them from one pool.
pub fn candidates<'a>(demand: &Demand, fleet: &'a Fleet) -> Vec<&'a Node> {
    let Ok(shape) = shape(demand, fleet) else {
        return Vec::new();
    };
    fleet.there().filter(|node| gap(&shape, node, &[]).is_none()).collect()
}

fn misfit(reason: Reason, message: String) -> Misfit {
    Misfit { reason, message }
}

fn shape<'a>(demand: &'a Demand, fleet: &'a Fleet) -> Result<Shape<'a>, Misfit> {
    let invalid = |message: String| misfit(Reason::SpecInvalid, format!("spec.hardware.{message}"));
    let table: &Table = &fleet.table;
    let row = table.get(&demand.accelerator).ok_or_else(|| {
        invalid(format!(
            "accelerator: {} is not in the operator's table: write one of {}",
            demand.accelerator,
            table.names()
        ))
    })?;
    let mut shape = Shape {
        demand,
        table,
        row,
        asks: None,
        per_node: demand.per_node.or(Some(1)),
        nodes: Some(demand.nodes.unwrap_or(1)),
    };
    match (row.family, &demand.topology) {
        (Family::Tpu, None) => {
            return Err(invalid(
                "topology: a TPU is taken as a whole slice: write its shape in chips, such as 2x4".into(),
            ));
        }
        (Family::Tpu, Some(_)) => (shape.per_node, shape.nodes) = (None, demand.nodes),
        (_, Some(_)) => return Err(invalid("topology is that of a TPU slice: leave it out".into())),
        (Family::Cpu, None) => shape.per_node = Some(0),
        _ => {}
    }
    if demand.mig_profile.is_some() && row.family != Family::Cuda {
        return Err(invalid(format!(
            "migProfile: {} has no MIG partitions: leave it out",
            row.name
        )));
    }
    shape.asks = asks(demand, row).map_err(invalid)?;
    Ok(shape)
}

/// What a pod asks for. Or why it cannot, as what follows `spec.hardware.`.
fn asks(demand: &Demand, row: &Accelerator) -> Result<Option<Asks>, String> {
    if demand.allocation == Allocation::DevicePlugin {
        let resource = demand.mig_profile.as_deref().map(mig_resource);
        return Ok(resource.or(row.resource.clone()).map(Asks::Resource));
    }
    if row.family == Family::Cpu || demand.topology.is_some() {
        return Err(format!(
            "allocation: {} is not claimed: leave out allocation, or name another accelerator",
            row.name
        ));
    }
    let kind = demand.mig_profile.as_deref().map(DeviceKind::mig);
    let kind = kind.or(row.device.clone()).ok_or_else(|| {
        format!(
            "allocation: no DeviceClass of {} is known: write DevicePlugin, or add its `device: {{class: …, driver: …}}` in the \
             chart's value accelerators",
            row.name
        )
    })?;
    Ok(Some(Asks::Devices(kind)))
}

impl Shape<'_> {
    /// Accelerators a node and nodes, with the usual ones where only a node says it.
    fn guess(&self) -> (u32, u32) {
        match (self.per_node, &self.demand.topology) {
            (None, Some(slice)) => {
                let hosts = match (self.nodes, slice.chips <= 2 * CHIPS_PER_HOST) {
                    (Some(nodes), _) => nodes,
                    (None, true) => 1,
                    (None, false) => slice.chips.div_ceil(CHIPS_PER_HOST),
                };
                (slice.chips.div_ceil(hosts), hosts)
            }
            (per_node, _) => (per_node.unwrap_or(0), self.nodes.unwrap_or(1)),
        }
    }

    /// What it asks of a pool of nodes like `node`.
    fn on(&self, node: &Node) -> Option<(u32, u32)> {
        match (self.per_node, &self.demand.topology) {
            (None, Some(slice)) => {
                let chips = self.offered(node);
                let hosts = slice
                    .chips
                    .checked_div(chips)
                    .filter(|hosts| hosts * chips == slice.chips)?;
                self.nodes.is_none_or(|nodes| nodes == hosts).then_some((chips, hosts))
            }
            (per_node, _) => Some((per_node.unwrap_or(0), self.nodes.unwrap_or(1))),
        }
    }

    /// How many of its pods such a node has room for. Accelerators are taken by the node: one pod. Of processors each takes what
    /// it asks for, and several may stand on one node.
    fn pods_on(&self, node: &Node) -> u32 {
        let most = |has: f64, asks: f64| if asks > 0.0 { has / asks } else { f64::INFINITY };
        let demand = self.demand;
        match self.row.family {
            Family::Cpu => most(node.cpu_millis, demand.cpu_millis)
                .min(most(node.memory_bytes, demand.memory_bytes))
                .clamp(1.0, 1024.0) as u32,
            _ => 1,
        }
    }

    fn offered(&self, node: &Node) -> u32 {
        match &self.asks {
            None => 0,
            Some(Asks::Resource(resource)) => node.resources.get(resource).copied().unwrap_or(0),
            Some(Asks::Devices(kind)) => device::count(&node.devices, kind),
        }
    }
}

/// Why `node` does not do, apart from `forgiven`; `None` if it does.
fn gap(shape: &Shape<'_>, node: &Node, forgiven: &[Gap]) -> Option<Gap> {
    let demand = shape.demand;
    let is_accelerated = shape.row.family != Family::Cpu;
    let own = schedule::tolerations(shape.row, demand.capacity, &shape.table.spot);
    let tolerated = |taint: &&k8s_openapi::api::core::v1::Taint| {
        taint.effect == "PreferNoSchedule"
            // Of a node that is not ready or cordoned, or of spot: that is said below.
            || taint.key.starts_with("node.kubernetes.io/")
            || shape.table.spot.iter().any(|spot| spot.key == taint.key && taint.value.as_ref() == Some(&spot.value))
            || own.iter().chain(&demand.tolerations).any(|toleration| tolerates(toleration, taint))
    };
    let is_wanted = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
    let is_other = match demand.capacity {
        Capacity::OnDemand => node.is_spot,
        Capacity::Spot => !node.is_spot,
        Capacity::Any => false,
    };
    let is_of_slice = match &demand.topology {
        Some(slice) => node.topology.as_ref() == Some(&slice.text) && shape.on(node).is_some(),
        None => true,
    };
    let has_too_few = shape.offered(node) < shape.per_node.unwrap_or(1);
    let checks = [
        (Gap::Accelerator, is_accelerated && node.accelerator != shape.row.name),
        (Gap::Labels, !demand.node_selector.iter().all(is_wanted)),
        (Gap::Taint, !node.taints.iter().all(|taint| tolerated(&taint))),
        (Gap::Capacity, is_other),
        (Gap::Topology, !is_of_slice),
        (Gap::Partition, demand.mig_profile.is_some() && shape.offered(node) == 0),
        (Gap::TooFew, is_accelerated && has_too_few),
        (Gap::Nvlink, demand.nvlink == Some(Need::Required) && !node.has_nvlink),
        (
            Gap::Infiniband,
            demand.infiniband == Some(Need::Required) && !node.has_infiniband,
        ),
        (
            Gap::Size,
            demand.cpu_millis > node.cpu_millis || demand.memory_bytes > node.memory_bytes,
        ),
        (Gap::Cordoned, node.is_cordoned),
        (Gap::Sick, is_sick(node, is_accelerated)),
    ];
    checks
        .iter()
        .find(|(gap, holds)| *holds && !forgiven.contains(gap))
        .map(|(gap, _)| *gap)
}

/// A node's accelerators may be sick while its processors are not.
fn is_sick(node: &Node, is_accelerated: bool) -> bool {
    node.sick.iter().any(|sign| is_accelerated || sign == "NotReady")
}

/// A pool that does.
struct Choice<'a> {
    /// One of its nodes: they are alike in what counts here.
    node: &'a Node,
    per_node: u32,
    nodes: u32,
    /// The smaller, the better.
    rank: (bool, bool, bool, u64),
}

impl Choice<'_> {
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let key = |choice: &Self| {
            (
                choice.rank,
                choice.node.pool.clone(),
                Reverse(choice.per_node),
                choice.node.name.clone(),
            )
        };
        key(self).cmp(&key(other))
    }
}

/// Every node of a pool of which enough do, the best first.
fn choices<'a>(
    shape: &Shape<'_>,
    table: &Table,
    nodes: impl Iterator<Item = (&'a Node, u32)>,
    forgiven: &[Gap],
) -> Vec<Choice<'a>> {
    let mut pools: BTreeMap<_, (Vec<&Node>, u32)> = BTreeMap::new();
    for (node, how_many) in nodes {
        if gap(shape, node, forgiven).is_some() {
            continue;
        }
        let Some((per_node, hosts)) = shape.on(node) else {
            continue;
        };
        let alike = (&node.pool, per_node, hosts, rdma(shape, node, table));
        let pool = pools.entry(alike).or_default();
        pool.0.push(node);
        pool.1 = pool.1.saturating_add(how_many.saturating_mul(shape.pods_on(node)));
    }
    let enough = pools
        .into_iter()
        .filter(|((_, _, hosts, _), (_, found))| found >= hosts);
    let mut all: Vec<Choice> = enough
        .flat_map(|((_, per_node, hosts, _), (nodes, _))| nodes.into_iter().map(move |node| (node, per_node, hosts)))
        .map(|(node, per_node, nodes)| Choice {
            node,
            per_node,
            nodes,
            rank: (
                shape.demand.capacity == Capacity::Any && !node.is_spot,
                shape.demand.nvlink.is_some() && !node.has_nvlink,
                shape.demand.infiniband.is_some() && !node.has_infiniband,
                price_rank(shape, node, per_node),
            ),
        })
        .collect();
    all.sort_by(Choice::order);
    all
}

/// Price of a node, or of what is taken of it.
fn price(shape: &Shape<'_>, node: Option<&Node>, per_node: u32) -> Option<f64> {
    let listed = shape
        .row
        .price_per_hour
        .map(|price| price.0 * f64::from(per_node) * part(shape.demand));
    node.and_then(|node| node.price_per_hour).or(listed)
}

/// The part of a GPU that is taken: 3g is three sevenths.
fn part(demand: &Demand) -> f64 {
    let slices = demand
        .mig_profile
        .as_ref()
        .and_then(|profile| profile.split_once('g')?.0.parse::<f64>().ok());
    slices.map_or(1.0, |slices| slices / 7.0)
}

/// Price of a node in millionths, for comparisons.
fn price_rank(shape: &Shape<'_>, node: &Node, per_node: u32) -> u64 {
    (price(shape, Some(node), per_node).unwrap_or(0.0) * 1e6) as u64
}

/// InfiniBand's devices are asked for by the name that the node has for them: all of them, or a share of what is shared.
fn rdma(shape: &Shape<'_>, node: &Node, table: &Table) -> Option<(String, u32)> {
    shape.demand.infiniband?;
    let found = |name: &&String| node.resources.get(*name).is_some_and(|count| *count > 0);
    let name = table.infiniband.resources.iter().find(found)?;
    let count = if name.contains("shared") {
        1
    } else {
        node.resources[name]
    };
    Some((name.clone(), count))
}

fn placement(shape: &Shape<'_>, fleet: &Fleet, choice: Option<&Choice<'_>>, seat: Seat) -> Placement {
    let demand = shape.demand;
    let (per_node, nodes) = choice.map_or_else(|| shape.guess(), |choice| (choice.per_node, choice.nodes));
    let node = choice.map(|choice| choice.node);
    let (mut resources, mut claim) = (BTreeMap::new(), None);
    match shape.asks.as_ref().filter(|_| per_node > 0) {
        None => {}
        Some(Asks::Resource(resource)) => drop(resources.insert(resource.clone(), per_node)),
        Some(Asks::Devices(kind)) => {
            claim = Some(Claim {
                kind: kind.clone(),
                count: per_node,
            });
        }
    }
    let rdma = node.and_then(|node| rdma(shape, node, &fleet.table));
    let by_label = rdma.is_none();
    resources.extend(rdma);
    let mut node_selector = BTreeMap::new();
    if let Some((key, pool)) = node.and_then(|node| node.pool.clone()).filter(|_| nodes > 1) {
        node_selector.insert(key, pool);
    }
    Placement {
        accelerator: shape.row.name.clone(),
        family: shape.row.family,
        pool: node.and_then(Node::pool_name).map(str::to_owned),
        seat,
        nodes,
        per_node,
        node_selector,
        tolerations: schedule::tolerations(shape.row, demand.capacity, &fleet.table.spot),
        affinity: schedule::affinity(demand, shape.row, &fleet.table, by_label),
        avoid: avoid(shape, fleet),
        resources,
        claim,
        has_nvlink: node.is_some_and(|node| node.has_nvlink) && demand.mig_profile.is_none(),
        accelerator_bytes: accelerator_bytes(demand, shape.row),
        share: part(demand),
        price_per_hour: price(shape, node, per_node).map(|price| price * f64::from(nodes)),
    }
}

/// Nodes that would attract the pods and are sick, by host name.
fn avoid(shape: &Shape<'_>, fleet: &Fleet) -> Vec<String> {
    let is_accelerated = shape.row.family != Family::Cpu;
    let sick: BTreeSet<&String> = fleet
        .there()
        .filter(|node| is_accelerated && node.accelerator == shape.row.name && is_sick(node, true))
        .map(|node| &node.hostname)
        .collect();
    sick.into_iter().take(MOST_AVOIDED).cloned().collect()
}

/// Judges what is known to be needed against what the accelerators have.
fn memory(shape: &Shape<'_>, fleet: &Fleet, per_node: u32, nodes: u32) -> Result<(), Misfit> {
    let (Some(needed), Some(each)) = (
        shape.demand.accelerator_bytes,
        accelerator_bytes(shape.demand, shape.row),
    ) else {
        return Ok(());
    };
    let has = each
        .saturating_mul(u64::from(per_node))
        .saturating_mul(u64::from(nodes));
    if needed <= has {
        return Ok(());
    }
    let gib = |bytes: u64| bytes.div_ceil(1 << 30);
    let more = needed.div_ceil(each.max(1));
    let of_many = format!("{more} accelerators");
    let larger: Vec<&str> = fleet
        .table
        .accelerators
        .iter()
        .filter(|row| row.memory_bytes.is_some_and(|bytes| bytes >= needed))
        .filter(|row| shape.demand.engine.supports(row.family, 1, 1, &[]).is_ok())
        .map(|row| row.name.as_str())
        .collect();
    let takes_many =
        u32::try_from(more).is_ok_and(|more| shape.demand.engine.supports(shape.row.family, more, 1, &[]).is_ok());
    let would = match (takes_many, larger.is_empty()) {
        (true, _) => of_many,
        (false, false) => larger.join(", "),
        (false, true) => "no accelerator of the table with this engine: make the model smaller".into(),
    };
    Err(misfit(
        Reason::NoNodeFits,
        format!(
            "at least {} GiB of accelerator memory are needed, and {} × {} have {} GiB; what would fit: {would}",
            gib(needed),
            per_node * nodes,
            shape.row.name,
            has >> 30,
        ),
    ))
}

/// Memory of one accelerator, or of the part of it that is asked for.
pub fn accelerator_bytes(demand: &Demand, row: &Accelerator) -> Option<u64> {
    match &demand.mig_profile {
        // 3g.40gb: the number before "gb".
        Some(profile) => {
            let gigabytes: u64 = profile.split_once('.')?.1.split_once("gb")?.0.parse().ok()?;
            gigabytes.checked_mul(1_000_000_000)
        }
        None => row.memory_bytes,
    }
}
