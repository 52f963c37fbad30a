//! From an InferenceService's phase to what is wanted of the server: the preparing run, the Deployment, the Service,
//! and how many pods a drain may take at once.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PodTemplateSpec, Volume, VolumeMount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use strata_api::{InferenceService, KvCacheDtype, RunStatus};
use strata_contract::{SERVE_PORT, Uri};

use super::check::Serving;
use super::phase::{is_ready, rolled_out, serving_pods};
use super::rollout::rollout;
use super::{Checked, container};
use crate::engine::kind::{Observed, Planned, Refusal, ResourceKind, Wanted};
use crate::placement::device::Claim;
use crate::placement::schedule::avoided;
use crate::placement::{Family, Placement, Preflight};
use crate::run;
use crate::run::phase::{Ledger, Phase, phase};
use crate::workload::deployment::{Probes, Rollout};
use crate::workload::pod::{PodParts, template};
use crate::workload::volume::Claims;
use crate::workload::{budget, claim, deployment, labels, service, volume};

/// Time that the server in the pod goes on as before after it is asked to stop, in seconds: the default of its
/// `--shutdown-delay`. It is not handed in: pods keep their image, and an older one may not know it.
const SHUTDOWN_DELAY_SECONDS: i64 = 5;
/// Shortest time for a loaded machine after both, in seconds.
const SHUTDOWN_SPARE_SECONDS: i64 = 30;

/// Where Secrets are mounted, and what their files are called there.
const KEYS_DIR: &str = "/etc/strata/api-keys";
const KEYS_FILE: &str = "keys";
const TLS_DIR: &str = "/etc/strata/tls";
const CERTIFICATE_FILE: &str = "tls.crt";
const PRIVATE_KEY_FILE: &str = "tls.key";
/// Where the disk behind the cache is mounted.
const SPILL_DIR: &str = "/var/cache/strata/kv";
/// What its volume may hold beyond what the server puts there, in MiB: a pod whose volume holds more is evicted, and where the
/// kubelet asks the file system's quota, that counts what it keeps about a file, too. Where it adds up what it finds in the folder
/// instead, it finds nothing, as the file has no name: then the server's own bound alone holds, and what the pod requests.
const SPILL_SPARE_MIB: u64 = 64;

/// What is wanted of the server.
pub fn plan(
    resource: &InferenceService,
    checked: Result<&Checked, &Refusal>,
    observed: &Observed,
    now: Timestamp,
) -> Planned {
    let checked = match checked {
        Ok(checked) => checked,
        Err(refusal) => return run::plan::plan(resource, Err(refusal), observed, now),
    };
    let none = RunStatus::default();
    let status = resource.status.as_ref().map_or(&none, |status| &status.run_status);
    let name = resource.name_any();
    let serving = &checked.serving;
    let (mut planned, template) = match &checked.container {
        Some(container) => {
            let there = observed.deployment.as_ref();
            let pods = |model: container::Model| {
                let place = place(serving, observed, &model.identity())?;
                Some(container.pods(
                    &name,
                    serving,
                    place.as_ref().map(|(placement, _)| placement),
                    &model,
                    there,
                ))
            };
            (container::plan(observed), container.served(status).and_then(pods))
        }
        None => {
            let pods = |mut served: Served| {
                let place = place(serving, observed, &served.digest)?;
                if let Some((placement, image)) = &place
                    && placement.family != Family::Cpu
                    && !serves_on(observed, &placement.accelerator, &served.digest)
                {
                    served.image = image.clone();
                }
                Some(pods(
                    &name,
                    serving,
                    place.as_ref().map(|(placement, _)| placement),
                    &served,
                ))
            };
            let served = served(resource, checked, observed, now);
            let planned = run::plan::plan(resource, checked.order.as_ref(), observed, now);
            (planned, served.and_then(pods))
        }
    };
    let Some(mut template) = template else { return planned };
    let owner = run::check::owner(resource);
    let metadata = ObjectMeta {
        name: Some(name.clone()),
        namespace: resource.namespace(),
        labels: Some(labels::common(ResourceKind::InferenceService, &name, labels::SERVE)),
        ..ObjectMeta::default()
    };
    let selector = labels::serving_selector(&name);
    // Before there is a Deployment, no budget was looked for.
    if observed.deployment.is_some() {
        planned.budget = match needs_budget(most(resource, &checked.serving), &template, &observed.budgets) {
            true => Wanted::There(budget::build(metadata.clone(), &owner, selector.clone())),
            false => Wanted::Gone,
        };
    }
    let probes = checked.container.as_ref().map(|container| container.probes());
    let mut metadata_of_deployment = metadata.clone();
    if let (Some(labels), Some(queue)) = (
        metadata_of_deployment.labels.as_mut(),
        run::check::queue(&resource.spec.common),
    ) {
        labels.insert(labels::QUEUE.into(), queue.to_owned());
    }
    if let Some(wanted) = claimed(serving) {
        let metadata = ObjectMeta {
            name: Some(claim::name(&name, wanted)),
            ..metadata.clone()
        };
        let claims = claim::build(metadata, &owner, wanted);
        claim::bind(&mut template, &claims.name_any());
        planned.claims = Some(claims);
    }
    let (needed, old) = claim_templates(&template, observed.deployment.as_ref());
    planned.old_claims = old;
    if !needed.is_empty() {
        let annotations = metadata_of_deployment.annotations.get_or_insert_default();
        annotations.insert(labels::CLAIMS.into(), needed.join(","));
    }
    let there = observed.deployment.as_ref();
    let rollout = there.map_or(Rollout::Surge, |there| {
        rollout(there, &serving_pods(&observed.pods), serving.rollout_patience, now)
    });
    planned.deployment = Some(deployment::build(
        metadata_of_deployment,
        &owner,
        selector.clone(),
        checked.serving.replicas,
        checked.serving.scheme(),
        probes.unwrap_or(&Probes::own()),
        rollout,
        template,
    ));
    planned.service = Some(service::build(metadata, &owner, selector, checked.serving.scheme()));
    planned
}

