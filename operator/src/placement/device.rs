//! Devices that are asked for by claim (resource.k8s.io/v1, dynamic resource allocation): which ones an accelerator is, and how
//! many of them each node has by what DRA drivers say in ResourceSlices.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::resource::v1::{Device, DeviceCounterConsumption, ResourceSlice};
use serde::Deserialize;

use super::table::Table;
use crate::workload::quantity;

/// Whose MIG partitions are claimed: NVIDIA's DRA driver, its DeviceClass for them, and the attribute with their profile
/// (kubernetes-sigs/dra-driver-nvidia-gpu, cmd/gpu-kubelet-plugin/deviceinfo.go).
const MIG_DRIVER: &str = "gpu.nvidia.com";
const MIG_CLASS: &str = "mig.nvidia.com";
const PROFILE: &str = "profile";

/// The devices that an accelerator is.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DeviceKind {
    /// Name of their DeviceClass.
    pub class: String,
    /// Name of their driver.
    pub driver: String,
    /// Attributes of the driver's that one has: not all that a driver offers is a whole accelerator.
    #[serde(default)]
    pub attributes: BTreeMap<String, String>,
}

impl DeviceKind {
    /// The partitions of a GPU that have a profile, which is written as in the device plugin's resources: `1g.10gb.me`, where
    /// NVIDIA says `1g.10gb+me`.
    pub fn mig(profile: &str) -> Self {
        let attributes = [("type", "mig".to_owned()), (PROFILE, profile.replace(".me", "+me"))];
        Self {
            class: MIG_CLASS.into(),
            driver: MIG_DRIVER.into(),
            attributes: attributes.map(|(name, value)| (name.to_owned(), value)).into(),
        }
    }
}

/// What one pod asks for by claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which devices.
    pub kind: DeviceKind,
    /// How many.
    pub count: u32,
}

/// Devices of a node that are alike in what matters here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sort {
    driver: String,
    attributes: BTreeMap<String, String>,
}

/// How many devices of each sort a node has.
pub type Devices = BTreeMap<Sort, u32>;

/// How many of a node's devices are of that kind.
pub fn count(devices: &Devices, kind: &DeviceKind) -> u32 {
    let is_one = |sort: &Sort| {
        let mut attributes = kind.attributes.iter();
        sort.driver == kind.driver && attributes.all(|(name, value)| sort.attributes.get(name) == Some(value))
    };
    devices
        .iter()
        .filter(|(sort, _)| is_one(sort))
        .map(|(_, count)| count)
        .sum()
}

/// The profiles of a node's MIG partitions, as `spec.hardware` writes them.
pub fn profiles(devices: &Devices) -> impl Iterator<Item = String> {
    let ours = devices.keys().filter(|sort| sort.driver == MIG_DRIVER);
    ours.filter_map(|sort| Some(sort.attributes.get(PROFILE)?.replace("+me", ".me")))
}

/// Devices of a declared pool's node.
pub fn declared(kind: &DeviceKind, count: u32) -> (Sort, u32) {
    let sort = Sort {
        driver: kind.driver.clone(),
        attributes: kind.attributes.clone(),
    };
    (sort, count)
}

/// Amounts of counters, by set and counter: what devices that are cut from one whole share.
type Counters = BTreeMap<(String, String), f64>;

/// What matters of a ResourceSlice.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// The node that has the devices. What several nodes share is no node's, and not counted.
    node: Option<String>,
    driver: String,
    pool: String,
    generation: i64,
    /// Slices that the pool has in this generation.
    slices: i64,
    counters: Counters,
    devices: Vec<(String, Sort, Counters)>,
}

impl Slice {
    /// Reads the API's ResourceSlice. Of attributes, those are kept by which `table` tells devices apart.
    pub fn read(slice: &ResourceSlice, table: &Table) -> Self {
        let spec = &slice.spec;
        let rows = table.accelerators.iter().filter_map(|row| row.device.as_ref());
        let mig = DeviceKind::mig("");
        let names: BTreeSet<&String> = rows
            .chain([&mig])
            .filter(|kind| kind.driver == spec.driver)
            .flat_map(|kind| kind.attributes.keys())
            .collect();
        let sets = spec.shared_counters.iter().flatten();
        let devices = spec.devices.iter().flatten();
        Self {
            node: spec.node_name.clone(),
            driver: spec.driver.clone(),
            pool: spec.pool.name.clone(),
            generation: spec.pool.generation,
            slices: spec.pool.resource_slice_count,
            counters: sets
                .flat_map(|set| {
                    amounts(
                        &set.name,
                        set.counters.iter().map(|(name, counter)| (name, &counter.value.0)),
                    )
                })
                .collect(),
            devices: devices
                .map(|device| (device.name.clone(), sort(&spec.driver, device, &names), needs(device)))
                .collect(),
        }
    }
}

