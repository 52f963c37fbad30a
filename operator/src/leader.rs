//! Who of several replicas works: the holder of a Lease.
//!
//! The holder renews it; who cannot for [`Times::deadline`] stops writing, which is before anybody else may take over,
//! [`Times::duration`] after the last renewal that it saw. Both are measured by each replica's own clock from what it
//! saw itself: times in the Lease are for people, and clocks of two nodes need not agree.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::engine::apply::FIELD_MANAGER;
use crate::engine::guard::Leadership;

/// The times of an election. Each is well below the one before.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Silence of the holder after which another replica takes over; whole seconds.
    pub duration: Duration,
    /// Time without a renewal after which the holder stops working.
    pub deadline: Duration,
    /// Pause between two looks at the Lease; the holder renews it at each.
    pub pause: Duration,
}

impl Times {
    /// Those of the operator.
    pub const OPERATOR: Self = Self {
        duration: Duration::from_secs(15),
        deadline: Duration::from_secs(10),
        pause: Duration::from_secs(2),
    };
}

/// A part in the election, given back by [`Election::release`].
pub struct Election {
    /// Whether this replica leads.
    pub leads: watch::Receiver<bool>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Election {
    /// Takes part, as `identity`, in the election for the Lease `name`. `leadership` says at any time whether we won.
    ///
    /// # Errors
    /// The Lease can be neither read nor written.
    pub async fn join(
        client: Client,
        namespace: &str,
        name: &str,
        identity: &str,
        times: Times,
        leadership: Leadership,
    ) -> anyhow::Result<Self> {
        let (sender, leads) = watch::channel(false);
        let (stop, stopped) = oneshot::channel();
        let mut candidate = Candidate {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            times,
            leadership,
            sender,
            seen: None,
        };
        let started = Instant::now();
        let won = match candidate.turn().await {
            Err(error) if !is_conflict(&error) => {
                let hint = format!("cannot use the Lease {namespace}/{name}: check the operator's Role there");
                return Err(error).context(hint);
            }
            won => won.unwrap_or(false),
        };
        candidate.set(won);
        let task = tokio::spawn(candidate.run(started, stopped));
        Ok(Self { leads, stop, task })
    }

    /// Gives the Lease back, so that another replica need not wait for its end.
    pub async fn release(self) {
        // A task that has ended needs no word.
        let _ = self.stop.send(());
        if let Err(error) = self.task.await {
            tracing::warn!(%error, "the election ended badly");
        }
    }
}

struct Candidate {
    api: Api<Lease>,
    name: String,
    identity: String,
    times: Times,
    leadership: Leadership,
    sender: watch::Sender<bool>,
    /// The Lease of another holder, and when it was first seen like that.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    /// Until it is stopped, or has led and does not any more: then the process starts anew.
    async fn run(mut self, mut renewed: Instant, mut stopped: oneshot::Receiver<()>) {
        loop {
            tokio::select! {
                _ = &mut stopped => break,
                () = sleep_until(self.soon(renewed)) => {}
            }
            let led = self.leadership.leads();
            let started = Instant::now();
            match timeout_at(self.latest(renewed), self.turn()).await {
                Ok(Ok(leads)) => {
                    renewed = started;
                    self.set(leads);
                }
                // Somebody else was faster: the next turn sees what was written.
                Ok(Err(error)) if is_conflict(&error) => {}
                Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "cannot use the Lease"),
                Err(_) => tracing::warn!(lease = self.name, "no answer about the Lease"),
            }
            if led && renewed.elapsed() >= self.times.deadline {
                tracing::warn!(lease = self.name, "the Lease could not be renewed in time");
                self.set(false);
            }
            if led && !self.leadership.leads() {
                return;
            }
        }
        // Not what the guard says: who stops lets it refuse writes before.
        if *self.sender.borrow() {
            self.set(false);
            match timeout_at(self.soon(renewed), self.give_back()).await {
                Ok(Ok(())) => tracing::info!(lease = self.name, "gave the Lease back"),
                _ => tracing::warn!(
                    lease = self.name,
                    "could not give the Lease back; it runs out by itself"
                ),
            }
        }
    }

    /// After a pause; for the holder, at the latest when its time is over.
    fn soon(&self, renewed: Instant) -> Instant {
        (Instant::now() + self.times.pause).min(self.latest(renewed))
    }

    /// When the holder's time is over. A slow server may answer until then; others are as patient.
    fn latest(&self, renewed: Instant) -> Instant {
        match self.leadership.leads() {
            true => renewed + self.times.deadline,
            false => Instant::now() + self.times.deadline,
        }
    }

    fn set(&self, leads: bool) {
        self.leadership.set(leads);
        self.sender.send_replace(leads);
    }

