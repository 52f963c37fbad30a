//! Fake nodes of the clouds' shapes and the real scheduler: work goes where its hardware is, and where there is none the
//! status says what would do.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use k8s_openapi::api::resource::v1::{DeviceClass, ResourceClaim, ResourceClaimTemplate, ResourceSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use strata_api::{Dataset, Hardware, InferenceService, PretrainJob};
use strata_e2e::engines::Engines;
use strata_e2e::fleet::{Fleet, LABEL};
use strata_e2e::strata::{apply, condition};
use strata_e2e::{Context, install, run, wait, with_temp_ns};
use strata_operator::placement::{Demand, Engine, Table, fit};
use strata_operator::workload::pod::Sizes;

const DEADLINE: Duration = Duration::from_secs(60);

/// A node as a cloud would label it; kwok makes it ready.
fn node(name: &str, labels: Value, devices: Value, taint: &str, conditions: Value) -> Result<Node> {
    let mut node = json!({
        "metadata": {"name": name, "labels": {LABEL.0: LABEL.1, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
        "spec": {"taints": [{"key": taint, "value": "gpu", "effect": "NoSchedule"}]},
        "status": {"allocatable": {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "1Ti"}, "conditions": conditions},
    });
    let add = |target: &mut Value, more: &Value| {
        for (key, value) in more.as_object().into_iter().flatten() {
            target[key] = value.clone();
        }
    };
    add(&mut node["metadata"]["labels"], &labels);
    add(&mut node["status"]["allocatable"], &devices);
    node["status"]["capacity"] = node["status"]["allocatable"].clone();
    Ok(serde_json::from_value(node)?)
}

fn gpu(name: &str, product: &str, more: Value, conditions: Value) -> Result<Node> {
    let mut labels =
        json!({"nvidia.com/gpu.product": product, "kubernetes.azure.com/agentpool": format!("{name}-pool")});
    for (key, value) in more.as_object().into_iter().flatten() {
        labels[key] = value.clone();
    }
    node(name, labels, json!({"nvidia.com/gpu": "1"}), "sku", conditions)
}

fn tpu(pool: &str, host: usize) -> Result<Node> {
    let labels = json!({
        "cloud.google.com/gke-nodepool": pool,
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    });
    node(
        &format!("{pool}-{host}"),
        labels,
        json!({"google.com/tpu": "4"}),
        "google.com/tpu",
        json!([]),
    )
}

async fn add(context: &Context, node: Node) -> Result<()> {
    let api = Api::<Node>::all(context.client.clone());
    api.create(&PostParams::default(), &node).await?;
    let usable = |node: Option<&Node>| {
        let taints = node
            .and_then(|node| node.spec.as_ref()?.taints.as_ref())
            .into_iter()
            .flatten();
        wait::node_is_ready(node)
            && taints
                .into_iter()
                .all(|taint| !taint.key.starts_with("node.kubernetes.io/"))
    };
    wait::until(&api, &node.name_any(), "is ready", DEADLINE, usable)
        .await
        .map(drop)
}

async fn remove_nodes(context: &Context) -> Result<()> {
    let api = Api::<Node>::all(context.client.clone());
    let ours = ListParams::default().labels(&format!("{}={}", LABEL.0, LABEL.1));
    api.delete_collection(&DeleteParams::default(), &ours).await?;
    let slices = Api::<ResourceSlice>::all(context.client.clone());
    slices.delete_collection(&DeleteParams::default(), &ours).await?;
    let classes = Api::<DeviceClass>::all(context.client.clone());
    classes.delete_collection(&DeleteParams::default(), &ours).await?;
    Ok(())
}

/// A PretrainJob on the Dataset `words` with this hardware.
async fn start(context: &Context, name: &str, hardware: &str) -> Result<()> {
    let job = run::pretrain(name, 2048).replace("  pod:", &format!("  hardware: {hardware}\n  pod:"));
    apply(context, &job).await
}

/// The node that the pod of `name` was given.
async fn node_of(context: &Context, name: &str) -> Result<String> {
    let ours = ListParams::default().labels(&format!("strata.dev/name={name}"));
    let api = context.api::<Pod>();
    wait::poll(&format!("a pod of {name} has a node"), DEADLINE, || async {
        let pods = api.list(&ours).await?;
        Ok(pods.iter().find_map(|pod| pod.spec.as_ref()?.node_name.clone()))
    })
    .await
}

/// Waits until Placed of `name` has this reason; its message.
async fn placed(context: &Context, name: &str, reason: &str) -> Result<String> {
    let has = |job: Option<&PretrainJob>| {
        job.and_then(|job| condition(job, "Placed"))
            .is_some_and(|(_, said, _)| said == reason)
    };
    let job = wait::until(&context.api::<PretrainJob>(), name, reason, DEADLINE, has).await?;
    Ok(condition(&job, "Placed").context("it was there")?.2)
}

#[tokio::test]
async fn work_goes_to_the_nodes_that_its_hardware_names_or_says_what_would_do() {
    with_temp_ns(|context| async move {
        install::operator(
            &context.bed,
            &[
                "runtimeImageCuda.repository=strata.local/strata-runtime-cuda",
                "rolloutPatienceSeconds=5",
            ],
        )?;
        // Pods of Jobs run to the end of the test.
        let mut kwok = Fleet::start(&context.bed, 3600, "")?;
        remove_nodes(&context).await?;
        let outcome = on_fake_nodes(&context).await;
        kwok.check()?;
        remove_nodes(&context).await?;
        outcome
    })
    .await;
}

async fn on_fake_nodes(context: &Context) -> Result<()> {
    let spot = json!({"kubernetes.azure.com/scalesetpriority": "spot"});
    let sick = json!([{"type": "XIDErrors", "status": "True", "reason": "Xid79", "message": "fell off the bus"}]);
    let sxm = "NVIDIA-H100-80GB-HBM3";
    for node in [
        gpu("sick", sxm, json!({}), sick)?,
        gpu("pcie", "NVIDIA-H100-PCIe", json!({}), json!([]))?,
        gpu("sxm", sxm, json!({}), json!([]))?,
        gpu("spot", "NVIDIA-A100-SXM4-80GB", spot, json!([]))?,
        gpu("stays", "NVIDIA-A100-SXM4-80GB", json!({}), json!([]))?,
    ] {
        add(context, node).await?;
    }
    context.claim("artifacts", "1Gi", None).await?;
    // A data set that was published, as far as its status says: nothing here computes.
    apply(context, &run::WORDS.replace("  retries: 0\n", "  suspend: true\n")).await?;
    let artifact = json!({"uri": "pvc://artifacts/words", "digest": format!("sha256:{}", "0".repeat(64)), "bytes": 1, "runId": "0"});
    context
        .api::<Dataset>()
        .patch_status(
            "words",
            &PatchParams::default(),
            &Patch::Merge(json!({"status": {"artifact": artifact}})),
        )
        .await?;

    start(
        context,
        "joined",
        "{accelerator: nvidia-h100, interconnect: {nvlink: Required}}",
    )
    .await?;
    ensure!(
        node_of(context, "joined").await? == "sxm",
        "NVLink, and not the sick node"
    );
    start(context, "any", "{accelerator: nvidia-h100}").await?;
    ensure!(
        node_of(context, "any").await? == "pcie",
        "the one that is left and well"
    );

    start(context, "first", "{accelerator: nvidia-a100, capacity: Any}").await?;
    ensure!(node_of(context, "first").await? == "spot");
    start(context, "second", "{accelerator: nvidia-a100, capacity: Any}").await?;
    ensure!(node_of(context, "second").await? == "stays", "spot is full");

    start(context, "rocm", "{accelerator: amd-mi300x}").await?;
    let said = placed(context, "rocm", "EngineUnsupported").await?;
    ensure!(said.contains("computes on CPU and CUDA"), "{said}");
    start(context, "later", "{accelerator: nvidia-h200}").await?;
    let said = placed(context, "later", "NoNodeFits").await?;
    ensure!(said.contains("there is") && said.contains("nvidia-h100"), "{said}");
    add(context, gpu("new", "NVIDIA-H200", json!({}), json!([]))?).await?;
    ensure!(
        node_of(context, "later").await? == "new",
        "a node that comes wakes who waits for it"
    );

    quote_who_brings_nodes(context).await?;
    scale_within_the_budget(context).await?;
    roll_out_without_room(context).await?;
    slice(context).await?;
    claims(context).await
}

/// A pod that fits nowhere, and the autoscaler's word that no node will come: as it is in the Event of a real one.
async fn quote_who_brings_nodes(context: &Context) -> Result<()> {
    let large = run::pretrain("large", 2048).replace("limits: {cpu: 500m}", "limits: {cpu: '900'}");
    apply(context, &large).await?;
    let ours = ListParams::default().labels("strata.dev/name=large");
    let pod = wait::poll("its pod is there", DEADLINE, || async {
        Ok(context.api::<Pod>().list(&ours).await?.items.pop())
    })
    .await?;
    let words = "pod didn't trigger scale-up: 1 max node group size reached";
    let event: Event = serde_json::from_value(json!({
        "metadata": {"name": "large.1"}, "type": "Normal", "reason": "NotTriggerScaleUp", "message": words,
        "source": {"component": "cluster-autoscaler"}, "lastTimestamp": "2026-01-01T00:00:00Z",
        "involvedObject": {"kind": "Pod", "namespace": pod.namespace(), "name": pod.name_any(), "uid": pod.uid()},
    }))?;
    context.create(&event).await?;
    let says = |job: Option<&PretrainJob>| {
        job.and_then(|job| condition(job, "Succeeded"))
            .is_some_and(|(.., message)| message.contains(&format!("cluster-autoscaler: {words}; 0/")))
    };
    let jobs = context.api::<PretrainJob>();
    wait::until(&jobs, "large", "says what the autoscaler said", DEADLINE, says).await?;
    jobs.delete("large", &DeleteParams::default())
        .await
        .map(drop)
        .map_err(Into::into)
}

/// More wait than any number of pods would get done, and there are three nodes: the budget has accelerators for two.
async fn scale_within_the_budget(context: &Context) -> Result<()> {
    let _engines = Engines::start(context.bed.slot(), 100).await?;
    for name in ["one", "two", "three"] {
        add(context, gpu(name, "NVIDIA-H200", json!({}), json!([]))?).await?;
    }
    let service = "apiVersion: strata.dev/v1alpha1
kind: InferenceService
metadata: {name: bounded}
spec:
  model: {uri: 'pvc://artifacts/m'}
  engine: {container: {image: none}}
  hardware: {accelerator: nvidia-h200}
  autoscale: {maxReplicas: 3, maxAccelerators: 2, targets: {waitingRequests: 4}}
";
    apply(context, service).await?;
    let is_bounded = |service: Option<&InferenceService>| {
        service.is_some_and(|service| {
            let ready = service.status.as_ref().and_then(|status| status.ready_replicas);
            let effective = condition(service, "ScalingEffective");
            ready == Some(2) && effective.is_some_and(|(_, reason, _)| reason == "OverBudget")
        })
    };
    let services = context.api::<InferenceService>();
    wait::until(
        &services,
        "bounded",
        "has two pods and says why not three",
        DEADLINE,
        is_bounded,
    )
    .await?;
    remove_service(context, "bounded").await
}

async fn remove_service(context: &Context, name: &str) -> Result<()> {
    let services = context.api::<InferenceService>();
    services.delete(name, &DeleteParams::default()).await?;
    let ours = ListParams::default().labels(&format!("strata.dev/name={name}"));
    wait::poll("its pods are gone", DEADLINE, || async {
        Ok(context.api::<Pod>().list(&ours).await?.items.is_empty().then_some(()))
    })
    .await
}

/// Three pods on three nodes, and a new version: it comes all the same, with no more than one pod fewer at a time.
async fn roll_out_without_room(context: &Context) -> Result<()> {
    let manifest = |image: &str| {
        format!(
            "apiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata: {{name: full}}\nspec:\n  replicas: 3\n  \
             model: {{uri: 'pvc://artifacts/m'}}\n  engine: {{container: {{image: {image}}}}}\n  hardware: {{accelerator: nvidia-h200}}\n"
        )
    };
    let deployments = context.api::<Deployment>();
    for image in ["before", "after"] {
        apply(context, &manifest(image)).await?;
        let serves = |there: Option<&Deployment>| {
            let Some(Deployment {
                spec: Some(spec),
                status: Some(status),
                metadata,
            }) = there
            else {
                return false;
            };
            let containers = spec.template.spec.iter().flat_map(|pod| &pod.containers);
            status.observed_generation == metadata.generation
                && (status.replicas, status.updated_replicas, status.available_replicas) == (Some(3), Some(3), Some(3))
                && containers.map(|container| container.image.as_deref()).eq([Some(image)])
        };
        wait::poll(
            &format!("three pods serve with the image {image}"),
            DEADLINE,
            || async {
                let there = deployments.get_opt("full").await?;
                let available = there
                    .as_ref()
                    .and_then(|there| there.status.as_ref()?.available_replicas);
                ensure!(
                    image == "before" || available >= Some(2),
                    "{available:?} answer in the midst of it"
                );
                Ok(serves(there.as_ref()).then_some(()))
            },
        )
        .await?;
    }
    let is_as_before = |there: Option<&Deployment>| {
        let strategy = there.and_then(|there| there.spec.as_ref()?.strategy.as_ref()?.rolling_update.clone());
        strategy.is_some_and(|strategy| strategy.max_unavailable == Some(IntOrString::Int(0)))
    };
    wait::until(
        &deployments,
        "full",
        "will take no pod next time either",
        DEADLINE,
        is_as_before,
    )
    .await?;
    remove_service(context, "full").await
}

/// Pods of a slice, made from the placement as the operator makes it: four hosts of one pool, none of the half-built one.
async fn slice(context: &Context) -> Result<()> {
    for host in 0..4 {
        if host < 2 {
            add(context, tpu("half", host)?).await?;
        }
        add(context, tpu("whole", host)?).await?;
    }
    let nodes = Api::<Node>::all(context.client.clone())
        .list(&ListParams::default())
        .await?;
    let table = Table::built_in();
    let facts = nodes
        .iter()
        .map(|node| Arc::new(strata_operator::placement::Node::read(node, &table)))
        .collect();
    let fleet = strata_operator::placement::Fleet::new(table, Some(facts));
    let hardware: Hardware = serde_json::from_value(json!({"accelerator": "google-tpu-v5e", "topology": "4x4"}))?;
    let sizes = Sizes {
        cpu_millis: 100,
        memory_mib: 64,
        memory_limit_mib: 128,
    };
    let demand = Demand::read(&hardware, &Default::default(), sizes, Engine::Container).map_err(anyhow::Error::msg)?;
    let placement = fit::place(&demand, &fleet, &[]).map_err(|misfit| anyhow::Error::msg(misfit.message))?;
    ensure!(
        placement.nodes == 4 && placement.pool.as_deref() == Some("whole"),
        "{placement:?}"
    );
    for host in 0..placement.nodes {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": format!("slice-{host}"), "labels": {"strata.dev/name": format!("slice-{host}")}},
            "spec": {
                "nodeSelector": placement.node_selector, "tolerations": placement.tolerations, "affinity": placement.node_affinity(),
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "main", "image": "none",
                    "resources": {"limits": placement.resources.iter().map(|(name, count)| (name.clone(), count.to_string()))
                        .collect::<std::collections::BTreeMap<_, _>>()},
                    "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                }],
            },
        }))?;
        context.create(&pod).await?;
    }
    let mut hosts = BTreeSet::new();
    for host in 0..placement.nodes {
        hosts.insert(node_of(context, &format!("slice-{host}")).await?);
    }
    let whole: BTreeSet<String> = (0..4).map(|host| format!("whole-{host}")).collect();
    ensure!(hosts == whole, "{hosts:?}");
    Ok(())
}

