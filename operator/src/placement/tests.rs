//! What fits where, as a table; and what must hold for any fleet.

mod claims;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node as ApiNode;
use k8s_openapi::api::resource::v1::ResourceSlice;
use proptest::prelude::*;
use serde_json::{Value, json};
use strata_api::{Hardware, PodOverrides, Reason};

use super::schedule::tolerates;
use super::{Demand, Engine, Family, Fleet, Node, Placement, Seat, Table, device, engine, fit};
use crate::engine::kind::{Kind, Observed, Refusal, ResourceKind};
use crate::fixtures::{Attempt, NOW, at, env, inference, observe, pretrain, published, started, to};
use crate::workload::pod::Sizes;

const SIZES: Sizes = Sizes {
    cpu_millis: 1000,
    memory_mib: 1024,
    memory_limit_mib: 2048,
};

/// A node of `pool` with these labels, resources and more.
fn node(name: &str, labels: Value, allocatable: Value, more: Value) -> ApiNode {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {"allocatable": {"cpu": "90", "memory": "1800Gi"}, "conditions": [{"type": "Ready", "status": "True"}]},
    });
    crate::fixtures::merge(&mut node["metadata"]["labels"], labels);
    crate::fixtures::merge(&mut node["status"]["allocatable"], allocatable);
    crate::fixtures::merge(&mut node, more);
    serde_json::from_value(node).expect("a node")
}

fn h100(name: &str, pool: &str, more: Value) -> ApiNode {
    let labels = json!({
        "kubernetes.azure.com/agentpool": pool,
        "node.kubernetes.io/instance-type": "Standard_ND96isr_H100_v5",
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    });
    node(name, labels, json!({"nvidia.com/gpu": "8", "rdma/ib": "8"}), more)
}

fn spot(name: &str) -> ApiNode {
    let more = json!({
        "metadata": {"labels": {"kubernetes.azure.com/scalesetpriority": "spot"}},
        "spec": {"taints": [{"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"}]},
    });
    h100(name, "spot", more)
}

fn sick(name: &str, pool: &str, condition: &str) -> ApiNode {
    let conditions = json!([{"type": "Ready", "status": "True"}, {"type": condition, "status": "True"}]);
    h100(name, pool, json!({"status": {"conditions": conditions}}))
}

fn tpu(name: &str, pool: &str, topology: &str, chips: &str) -> ApiNode {
    let labels = json!({
        "cloud.google.com/gke-nodepool": pool,
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": topology,
    });
    let taints = json!([{"key": "google.com/tpu", "value": "present", "effect": "NoSchedule"}]);
    node(
        name,
        labels,
        json!({"google.com/tpu": chips}),
        json!({"spec": {"taints": taints}}),
    )
}

fn fleet_with(nodes: Vec<ApiNode>, more: &str) -> Fleet {
    fleet_of(nodes, &[], more)
}

fn fleet_of(nodes: Vec<ApiNode>, slices: &[ResourceSlice], more: &str) -> Fleet {
    Fleet::read(Arc::new(Table::read(more).expect("a table")), &nodes, slices)
}

/// What a DRA driver says of a node: so many devices with these attributes.
fn slice(node: &str, driver: &str, count: u32, attributes: Value) -> ResourceSlice {
    let attributes: BTreeMap<&String, Value> = attributes
        .as_object()
        .expect("a map")
        .iter()
        .map(|(name, value)| (name, json!({"string": value})))
        .collect();
    let devices: Vec<Value> = (0..count)
        .map(|index| json!({"name": format!("d{index}"), "attributes": attributes}))
        .collect();
    serde_json::from_value(json!({"metadata": {"name": format!("{node}-{driver}")}, "spec": {
        "driver": driver, "nodeName": node, "pool": {"name": node, "generation": 1, "resourceSliceCount": 1}, "devices": devices,
    }}))
    .expect("a slice")
}

/// A node whose GPUs are offered by claims.
fn claimed(name: &str, pool: &str, count: u32) -> (ApiNode, ResourceSlice) {
    let node = h100(name, pool, json!({"status": {"allocatable": {"nvidia.com/gpu": null}}}));
    (node, slice(name, "gpu.nvidia.com", count, json!({"type": "gpu"})))
}

