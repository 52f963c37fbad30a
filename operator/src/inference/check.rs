//! From an InferenceService's spec to the preparing run and the settings of the serving pods.

use std::ops::RangeInclusive;

use k8s_openapi::jiff::SignedDuration;
use strata_api::{Common, Hardware, InferenceService, KvCacheDtype, PodOverrides, Reason, SPILL_RULE, SecretKey};
use strata_contract::{Input, QuantizationFormat, QuantizeConfig, Stage};

use super::beside::{self, Beside};
use super::container::Container;
use super::scale::{Scaled, scaled};
use crate::engine::kind::{Env, Observed, Refusal, ResourceKind};
use crate::placement::preflight::Work;
use crate::placement::{self, Misfit, Preflight, Wants};
use crate::run::check::{check as check_run, check_pod};
use crate::run::fields::{gates, unsigned};
use crate::run::{Engine, InputRef, Order, Runs};
use crate::workload::pod::Sizes;
use crate::workload::quantity;
use crate::workload::service::Scheme;

/// Memory of the cache of keys and values where the spec does not say, in bytes.
const DEFAULT_KV_CACHE_BYTES: u64 = 256 << 20;
/// Smallest memory of that cache, in bytes.
const MIN_KV_CACHE_BYTES: u64 = 1 << 20;
/// Smallest and largest disk behind that cache, in bytes.
const SPILL_BYTES: RangeInclusive<u64> = 1 << 20..=16 << 40;
/// Memory that it costs, in MiB: what is on its way to it and back, and what is known of its content.
const SPILL_MIB: u64 = 128;
/// Time that running answers get where the spec does not say, in seconds: another default would restart all pods that serve.
const DRAIN_SECONDS: i64 = 25;
/// And where pods go by themselves, at any time.
const SCALED_DRAIN_SECONDS: i64 = 300;
/// Longest such time, in seconds: a node that is to go waits for it.
const MOST_DRAIN_SECONDS: i64 = 86_400;
/// Memory of a serving pod besides the cache and the weights, in MiB.
const SERVE_BASE_MIB: u64 = 256;

impl Runs for InferenceService {
    const RUN_KIND: ResourceKind = ResourceKind::InferenceService;
    /// Of the preparing run; a serving pod's follow from its cache, see [`Serving::sizes`].
    const SIZES: Sizes = Sizes {
        cpu_millis: 500,
        memory_mib: 1024,
        memory_limit_mib: 4096,
    };

    fn common(&self) -> &Common {
        &self.spec.common
    }

    /// The preparing run is always Strata's own: a container serves the model as it was published.
    fn engine(&self) -> Result<Engine<'_>, String> {
        Ok(Engine::Own("candle"))
    }

    /// The preparing run needs a processor only; `spec.hardware` is about the serving pods.
    fn hardware(&self) -> Option<&Hardware> {
        None
    }

    fn inputs(&self) -> Vec<InputRef> {
        InputRef::model("model", &self.spec.model).into_iter().collect()
    }

    fn stage(&self, inputs: &[Input]) -> Result<Stage, String> {
        let evaluate = self.spec.evaluate.clone().unwrap_or_default();
        let model = inputs.first().cloned();
        Ok(Stage::Quantize(QuantizeConfig {
            model: model.ok_or("spec.model: exactly one of pretrainJob, alignmentJob, uri must be set")?,
            format: self.spec.quantization.unwrap_or(QuantizationFormat::Q8_0),
            gates: gates(&evaluate.gates)?,
        }))
    }
}

/// A spec that was found good.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The preparing run, or why there is none now; what was published before is served in any case.
    pub order: Result<Order, Refusal>,
    /// Settings of the serving pods.
    pub serving: Serving,
    /// The user's container that serves; then there is no preparing run.
    pub container: Option<Container>,
}

/// Settings of the serving pods.
#[derive(Clone, Debug, PartialEq)]
pub struct Serving {
    /// What the user set on pods.
    pub pod: PodOverrides,
    /// Image, unless the run that published has another.
    pub image: String,
    /// Where the pods go, and the image that computes there; absent without `spec.hardware`.
    pub placement: Option<Result<(Preflight, String), Misfit>>,
    /// Number of pods; 0 while suspended.
    pub replicas: i32,
    /// What led to that number, where it follows what pods say.
    pub scaled: Option<Scaled>,
    /// Whether the user wants it stopped.
    pub is_suspended: bool,
    /// Where the keys are that clients must present.
    pub api_keys: Option<SecretKey>,
    /// The Secret with the certificate, if HTTPS is served.
    pub tls_secret: Option<String>,
    /// Tokens in a block of the cache.
    pub block_tokens: u32,
    /// Memory of the cache in bytes.
    pub kv_cache_bytes: u64,
    /// Format of the cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Whether blocks of a shared prefix are reused.
    pub prefix_caching: bool,
    /// Size of the disk behind the cache in bytes, if there is one.
    pub spill_bytes: Option<u64>,
    /// Time that running answers get before a pod ends, in seconds.
    pub drain_seconds: i64,
    /// How long a pod of a new version waits for room before one of the version before makes place.
    pub rollout_patience: SignedDuration,
    /// Longest sequence; absent: the model's own.
    pub max_sequence_tokens: Option<u32>,
    /// Requests computed at once; absent: the server's default.
    pub max_concurrent_requests: Option<u32>,
    /// Requests that may wait; absent: the server's default.
    pub max_waiting_requests: Option<u32>,
    /// What is loaded beside the model.
    pub beside: Beside,
}