    /// Takes or renews the Lease if that is ours to do. Says whether we hold it.
    async fn turn(&mut self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.held(LeaseSpec::default())),
            };
            self.api.create(&params(), &lease).await?;
            return Ok(true);
        };
        let spec = lease.spec.take().unwrap_or_default();
        if !self.may_have(&spec) {
            return Ok(false);
        }
        lease.spec = Some(self.held(spec));
        // It carries the resourceVersion that was read: of two that try, one wins.
        self.api.replace(&self.name, &params(), &lease).await?;
        self.seen = None;
        Ok(true)
    }

    /// Whether the Lease is ours, or nobody's, or its holder has been silent for too long.
    fn may_have(&mut self, spec: &LeaseSpec) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return true;
        }
        let seconds = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok());
        let duration = seconds.map_or(self.times.duration, Duration::from_secs);
        match &self.seen {
            Some((seen, since)) if seen == spec => since.elapsed() > duration,
            _ => {
                self.seen = Some((spec.clone(), Instant::now()));
                false
            }
        }
    }

    /// `spec` as its holder's, which we are from now on.
    fn held(&self, spec: LeaseSpec) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let is_ours = spec.holder_identity.as_deref() == Some(&self.identity);
        let transitions = spec.lease_transitions.unwrap_or(0);
        LeaseSpec {
            acquire_time: spec.acquire_time.filter(|_| is_ours).or_else(|| Some(now.clone())),
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.times.duration.as_secs()).ok(),
            lease_transitions: Some(transitions.saturating_add(i32::from(!is_ours))),
            renew_time: Some(now),
            ..spec
        }
    }

    async fn give_back(&self) -> Result<(), kube::Error> {
        let mut lease = self.api.get(&self.name).await?;
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_deref() == Some(&self.identity) {
            (spec.holder_identity, spec.acquire_time, spec.renew_time) = (None, None, None);
            self.api.replace(&self.name, &params(), &lease).await?;
        }
        Ok(())
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PostParams::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::engine::tests::server::Server;

    /// Faster than the operator's, but slow enough for a machine with other work.
    const FAST: Times = Times {
        duration: Duration::from_secs(4),
        deadline: Duration::from_secs(3),
        pause: Duration::from_millis(50),
    };

    async fn join(server: &Arc<Server>, identity: &str) -> (Election, Leadership) {
        let leadership = Leadership::default();
        let client = kube::client::ClientBuilder::new(server.service(), "ns").build();
        let election = Election::join(client, "ns", "lease", identity, FAST, leadership.clone()).await;
        (election.expect("the Lease can be used"), leadership)
    }

    async fn until(election: &mut Election, wanted: bool) {
        let change = election.leads.wait_for(|leads| *leads == wanted);
        let change = tokio::time::timeout(Duration::from_secs(20), change).await;
        change.expect("in time").expect("the election goes on");
    }

    fn holder(server: &Server) -> Value {
        server.object("leases/lease")["spec"]["holderIdentity"].clone()
    }

    #[tokio::test]
    async fn who_cannot_renew_stops_before_another_takes_over() {
        let server = Arc::new(Server::new());
        let (mut first, first_leads) = join(&server, "first").await;
        until(&mut first, true).await;
        let (mut second, second_leads) = join(&server, "second").await;
        // It stays the leader for longer than the Lease lasts: it renews.
        tokio::time::sleep(FAST.duration + FAST.pause * 10).await;
        assert!(first_leads.leads() && !second_leads.leads());

        server.set_down(true);
        until(&mut first, false).await;
        assert!(!first_leads.leads(), "the guard knows as soon as anybody");
        first.release().await;
        assert_eq!(holder(&server), "first", "who does not lead gives nothing back");
        server.set_down(false);
        until(&mut second, true).await;
        assert_eq!(holder(&server), "second");
        assert_eq!(server.object("leases/lease")["spec"]["leaseTransitions"], 2);
    }

    #[tokio::test]
    async fn a_lease_that_was_deleted_is_made_anew_and_one_that_is_given_back_is_taken_at_once() {
        let server = Arc::new(Server::new());
        let (mut first, first_leads) = join(&server, "first").await;
        until(&mut first, true).await;
        server.remove("leases/lease");
        while holder(&server) != "first" {
            tokio::task::yield_now().await;
        }
        assert!(first_leads.leads());

        let (mut second, _) = join(&server, "second").await;
        let started = Instant::now();
        // As the operator does before.
        first_leads.set(false);
        first.release().await;
        until(&mut second, true).await;
        assert!(
            started.elapsed() < FAST.duration,
            "nobody waits for the end of a Lease that was given back"
        );
    }

    #[tokio::test]
    async fn a_lease_that_was_taken_away_is_not_fought_for() {
        let server = Arc::new(Server::new());
        let (mut first, first_leads) = join(&server, "first").await;
        until(&mut first, true).await;
        server.remove("leases/lease");
        server.add("leases", json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": "lease", "namespace": "ns"}, "spec": {"holderIdentity": "other", "leaseDurationSeconds": 1}}));
        until(&mut first, false).await;
        assert!(!first_leads.leads());
        assert_eq!(holder(&server), "other");
    }
}
