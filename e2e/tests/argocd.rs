//! The real Argo CD and Strata: what it judges healthy, and that the two do not work against each other.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};
use strata_e2e::argocd::{self, ArgoCd, resource};
use strata_e2e::strata::ready;
use strata_e2e::{Context, audit, install, small, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(300);
/// The whole life of a small model.
const LIFE: Duration = Duration::from_secs(600);

/// They hold the artifacts, so they stay whatever git drops.
const CLAIMS: &str = "
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: raw, annotations: {argocd.argoproj.io/sync-options: 'Prune=false,Delete=false'}}
spec: {accessModes: [ReadWriteOnce], storageClassName: '', resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: artifacts, annotations: {argocd.argoproj.io/sync-options: 'Prune=false,Delete=false'}}
spec: {accessModes: [ReadWriteOnce], storageClassName: '', resources: {requests: {storage: 1Gi}}}
";
/// With Argo CD's own program; `health.rs` has every reason, in `make test`.
#[test]
fn argo_cd_judges_the_fixtures_as_they_say() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for case in argocd::fixtures()? {
        let said = argocd::health(&case.of("Dataset"), folder.path())?;
        ensure!(said == case.health, "{}: Argo CD says {said:?}", case.case);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn argo_cd_and_the_operator_keep_one_model_together() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        let raw = context.volume("raw", "1Gi", None).await?.path()?;
        context.volume("artifacts", "1Gi", None).await?;
        small::fill(&raw)?;
        let argo = ArgoCd::start(&context.bed, &context.client).await?;
        argo.commit(
            "a whole life at once",
            &[
                ("service.yaml", Some(&small::service(None))),
                ("alignment.yaml", Some(&small::alignment("1e-3"))),
                ("preferences.yaml", Some(small::PREFERENCES)),
                ("tiny.yaml", Some(&small::model("tiny"))),
                ("words.yaml", Some(&small::words())),
                ("claims.yaml", Some(CLAIMS)),
            ],
        )?;
        argo.application(&context.namespace).await?;
        let outcome = life(&context, &argo).await.with_context(|| argo.explain());
        argo.remove().await?;
        outcome
    })
    .await;
}

async fn life(context: &Context, argo: &ArgoCd) -> Result<()> {
    health_follows_the_life(context, argo).await?;
    quiet_when_all_is_done(context, argo).await?;
    what_is_scaled_is_no_drift(context, argo).await?;
    what_is_changed_by_hand_comes_back(context, argo).await?;
    what_git_suspends_or_breaks_is_seen_and_what_it_drops_is_pruned(context, argo).await?;
    a_promotion_is_a_commit(context, argo).await
}

/// Nothing was ordered in waves: each waits for what it needs, and the Application is healthy when the last one serves.
async fn health_follows_the_life(context: &Context, argo: &ArgoCd) -> Result<()> {
    let synced = argo.until("is synced and works", DEADLINE, |app| {
        is(app, "Synced", "Progressing") && resource(app, "InferenceService", "chat").0 == "Progressing"
    });
    synced.await?;
    ready::<AlignmentJob>(context, "chat", LIFE).await?;
    ready::<InferenceService>(context, "chat", LIFE).await?;
    let app = argo
        .until("is healthy", DEADLINE, |app| is(app, "Synced", "Healthy"))
        .await?;
    for (kind, name) in [
        ("Dataset", "words"),
        ("Dataset", "preferences"),
        ("PretrainJob", "tiny"),
        ("AlignmentJob", "chat"),
        ("InferenceService", "chat"),
    ] {
        let (health, sync) = resource(&app, kind, name);
        ensure!(
            health == "Healthy" && sync == "Synced",
            "{kind}/{name} is {health}, {sync}"
        );
    }
    Ok(())
}

/// Argo CD looks again and again, and neither of the two finds anything to write.
async fn quiet_when_all_is_done(context: &Context, argo: &ArgoCd) -> Result<()> {
    let before = argo.refresh().await?;
    let mark = audit::mark(&context.bed)?;
    for _ in 0..3 {
        let after = argo.refresh().await?;
        ensure!(is(&after, "Synced", "Healthy"), "{}", after["status"]);
        ensure!(
            operations(&after) == operations(&before),
            "a sync was made that nobody asked for: {}",
            after["status"]["operationState"]
        );
    }
    let ours = |write: &audit::Write| write.namespace == context.namespace;
    let wrote: Vec<_> = audit::writes(&context.bed, argocd::USER, mark)?
        .into_iter()
        .filter(ours)
        .collect();
    ensure!(wrote.is_empty(), "Argo CD wrote {wrote:?}");
    let wrote: Vec<_> = audit::writes(&context.bed, install::USER, mark)?
        .into_iter()
        .filter(ours)
        .collect();
    ensure!(wrote.is_empty(), "the operator wrote {wrote:?}");
    Ok(())
}

