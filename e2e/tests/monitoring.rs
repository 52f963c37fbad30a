//! What operators of a cluster rely on: dashboards and alerts that show what is there, and drains that go through.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams};
use serde_json::{Value, json};
use strata_api::{Dataset, InferenceService, PretrainJob};
use strata_e2e::prometheus::{Prometheus, scrape_configs};
use strata_e2e::strata::{apply, condition, ready, reason};
use strata_e2e::{Context, install, run, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(180);
/// With a scrape each second, enough for two in each window.
const RATE_INTERVAL: &str = "10s";
const SETTINGS: &[&str] = &[
    "monitoring.monitors.enabled=true",
    "monitoring.rules.enabled=true",
    "monitoring.dashboards.enabled=true",
    "networkPolicy.enabled=true",
];
/// Somebody else's budget under the name of the service `talker`, for other pods.
const TAKEN: &str = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: talker}\n\
                     spec: {maxUnavailable: 1, selector: {matchLabels: {app: other}}}\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_panel_and_alert_reads_what_is_there_and_a_drain_goes_through() {
    with_temp_ns(|context| async move {
        install::monitoring_crds(&context.bed)?;
        install::operator(&context.bed, SETTINGS)?;
        models_serve(&context).await?;
        let prometheus = start(&context).await?;
        let answering = tokio::spawn(ask_for_ever(context.clone()));
        let seen = everything_is_seen(&context, &prometheus).await;
        answering.abort();
        if let Err(error) = seen {
            bail!("{error:#}\n{}", prometheus.targets().await);
        }
        drop(prometheus);
        a_drain_takes_one_pod_at_a_time(&context).await
    })
    .await;
}

/// `talker` with two pods, whose budget's name is taken; `closed` with TLS and keys; and a training that goes on.
async fn models_serve(context: &Context) -> Result<()> {
    let raw = context.claim("raw", "1Gi", None).await?.path()?;
    context.claim("artifacts", "1Gi", None).await?;
    fs::write(raw.join("words.txt"), run::text())?;
    apply(context, run::WORDS).await?;
    apply(context, &run::pretrain("tiny", 2048)).await?;
    apply(context, TAKEN).await?;
    context.create(&certificate()?).await?;
    let scaled = "  drain: 10s\n  autoscale: {minReplicas: 2, maxReplicas: 2, targets: {waitingRequests: 4}}\n";
    apply(context, &run::serve("talker", "tiny", scaled)).await?;
    let closed = "  replicas: 1\n  tls: {secretName: closed}\n  auth: {secret: {name: closed, key: keys}}\n";
    apply(context, &run::serve("closed", "tiny", closed)).await?;
    ready::<Dataset>(context, "words", DEADLINE).await?;
    ready::<PretrainJob>(context, "tiny", DEADLINE).await?;
    apply(context, &run::pretrain("long", 10_000_000_000)).await?;
    ready::<InferenceService>(context, "closed", DEADLINE).await?;
    let said = reason::<InferenceService>(context, "talker", "False", "NameTaken", DEADLINE).await?;
    ensure!(
        said.contains("PodDisruptionBudget talker belongs to something else"),
        "{said}"
    );
    let serves = |service: Option<&InferenceService>| {
        let status = service.and_then(|service| service.status.as_ref());
        status.and_then(|status| status.ready_replicas) == Some(2)
    };
    wait::until(
        &context.api::<InferenceService>(),
        "talker",
        "answers all the same",
        DEADLINE,
        serves,
    )
    .await?;
    Ok(())
}

/// What `closed` reads: a certificate, and a key that no scraper has.
fn certificate() -> Result<Secret> {
    let pair = rcgen::generate_simple_self_signed(["closed".to_owned()])?;
    let data = [
        ("tls.crt", pair.cert.pem()),
        ("tls.key", pair.signing_key.serialize_pem()),
        ("keys", "a-key-of-sixteen-letters".to_owned()),
    ];
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some("closed".into()),
            ..ObjectMeta::default()
        },
        string_data: Some(data.map(|(key, value)| (key.to_owned(), value)).into()),
        ..Secret::default()
    })
}

