//! Who of several replicas works: the holder of a Lease.

use anyhow::Context;
use kube::Client;
use kube_lease_manager::{LeaseCreateMode, LeaseManager, LeaseManagerBuilder};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Name of the Lease.
const LEASE: &str = "strata-operator";
/// Time after which another replica takes over from one that is silent, in seconds.
const DURATION_SECONDS: u64 = 15;
/// Time before its end at which the Lease is renewed, in seconds.
const GRACE_SECONDS: u64 = 5;

/// A part in the election, given back by [`Election::release`].
pub struct Election {
    /// Whether this replica leads.
    pub leads: watch::Receiver<bool>,
    task: JoinHandle<Result<LeaseManager, kube_lease_manager::LeaseManagerError>>,
}

impl Election {
    /// Takes part in the election as `identity`.
    ///
    /// # Errors
    /// The Lease can be neither read nor made.
    pub async fn join(client: Client, namespace: &str, identity: &str) -> anyhow::Result<Self> {
        let manager = LeaseManagerBuilder::new(client, LEASE)
            .with_namespace(namespace)
            .with_identity(identity)
            .with_duration(DURATION_SECONDS)
            .with_grace(GRACE_SECONDS)
            .with_create_mode(LeaseCreateMode::AutoCreate)
            .build()
            .await
            .with_context(|| format!("cannot use the Lease {namespace}/{LEASE}: check the operator's Role there"))?;
        let (leads, task) = manager.watch().await;
        Ok(Self { leads, task })
    }

    /// Gives the Lease back, so that another replica need not wait for its end.
    pub async fn release(self) {
        drop(self.leads);
        match self.task.await {
            Ok(Ok(_)) => tracing::info!("gave the Lease back"),
            Ok(Err(error)) => tracing::warn!(%error, "could not give the Lease back; it runs out by itself"),
            Err(error) => tracing::warn!(%error, "the election ended badly"),
        }
    }
}