/// Git says nothing about replicas, so whoever scales may: an HPA, KEDA, a person.
async fn what_is_scaled_is_no_drift(context: &Context, argo: &ArgoCd) -> Result<()> {
    let before = argo.refresh().await?;
    context
        .kubectl(["scale", "inferenceservice/chat", "--replicas=2"])
        .await?;
    let two = |service: Option<&InferenceService>| {
        service.and_then(|service| service.status.as_ref()?.ready_replicas) == Some(2)
    };
    wait::until(
        &context.api::<InferenceService>(),
        "chat",
        "has two pods",
        DEADLINE,
        two,
    )
    .await?;
    argo.until("is healthy again", DEADLINE, |app| is(app, "Synced", "Healthy"))
        .await?;
    let after = argo.refresh().await?;
    ensure!(is(&after, "Synced", "Healthy"), "{}", after["status"]);
    ensure!(
        operations(&after) == operations(&before),
        "scaling made a sync: {}",
        after["status"]
    );
    let service = context.api::<InferenceService>().get("chat").await?;
    ensure!(service.spec.replicas == Some(2), "Argo CD scaled it back");
    context
        .kubectl(["scale", "inferenceservice/chat", "--replicas=1"])
        .await?;
    Ok(())
}

async fn what_is_changed_by_hand_comes_back(context: &Context, argo: &ArgoCd) -> Result<()> {
    let patch = r#"{"spec": {"retries": 9}}"#;
    context
        .kubectl(["patch", "dataset", "preferences", "--type=merge", "--patch", patch])
        .await?;
    let back = |dataset: Option<&Dataset>| dataset.is_some_and(|dataset| dataset.spec.common.retries == Some(0));
    wait::until(
        &context.api::<Dataset>(),
        "preferences",
        "is as git says",
        DEADLINE,
        back,
    )
    .await
    .with_context(|| argo.explain())?;
    argo.until("is healthy", DEADLINE, |app| is(app, "Synced", "Healthy"))
        .await
        .map(drop)
}

async fn what_git_suspends_or_breaks_is_seen_and_what_it_drops_is_pruned(
    context: &Context,
    argo: &ArgoCd,
) -> Result<()> {
    let broken = small::words()
        .replace("name: words}", "name: broken}")
        .replace("words.txt", "nothing.txt");
    let paused = small::model("paused").replace("spec:\n", "spec:\n  suspend: true\n");
    argo.commit(
        "one broken, one suspended",
        &[("broken.yaml", Some(&broken)), ("paused.yaml", Some(&paused))],
    )?;
    argo.refresh().await?;
    let app = argo.until("is degraded", DEADLINE, |app| {
        is(app, "Synced", "Degraded")
            && resource(app, "Dataset", "broken").0 == "Degraded"
            && resource(app, "PretrainJob", "paused").0 == "Suspended"
    });
    app.await?;
    argo.commit("without them", &[("broken.yaml", None), ("paused.yaml", None)])?;
    argo.refresh().await?;
    wait::until_gone(&context.api::<Dataset>(), "broken", DEADLINE).await?;
    wait::until_gone(&context.api::<PretrainJob>(), "paused", DEADLINE).await?;
    argo.until("is healthy", DEADLINE, |app| is(app, "Synced", "Healthy"))
        .await
        .map(drop)
}

/// With a digest in git, a new publication is served when a commit says so, and not before.
async fn a_promotion_is_a_commit(context: &Context, argo: &ArgoCd) -> Result<()> {
    let published = |job: &AlignmentJob| {
        job.status
            .as_ref()
            .and_then(|status| Some(status.artifact.as_ref()?.digest.clone()))
    };
    let first = published(&context.api::<AlignmentJob>().get("chat").await?).context("a digest")?;
    argo.commit("pinned", &[("service.yaml", Some(&small::service(Some(&first))))])?;
    argo.refresh().await?;
    let again = small::alignment("2e-3");
    argo.commit("aligned otherwise", &[("alignment.yaml", Some(&again))])?;
    argo.refresh().await?;
    let other = |job: Option<&AlignmentJob>| job.and_then(published).is_some_and(|digest| digest != first);
    let job = wait::until(&context.api(), "chat", "has published another", LIFE, other).await?;
    let second = published(&job).context("a digest")?;
    argo.until("is healthy", DEADLINE, |app| is(app, "Synced", "Healthy"))
        .await?;
    let read = |service: &InferenceService| {
        let status = service.status.as_ref()?;
        status.run_status.inputs.first()?.digest.clone()
    };
    let service_now: InferenceService = ready(context, "chat", DEADLINE).await?;
    ensure!(
        read(&service_now) == Some(first),
        "what is pinned is served: {:?}",
        service_now.status
    );
    argo.commit("promoted", &[("service.yaml", Some(&small::service(Some(&second))))])?;
    argo.refresh().await?;
    let promoted = |service: Option<&InferenceService>| service.and_then(read).as_ref() == Some(&second);
    wait::until(
        &context.api::<InferenceService>(),
        "chat",
        "serves what was promoted",
        LIFE,
        promoted,
    )
    .await?;
    argo.until("is healthy", LIFE, |app| is(app, "Synced", "Healthy"))
        .await
        .map(drop)
}

fn is(application: &Value, sync: &str, health: &str) -> bool {
    let status = &application["status"];
    status["sync"]["status"] == sync && status["health"]["status"] == health
}

/// What tells one sync from the next: when the last one ended, and how many there were.
fn operations(application: &Value) -> (Value, usize) {
    let status = &application["status"];
    let count = status["history"].as_array().map_or(0, Vec::len);
    (status["operationState"]["finishedAt"].clone(), count)
}