impl Serving {
    /// Pods that must answer: of those that scaling wants, the last ones may be starting.
    pub fn enough(&self) -> i32 {
        self.scaled
            .as_ref()
            .map_or(self.replicas, |scaled| scaled.min.min(self.replicas))
    }

    /// What the server speaks.
    pub fn scheme(&self) -> Scheme {
        match self.tls_secret {
            Some(_) => Scheme::Https,
            None => Scheme::Http,
        }
    }

    /// What a serving pod asks for, given the size of the served file.
    pub fn sizes(&self, artifact_bytes: u64) -> Sizes {
        let spill = self.spill_bytes.map_or(0, |_| SPILL_MIB << 20);
        sizes(
            self.kv_cache_bytes,
            artifact_bytes,
            self.beside.bytes(artifact_bytes) + spill,
        )
    }
}

fn sizes(kv_cache_bytes: u64, artifact_bytes: u64, beside_bytes: u64) -> Sizes {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let needed = SERVE_BASE_MIB + mib(kv_cache_bytes) + mib(artifact_bytes) + mib(beside_bytes);
    let clamp = |mib: u64| u32::try_from(mib).unwrap_or(u32::MAX);
    Sizes {
        cpu_millis: 250,
        memory_mib: clamp(needed),
        // Mapped weights count as page cache; the working memory of long prompts needs room beside them.
        memory_limit_mib: clamp(needed * 2),
    }
}

/// Judges a spec.
///
/// # Errors
/// The condition that says why nothing is run.
pub fn check(service: &InferenceService, observed: &Observed, env: &Env) -> Result<Checked, Refusal> {
    let serving = serving(service, observed, env).map_err(|message| Refusal::Spec(Reason::SpecInvalid, message))?;
    let container = match Container::wanted(service) {
        None => None,
        Some(container) => Some(super::container::check(service, container, observed, env)?),
    };
    let order = match &container {
        None => check_run(service, observed, env),
        Some(_) => Err(Refusal::Spec(
            Reason::EngineUnsupported,
            "a container needs no preparing run".into(),
        )),
    };
    Ok(Checked {
        order,
        serving,
        container,
    })
}

/// Where the serving pods go and which image they have, or why nowhere.
type Placed = Result<(Preflight, String), Misfit>;

/// Where the serving pods go; `None`: wherever there is room.
fn place(service: &InferenceService, observed: &Observed, env: &Env) -> Result<Option<Placed>, String> {
    if service.spec.common.hardware.is_none() {
        return Ok(None);
    }
    let placed = wants(service, observed)?
        .preflight(&observed.fleet)
        .and_then(|preflight| {
            // A container has the user's image.
            let image = match Container::wanted(service) {
                Some(container) => container.image.clone(),
                None => placement::image(Some(&preflight.placement), env)?,
            };
            Ok((preflight, image))
        });
    match placed {
        Err(misfit) if misfit.reason == Reason::SpecInvalid => Err(misfit.message),
        placed => Ok(Some(placed)),
    }
}

/// What the serving pods ask for and compute.
///
/// # Errors
/// A sentence that names a field.
pub fn wants(service: &InferenceService, observed: &Observed) -> Result<Wants, String> {
    let spec = &service.spec;
    let cache = cache_bytes(service)?;
    let published = service
        .status
        .as_ref()
        .and_then(|status| status.run_status.artifact.as_ref());
    let published = published.and_then(|artifact| u64::try_from(artifact.bytes).ok());
    let weights = published.or_else(|| {
        let shape = crate::run::refs(service)
            .iter()
            .find_map(|to| observed.upstream.get(to)?.shape)?;
        // Bits a weight of each format: its blocks with their scales.
        let bits = match spec.quantization.unwrap_or(QuantizationFormat::Q8_0) {
            QuantizationFormat::Q8_0 => 17,
            QuantizationFormat::Q4_0 | QuantizationFormat::Q4_K => 9,
            QuantizationFormat::F16 => 32,
        };
        Some(shape.parameters() * bits / 16)
    });
    let weights = weights.unwrap_or(0);
    Ok(Wants {
        hardware: spec.common.hardware.clone(),
        pod: spec.common.pod.clone().unwrap_or_default(),
        // What is loaded beside the model is at most more: what is refused here is refused for certain.
        sizes: sizes(cache, weights, 0),
        engine: match Container::wanted(service) {
            Some(_) => placement::Engine::Container,
            None => placement::Engine::Candle,
        },
        work: Work::Serve { weights, cache },
    })
}