fn demand(hardware: Value, engine: Engine) -> Demand {
    let hardware: Hardware = serde_json::from_value(hardware).expect("hardware");
    Demand::read(&hardware, &PodOverrides::default(), SIZES, engine).expect("a demand")
}

/// Pool, nodes and accelerators a node of the answer; or the reason and the message.
fn place(hardware: Value, fleet: &Fleet) -> Result<(String, u32, u32, Seat), (Reason, String)> {
    match fit::place(&demand(hardware, Engine::Container), fleet, engine::OFFERED) {
        Ok(Placement {
            pool,
            nodes,
            per_node,
            seat,
            ..
        }) => Ok((pool.unwrap_or_default(), nodes, per_node, seat)),
        Err(misfit) => Err((misfit.reason, misfit.message)),
    }
}

#[test]
fn a_demand_goes_where_its_shape_is() {
    let slice = |pool: &str, hosts: usize| -> Vec<ApiNode> {
        (0..hosts)
            .map(|host| tpu(&format!("{pool}{host}"), pool, "4x4", "4"))
            .collect()
    };
    let noib = json!({"metadata": {"labels": {"node.kubernetes.io/instance-type": "Standard_ND96is_noIB_H100_v5"}},
        "status": {"allocatable": {"rdma/ib": null}}});
    let mixed = json!({"status": {"allocatable": {"nvidia.com/gpu": "0", "nvidia.com/mig-1g.10gb": "56"}}});
    let all = |nodes: Vec<ApiNode>| fleet_with(nodes, "");
    let h100_8 = json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": 8});
    let cases = [
        (
            "a GPU node",
            h100_8.clone(),
            all(vec![h100("a", "p", json!({}))]),
            ("p", 1, 8),
        ),
        (
            "two nodes of one pool, not one of each",
            json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": 8, "nodeCount": 2}),
            all(vec![
                h100("a", "p", json!({})),
                h100("b", "q", json!({})),
                h100("c", "q", json!({})),
            ]),
            ("q", 2, 8),
        ),
        (
            "InfiniBand by the exact size",
            json!({"accelerator": "nvidia-h100", "interconnect": {"infiniband": "Required"}}),
            all(vec![h100("a", "noib", noib.clone()), h100("b", "ib", json!({}))]),
            ("ib", 1, 1),
        ),
        (
            "without, where it is only preferred",
            json!({"accelerator": "nvidia-h100", "interconnect": {"infiniband": "Preferred"}}),
            all(vec![h100("a", "noib", noib)]),
            ("noib", 1, 1),
        ),
        (
            "spot first where both are allowed",
            json!({"accelerator": "nvidia-h100", "capacity": "Any"}),
            all(vec![h100("a", "p", json!({})), spot("b")]),
            ("spot", 1, 1),
        ),
        (
            "others where there is no spot",
            json!({"accelerator": "nvidia-h100", "capacity": "Any"}),
            all(vec![h100("a", "p", json!({}))]),
            ("p", 1, 1),
        ),
        (
            "not spot where nothing is said",
            json!({"accelerator": "nvidia-h100"}),
            all(vec![spot("b"), h100("a", "p", json!({}))]),
            ("p", 1, 1),
        ),
        (
            "a whole slice of four hosts",
            json!({"accelerator": "google-tpu-v5e", "topology": "4x4"}),
            all(slice("s", 4)),
            ("s", 4, 4),
        ),
        (
            "not half of one",
            json!({"accelerator": "google-tpu-v5e", "topology": "4x4"}),
            all(slice("half", 2).into_iter().chain(slice("whole", 4)).collect()),
            ("whole", 4, 4),
        ),
        (
            "a slice on one host",
            json!({"accelerator": "google-tpu-v5e", "topology": "2x4"}),
            all(vec![tpu("a", "t", "2x4", "8")]),
            ("t", 1, 8),
        ),
        (
            "a part of a GPU",
            json!({"accelerator": "nvidia-h100", "migProfile": "1g.10gb", "acceleratorsPerNode": 2}),
            all(vec![h100("a", "p", json!({})), h100("b", "mig", mixed)]),
            ("mig", 1, 2),
        ),
        (
            "the well one of two",
            json!({"accelerator": "nvidia-h100"}),
            all(vec![sick("a", "p", "XIDErrors"), h100("b", "q", json!({}))]),
            ("q", 1, 1),
        ),
        (
            "a sick GPU does not hurt a processor",
            json!({"accelerator": "cpu"}),
            all(vec![node(
                "a",
                json!({"kubernetes.azure.com/agentpool": "c"}),
                json!({}),
                json!({"status": {"conditions": [{"type": "GPUMissing", "status": "True"}]}}),
            )]),
            ("c", 1, 0),
        ),
    ];
    for (what, hardware, fleet, (pool, nodes, per_node)) in cases {
        assert_eq!(
            place(hardware, &fleet),
            Ok((pool.to_owned(), nodes, per_node, Seat::There)),
            "{what}"
        );
    }
}