/// Scrapes what the monitors of the installed chart select, with the alerts of its PrometheusRule.
async fn start(context: &Context) -> Result<Prometheus> {
    let kubeconfig = context.bed.kubeconfig().display().to_string();
    let release = ["-n", install::NAMESPACE, "-o", "json"];
    let monitors = context
        .kubectl(["get", "servicemonitors,podmonitors"].iter().chain(&release))
        .await?;
    let monitors: Value = serde_json::from_str(&monitors)?;
    let monitors = monitors["items"].as_array().context("a list")?;
    ensure!(monitors.len() == 3, "operator, serving, stages: {monitors:?}");
    let mut scrapes = Vec::new();
    for monitor in monitors {
        scrapes.extend(scrape_configs(monitor, &kubeconfig)?);
    }
    let rules = context
        .kubectl(["get", "prometheusrules", "strata-operator"].iter().chain(&release))
        .await?;
    let rules: Value = serde_json::from_str(&rules)?;
    Prometheus::start(&context.bed, scrapes, &rules["spec"].to_string()).await
}

/// Short answers of `talker`, one after the other.
async fn ask_for_ever(context: Context) -> Result<()> {
    let service = context.api::<Service>().get("talker").await?;
    let address = service.spec.and_then(|spec| spec.cluster_ip).context("an address")?;
    let client = strata_e2e::bed::network::http()?;
    let body = json!({"model": "talker", "prompt": "The", "max_tokens": 8, "temperature": 0});
    loop {
        let request = client.post(format!("http://{address}/v1/completions")).json(&body);
        let answer = request.timeout(Duration::from_secs(30)).send().await?;
        ensure!(answer.status().is_success(), "{}", answer.text().await?);
    }
}

async fn everything_is_seen(context: &Context, prometheus: &Prometheus) -> Result<()> {
    // `closed` is scraped although it speaks HTTPS and asks for keys.
    let mut open: Vec<(String, String)> = panels(context).await?;
    open.push((
        "HTTPS".into(),
        "vllm:num_requests_running{model_name=\"closed\"}".into(),
    ));
    let rules = prometheus.rules().await?;
    ensure!(rules.len() >= 10, "{rules:?}");
    for rule in &rules {
        for metric in prometheus
            .metrics_of(rule["query"].as_str().context("an expression")?)
            .await?
        {
            open.push((rule["name"].to_string(), metric));
        }
    }
    let end = Instant::now() + DEADLINE;
    while !open.is_empty() {
        // So that there are reconciles to count.
        let touch = json!({"metadata": {"annotations": {"e2e.strata.dev/left": open.len().to_string()}}});
        let services = context.api::<InferenceService>();
        services
            .patch("closed", &PatchParams::default(), &Patch::Merge(touch))
            .await?;
        let answers = join_all(open.iter().map(|(_, expression)| prometheus.query(expression))).await;
        let mut left = Vec::new();
        for (panel, answer) in open.into_iter().zip(answers) {
            if answer.with_context(|| panel.0.clone())?.is_empty() {
                left.push(panel);
            }
        }
        open = left;
        ensure!(Instant::now() < end, "no data for {open:#?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let needs = wait::poll("the alert of a resource that needs a person", DEADLINE, || async {
        let alerts = prometheus.alerts().await?;
        let ours = |alert: &&Value| {
            alert["labels"]["alertname"] == "StrataNeedsAPerson" && alert["labels"]["reason"] == "NameTaken"
        };
        Ok(alerts.iter().find(ours).cloned())
    });
    let alert = needs.await?;
    ensure!(alert["labels"]["kind"] == "InferenceService", "{alert}");
    let rules = prometheus.rules().await?;
    let sick: Vec<&Value> = rules.iter().filter(|rule| rule["health"] != "ok").collect();
    ensure!(sick.is_empty(), "rules that cannot be evaluated: {sick:#?}");
    Ok(())
}