/// One pod alone needs none: a budget could only be in the way of its drain. And a pod that two budgets select can not be
/// evicted at all: where a user has one, ours goes.
fn needs_budget(most: i32, template: &PodTemplateSpec, others: &[PodDisruptionBudget]) -> bool {
    let labels = template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
    let has_another = labels.is_some_and(|labels| others.iter().any(|other| budget::selects(other, labels)));
    most > 1 && !has_another
}

/// The most pods that there may be while the spec stays as it is: so that a budget does not come and go with the load.
fn most(resource: &InferenceService, serving: &Serving) -> i32 {
    match (&serving.scaled, &resource.spec.autoscale) {
        (Some(_), Some(autoscale)) => autoscale.max_replicas,
        _ => serving.replicas,
    }
}

/// What each serving pod claims.
fn claimed(serving: &Serving) -> Option<&Claim> {
    match &serving.placement {
        Some(Ok((Preflight { placement, .. }, _))) => placement.claim.as_ref(),
        _ => None,
    }
}

/// Names of the claim templates that pods of `template` and of what is `there` may need, and of those that none needs any more:
/// only when no pod of before is left, since until then one that is lost is made again as it was. An old ReplicaSet without pods
/// needs none: nothing but this operator brings one back.
fn claim_templates(template: &PodTemplateSpec, there: Option<&Deployment>) -> (Vec<String>, Vec<String>) {
    let wanted = claim::of(template).map(str::to_owned);
    let names = there.and_then(|there| there.metadata.annotations.as_ref()?.get(labels::CLAIMS));
    let names = names.iter().flat_map(|names| names.split(',')).map(str::to_owned);
    let before: Vec<String> = names.filter(|name| Some(name) != wanted.as_ref()).collect();
    let serves_wanted = there.is_some_and(|there| {
        let template = there.spec.as_ref().map(|spec| &spec.template);
        template.and_then(claim::of) == wanted.as_deref() && rolled_out(there)
    });
    match serves_wanted {
        true => (wanted.into_iter().collect(), before),
        false => (wanted.into_iter().chain(before).collect(), Vec::new()),
    }
}

/// What is to be served, and by which image.
struct Served {
    uri: Uri,
    digest: String,
    bytes: u64,
    run_id: String,
    image: String,
}

