//! What is wanted of scaling, checked once: bounds, a budget of accelerators, targets.

/// What is wanted, checked: it cannot be wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub(super) min: u32,
    pub(super) max: u32,
    budget: Option<Budget>,
    targets: Targets,
    pub(super) window_seconds: Option<i64>,
    pub(super) cold_start_seconds: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Budget {
    accelerators: u32,
    per_replica: u32,
}

/// What is aimed at; absent is not aimed at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Targets {
    /// Share of the KV-cache that is held, 0 to 1.
    pub kv_cache_utilization: Option<f64>,
    /// Requests that wait, per replica.
    pub waiting_requests: Option<f64>,
    /// 95th percentile of the time to the first token, in seconds.
    pub time_to_first_token_p95_seconds: Option<f64>,
    /// 95th percentile of the time between two tokens, in seconds.
    pub inter_token_latency_p95_seconds: Option<f64>,
}

/// Why settings are none.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// Nothing would wake it up again.
    #[error("minReplicas is 0: write at least 1, as nothing would hold requests while a pod starts")]
    MinIsZero,
    /// No number is in between.
    #[error("maxReplicas ({max}) is below minReplicas ({min}): raise it")]
    MaxBelowMin {
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// The least is beyond the budget.
    #[error(
        "minReplicas ({min}) with {per_replica} accelerators each is over maxAccelerators ({accelerators}): raise it, or lower \
         minReplicas"
    )]
    BudgetBelowMin {
        /// The least.
        min: u32,
        /// Accelerators of a replica.
        per_replica: u32,
        /// The budget.
        accelerators: u32,
    },
    /// A target that no load could keep, or that any load does.
    #[error("{name} is {value}: write {instead}")]
    Target {
        /// The target.
        name: &'static str,
        /// What it is.
        value: f64,
        /// What it can be.
        instead: &'static str,
    },
}

impl Settings {
    /// Checks bounds and targets. `budget` is (accelerators in all, accelerators of a replica); replicas without any cost none
    /// of it.
    pub fn new(min: u32, max: u32, budget: Option<(u32, u32)>, targets: Targets) -> Result<Self, SettingsError> {
        let budget = budget
            .filter(|(_, per_replica)| *per_replica > 0)
            .map(|(accelerators, per_replica)| Budget {
                accelerators,
                per_replica,
            });
        if min == 0 {
            return Err(SettingsError::MinIsZero);
        }
        if max < min {
            return Err(SettingsError::MaxBelowMin { min, max });
        }
        if let Some(Budget {
            accelerators,
            per_replica,
        }) = budget
            && accelerators / per_replica < min
        {
            return Err(SettingsError::BudgetBelowMin {
                min,
                per_replica,
                accelerators,
            });
        }
        let bounds: [(&'static str, Option<f64>, f64, &'static str); 4] = [
            (
                "kvCacheUtilizationPercent",
                targets.kv_cache_utilization,
                1.0,
                "1 to 100",
            ),
            ("waitingRequests", targets.waiting_requests, 1e6, "at least 1"),
            (
                "timeToFirstTokenP95",
                targets.time_to_first_token_p95_seconds,
                3600.0,
                "more than 0 and at most an hour",
            ),
            (
                "interTokenLatencyP95",
                targets.inter_token_latency_p95_seconds,
                3600.0,
                "more than 0 and at most an hour",
            ),
        ];
        for (name, value, most, instead) in bounds {
            if let Some(value) = value.filter(|value| !(*value > 0.0 && *value <= most)) {
                return Err(SettingsError::Target { name, value, instead });
            }
        }
        Ok(Self {
            min,
            max,
            budget,
            targets,
            window_seconds: None,
            cold_start_seconds: None,
        })
    }

    /// Another time that a lower load must last before replicas become fewer, in seconds.
    #[must_use]
    pub fn with_window(mut self, seconds: i64) -> Self {
        self.window_seconds = Some(seconds.max(1));
        self
    }

    /// The cold start of a pod until it has been measured, in seconds.
    #[must_use]
    pub fn with_cold_start(mut self, seconds: f64) -> Self {
        self.cold_start_seconds = Some(seconds.max(1.0));
        self
    }

    /// The least that there may be.
    pub fn min(&self) -> u32 {
        self.min
    }

    /// The most that there may be: by the bound, and by the budget.
    pub fn most(&self) -> u32 {
        let affordable = self
            .budget
            .map_or(u32::MAX, |budget| budget.accelerators / budget.per_replica);
        self.max.min(affordable)
    }

    /// The targets.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }
}