/// Title and expression of each query of the installed dashboard, with its variables filled in as Grafana does.
async fn panels(context: &Context) -> Result<Vec<(String, String)>> {
    let get = [
        "get",
        "configmaps",
        "-n",
        install::NAMESPACE,
        "-l",
        "grafana_dashboard=1",
        "-o",
        "json",
    ];
    let found: Value = serde_json::from_str(&context.kubectl(get).await?)?;
    let text = found["items"][0]["data"]["strata.json"]
        .as_str()
        .context("a dashboard")?;
    let dashboard: Value = serde_json::from_str(text)?;
    let mut all = Vec::new();
    for panel in dashboard["panels"].as_array().into_iter().flatten() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().context("an expression")?;
            let filled = expression
                .replace("$__rate_interval", RATE_INTERVAL)
                .replace("$namespace", &context.namespace)
                .replace("$model", "talker");
            ensure!(!filled.contains('$'), "a variable that is not filled in: {filled}");
            all.push((panel["title"].to_string(), filled));
        }
    }
    ensure!(all.len() > 20, "{} queries", all.len());
    Ok(all)
}

async fn a_drain_takes_one_pod_at_a_time(context: &Context) -> Result<()> {
    // Once the name is free, the operator makes its own.
    let budgets = context.api::<PodDisruptionBudget>();
    budgets.delete("talker", &DeleteParams::default()).await?;
    reason::<InferenceService>(context, "talker", "True", "Serving", DEADLINE).await?;
    let allows = |budget: Option<&PodDisruptionBudget>| {
        budget
            .and_then(|budget| budget.status.as_ref())
            .is_some_and(|status| status.disruptions_allowed == 1)
    };
    wait::until(&budgets, "talker", "lets one pod go", DEADLINE, allows).await?;
    let pods = context.api::<Pod>();
    let ours = ListParams::default().labels("strata.dev/name=talker,app.kubernetes.io/component=serve");
    let names: Vec<String> = pods.list(&ours).await?.iter().map(|pod| pod.name_any()).collect();
    ensure!(names.len() == 2, "{names:?}");
    ensure!(evict(context, &names[0]).await?, "one of two may go");
    ensure!(
        !evict(context, &names[1]).await?,
        "the second of two waits for the first"
    );
    let evicted = wait::poll("the second follows when the first is replaced", DEADLINE, || async {
        Ok(evict(context, &names[1]).await?.then_some(()))
    });
    evicted.await?;

    // A lone pod is no prisoner of its budget: there is none.
    let alone = Patch::Merge(json!({"spec": {"autoscale": null, "replicas": 1}}));
    let services = context.api::<InferenceService>();
    services.patch("talker", &PatchParams::default(), &alone).await?;
    wait::until_gone(&budgets, "talker", DEADLINE).await?;
    let service = ready::<InferenceService>(context, "talker", DEADLINE).await?;
    ensure!(condition(&service, "Available").is_some_and(|(_, reason, _)| reason == "Serving"));
    Ok(())
}

/// Evicts a pod as a drain does; false if its budget says no. By kubectl: our own client would ask again until it may.
async fn evict(context: &Context, pod: &str) -> Result<bool> {
    let metadata = json!({"name": pod, "namespace": context.namespace});
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata});
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), eviction.to_string())?;
    let path = format!("/api/v1/namespaces/{}/pods/{pod}/eviction", context.namespace);
    let file = file.path().display().to_string();
    match context.kubectl(["create", "--raw", &path, "-f", &file]).await {
        Ok(_) => Ok(true),
        Err(error) if format!("{error:#}").contains("disruption budget") => Ok(false),
        Err(error) => Err(error),
    }
}