#[test]
fn what_does_not_fit_is_said_with_what_would() {
    let here = |nodes: Vec<ApiNode>| fleet_with(nodes, "");
    let four = json!({"status": {"allocatable": {"nvidia.com/gpu": "4"}}});
    let pool = "pools: [{name: big, accelerator: nvidia-h100, acceleratorsPerNode: 8, maxNodes: 2, cpu: '90', memory: 1800Gi}]";
    let cases = [
        (
            json!({"accelerator": "h100"}),
            here(vec![]),
            Reason::SpecInvalid,
            "write one of cpu, nvidia-h100",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            here(vec![]),
            Reason::NoNodeFits,
            "there are no nodes",
        ),
        (
            json!({"accelerator": "nvidia-a100"}),
            here(vec![h100("a", "p", json!({}))]),
            Reason::NoNodeFits,
            "no node and no declared pool has nvidia-a100; there is nvidia-h100",
        ),
        (
            json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": 8}),
            here(vec![h100("a", "p", four)]),
            Reason::NoNodeFits,
            "write acceleratorsPerNode: 4",
        ),
        (
            json!({"accelerator": "nvidia-h100", "nodeCount": 3}),
            here(vec![
                h100("a", "p", json!({})),
                h100("b", "p", json!({})),
                h100("c", "q", json!({})),
            ]),
            Reason::NoNodeFits,
            "write nodeCount: 2",
        ),
        (
            json!({"accelerator": "nvidia-h100", "nodeCount": 3}),
            fleet_with(vec![], pool),
            Reason::NoNodeFits,
            "the largest has 2",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            here(vec![spot("a")]),
            Reason::NoNodeFits,
            "write capacity: Any or Spot",
        ),
        (
            json!({"accelerator": "nvidia-h100", "capacity": "Spot"}),
            here(vec![h100("a", "p", json!({}))]),
            Reason::NoNodeFits,
            "write capacity: Any or OnDemand",
        ),
        (
            json!({"accelerator": "google-tpu-v5e"}),
            here(vec![]),
            Reason::SpecInvalid,
            "write its shape in chips",
        ),
        (
            json!({"accelerator": "google-tpu-v5e", "topology": "4x4"}),
            here(vec![tpu("a", "t", "2x4", "8")]),
            Reason::NoNodeFits,
            "no slice of google-tpu-v5e has the topology 4x4; there is 2x4",
        ),
        (
            json!({"accelerator": "google-tpu-v5e", "topology": "4x4"}),
            here(vec![tpu("a", "t", "4x4", "4"), tpu("b", "t", "4x4", "4")]),
            Reason::NoNodeFits,
            "a slice is taken whole",
        ),
        (
            json!({"accelerator": "nvidia-h100", "migProfile": "1g.10gb"}),
            here(vec![h100("a", "p", json!({}))]),
            Reason::NoNodeFits,
            "none is partitioned: leave out migProfile",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            here(vec![sick("a", "p", "IBLinkFlapping")]),
            Reason::WaitingForNodes,
            "kept away from (IBLinkFlapping)",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            here(vec![h100("a", "p", json!({"spec": {"unschedulable": true}}))]),
            Reason::WaitingForNodes,
            "cordoned",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            here(vec![h100(
                "a",
                "p",
                json!({"spec": {"taints": [{"key": "team", "value": "x", "effect": "NoSchedule"}]}}),
            )]),
            Reason::NoNodeFits,
            "team=x:NoSchedule",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            here(vec![h100(
                "a",
                "p",
                json!({"status": {"allocatable": {"cpu": "500m"}}}),
            )]),
            Reason::NoNodeFits,
            "a pod asks for 1.0 cores",
        ),
    ];
    for (hardware, fleet, reason, says) in cases {
        let (got, message) = place(hardware.clone(), &fleet).expect_err(&hardware.to_string());
        assert_eq!(got, reason, "{hardware}: {message}");
        assert!(message.contains(says), "{hardware}: {message}");
    }
}

