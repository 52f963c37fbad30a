//! The number of pods follows the load, by itself or by others through `/scale`, and nobody's answer is cut off.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use strata_api::InferenceService;
use strata_e2e::chats::{Chats, Way};
use strata_e2e::image::catalog;
use strata_e2e::strata::{apply, condition, ready};
use strata_e2e::{Context, audit, install, operator, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(240);
/// A refusal, as far as it is the same in all tools' words.
const REFUSAL: &str = "set either replicas or autoscale";

/// The window is short, so that the test is; the cache is small, so that 16 chats fill it.
const SERVICE: &str = "apiVersion: strata.dev/v1alpha1
kind: InferenceService
metadata: {name: chat}
spec:
  model: {uri: 'pvc://raw/model.gguf'}
  kvCache: {memory: 64Mi}
  maxSequenceTokens: 512
  autoscale:
    maxReplicas: 2
    targets: {kvCacheUtilizationPercent: 50}
    scaleDownWindow: 20s
    coldStart: 10s
  storage: {uri: 'pvc://artifacts'}
";

/// A real HorizontalPodAutoscaler; its bounds alone need no metrics.
const HPA: &str = "apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: chat}
spec:
  scaleTargetRef: {apiVersion: strata.dev/v1alpha1, kind: InferenceService, name: chat}
  minReplicas: 2
  maxReplicas: 2
  metrics:
  - {type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 50}}}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_come_with_the_load_and_go_with_it_and_no_answer_is_cut_off() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        let raw = context.claim("raw", "1Gi", None).await?.path()?;
        context.claim("artifacts", "1Gi", None).await?;
        fs::copy(catalog::model()?, raw.join("model.gguf"))?;
        apply(&context, SERVICE).await?;
        ready::<InferenceService>(&context, "chat", DEADLINE).await?;

        a_second_writer_is_refused(&context).await?;
        the_load_brings_a_pod_and_its_end_takes_one(&context).await?;
        nothing_is_written_while_nothing_happens(&context).await?;
        who_scales_the_deployment_is_named(&context).await?;
        others_scale_by_themselves(&context).await
    })
    .await;
}

/// By hand, and as a real HorizontalPodAutoscaler does.
async fn a_second_writer_is_refused(context: &Context) -> Result<()> {
    let scale = context
        .kubectl(["scale", "inferenceservice", "chat", "--replicas=2"])
        .await;
    let refusal = format!("{:#}", scale.err().context("two writers of one number were taken")?);
    ensure!(refusal.contains(REFUSAL), "{refusal}");
    apply(context, HPA).await?;
    let refused = |hpa: Option<&HorizontalPodAutoscaler>| {
        let conditions = hpa.and_then(|hpa| hpa.status.as_ref()?.conditions.as_ref());
        conditions.is_some_and(|all| {
            let says = |message: &Option<String>| message.as_ref().is_some_and(|message| message.contains(REFUSAL));
            all.iter()
                .any(|one| one.type_ == "AbleToScale" && one.status == "False" && says(&one.message))
        })
    };
    wait::until(
        &context.api(),
        "chat",
        "is told why it may not scale",
        DEADLINE,
        refused,
    )
    .await?;
    context.kubectl(["delete", "hpa", "chat", "--wait"]).await.map(drop)
}