/// What a DRA driver would publish of eight GPUs, and the class that comes with it. A node that offers them by claims alone, and the
/// real scheduler allocates them.
async fn claims(context: &Context) -> Result<()> {
    let product = json!({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"});
    add(context, node("dra", product, json!({}), "sku", json!([]))?).await?;
    let four = "{accelerator: nvidia-a100-40gb, acceleratorsPerNode: 4, allocation: ResourceClaim}";
    start_image(context, "claimed", four).await?;
    let said = placed(context, "claimed", "NoNodeFits").await?;
    ensure!(said.contains("no ResourceSlice offers any"), "{said}");

    let labels = json!({LABEL.0: LABEL.1});
    let selects = "device.driver == 'gpu.nvidia.com' && device.attributes['gpu.nvidia.com'].type == 'gpu'";
    let class: DeviceClass = serde_json::from_value(json!({
        "metadata": {"name": "gpu.nvidia.com", "labels": labels}, "spec": {"selectors": [{"cel": {"expression": selects}}]},
    }))?;
    let classes = Api::<DeviceClass>::all(context.client.clone());
    classes.create(&PostParams::default(), &class).await?;
    let device = |index| json!({"name": format!("gpu-{index}"), "attributes": {"type": {"string": "gpu"}}});
    let slice: ResourceSlice = serde_json::from_value(json!({
        "metadata": {"name": "dra-gpus", "labels": labels},
        "spec": {
            "driver": "gpu.nvidia.com", "nodeName": "dra", "pool": {"name": "dra", "generation": 1, "resourceSliceCount": 1},
            "devices": (0..8).map(device).collect::<Vec<_>>(),
        },
    }))?;
    let slices = Api::<ResourceSlice>::all(context.client.clone());
    slices.create(&PostParams::default(), &slice).await?;
    ensure!(
        node_of(context, "claimed").await? == "dra",
        "devices that come wake who waits for them"
    );
    ensure!(allocated(context, "claimed").await?.len() == 4);

    start_image(context, "many", &four.replace("Node: 4", "Node: 16")).await?;
    let said = placed(context, "many", "NoNodeFits").await?;
    ensure!(said.contains("with at most 8 of the 16"), "{said}");

    serve_by_claim(context).await?;

    let jobs = context.api::<PretrainJob>();
    jobs.delete("claimed", &DeleteParams::default()).await?;
    let ours = ListParams::default().labels("strata.dev/name=claimed");
    wait::poll("the claim and its template are gone", DEADLINE, || async {
        let claims = context.api::<ResourceClaim>().list(&ours).await?.items.len();
        let templates = context.api::<ResourceClaimTemplate>().list(&ours).await?.items.len();
        Ok((claims + templates == 0).then_some(()))
    })
    .await
}

/// A PretrainJob of an image, which may compute on several accelerators.
async fn start_image(context: &Context, name: &str, hardware: &str) -> Result<()> {
    let more = format!("  engine: {{container: {{image: none, command: [none]}}}}\n  hardware: {hardware}\n  pod:");
    apply(context, &run::pretrain(name, 2048).replace("  pod:", &more)).await
}

/// The devices that the claims of `name` were given.
async fn allocated(context: &Context, name: &str) -> Result<BTreeSet<String>> {
    let ours = ListParams::default().labels(&format!("strata.dev/name={name}"));
    let claims = context.api::<ResourceClaim>().list(&ours).await?;
    let of = |claim: &ResourceClaim| claim.status.clone()?.allocation?.devices?.results;
    let results: Vec<_> = claims.iter().filter_map(of).flatten().collect();
    let devices: BTreeSet<String> = results.iter().map(|result| result.device.clone()).collect();
    ensure!(devices.len() == results.len(), "no device is given twice: {results:?}");
    Ok(devices)
}

/// A service whose claim changes: its pods are replaced, and the template of before goes with the last of them.
async fn serve_by_claim(context: &Context) -> Result<()> {
    let manifest = |each: u32| {
        format!(
            "apiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata: {{name: chat}}\nspec:\n  model: {{uri: 'pvc://artifacts/m'}}\n  \
             engine: {{container: {{image: none}}}}\n  \
             hardware: {{accelerator: nvidia-a100-40gb, acceleratorsPerNode: {each}, allocation: ResourceClaim}}\n"
        )
    };
    let ours = ListParams::default().labels("strata.dev/name=chat");
    let mut before: Option<String> = None;
    for each in [1, 2] {
        apply(context, &manifest(each)).await?;
        wait::poll(
            &format!("one template is left, and the pod has {each}"),
            DEADLINE,
            || async {
                let templates = context.api::<ResourceClaimTemplate>().list(&ours).await?;
                let names: Vec<String> = templates.iter().map(ResourceExt::name_any).collect();
                let pods = context.api::<Pod>().list(&ours).await?;
                let is_new = names.len() == 1 && names.first() != before.as_ref();
                let has_all = pods.items.len() == 1 && allocated(context, "chat").await?.len() == each as usize;
                Ok((is_new && has_all).then(|| names.concat()))
            },
        )
        .await
        .map(|name| before = Some(name))?;
        ensure!(node_of(context, "chat").await? == "dra");
    }
    let deployment = context.api::<Deployment>().get("chat").await?;
    // Not its generation: an annotation counts there too.
    let revision = deployment.annotations().get("deployment.kubernetes.io/revision");
    ensure!(
        revision.is_some_and(|revision| revision == "2"),
        "its pods were made once and replaced once: {revision:?}"
    );
    let both = allocated(context, "claimed").await?.len() + allocated(context, "chat").await?.len();
    ensure!(both == 6, "{both}");
    Ok(())
}