/// Memory of the cache of keys and values.
fn cache_bytes(service: &InferenceService) -> Result<u64, String> {
    match service.spec.kv_cache.as_ref().and_then(|cache| cache.memory.as_ref()) {
        None => Ok(DEFAULT_KV_CACHE_BYTES),
        Some(text) => quantity::bytes(&text.0)
            .filter(|bytes| *bytes >= MIN_KV_CACHE_BYTES)
            .ok_or_else(|| {
                format!(
                    "spec.kvCache.memory must be a size of at least 1Mi, such as 256Mi; got {}",
                    text.0
                )
            }),
    }
}

/// Size of the disk behind that cache.
fn spill_bytes(service: &InferenceService) -> Result<Option<u64>, String> {
    let cache = service.spec.kv_cache.clone().unwrap_or_default();
    let Some(spill) = cache.spill else { return Ok(None) };
    if cache.prefix_caching == Some(false) {
        return Err(format!("spec.kvCache: {SPILL_RULE}"));
    }
    match quantity::bytes(&spill.size.0).filter(|bytes| SPILL_BYTES.contains(bytes)) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(format!(
            "spec.kvCache.spill.size must be a size between 1Mi and 16Ti, such as 10Gi; got {}",
            spill.size.0
        )),
    }
}

fn serving(service: &InferenceService, observed: &Observed, env: &Env) -> Result<Serving, String> {
    let cache = service.spec.kv_cache.clone().unwrap_or_default();
    // Before anything is rolled out: what is refused leaves the pods that serve as they are.
    let pod = service.spec.common.pod.clone().unwrap_or_default();
    check_pod(&pod)?;
    let bound = |field: &str, value: Option<i32>| value.map(|value| unsigned(field, value)).transpose();
    let suspend = service.spec.common.suspend.unwrap_or(false);
    let scaled = match &service.spec.autoscale {
        None => None,
        Some(autoscale) => Some(scaled(service, autoscale, observed)?).filter(|_| !suspend),
    };
    let replicas = match &scaled {
        _ if suspend => 0,
        Some(scaled) => scaled.replicas,
        None => service.spec.replicas.unwrap_or(1),
    };
    Ok(Serving {
        pod,
        image: env.runtime_image.clone(),
        placement: place(service, observed, env)?,
        replicas,
        scaled,
        is_suspended: suspend,
        api_keys: service.spec.auth.as_ref().map(|auth| auth.secret.clone()),
        tls_secret: service.spec.tls.as_ref().map(|tls| tls.secret_name.clone()),
        block_tokens: unsigned("spec.kvCache.blockTokens", cache.block_tokens.unwrap_or(16))?,
        kv_cache_bytes: cache_bytes(service)?,
        kv_cache_dtype: cache.dtype.unwrap_or_default(),
        prefix_caching: cache.prefix_caching.unwrap_or(true),
        spill_bytes: spill_bytes(service)?,
        drain_seconds: drain_seconds(service)?,
        rollout_patience: env.rollout_patience,
        max_sequence_tokens: bound("spec.maxSequenceTokens", service.spec.max_sequence_tokens)?,
        max_concurrent_requests: bound("spec.maxConcurrentRequests", service.spec.max_concurrent_requests)?,
        max_waiting_requests: bound("spec.maxWaitingRequests", service.spec.max_waiting_requests)?,
        beside: beside::check(service, observed)?,
    })
}

fn drain_seconds(service: &InferenceService) -> Result<i64, String> {
    match &service.spec.drain {
        Some(drain) => drain
            .seconds()
            .and_then(|seconds| i64::try_from(seconds).ok())
            .filter(|seconds| *seconds <= MOST_DRAIN_SECONDS)
            .ok_or_else(|| format!("spec.drain must be a time of at most 24h, such as 5m; got {}", drain.0)),
        None if service.spec.autoscale.is_some() => Ok(SCALED_DRAIN_SECONDS),
        None => Ok(DRAIN_SECONDS),
    }
}