/// The artifact that was published last, also if that was just now.
fn served(resource: &InferenceService, checked: &Checked, observed: &Observed, now: Timestamp) -> Option<Served> {
    let none = RunStatus::default();
    let status = resource.status.as_ref().map_or(&none, |status| &status.run_status);
    let before = || {
        let artifact = status.artifact.as_ref()?;
        let run = status.run.as_ref().filter(|run| run.id == artifact.run_id);
        Some(Served {
            uri: artifact.uri.parse().ok()?,
            digest: artifact.digest.clone(),
            bytes: u64::try_from(artifact.bytes).unwrap_or(0),
            run_id: artifact.run_id.clone(),
            image: run.map_or_else(|| checked.serving.image.clone(), |run| run.image.clone()),
        })
    };
    let fresh = || {
        let order = checked.order.as_ref().ok()?;
        let ledger = Ledger::read(&order.run_id, order.generation, status, observed, now);
        let Phase::Publishing(report) = phase(order, &ledger, status, observed, now) else {
            return None;
        };
        let artifact = report.artifact?;
        Some(Served {
            uri: artifact.uri,
            digest: artifact.digest,
            bytes: artifact.bytes,
            run_id: order.run_id.clone(),
            image: ledger.image,
        })
    };
    let mut served = fresh().or_else(before)?;
    // Pods that already serve it keep their image: another operator version, or the next run's image, restarts nothing.
    if let Some(image) = observed
        .deployment
        .as_ref()
        .and_then(|deployment| image_serving(deployment, &served.digest))
    {
        served.image = image;
    }
    Some(served)
}

fn image_serving(deployment: &Deployment, digest: &str) -> Option<String> {
    let template = &deployment.spec.as_ref()?.template;
    let serves = template.metadata.as_ref()?.annotations.as_ref()?.get(labels::DIGEST)?;
    let image = template.spec.as_ref()?.containers.first()?.image.clone();
    image.filter(|_| serves == digest)
}

/// Where the pods that serve `digest` go, and the image for it; without `spec.hardware`, nothing is said. `None`: they fit
/// nowhere. What serves goes on then, and nothing new is started.
fn place(serving: &Serving, observed: &Observed, digest: &str) -> Option<Option<(Placement, String)>> {
    match &serving.placement {
        None => Some(None),
        Some(Err(_)) => None,
        Some(Ok((Preflight { placement, .. }, image))) => {
            Some(Some((settled(placement, observed, digest), image.clone())))
        }
    }
}

/// Whether the Deployment serves `digest` on `accelerator` already: then its image is that accelerator's.
fn serves_on(observed: &Observed, accelerator: &str, digest: &str) -> bool {
    annotations(observed).is_some_and(|annotations| {
        annotations.get(labels::DIGEST).map(String::as_str) == Some(digest)
            && annotations.get(labels::ACCELERATOR).map(String::as_str) == Some(accelerator)
    })
}

fn annotations(observed: &Observed) -> Option<&BTreeMap<String, String>> {
    let template = &observed.deployment.as_ref()?.spec.as_ref()?.template;
    template.metadata.as_ref()?.annotations.as_ref()
}

/// The placement with the nodes to avoid that the pods already avoid: a node that falls ill or gets well restarts no pod
/// that answers. The list is made anew when the pods change anyway, and when one that does not answer is on a sick node
/// (or waits for a place).
fn settled(placement: &Placement, observed: &Observed, digest: &str) -> Placement {
    let spec = observed
        .deployment
        .as_ref()
        .and_then(|deployment| deployment.spec.as_ref());
    let before = avoided(spec.and_then(|spec| spec.template.spec.as_ref()?.affinity.as_ref()));
    let is_stuck = serving_pods(&observed.pods)
        .into_iter()
        .filter(|pod| !is_ready(pod))
        .any(|pod| {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
            node.is_none_or(|node| placement.avoid.contains(node))
        });
    let avoid = match serves_on(observed, &placement.accelerator, digest) && !is_stuck {
        true => before,
        false => placement.avoid.clone(),
    };
    Placement {
        avoid,
        ..placement.clone()
    }
}