/// Whether taints keep a device away is not asked: AMD's driver taints by what else is allocated, and fullness is the
/// scheduler's to judge.
fn sort(driver: &str, device: &Device, names: &BTreeSet<&String>) -> Sort {
    let attributes = device.attributes.clone().unwrap_or_default();
    let value = |name: &&&String| {
        // A name without a domain is in the driver's.
        let attribute = attributes
            .get(**name)
            .or_else(|| attributes.get(&format!("{driver}/{name}")))?;
        Some(((**name).clone(), attribute.string.clone()?))
    };
    Sort {
        driver: driver.to_owned(),
        attributes: names.iter().filter_map(|name| value(&name)).collect(),
    }
}

fn needs(device: &Device) -> Counters {
    let amounts_of = |needed: &DeviceCounterConsumption| {
        let counters = needed.counters.iter().map(|(name, counter)| (name, &counter.value.0));
        amounts(&needed.counter_set, counters).collect::<Vec<_>>()
    };
    device.consumes_counters.iter().flatten().flat_map(amounts_of).collect()
}

fn amounts<'a>(
    set: &'a str,
    counters: impl Iterator<Item = (&'a String, &'a String)>,
) -> impl Iterator<Item = ((String, String), f64)> {
    counters.map(move |(name, value)| ((set.to_owned(), name.clone()), quantity::parse(value).unwrap_or(0.0)))
}

/// What each node has by `slices`, in any order. As the scheduler does, only the newest generation of a pool counts, and only once
/// all of its slices are there.
pub fn by_node<'a>(slices: impl Iterator<Item = &'a Slice>) -> BTreeMap<String, Devices> {
    let mut pools: BTreeMap<(&String, &String), Vec<&Slice>> = BTreeMap::new();
    for slice in slices {
        pools.entry((&slice.driver, &slice.pool)).or_default().push(slice);
    }
    let mut nodes: BTreeMap<String, Devices> = BTreeMap::new();
    for slices in pools.values() {
        let newest = slices.iter().map(|slice| slice.generation).max();
        let slices: Vec<&&Slice> = slices.iter().filter(|slice| Some(slice.generation) == newest).collect();
        let is_whole = |slice: &&&Slice| i64::try_from(slices.len()).is_ok_and(|there| there >= slice.slices);
        if !slices.iter().all(is_whole) {
            continue;
        }
        let counters: Counters = slices.iter().flat_map(|slice| slice.counters.clone()).collect();
        let mut sorts: BTreeMap<(&String, &Sort), BTreeMap<&String, &Counters>> = BTreeMap::new();
        for slice in slices {
            let Some(node) = &slice.node else { continue };
            for (name, sort, needs) in &slice.devices {
                sorts.entry((node, sort)).or_default().insert(name, needs);
            }
        }
        for ((node, sort), devices) in sorts {
            let together = together(devices.into_values(), counters.clone());
            *nodes.entry(node.clone()).or_default().entry(sort.clone()).or_default() += together;
        }
    }
    nodes
}

