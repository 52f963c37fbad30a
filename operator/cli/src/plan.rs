//! `strata plan`: what the operator would say of hardware before anything starts, offline and by the same code.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Node as ApiNode;
use k8s_openapi::api::resource::v1::ResourceSlice;
use kube::ResourceExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strata_api::{AlignmentJob, Dataset, InferenceService, PlacementStatus, PretrainJob};
use strata_lint::{INPUT_LIMIT_BYTES, Severity, lint};
use strata_operator::engine::kind::{Kind, Observed, Ref};
use strata_operator::inference;
use strata_operator::placement::preflight::Memory;
use strata_operator::placement::{Fleet, Table, Wants};

use crate::input;
use crate::output::{self, Format};

/// Largest list of nodes that is read, in bytes: some thousand nodes.
const NODES_LIMIT_BYTES: u64 = 256 << 20;

/// What to plan, and on what.
#[derive(clap::Args)]
pub struct Arguments {
    /// Manifests, or - for standard input. Resources that refer to each other belong in one file.
    #[arg(short = 'f', long = "filename")]
    file: PathBuf,
    /// What `kubectl get nodes -o yaml` (or json) printed, or -; for `allocation: ResourceClaim`, `kubectl get
    /// nodes,resourceslices -o yaml`. Without, only the declared pools count.
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,
    /// What the operator is given as --accelerators: declared pools, prices, more accelerators (the chart's values
    /// accelerators and pools).
    #[arg(long, value_name = "FILE")]
    accelerators: Option<PathBuf>,
    /// How the plan is written.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// What there is to say about one resource.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Plan {
    resource: String,
    /// Whether it has a place, or gets one.
    fits: bool,
    /// Reason and message of the condition Placed.
    reason: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    placement: Option<PlacementStatus>,
    /// Memory of one accelerator by what it is for.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    memory_bytes: BTreeMap<&'static str, u64>,
}

/// Exit status 0 if everything has a place or gets one, 1 if something fits nowhere or is refused, 2 if a file cannot be read.
pub fn run(arguments: &Arguments) -> ExitCode {
    match plan(arguments) {
        Ok(plans) => {
            let written = output::write(arguments.output, &plans, |plans| plans.iter().map(text).collect());
            match written {
                Err(error) if !output::is_closed(&error) => ExitCode::from(2),
                _ => ExitCode::from(u8::from(plans.iter().any(|plan| !plan.fits))),
            }
        }
        Err(error) => {
            output::say(&format!("{error:#}"));
            ExitCode::from(2)
        }
    }
}

fn plan(arguments: &Arguments) -> anyhow::Result<Vec<Plan>> {
    let table = match &arguments.accelerators {
        Some(file) => Table::open(file).with_context(|| file.display().to_string())?,
        None => Table::default(),
    };
    let table = Arc::new(table);
    let nodes = match &arguments.nodes {
        Some(file) => Some(nodes(&read(file, NODES_LIMIT_BYTES)?).with_context(|| file.display().to_string())?),
        None => None,
    };
    let fleet = match nodes {
        Some((nodes, slices)) => Fleet::read(table, &nodes, &slices),
        None => Fleet::new(table, None),
    };
    let text = read(&arguments.file, INPUT_LIMIT_BYTES as u64)?;
    judge(&text, fleet)
}

/// The plan of each resource of `text`.
fn judge(text: &str, fleet: Fleet) -> anyhow::Result<Vec<Plan>> {
    let wrong: Vec<String> = lint(text)
        .into_iter()
        .filter(|finding| finding.severity == Severity::Error)
        .map(|finding| finding.to_string())
        .collect();
    if !wrong.is_empty() {
        bail!("the API server would refuse this:\n{}", wrong.join("\n"));
    }
    let mut documents = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        documents.push(<serde_json::Value as serde::Deserialize>::deserialize(document)?);
    }
    let mut observed = Observed {
        fleet: Arc::new(fleet),
        ..Observed::default()
    };
    let all: Vec<Resource> = documents
        .into_iter()
        .filter_map(Resource::read)
        .collect::<Result<_, _>>()?;
    for resource in &all {
        let (to, upstream) = resource.upstream();
        observed.upstream.insert(to, upstream);
    }
    Ok(all.iter().map(|resource| resource.plan(&observed)).collect())
}

/// A resource of one of the four kinds.
enum Resource {
    Dataset(Box<Dataset>),
    Pretrain(Box<PretrainJob>),
    Alignment(Box<AlignmentJob>),
    Inference(Box<InferenceService>),
}

