//! Watching a model's life: the four kinds read again and again until the endpoint is ready or something needs a person.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob, RunStatus};

use super::table::{Row, Table};
use crate::strata::Kind;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// How long the API server may be away: an upgrade of a managed one, or a laptop that was asleep.
const PATIENCE: Duration = Duration::from_secs(60);

/// The resources of one namespace, as rows.
#[derive(Clone)]
pub struct Life {
    client: Client,
    namespace: String,
}

impl Life {
    /// The life in `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
        }
    }

    /// Shows the table until every resource is ready.
    ///
    /// # Errors
    /// A resource needs a person (its message says why), or the deadline is over.
    pub async fn watch(&self, deadline: Duration) -> Result<()> {
        let started = Instant::now();
        let mut table = Table::new(std::io::stdout().is_terminal());
        let mut answered = Instant::now();
        loop {
            let rows = match self.rows().await {
                Ok(rows) => rows,
                Err(_) if answered.elapsed() < PATIENCE => {
                    tokio::time::sleep(LOOK).await;
                    continue;
                }
                Err(error) => {
                    let seconds = answered.elapsed().as_secs();
                    return Err(error.context(format!("the cluster has not answered for {seconds} s")));
                }
            };
            answered = Instant::now();
            table.show(&rows, started.elapsed());
            if let Some(row) = rows.iter().find(|row| row.ready == "False") {
                bail!("{} needs a person: {}: {}", row.name, row.reason, row.message);
            }
            if !rows.is_empty() && rows.iter().all(|row| row.ready == "True") {
                return Ok(());
            }
            if started.elapsed() > deadline {
                bail!("after {} min not everything is ready", deadline.as_secs() / 60);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// One row a resource, in the order of a model's life.
    async fn rows(&self) -> Result<Vec<Row>> {
        let mut rows = self.rows_of::<Dataset>().await?;
        rows.extend(self.rows_of::<PretrainJob>().await?);
        rows.extend(self.rows_of::<AlignmentJob>().await?);
        rows.extend(self.rows_of::<InferenceService>().await?);
        Ok(rows)
    }

    async fn rows_of<K: Kind>(&self) -> Result<Vec<Row>> {
        let all: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        Ok(all.list(&ListParams::default()).await?.iter().map(row).collect())
    }
}

fn row<K: Kind>(object: &K) -> Row {
    // What is said about an older spec is no verdict on this one.
    let current = |status: &&RunStatus| status.observed_generation == object.meta().generation;
    let status = object.run_status().filter(current);
    let ready = status.and_then(|status| status.conditions.iter().find(|condition| condition.type_ == "Ready"));
    let progress = status.and_then(|status| status.progress.as_ref());
    Row {
        name: format!("{}/{}", K::kind(&()).to_lowercase(), object.name_any()),
        ready: ready.map_or_else(|| "Unknown".into(), |condition| condition.status.clone()),
        reason: ready.map(|condition| condition.reason.clone()).unwrap_or_default(),
        message: ready.map(|condition| condition.message.clone()).unwrap_or_default(),
        percent: progress.map(|progress| progress.percent),
        activity: progress.map(|progress| progress.activity.clone()).unwrap_or_default(),
    }
}