/// How many of `devices` can be had at once: a driver may offer every partition that could be cut from a GPU.
fn together<'a>(devices: impl Iterator<Item = &'a Counters>, mut left: Counters) -> u32 {
    let mut count = 0;
    for needs in devices {
        let has_left =
            |(counter, amount): (&(String, String), &f64)| left.get(counter).is_some_and(|left| left >= amount);
        if needs.iter().all(has_left) {
            for (counter, amount) in needs {
                left.entry(counter.clone()).and_modify(|left| *left -= amount);
            }
            count += 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn slice(change: Value) -> Slice {
        let mut slice = json!({"metadata": {"name": "s"}, "spec": {
            "driver": "gpu.nvidia.com", "nodeName": "n", "pool": {"name": "n", "generation": 1, "resourceSliceCount": 1},
            "devices": [],
        }});
        crate::fixtures::merge(&mut slice["spec"], change);
        Slice::read(&serde_json::from_value(slice).expect("a slice"), &Table::built_in())
    }

    fn device(name: &str, attributes: Value) -> Value {
        let attributes: serde_json::Map<String, Value> = attributes
            .as_object()
            .expect("a map")
            .iter()
            .map(|(name, value)| (name.clone(), json!({"string": value})))
            .collect();
        json!({"name": name, "attributes": attributes})
    }

    fn gpus(count: usize) -> Vec<Value> {
        (0..count)
            .map(|index| {
                device(
                    &format!("gpu-{index}"),
                    json!({"type": "gpu", "uuid": format!("GPU-{index}")}),
                )
            })
            .collect()
    }

    fn counted(slices: &[Slice], node: &str, kind: &DeviceKind) -> u32 {
        by_node(slices.iter())
            .get(node)
            .map_or(0, |devices| super::count(devices, kind))
    }

    #[test]
    fn devices_are_counted_by_node_in_the_newest_whole_generation_of_their_pool() {
        let gpu = Table::built_in()
            .get("nvidia-h100")
            .and_then(|row| row.device.clone())
            .expect("a kind");
        let pool =
            |generation: i64, slices: i64| json!({"name": "n", "generation": generation, "resourceSliceCount": slices});
        let of = |change: Value, count: usize| {
            let mut change = change;
            change["devices"] = json!(gpus(count));
            slice(change)
        };
        let cases = [
            ("one slice", vec![of(json!({}), 8)], 8),
            (
                "two of one pool",
                vec![
                    of(json!({"pool": pool(1, 2)}), 8),
                    slice(json!({"pool": pool(1, 2),
                "devices": [device("gpu-8", json!({"gpu.nvidia.com/type": "gpu"}))]})),
                ],
                9,
            ),
            (
                "a generation of before",
                vec![of(json!({"pool": pool(1, 1)}), 8), of(json!({"pool": pool(2, 1)}), 4)],
                4,
            ),
            (
                "a new one that is not whole yet",
                vec![of(json!({"pool": pool(1, 1)}), 8), of(json!({"pool": pool(2, 2)}), 4)],
                0,
            ),
            (
                "two pools",
                vec![of(json!({}), 8), of(json!({"pool": {"name": "other"}}), 4)],
                12,
            ),
            ("another node's", vec![of(json!({"nodeName": "m"}), 8)], 0),
            ("no node's", vec![of(json!({"nodeName": null, "allNodes": true}), 8)], 0),
            ("another driver's", vec![of(json!({"driver": "gpu.amd.com"}), 8)], 0),
            (
                "other devices of the driver",
                vec![slice(json!({"devices": [device("m", json!({"type": "mig"}))]}))],
                0,
            ),
            ("no attributes", vec![slice(json!({"devices": [{"name": "x"}]}))], 0),
        ];
        for (what, slices, expect) in cases {
            assert_eq!(counted(&slices, "n", &gpu), expect, "{what}");
            let turned: Vec<Slice> = slices.into_iter().rev().collect();
            assert_eq!(counted(&turned, "n", &gpu), expect, "{what}, the other way round");
        }
    }

    /// An H100 has seven slices of processors and eight of memory; a driver that cuts on demand offers every place of every
    /// profile (NVIDIA's MIG user guide, H100: 1g.10gb at 0 to 6, 3g.40gb at 0 and 4).
    #[test]
    fn partitions_that_could_be_cut_are_counted_as_far_as_they_can_be_had_at_once() {
        let place = |profile: &str, from: usize, size: usize| {
            let counters: serde_json::Map<String, Value> = (from..from + size)
                .map(|slice| (format!("memory-slice-{slice}"), json!({"value": "1"})))
                .collect();
            let mut one = device(
                &format!("{}-{from}", profile.replace(['.', '+'], "-")),
                json!({"type": "mig", "profile": profile}),
            );
            one["consumesCounters"] = json!([{"counterSet": "gpu-0", "counters": counters}]);
            one
        };
        let whole: serde_json::Map<String, Value> = (0..8)
            .map(|slice| (format!("memory-slice-{slice}"), json!({"value": "1"})))
            .collect();
        let mut devices: Vec<Value> = (0..7).map(|from| place("1g.10gb", from, 1)).collect();
        devices.extend([place("1g.20gb", 0, 2), place("1g.20gb", 1, 2), place("1g.20gb", 2, 2)]);
        devices.extend([
            place("3g.40gb", 0, 4),
            place("3g.40gb", 4, 4),
            place("1g.10gb+me", 0, 1),
        ]);
        // Counters may be in a slice of their own.
        let pool = json!({"name": "n", "generation": 1, "resourceSliceCount": 2});
        let slices = [
            slice(json!({"pool": pool, "devices": devices})),
            slice(json!({"pool": pool, "sharedCounters": [{"name": "gpu-0", "counters": whole}]})),
        ];
        for (profile, expect) in [
            ("1g.10gb", 7),
            ("1g.20gb", 2),
            ("3g.40gb", 2),
            ("1g.10gb.me", 1),
            ("7g.80gb", 0),
        ] {
            assert_eq!(counted(&slices, "n", &DeviceKind::mig(profile)), expect, "{profile}");
        }
        let there: BTreeSet<String> = profiles(&by_node(slices.iter())["n"]).collect();
        assert_eq!(
            there,
            ["1g.10gb", "1g.10gb.me", "1g.20gb", "3g.40gb"]
                .map(str::to_owned)
                .into()
        );
    }
}