fn pods(name: &str, serving: &Serving, placement: Option<&Placement>, served: &Served) -> PodTemplateSpec {
    let mut claims = Claims::default();
    claims.read(&served.uri);
    serving.beside.read().for_each(|input| claims.read(&input.uri));
    let mut labels = labels::common(ResourceKind::InferenceService, name, labels::SERVE);
    labels.insert(labels::RUN.into(), served.run_id.clone());
    let mut template = template(PodParts {
        labels,
        annotations: BTreeMap::from([(labels::DIGEST.to_owned(), served.digest.clone())]),
        image: served.image.clone(),
        command: command(name, serving, served),
        env: Vec::new(),
        port: ("http", SERVE_PORT),
        claims: &claims,
        volumes: secrets(serving).into_iter().chain(spill(serving)).collect(),
        sizes: serving.sizes(served.bytes),
        grace_seconds: SHUTDOWN_DELAY_SECONDS + serving.drain_seconds + SHUTDOWN_SPARE_SECONDS,
        restart_policy: None,
        placement,
        overrides: &serving.pod,
    });
    // Else the pod comes to a node without room for it, and is among the first that go when the node's disk is full.
    if let (Some(bytes), None) = (serving.spill_bytes, &serving.pod.resources) {
        let containers = template.spec.iter_mut().flat_map(|spec| &mut spec.containers);
        for resources in containers.filter_map(|container| container.resources.as_mut()) {
            let requests = resources.requests.get_or_insert_default();
            requests.insert("ephemeral-storage".into(), mib(bytes.div_ceil(1 << 20)));
        }
    }
    template
}

fn mib(count: u64) -> Quantity {
    Quantity(format!("{count}Mi"))
}

/// The disk behind the cache.
fn spill(serving: &Serving) -> Option<(Volume, VolumeMount)> {
    let size = mib(serving.spill_bytes?.div_ceil(1 << 20) + SPILL_SPARE_MIB);
    Some(volume::empty("kv-spill", SPILL_DIR, size))
}

/// The Secrets that the server reads, mounted: the operator itself reads none.
fn secrets(serving: &Serving) -> Vec<(Volume, VolumeMount)> {
    let keys = serving.api_keys.as_ref().map(|secret| {
        let item = (secret.key.clone(), KEYS_FILE);
        volume::secret("api-keys", &secret.name, KEYS_DIR, vec![item])
    });
    let tls = serving.tls_secret.as_ref().map(|name| {
        let items = [CERTIFICATE_FILE, PRIVATE_KEY_FILE].map(|file| (file.to_owned(), file));
        volume::secret("tls", name, TLS_DIR, items.into())
    });
    keys.into_iter().chain(tls).collect()
}

fn command(name: &str, serving: &Serving, served: &Served) -> Vec<String> {
    let dtype = match serving.kv_cache_dtype {
        KvCacheDtype::F16 => "f16",
        KvCacheDtype::F32 => "f32",
        KvCacheDtype::Q8 => "q8",
    };
    let mut command: Vec<String> = ["strata-runtime", "serve"].map(str::to_owned).into();
    if serving.prefix_caching {
        command.push("--enable-prefix-caching".into());
    }
    let options = [
        ("--model", served.uri.to_string()),
        ("--digest", served.digest.clone()),
        ("--served-model-name", name.to_owned()),
        ("--host", "0.0.0.0".to_owned()),
        ("--port", SERVE_PORT.to_string()),
        ("--block-size", serving.block_tokens.to_string()),
        ("--kv-cache-memory-bytes", serving.kv_cache_bytes.to_string()),
        ("--kv-cache-dtype", dtype.to_owned()),
        ("--shutdown-timeout", serving.drain_seconds.to_string()),
    ];
    let bounds = [
        ("--max-model-len", serving.max_sequence_tokens),
        ("--max-num-seqs", serving.max_concurrent_requests),
        ("--max-num-waiting", serving.max_waiting_requests),
    ];
    let bounds = bounds
        .into_iter()
        .filter_map(|(option, value)| Some((option, value?.to_string())));
    let keys = serving
        .api_keys
        .as_ref()
        .map(|_| ("--api-key-file", format!("{KEYS_DIR}/{KEYS_FILE}")));
    let files = [
        ("--ssl-certfile", CERTIFICATE_FILE),
        ("--ssl-keyfile", PRIVATE_KEY_FILE),
    ];
    let tls = files.map(|(option, file)| (option, format!("{TLS_DIR}/{file}")));
    let tls = tls.into_iter().filter(|_| serving.tls_secret.is_some());
    let spill = serving.spill_bytes.map(|bytes| {
        [
            ("--kv-spill-dir", SPILL_DIR.to_owned()),
            ("--kv-spill-bytes", bytes.to_string()),
        ]
    });
    let spill = spill.into_iter().flatten();
    for (option, value) in options.into_iter().chain(bounds).chain(keys).chain(tls).chain(spill) {
        command.extend([option.to_owned(), value]);
    }
    command.extend(serving.beside.arguments());
    command
}