#[test]
fn a_pool_at_zero_that_may_grow_gets_the_pods_that_make_it_grow() {
    let pool = "pools: [{name: big, accelerator: nvidia-h100, acceleratorsPerNode: 8, maxNodes: 2, cpu: '90', memory: 1800Gi}]";
    let hardware = json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": 8, "nodeCount": 2});
    let big = |seat| Ok(("big".to_owned(), 2, 8, seat));
    assert_eq!(place(hardware.clone(), &fleet_with(vec![], pool)), big(Seat::Grows));
    // Without the right to read nodes, what is declared counts.
    let blind = Fleet::new(Arc::new(Table::read(pool).expect("a table")), None);
    assert_eq!(place(hardware.clone(), &blind), big(Seat::Declared));
    assert_eq!(
        place(hardware, &Fleet::default()),
        Ok((String::new(), 2, 8, Seat::Unknown))
    );
}

#[test]
fn an_engine_that_cannot_compute_there_is_refused_on_the_first_reconcile() {
    for (hardware, says) in [
        (
            json!({"accelerator": "amd-mi300x"}),
            "computes on CPU and CUDA, not on ROCm",
        ),
        (
            json!({"accelerator": "google-tpu-v5e", "topology": "2x4"}),
            "not on TPU",
        ),
        (
            json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": 8}),
            "at most 1 accelerator",
        ),
    ] {
        let job = pretrain("p", json!({"hardware": hardware}));
        // Its Dataset is not even there.
        match job.check(&Observed::default(), &env()) {
            Err(Refusal::Placement(misfit)) => {
                assert_eq!(misfit.reason, Reason::EngineUnsupported, "{hardware}");
                assert!(misfit.message.contains(says), "{hardware}: {}", misfit.message);
            }
            other => panic!("{hardware}: {other:?}"),
        }
    }
    let job = pretrain("p", json!({"hardware": {"accelerator": "nvidia-h100"}}));
    let report = job
        .report(&job.check(&Observed::default(), &env()), &Observed::default(), at(NOW))
        .status;
    let placed = report
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Placed")
        .expect("said");
    assert_eq!(
        (placed.status.as_str(), placed.reason.as_str()),
        ("False", "ImageMissing")
    );
    assert!(placed.message.contains("runtimeImageCuda"));
}

fn gpu_env() -> crate::engine::kind::Env {
    crate::engine::kind::Env {
        runtime_image_cuda: Some("strata-runtime:1-cuda".into()),
        ..env()
    }
}

fn around(nodes: Vec<ApiNode>) -> Observed {
    Observed {
        upstream: [
            (to(ResourceKind::Dataset, "plays"), published('d')),
            (to(ResourceKind::PretrainJob, "bard"), published('m')),
        ]
        .into(),
        fleet: Arc::new(fleet_with(nodes, "")),
        ..Observed::default()
    }
}

