//! What is said where nothing fits: what is nearest to it, and what to write.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Which sick nodes would do, and what they have.
pub(super) fn sick(shape: &Shape<'_>, fleet: &Fleet) -> String {
    let away: Vec<&Node> = fleet
        .there()
        .filter(|node| gap(shape, node, &[Gap::Sick, Gap::Cordoned]).is_none() && gap(shape, node, &[]).is_some())
        .collect();
    let signs: BTreeSet<&str> = away
        .iter()
        .flat_map(|node| {
            node.sick
                .iter()
                .map(String::as_str)
                .chain(node.is_cordoned.then_some("cordoned"))
        })
        .collect();
    let signs: Vec<&str> = signs.into_iter().collect();
    let are = if away.len() == 1 { "is" } else { "are" };
    format!(
        "{} with {} would do and {are} kept away from ({}): it starts when enough of them are well",
        count(away.len(), "node"),
        shape.row.name,
        signs.join(", ")
    )
}

/// What is nearest to fitting, and what to write.
pub(super) fn nearest(shape: &Shape<'_>, fleet: &Fleet) -> String {
    let demand = shape.demand;
    let (per_node, wanted) = shape.guess();
    let declared = fleet.declared.iter().map(|(node, most)| (node, *most as usize));
    let all: Vec<(Option<Gap>, &Node, usize)> = fleet
        .there()
        .map(|node| (node, 1))
        .chain(declared)
        .map(|(node, how_many)| (gap(shape, node, &[]), node, how_many))
        .collect();
    let nearest = all.iter().map(|(gap, ..)| gap.map_or(u8::MAX, |gap| gap as u8)).max();
    let those: Vec<&Node> = all
        .iter()
        .filter(|(gap, ..)| Some(gap.map_or(u8::MAX, |gap| gap as u8)) == nearest)
        .map(|(_, node, _)| *node)
        .collect();
    let gap = all
        .iter()
        .find(|(gap, ..)| Some(gap.map_or(u8::MAX, |gap| gap as u8)) == nearest);
    let name = &shape.row.name;
    let found = count(those.len(), "node");
    let offered = those.iter().map(|node| shape.offered(node)).max().unwrap_or(0);
    let list = |values: BTreeSet<String>| values.into_iter().take(8).collect::<Vec<_>>().join(", ");
    match gap.map(|(gap, ..)| *gap) {
        None => format!(
            "there are no nodes, and no pool is declared: add nodes with {name}, or declare their pool in the chart's value pools"
        ),
        Some(Some(Gap::Accelerator)) => {
            let kinds: BTreeSet<String> = those.iter().map(|node| node.accelerator.clone()).collect();
            format!(
                "no node and no declared pool has {name}; there is {}: write one of those as accelerator, add nodes, or declare a \
                 pool that may grow in the chart's value pools",
                list(kinds)
            )
        }
        Some(Some(Gap::Labels)) => {
            format!("{found} with {name}, but none has the labels of spec.pod.nodeSelector: correct it")
        }
        Some(Some(Gap::Taint)) => {
            let taints: BTreeSet<String> = those
                .iter()
                .flat_map(|node| &node.taints)
                .map(|taint| {
                    format!(
                        "{}={}:{}",
                        taint.key,
                        taint.value.as_deref().unwrap_or(""),
                        taint.effect
                    )
                })
                .collect();
            format!(
                "{found} would do but for taints ({}): add to spec.pod.tolerations",
                list(taints)
            )
        }
        Some(Some(Gap::Capacity)) => match demand.capacity {
            Capacity::Spot => format!("{found} with {name}, none of them spot: write capacity: Any or OnDemand"),
            _ => format!("{found} with {name}, all of them spot: write capacity: Any or Spot"),
        },
        Some(Some(Gap::Topology)) => {
            let shapes: BTreeSet<String> = those.iter().filter_map(|node| node.topology.clone()).collect();
            let asked = demand.topology.as_ref().map_or("", |slice| slice.text.as_str());
            let nodes = demand
                .nodes
                .map(|nodes| format!(" of {}", count(nodes as usize, "node")))
                .unwrap_or_default();
            format!(
                "no slice of {name} has the topology {asked}{nodes}; there is {}: write one of those",
                list(shapes)
            )
        }
        Some(Some(Gap::Partition)) => {
            let profiles: BTreeSet<String> = those
                .iter()
                .flat_map(|node| match shape.asks {
                    Some(Asks::Devices(_)) => device::profiles(&node.devices).collect::<Vec<_>>(),
                    _ => {
                        let parts = node
                            .resources
                            .keys()
                            .filter_map(|key| key.strip_prefix("nvidia.com/mig-"));
                        parts.map(str::to_owned).collect()
                    }
                })
                .collect();
            let there = match profiles.is_empty() {
                true => "none is partitioned: leave out migProfile".to_owned(),
                false => format!("there is {}: write one of those", list(profiles)),
            };
            format!(
                "no {name} has the partition {}; {there}",
                demand.mig_profile.as_deref().unwrap_or_default()
            )
        }
        Some(Some(Gap::TooFew)) if offered == 0 => match &shape.asks {
            Some(Asks::Devices(kind)) => format!(
                "{found} with {name}, for which no ResourceSlice offers any by the driver {}: write allocation: DevicePlugin, or \
                 install that DRA driver",
                kind.driver
            ),
            _ if those.iter().any(|node| offers_by_claim(shape, node)) => {
                format!("{found} with {name}, offered by claims only: write allocation: ResourceClaim")
            }
            _ => format!(
                "{found} with {name}, none of which has it as a resource that pods can ask for: see that its device plugin runs"
            ),
        },
        Some(Some(Gap::TooFew)) => format!(
            "{found} with {name}, with at most {offered} of the {per_node} that are asked for: write acceleratorsPerNode: {offered}, or add larger nodes"
        ),
        Some(Some(Gap::Nvlink)) => format!(
            "{found} with {name}, none known to have NVLink: write interconnect.nvlink: Preferred, or add nodes whose GPUs it joins"
        ),
        Some(Some(Gap::Infiniband)) => format!(
            "{found} with {name}, none with InfiniBand: write interconnect.infiniband: Preferred, or add nodes that have it (on AKS \
             an exact size such as Standard_ND96isr_H100_v5)"
        ),
        Some(Some(Gap::Size)) => {
            let most = |of: fn(&Node) -> f64| those.iter().map(|node| of(node)).fold(0.0, f64::max);
            format!(
                "{found} would do but for processors or memory: a pod asks for {:.1} cores and {:.1} GiB, and they have at most {:.1} \
                 and {:.1}: lower spec.pod.resources, or add larger nodes",
                demand.cpu_millis / 1000.0,
                demand.memory_bytes / f64::from(1 << 30),
                most(|node| node.cpu_millis) / 1000.0,
                most(|node| node.memory_bytes) / f64::from(1 << 30),
            )
        }
        Some(Some(Gap::Sick | Gap::Cordoned) | None) => {
            let mut pools: BTreeMap<&str, usize> = BTreeMap::new();
            for (_, node, how_many) in all.iter().filter(|(gap, ..)| gap.is_none()) {
                *pools.entry(node.pool_name().unwrap_or("")).or_default() += how_many * shape.pods_on(node) as usize;
            }
            let most = pools.values().copied().max().unwrap_or(0);
            let fewer = match demand.topology {
                Some(_) => "a slice is taken whole, so wait for the others or take a smaller topology".to_owned(),
                None => format!("write nodeCount: {most}"),
            };
            format!(
                "no pool has {} that do; the largest has {most}: {fewer}, add nodes, or declare in the chart's value pools how far a \
                 pool may grow",
                count(wanted as usize, "node")
            )
        }
    }
}

fn offers_by_claim(shape: &Shape<'_>, node: &Node) -> bool {
    let kind = shape.row.device.as_ref();
    kind.is_some_and(|kind| device::count(&node.devices, kind) > 0)
}