impl Resource {
    /// `None`: something else, such as a claim.
    fn read(document: serde_json::Value) -> Option<anyhow::Result<Self>> {
        fn as_<T: DeserializeOwned>(document: serde_json::Value) -> anyhow::Result<Box<T>> {
            Ok(Box::new(serde_json::from_value(document)?))
        }
        let is_ours = document["apiVersion"]
            .as_str()
            .is_some_and(|version| version.starts_with("strata.dev/"));
        let kind = document["kind"].as_str().filter(|_| is_ours)?.to_owned();
        match kind.as_str() {
            "Dataset" => Some(as_(document).map(Self::Dataset)),
            "PretrainJob" => Some(as_(document).map(Self::Pretrain)),
            "AlignmentJob" => Some(as_(document).map(Self::Alignment)),
            "InferenceService" => Some(as_(document).map(Self::Inference)),
            _ => None,
        }
    }

    fn upstream(&self) -> (Ref, strata_operator::engine::kind::Upstream) {
        fn of<K: Kind>(resource: &K) -> (Ref, strata_operator::engine::kind::Upstream) {
            let name = resource.name_any();
            (Ref { kind: K::KIND, name }, resource.upstream())
        }
        match self {
            Self::Dataset(resource) => of(resource.as_ref()),
            Self::Pretrain(resource) => of(resource.as_ref()),
            Self::Alignment(resource) => of(resource.as_ref()),
            Self::Inference(resource) => of(resource.as_ref()),
        }
    }

    fn plan(&self, observed: &Observed) -> Plan {
        let wants = match self {
            Self::Dataset(resource) => Ok(Wants::of_run(resource.as_ref(), observed)),
            Self::Pretrain(resource) => Ok(Wants::of_run(resource.as_ref(), observed)),
            Self::Alignment(resource) => Ok(Wants::of_run(resource.as_ref(), observed)),
            Self::Inference(resource) => inference::wants(resource, observed),
        };
        let (to, _) = self.upstream();
        let refused = |reason: &'static str, message: String| Plan {
            resource: to.to_string(),
            fits: false,
            reason,
            message,
            placement: None,
            memory_bytes: BTreeMap::new(),
        };
        let wants = match wants {
            Ok(wants) => wants,
            Err(message) => return refused("SpecInvalid", message),
        };
        match wants.preflight(&observed.fleet) {
            Err(misfit) => refused(misfit.reason.name(), misfit.message),
            Ok(preflight) => {
                let finding = preflight.placement.finding();
                Plan {
                    resource: to.to_string(),
                    fits: true,
                    reason: finding.reason.name(),
                    message: finding.message,
                    placement: Some(preflight.estimate.status(&preflight.placement, &observed.fleet.table)),
                    memory_bytes: parts(&preflight.estimate.memory),
                }
            }
        }
    }
}

fn parts(memory: &Memory) -> BTreeMap<&'static str, u64> {
    [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("cache", memory.cache),
    ]
    .into_iter()
    .filter(|(_, bytes)| *bytes > 0)
    .collect()
}

fn text(plan: &Plan) -> String {
    let mut lines = vec![
        format!("{}: {}", plan.resource, plan.reason),
        format!("  {}", plan.message),
    ];
    let gib = |bytes: i64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    if let Some(placement) = &plan.placement {
        if let Some(needed) = placement.needed_bytes {
            let parts: Vec<String> = plan
                .memory_bytes
                .iter()
                .map(|(what, bytes)| format!("{what} {}", gib(i64::try_from(*bytes).unwrap_or(i64::MAX))))
                .collect();
            let of = match placement.available_bytes {
                Some(has) if needed > has => format!(" of {}: more than there is, it may run out of memory", gib(has)),
                Some(has) => format!(" of {}", gib(has)),
                None => String::new(),
            };
            lines.push(format!("  memory of one: {}{of} ({})", gib(needed), parts.join(", ")));
        }
        if let Some(parallelism) = &placement.parallelism {
            lines.push(format!("  spread: {parallelism}"));
        }
        let currency = placement.currency.as_deref().unwrap_or_default();
        if let Some(price) = &placement.price_per_hour {
            lines.push(format!("  price: {price} {currency} an hour"));
        }
        if let (Some(hours), Some(assumption)) = (&placement.estimated_hours, &placement.assumption) {
            let cost = placement
                .estimated_cost
                .as_ref()
                .map(|cost| format!(", {cost} {currency}"))
                .unwrap_or_default();
            lines.push(format!("  time: {hours} hours{cost}, at {assumption}"));
        }
    }
    lines.join("\n") + "\n"
}

/// A list of Nodes and ResourceSlices, or one Node.
fn nodes(text: &str) -> anyhow::Result<(Vec<ApiNode>, Vec<ResourceSlice>)> {
    let value: serde_json::Value = serde_yaml::from_str(text)?;
    let items = match value["kind"].as_str() {
        Some("List" | "NodeList") => value["items"].as_array().cloned().unwrap_or_default(),
        Some("Node") => vec![value],
        _ => bail!("it holds no list of Nodes: write what `kubectl get nodes -o yaml` prints to it"),
    };
    let (mut nodes, mut slices) = (Vec::new(), Vec::new());
    for item in items {
        match item["kind"].as_str() {
            Some("ResourceSlice") => slices.push(serde_json::from_value(item)?),
            _ => nodes.push(serde_json::from_value(item)?),
        }
    }
    Ok((nodes, slices))
}