async fn the_load_brings_a_pod_and_its_end_takes_one(context: &Context) -> Result<()> {
    let way = Way::to_service(&context.client, &context.namespace, "chat").await?;
    let many = Chats::start(&way, "chat", 16, 200);
    has_pods(context, 2).await?;
    let answers = many.finish().await?;
    ensure!(answers >= 16, "{answers} answers");
    // Somebody still chats when the second pod goes, with answers that take longer than it waits for new ones.
    let one = Chats::start(&way, "chat", 1, 400);
    has_pods(context, 1).await?;
    let gone = wait::poll("one pod is left", DEADLINE, || async {
        let pods = context
            .kubectl(["get", "pods", "-l", "app.kubernetes.io/component=serve", "-o", "name"])
            .await?;
        Ok((pods.lines().count() == 1).then_some(()))
    });
    gone.await?;
    ensure!(one.finish().await? > 0, "somebody was answered");

    let status = service(context).await?.status.context("a status")?;
    let history: Vec<_> = status
        .scaling_history
        .iter()
        .map(|event| (event.from, event.to, event.reason.as_str()))
        .collect();
    ensure!(
        history == [(2, 1, "LoadFell"), (1, 2, "LoadRose")],
        "{:?}",
        status.scaling_history
    );
    let why = &status.scaling_history[1].message;
    ensure!(why.contains("KV-cache"), "the figures are told: {why}");
    let told = context
        .kubectl(["get", "events", "-o", "jsonpath={.items[*].reason}"])
        .await?;
    ensure!(told.contains("ScaledUp") && told.contains("ScaledDown"), "{told}");
    Ok(())
}

async fn nothing_is_written_while_nothing_happens(context: &Context) -> Result<()> {
    let rounds = operator::reconciles(&context.client).await? + 4.0;
    let settled = |service: Option<&InferenceService>| {
        service.is_some_and(|service| {
            let figures = service.status.as_ref().and_then(|status| status.autoscale.as_ref());
            figures.is_some_and(|figures| {
                figures.reason == "Steady" && figures.observed.get("runningRequests").is_some_and(|n| n == "0")
            })
        })
    };
    wait::until(&context.api(), "chat", "is idle", DEADLINE, settled).await?;
    let mark = audit::mark(&context.bed)?;
    wait::poll("some rounds are over", DEADLINE, || async {
        Ok((operator::reconciles(&context.client).await? >= rounds).then_some(()))
    })
    .await?;
    let writes = audit::writes(&context.bed, install::USER, mark)?;
    let writes: Vec<_> = writes.into_iter().filter(|write| write.resource != "leases").collect();
    ensure!(writes.is_empty(), "nothing happened, but the operator wrote {writes:?}");
    Ok(())
}

async fn who_scales_the_deployment_is_named(context: &Context) -> Result<()> {
    context.kubectl(["scale", "deployment", "chat", "--replicas=2"]).await?;
    let named = |service: Option<&InferenceService>| {
        service
            .and_then(|service| condition(service, "ScalingEffective"))
            .is_some_and(|(status, reason, message)| {
                status == "False" && reason == "AnotherWriter" && message.contains("kubectl")
            })
    };
    wait::until(&context.api(), "chat", "names the other writer", DEADLINE, named)
        .await
        .map(drop)
}

/// Without `autoscale`, `/scale` is for whoever wants it.
async fn others_scale_by_themselves(context: &Context) -> Result<()> {
    let patch = r#"{"spec": {"autoscale": null, "drain": "5m"}}"#;
    context
        .kubectl(["patch", "inferenceservice", "chat", "--type=merge", "-p", patch])
        .await?;
    has_pods(context, 1).await?;
    apply(context, HPA).await?;
    let scaled = |service: Option<&InferenceService>| service.is_some_and(|service| service.spec.replicas == Some(2));
    wait::until(
        &context.api(),
        "chat",
        "is scaled by a HorizontalPodAutoscaler",
        DEADLINE,
        scaled,
    )
    .await?;
    has_pods(context, 2).await?;
    context.kubectl(["delete", "hpa", "chat", "--wait"]).await?;
    context
        .kubectl(["scale", "inferenceservice", "chat", "--replicas=1"])
        .await?;
    has_pods(context, 1).await
}

async fn service(context: &Context) -> Result<InferenceService> {
    Ok(context.api().get("chat").await?)
}

async fn has_pods(context: &Context, wanted: i32) -> Result<()> {
    let has = |service: Option<&InferenceService>| {
        let status = service.and_then(|service| service.status.as_ref());
        status.is_some_and(|status| status.ready_replicas == Some(wanted) && status.replicas == Some(wanted))
    };
    let what = format!("has {wanted} pods that answer");
    wait::until(&context.api(), "chat", &what, DEADLINE, has)
        .await
        .map(drop)
}