#[test]
fn a_run_on_a_gpu_asks_for_it_and_has_the_image_and_the_id_of_the_run_without() {
    let observed = around(vec![h100("a", "p", json!({})), sick("ill", "p", "GPUMissing")]);
    let job = pretrain(
        "p",
        json!({"hardware": {"accelerator": "nvidia-h100", "interconnect": {"nvlink": "Required"}}}),
    );
    let started_job = started(job.plan(&job.check(&observed, &gpu_env()), &observed, at(NOW)));
    let pod = json!(started_job.spec.expect("a spec").template.spec.expect("a pod"));
    assert_eq!(pod["containers"][0]["image"], "strata-runtime:1-cuda");
    assert_eq!(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
    assert_eq!(pod["containers"][0]["resources"]["requests"]["nvidia.com/gpu"], "1");
    let terms = &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
    for term in terms.as_array().expect("terms") {
        let has = |rule: Value| term["matchExpressions"].as_array().expect("rules").contains(&rule);
        assert!(
            has(json!({"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["ill"]})),
            "{term}"
        );
        assert!(
            has(json!({"key": "kubernetes.azure.com/scalesetpriority", "operator": "NotIn", "values": ["spot"]})),
            "{term}"
        );
    }
    // Placement is no part of what determines the result.
    let plain = pretrain("p", json!({}));
    let id = |job: &strata_api::PretrainJob| job.check(&observed, &gpu_env()).expect("good").run_id;
    assert_eq!(id(&job), id(&plain));
    assert!(plain.check(&observed, &gpu_env()).expect("good").placement.is_none());
}

#[test]
fn what_runs_keeps_its_place_when_its_node_falls_ill_and_the_next_attempt_goes_elsewhere() {
    let job = pretrain("p", json!({"hardware": {"accelerator": "nvidia-h100"}}));
    let mut observed = around(vec![h100("a", "p", json!({}))]);
    let first = started(job.plan(&job.check(&observed, &gpu_env()), &observed, at(NOW)));
    observe(&mut observed, &first, Attempt::Running, 0);
    observed.fleet = Arc::new(fleet_with(vec![sick("a", "p", "XIDErrors")], ""));
    let checked = job.check(&observed, &gpu_env());
    assert!(checked.is_ok(), "{checked:?}");
    let status = job.report(&checked, &observed, at(NOW)).status;
    let placed = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Placed")
        .expect("said");
    assert_eq!(placed.status, "True");
    // Without an attempt under way, it waits for the node.
    observed.jobs.clear();
    assert!(
        matches!(job.check(&observed, &gpu_env()), Err(Refusal::Placement(misfit)) if misfit.reason == Reason::WaitingForNodes)
    );
}

#[test]
fn another_accelerator_gets_its_image_with_the_next_attempt() {
    let mut observed = around(vec![h100("a", "p", json!({}))]);
    let plain = pretrain("p", json!({}));
    let first = started(plain.plan(&plain.check(&observed, &gpu_env()), &observed, at(NOW)));
    observe(
        &mut observed,
        &first,
        Attempt::Disrupted("PreemptionByScheduler", "preempted"),
        100,
    );
    let job = pretrain("p", json!({"hardware": {"accelerator": "nvidia-h100"}}));
    let second = started(job.plan(&job.check(&observed, &gpu_env()), &observed, at(NOW)));
    assert_eq!(
        json!(second)["spec"]["template"]["spec"]["containers"][0]["image"],
        "strata-runtime:1-cuda"
    );
}

#[test]
fn nodes_that_come_fall_ill_and_get_well_restart_no_serving_pod() {
    let change = json!({"hardware": {"accelerator": "nvidia-h100"}});
    let mut service = inference("s", change);
    let mut observed = around(vec![h100("a", "p", json!({}))]);
    let job = started(service.plan(&service.check(&observed, &gpu_env()), &observed, at(NOW)));
    observe(
        &mut observed,
        &job,
        Attempt::Ended(0, "Completed", crate::fixtures::good_report('m')),
        5,
    );
    let checked = service.check(&observed, &gpu_env());
    service.status = Some(service.report(&checked, &observed, at(NOW)).status);
    let template = |observed: &Observed| {
        let planned = service.plan(&service.check(observed, &gpu_env()), observed, at(NOW));
        planned.deployment.expect("served")
    };
    let before = template(&observed);
    assert_eq!(
        json!(before)["spec"]["template"]["spec"]["containers"][0]["image"],
        "strata-runtime:1-cuda"
    );
    observed.deployment = Some(before.clone());
    let fleets = [
        vec![h100("a", "p", json!({})), h100("b", "q", json!({})), spot("c")],
        vec![sick("a", "p", "XIDErrors"), h100("b", "q", json!({}))],
        vec![sick("a", "p", "XIDErrors")],
    ];
    for nodes in fleets {
        observed.fleet = Arc::new(fleet_with(nodes, ""));
        let planned = service.plan(&service.check(&observed, &gpu_env()), &observed, at(NOW));
        assert!(planned.deployment.is_none_or(|after| after == before));
    }
    // A pod that does not answer on a sick node is what a new template is for.
    observed.fleet = Arc::new(fleet_with(
        vec![sick("a", "p", "XIDErrors"), h100("b", "q", json!({}))],
        "",
    ));
    observed.pods.push(
        serde_json::from_value(json!({
            "metadata": {"name": "s-1", "labels": {"app.kubernetes.io/component": "serve"}},
            "spec": {"nodeName": "a", "containers": []},
        }))
        .expect("a pod"),
    );
    let rules = json!(template(&observed)).to_string();
    assert!(
        rules.contains(r#"{"key":"kubernetes.io/hostname","operator":"NotIn","values":["a"]}"#),
        "{rules}"
    );
}

/// A node with what it offers by claims.
type Machine = (ApiNode, Option<ResourceSlice>);

/// Few kinds of nodes, so that they meet.
fn any_node() -> impl Strategy<Value = Machine> {
    (0_u32..1000, 0_u32..8, 0_u32..3, any::<bool>(), any::<bool>()).prop_map(
        |(number, kind, pool, is_sick, is_small)| {
            let name = format!("n{number}");
            let cpu = if is_small { "1" } else { "90" };
            let mut conditions = vec![json!({"type": "Ready", "status": "True"})];
            if is_sick && number % 3 == 0 {
                conditions.push(json!({"type": "XIDErrors", "status": "True"}));
            }
            let gpus = ["1", "4", "8"][pool as usize];
            let more =
                json!({"status": {"allocatable": {"cpu": cpu, "nvidia.com/gpu": gpus}, "conditions": conditions}});
            let devices = [1, 4, 8][pool as usize];
            let by_claim = match kind {
                6 => Some(slice(&name, "gpu.nvidia.com", devices, json!({"type": "gpu"}))),
                7 => Some(slice(
                    &name,
                    "gpu.nvidia.com",
                    7,
                    json!({"type": "mig", "profile": "1g.10gb"}),
                )),
                _ => None,
            };
            let node = match kind {
                0 | 1 => h100(&name, &format!("h{pool}"), more),
                2 => spot(&name),
                3 => tpu(&name, &format!("t{pool}"), "2x4", "4"),
                4 => tpu(&name, &format!("u{pool}"), "4x4", "4"),
                5 => node(
                    &name,
                    json!({"kubernetes.azure.com/agentpool": "c"}),
                    json!({"cpu": cpu}),
                    json!({}),
                ),
                _ => {
                    let mut more = more;
                    more["status"]["allocatable"]["nvidia.com/gpu"] = Value::Null;
                    // In pools with nodes of the device plugin: they do not make up for each other.
                    h100(&name, &format!("h{pool}"), more)
                }
            };
            (node, by_claim)
        },
    )
}

fn any_hardware() -> impl Strategy<Value = Value> {
    let needs = || prop_oneof![Just(Value::Null), Just(json!("Required")), Just(json!("Preferred"))];
    let capacity = || prop_oneof![Just("OnDemand"), Just("Spot"), Just("Any")];
    let allocation = || prop_oneof![Just("DevicePlugin"), Just("ResourceClaim")];
    let asks = (1_u32..9, 1_u32..4, needs(), needs(), capacity(), allocation());
    prop_oneof![
        asks.prop_map(|(each, nodes, nvlink, infiniband, capacity, allocation)| {
            let mut interconnect = json!({});
            crate::fixtures::merge(&mut interconnect, json!({"nvlink": nvlink, "infiniband": infiniband}));
            json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": each, "nodeCount": nodes,
                "interconnect": interconnect, "capacity": capacity, "allocation": allocation})
        }),
        (1_u32..9).prop_map(|each| {
            json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": each, "migProfile": "1g.10gb", "allocation": "ResourceClaim"})
        }),
        prop_oneof![Just("2x4"), Just("4x4"), Just("2x2")]
            .prop_map(|topology| json!({"accelerator": "google-tpu-v5e", "topology": topology})),
        (1_u32..4, capacity())
            .prop_map(|(nodes, capacity)| json!({"accelerator": "cpu", "nodeCount": nodes, "capacity": capacity})),
    ]
}

fn unique(nodes: Vec<Machine>) -> Vec<Machine> {
    let by_name: BTreeMap<_, _> = nodes
        .into_iter()
        .map(|machine| (machine.0.metadata.name.clone(), machine))
        .collect();
    by_name.into_values().collect()
}

fn fleet(machines: Vec<Machine>) -> Fleet {
    let (nodes, slices): (Vec<_>, Vec<_>) = machines.into_iter().unzip();
    let slices: Vec<ResourceSlice> = slices.into_iter().flatten().collect();
    fleet_of(nodes, &slices, "")
}

proptest! {
    /// Enough nodes of the named pool each have room for a pod, tolerate it, and together make up whole slices.
    #[test]
    fn no_node_is_over_committed_and_no_slice_is_split(
        nodes in prop::collection::vec(any_node(), 0..12), hardware in any_hardware(),
    ) {
        let fleet = fleet(unique(nodes));
        let demand = demand(hardware, Engine::Container);
        if let Ok(placement) = fit::place(&demand, &fleet, engine::OFFERED) {
            let fitting: Vec<&Node> = fit::candidates(&demand, &fleet)
                .into_iter()
                .filter(|node| node.pool_name() == placement.pool.as_deref())
                .filter(|node| placement.resources.iter().all(|(name, count)| node.resources.get(name).is_some_and(|has| has >= count)))
                .filter(|node| placement.claim.as_ref().is_none_or(|claim| device::count(&node.devices, &claim.kind) >= claim.count))
                .collect();
            let asks = placement.resources.contains_key("nvidia.com/gpu");
            prop_assert!(placement.family != Family::Cuda || asks != placement.claim.is_some(), "one of both ways");
            let room = |node: &&Node| match placement.family {
                Family::Cpu => (node.cpu_millis / demand.cpu_millis).min(node.memory_bytes / demand.memory_bytes) as usize,
                _ => 1,
            };
            prop_assert!(fitting.iter().map(room).sum::<usize>() >= placement.nodes as usize);
            for node in &fitting {
                prop_assert!(node.cpu_millis >= demand.cpu_millis && node.memory_bytes >= demand.memory_bytes);
                prop_assert!(node.taints.iter().all(|taint| placement.tolerations.iter().any(|one| tolerates(one, taint))));
                prop_assert!(!placement.avoid.contains(&node.hostname));
                if let Some(slice) = &demand.topology {
                    prop_assert_eq!(node.topology.as_ref(), Some(&slice.text));
                }
            }
            if let Some(slice) = &demand.topology {
                prop_assert_eq!(placement.per_node * placement.nodes, slice.chips);
                let hosts: Vec<u32> = fitting.iter().map(|node| node.resources["google.com/tpu"]).collect();
                prop_assert!(hosts.iter().all(|chips| *chips == placement.per_node), "a host is taken whole");
            }
        }
    }

    #[test]
    fn the_answer_does_not_depend_on_the_order_of_nodes(
        nodes in prop::collection::vec(any_node(), 0..12), hardware in any_hardware(), turn in 0_usize..12,
    ) {
        let nodes = unique(nodes);
        let mut turned = nodes.clone();
        turned.rotate_left(turn.min(nodes.len()));
        turned.reverse();
        let demand = demand(hardware, Engine::Container);
        let answer = |nodes: Vec<Machine>| fit::place(&demand, &fleet(nodes), engine::OFFERED);
        prop_assert_eq!(answer(nodes), answer(turned));
    }

    #[test]
    fn another_node_never_takes_a_place_away(
        nodes in prop::collection::vec(any_node(), 0..12), more in any_node(), hardware in any_hardware(),
    ) {
        let demand = demand(hardware, Engine::Container);
        let nodes = unique(nodes);
        let is_new = nodes.iter().all(|(node, _)| node.metadata.name != more.0.metadata.name);
        let before = fit::place(&demand, &fleet(nodes.clone()), engine::OFFERED);
        if before.is_ok() && is_new {
            let after: Vec<Machine> = nodes.into_iter().chain([more]).collect();
            prop_assert!(fit::place(&demand, &fleet(after), engine::OFFERED).is_ok());
        }
    }
}
