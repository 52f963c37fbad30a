//! What the operator counts, for `/metrics`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::autoscale::policy::Decision;
use crate::engine::kind::{Key, ResourceKind};
use crate::inference::observed;

/// Bounds of the reconcile histogram in seconds.
const BUCKETS: [f64; 9] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// Bounds of the histogram of own work in seconds.
const WORK_BUCKETS: [f64; 10] = [0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5];

/// The operator's metrics.
pub struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    seconds: HistogramVec,
    own_work: HistogramVec,
    status_writes: IntCounterVec,
    errors: IntCounterVec,
    resources: IntGaugeVec,
    queued: IntGaugeVec,
    leader: IntGauge,
    resident: IntGauge,
    desired: IntGaugeVec,
    observed: GaugeVec,
    ready: Mutex<HashMap<Key, Ready>>,
    scaled: Mutex<HashMap<Key, Vec<&'static str>>>,
}

/// What the condition Ready says, as labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// True, Unknown or False: done, on its way, or in need of a person. Alerts read it, so that they need no list of reasons.
    pub status: String,
    /// Why.
    pub reason: String,
}

impl Metrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// Two metrics of one name, which is a defect.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let reconciles = counter(
            "strata_operator_reconciles_total",
            "Reconciles by kind and result (ok, or the error's reason).",
            &["kind", "result"],
        )?;
        let status_writes = counter(
            "strata_operator_status_writes_total",
            "Status writes by kind.",
            &["kind"],
        )?;
        let errors = counter(
            "strata_operator_errors_total",
            "Failed reconciles by reason.",
            &["reason"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new("strata_operator_reconcile_seconds", "Length of a reconcile by kind.")
                .buckets(BUCKETS.to_vec()),
            &["kind"],
        )?;
        let own_work = HistogramVec::new(
            HistogramOpts::new(
                "strata_operator_own_work_seconds",
                "Processor time of a reconcile by kind: its length without any waiting.",
            )
            .buckets(WORK_BUCKETS.to_vec()),
            &["kind"],
        )?;
        let resources = IntGaugeVec::new(
            Opts::new(
                "strata_resources",
                "Resources by kind and by status and reason of their condition Ready.",
            ),
            &["kind", "ready", "reason"],
        )?;
        let queued = IntGaugeVec::new(
            Opts::new(
                "strata_operator_queued",
                "Resources by kind that are being looked at, or are to be now.",
            ),
            &["kind"],
        )?;
        let leader = IntGauge::new("strata_operator_leader", "1 if this replica leads, else 0.")?;
        let resident = IntGauge::new("process_resident_memory_bytes", "Resident memory in bytes.")?;
        let desired = IntGaugeVec::new(
            Opts::new(
                "strata_autoscale_desired_replicas",
                "Wanted pods of an InferenceService that scales by itself.",
            ),
            &["namespace", "name"],
        )?;
        let observed = GaugeVec::new(
            Opts::new(
                "strata_autoscale_observed",
                "What the pods of an InferenceService say that scales by itself, by figure.",
            ),
            &["namespace", "name", "figure"],
        )?;
        registry.register(Box::new(desired.clone()))?;
        registry.register(Box::new(observed.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(own_work.clone()))?;
        registry.register(Box::new(resources.clone()))?;
        registry.register(Box::new(queued.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(resident.clone()))?;
        Ok(Self {
            registry,
            reconciles,
            seconds,
            own_work,
            status_writes,
            errors,
            resources,
            queued,
            leader,
            resident,
            desired,
            observed,
            ready: Mutex::default(),
            scaled: Mutex::default(),
        })
    }

    /// A reconcile has ended; of the time that it took it worked for a part.
    pub fn reconciled(&self, kind: ResourceKind, result: &str, took: Duration, worked: Duration) {
        self.reconciles.with_label_values(&[kind.name(), result]).inc();
        self.seconds
            .with_label_values(&[kind.name()])
            .observe(took.as_secs_f64());
        self.own_work
            .with_label_values(&[kind.name()])
            .observe(worked.as_secs_f64());
        if result != "ok" {
            self.errors.with_label_values(&[result]).inc();
        }
    }

    /// A status was written.
    pub fn status_written(&self, kind: ResourceKind) {
        self.status_writes.with_label_values(&[kind.name()]).inc();
    }

    /// How many resources of a kind are to be looked at.
    pub fn queued(&self, kind: ResourceKind, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.queued.with_label_values(&[kind.name()]).set(count);
    }

    /// Whether this replica leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// What a resource's condition Ready says.
    pub fn ready(&self, key: &Key, ready: Ready) {
        let mut all = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.insert(key.clone(), ready.clone());
        if before.as_ref() != Some(&ready) {
            self.resources.with_label_values(&labels(key.kind, &ready)).inc();
            if let Some(before) = before {
                self.one_less(key.kind, &before);
            }
        }
    }

    /// A series that counts nothing any more is dropped.
    fn one_less(&self, kind: ResourceKind, ready: &Ready) {
        let labels = labels(kind, ready);
        let gauge = self.resources.with_label_values(&labels);
        gauge.dec();
        if gauge.get() <= 0 {
            // It fails only if the series is not there, which is what is wanted.
            let _ = self.resources.remove_label_values(&labels);
        }
    }

    /// What was decided about a service that scales by itself. A figure that is not said any more is no figure.
    pub fn scaled(&self, key: &Key, decision: &Decision) {
        let labels = [key.namespace.as_str(), key.name.as_str()];
        self.desired.with_label_values(&labels).set(decision.replicas.into());
        let figures = observed(&decision.measured);
        let now: Vec<&'static str> = figures.iter().map(|(figure, _)| *figure).collect();
        for (figure, value) in figures {
            let labels = [key.namespace.as_str(), key.name.as_str(), figure];
            self.observed.with_label_values(&labels).set(value);
        }
        let mut all = self.scaled.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.insert(key.clone(), now.clone()).unwrap_or_default();
        for figure in before.into_iter().filter(|figure| !now.contains(figure)) {
            self.unobserved(key, figure);
        }
    }

    /// A service does not scale by itself, or not any more.
    pub fn not_scaled(&self, key: &Key) {
        let mut all = self.scaled.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = all.remove(key) else { return };
        // It fails only if the series is not there, which is what is wanted.
        let _ = self
            .desired
            .remove_label_values(&[key.namespace.as_str(), key.name.as_str()]);
        for figure in before {
            self.unobserved(key, figure);
        }
    }

    fn unobserved(&self, key: &Key, figure: &str) {
        // As above.
        let _ = self
            .observed
            .remove_label_values(&[key.namespace.as_str(), key.name.as_str(), figure]);
    }

    /// A resource is gone.
    pub fn forget(&self, key: &Key) {
        self.not_scaled(key);
        let mut all = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = all.remove(key) {
            self.one_less(key.kind, &before);
        }
    }

    /// Every resource of which `keep` says no is gone.
    pub fn retain(&self, keep: impl Fn(&Key) -> bool) {
        let gone: Vec<Key> = {
            let all = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            all.keys().filter(|key| !keep(key)).cloned().collect()
        };
        gone.iter().for_each(|key| self.forget(key));
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// A metric that cannot be written, which is a defect.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        if let Some(bytes) = resident_bytes() {
            self.resident.set(bytes);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// In the order in which `strata_resources` names them.
fn labels(kind: ResourceKind, ready: &Ready) -> [&str; 3] {
    [kind.name(), &ready.status, &ready.reason]
}

/// Resident memory of this process in bytes, where the kernel says so.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