fn read(path: &Path, limit_bytes: u64) -> anyhow::Result<String> {
    let text = input::read(path, limit_bytes).with_context(|| path.display().to_string())?;
    if text.len() as u64 > limit_bytes {
        bail!("{}: more than {limit_bytes} bytes", path.display());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFESTS: &str = r#"
apiVersion: strata.dev/v1alpha1
kind: Dataset
metadata: {name: d}
spec:
  task: Pretraining
  sources: [{name: a, documents: {uri: pvc://raw/a.txt, format: Text}}]
  encode: {tokenizer: {train: {algorithm: BPE, vocabSize: 32000}}, sequence: {lengthTokens: 2048}}
---
apiVersion: strata.dev/v1alpha1
kind: PretrainJob
metadata: {name: base}
spec:
  datasets: [{name: d}]
  model: {llama: {hiddenSize: 2048, layers: 22, heads: 32, kvHeads: 4, intermediateSize: 5632, contextTokens: 2048, tieEmbeddings: false}}
  training: {tokens: 1000000000, batchTokens: 65536, learningRate: "3e-4"}
  hardware: {accelerator: nvidia-h100}
---
apiVersion: strata.dev/v1alpha1
kind: InferenceService
metadata: {name: chat}
spec:
  model: {pretrainJob: {name: base}}
  hardware: {accelerator: nvidia-a100}
"#;

    const NODES: &str = r#"
apiVersion: v1
kind: List
items:
- metadata: {name: a, labels: {kubernetes.azure.com/agentpool: big, node.kubernetes.io/instance-type: Standard_ND96isr_H100_v5}}
  status:
    allocatable: {cpu: "90", memory: 1800Gi, nvidia.com/gpu: "8"}
    conditions: [{type: Ready, status: "True"}]
"#;

    fn plans(text: &str, nodes_text: &str) -> Vec<Plan> {
        let (nodes, slices) = nodes(nodes_text).unwrap();
        judge(text, Fleet::read(Table::built_in(), &nodes, &slices)).unwrap()
    }

    #[test]
    fn a_file_is_planned_on_nodes_as_kubectl_prints_them() {
        let plans = plans(MANIFESTS, NODES);
        let [data, job, service] = plans.as_slice() else {
            panic!("{}", plans.len())
        };
        assert!(data.fits);
        assert_eq!((job.resource.as_str(), job.reason), ("PretrainJob/base", "Fits"));
        // TinyLlama 1.1B by its published checkpoint; F32 weights and gradients on the GPU.
        let weights = 1_100_048_384_u64;
        assert_eq!(job.memory_bytes["weights"], weights * 4);
        assert_eq!(job.memory_bytes["gradients"], weights * 4);
        let placement = job.placement.as_ref().unwrap();
        assert_eq!((placement.pool.as_deref(), placement.nodes), (Some("big"), 1));
        assert_eq!(placement.price_per_hour.as_deref(), Some("12.29"));
        let said = text(job);
        assert!(
            said.contains("10 % of 67 teraFLOP/s (f32)") && said.contains("USD"),
            "{said}"
        );
        assert_eq!((service.fits, service.reason), (false, "NoNodeFits"));
        assert!(service.message.contains("there is nvidia-h100"), "{}", service.message);
    }

    #[test]
    fn what_nodes_offer_by_claims_is_in_the_same_file() {
        let slice = r#"- apiVersion: resource.k8s.io/v1
  kind: ResourceSlice
  metadata: {name: a-gpus}
  spec:
    driver: gpu.nvidia.com
    nodeName: a
    pool: {name: a, generation: 1, resourceSliceCount: 1}
    devices:
    - {name: gpu-0, attributes: {type: {string: gpu}}}
"#;
        let claims = MANIFESTS.replace(
            "{accelerator: nvidia-h100}",
            "{accelerator: nvidia-h100, allocation: ResourceClaim}",
        );
        let without = plans(&claims, NODES);
        assert!(
            without[1].message.contains("no ResourceSlice offers any"),
            "{}",
            without[1].message
        );
        let with = plans(
            &claims,
            &format!("{}{slice}", NODES.replace(", nvidia.com/gpu: \"8\"", "")),
        );
        assert_eq!((with[1].fits, with[1].reason), (true, "Fits"), "{}", with[1].message);
        assert!(
            with[1].message.contains("1 nvidia-h100 by claim"),
            "{}",
            with[1].message
        );
    }

    #[test]
    fn what_the_server_would_refuse_is_not_planned() {
        let error = judge(
            &MANIFESTS.replace("nvidia-h100", "cpu, topology: 2x4"),
            Fleet::default(),
        )
        .err()
        .unwrap();
        assert!(error.to_string().contains("accelerator cpu has no"), "{error}");
    }
}
