//! The chart as its users meet it: linted, rendered, installed, upgraded under load, uninstalled without loss; and two
//! operators of which one leads.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use strata_api::{Dataset, PretrainJob};
use strata_contract::{SERVE_PORT, STAGE_PORT};
use strata_e2e::bed::{command, go::Program};
use strata_e2e::namespace::tool;
use strata_e2e::strata::{Kind, apply, condition, ready};
use strata_e2e::{Context, install, operator, run, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(180);
const ALL_RIGHTS: &str = "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: e2e-before}\n\
                          roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}\n\
                          subjects: [{kind: ServiceAccount, name: strata-operator, namespace: strata-system}]\n";
const MONITORING: &str = "monitoring.coreos.com/v1";
const MONITORS: [&str; 3] = ["ServiceMonitor", "PodMonitor", "PrometheusRule"];
/// Every part of the chart that is left out by default.
const EVERYTHING: &str = "monitoring.monitors.enabled=true,monitoring.monitors.labels.release=prometheus,\
    monitoring.rules.enabled=true,monitoring.dashboards.enabled=true,networkPolicy.enabled=true,\
    networkPolicy.serving.enabled=true,networkPolicy.serving.namespaces={team},artifactsStorageClass.create=true,\
    artifactsStorageClass.provisioner=blob.csi.azure.com,workspaces.team.serviceAccount.name=strata-pods,\
    workspaces.team.claims.artifacts.size=1Ti,workspaces.team.claims.artifacts.storageClassName=strata-artifacts,\
    workspaces.team.claims.raw.size=1Ti,workspaces.team.claims.raw.volume.driver=blob.csi.azure.com,\
    workspaces.team.claims.raw.volume.attributes.clientID=00000000-0000-0000-0000-000000000000,\
    workspaces.team.claims.raw.volume.mountOptions={-o allow_other}";

#[tokio::test]
async fn the_chart_renders_what_kubernetes_knows() {
    with_temp_ns(|context| async move {
        let chart = install::chart();
        command::output(install::helm(&context.bed)?.arg("lint").arg("--strict").arg(&chart))?;
        let folder = tempfile::tempdir()?;
        install::monitoring_crds(&context.bed)?;
        let known = wait::poll("the cluster publishes the schemas of monitors", DEADLINE, || async {
            let openapi = context.kubectl(["get", "--raw", "/openapi/v2"]).await?;
            Ok(MONITORS.iter().all(|kind| openapi.contains(kind)).then_some(openapi))
        });
        write_schemas(&known.await?, folder.path())?;
        let aks = chart.join("values-aks.yaml").display().to_string();
        for arguments in [
            &[][..],
            &["--set", "watchNamespace=team,replicas=1,defaultStorage=pvc://artifacts"],
            &["--set", EVERYTHING],
            &["--set", EVERYTHING, "--set", "watchNamespace=team"],
            &[
                "--values",
                &aks,
                "--api-versions",
                "azmonitoring.coreos.com/v1/ServiceMonitor",
                "--api-versions",
                "azmonitoring.coreos.com/v1/PodMonitor",
            ],
        ] {
            let mut helm = install::helm(&context.bed)?;
            helm.args(["template", "strata"]).arg(&chart).args(arguments);
            helm.args(
                MONITORS
                    .iter()
                    .flat_map(|kind| ["--api-versions".to_owned(), format!("{MONITORING}/{kind}")]),
            );
            let path = folder.path().join("rendered.yaml");
            // Azure's monitors have the same fields in a group of their own.
            let rendered = command::output(&mut helm)?.replace("azmonitoring.coreos.com", "monitoring.coreos.com");
            if rendered.contains("kind: NetworkPolicy") {
                let ports = [STAGE_PORT, SERVE_PORT].map(|port| format!("port: {port}\n"));
                ensure!(
                    ports.iter().all(|port| rendered.contains(port)),
                    "the pods' ports are open"
                );
            }
            std::fs::write(&path, rendered)?;
            let location = format!(
                "{}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json",
                folder.path().display()
            );
            let mut kubeconform = Command::new(tool(Program::Kubeconform)?);
            kubeconform
                .args(["-strict", "-summary", "-schema-location", &location])
                .arg(&path);
            command::output(&mut kubeconform)?;
        }
        let refused = command::output(
            install::helm(&context.bed)?
                .args(["template", "--set", "replica=3"])
                .arg(&chart),
        );
        ensure!(refused.is_err(), "a value that does not exist is refused");
        // Without their CRDs, monitors are refused with what to do, and not left out.
        let monitors = ["template", "--set", "monitoring.monitors.enabled=true"];
        let refused = command::output(install::helm(&context.bed)?.args(monitors).arg(&chart));
        let said = refused.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(said.contains("Install its CRD first"), "{said}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn an_upgrade_restarts_no_run_and_an_uninstall_keeps_resources_and_artifacts() {
    with_temp_ns(|context| async move {
        // The chart before, with this operator in it, as no other is compiled: what it may do more than that chart allows, it
        // may by this binding, until the upgrade brings its own.
        let before = tempfile::tempdir()?;
        apply(&context, ALL_RIGHTS).await?;
        install::operator_from(&install::previous_chart(before.path())?, &context.bed, &[])?;
        let raw = context.claim("raw", "1Gi", None).await?.path()?;
        let artifacts = context.claim("artifacts", "1Gi", None).await?.path()?;
        run::start_long(&context, "long", (&raw, &artifacts), DEADLINE).await?;
        let words: Dataset = ready(&context, "words", DEADLINE).await?;
        let before = words.status.context("a status")?;
        let started = started(&context).await?;

        // This chart and another image for pods, while one runs: what is done stays done and what runs goes on, under the
        // image it has.
        context.kubectl(["delete", "clusterrolebinding", "e2e-before"]).await?;
        install::operator(&context.bed, &["runtimeImage.tag=other"])?;
        only_the_new_operator_is_left(&context).await?;
        leader_changes_hands(&context).await?;
        let after: Dataset = touched(&context, "words").await?;
        let after = after.status.context("a status")?;
        ensure!(
            after.run == before.run && after.artifact == before.artifact,
            "{after:?}"
        );
        touched::<PretrainJob>(&context, "long").await?;
        ensure!(
            self::started(&context).await? == started,
            "a Job or a pod was started again"
        );
        context.kubectl(["delete", "pretrainjob", "long", "--wait"]).await?;

        command::output(install::helm(&context.bed)?.args([
            "uninstall",
            "strata",
            "--wait",
            "-n",
            install::NAMESPACE,
        ]))?;
        let kept: Dataset = context.api().get("words").await?;
        ensure!(
            kept.status.and_then(|status| status.artifact) == before.artifact,
            "the resource outlives the chart"
        );

        // Back again: a new resource of the same content finds what was published and computes nothing.
        install::operator(&context.bed, &[])?;
        context.kubectl(["delete", "dataset", "words", "--wait"]).await?;
        apply(&context, run::WORDS).await?;
        let again: Dataset = ready(&context, "words", DEADLINE).await?;
        let again_object = again.clone();
        let again = again.status.context("a status")?;
        ensure!(
            again.artifact == before.artifact,
            "the same content has the same digest: {again:?}"
        );
        let id = again.run.context("a run")?.id;
        let folder = artifacts.join(format!("{}/dataset/words/{id}", context.namespace));
        ensure!(
            run::attempts(&folder) == 1,
            "it was computed again: {}",
            folder.display()
        );
        let (_, _, message) = condition(&again_object, "Ready").context("a condition")?;
        ensure!(message.contains("nothing was computed"), "{message}");
        Ok(())
    })
    .await;
}

/// Name and UID of the Jobs, and of the pods that run or have ended well.
async fn started(context: &Context) -> Result<BTreeSet<(String, String)>> {
    let jobs = context.api::<Job>().list(&ListParams::default()).await?;
    let jobs = jobs.iter().map(|job| (job.name_any(), job.uid().unwrap_or_default()));
    let pods = context.api::<Pod>().list(&ListParams::default()).await?;
    let phase = |pod: &Pod| {
        pod.status
            .as_ref()
            .and_then(|status| status.phase.clone())
            .unwrap_or_default()
    };
    let pods = pods
        .iter()
        .filter(|pod| ["Running", "Succeeded"].contains(&phase(pod).as_str()))
        .map(|pod| (pod.name_any(), pod.uid().unwrap_or_default()));
    Ok(jobs.chain(pods).collect())
}

/// Changes what determines no result, and waits until the operator has seen that.
async fn touched<K: Kind>(context: &Context, name: &str) -> Result<K> {
    let patch = Patch::Merge(json!({"spec": {"retries": 7}}));
    let api = context.api::<K>();
    let generation = api
        .patch(name, &PatchParams::default(), &patch)
        .await?
        .meta()
        .generation;
    let seen = |object: Option<&K>| {
        object.and_then(|object| object.run_status()?.observed_generation) >= generation && generation.is_some()
    };
    wait::until(&api, name, "is seen by the operator", DEADLINE, seen).await
}

/// The pods of the old one may still be ending when helm is content.
async fn only_the_new_operator_is_left(context: &Context) -> Result<()> {
    let is_new = |pod: &Pod| {
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let mut arguments = containers.flat_map(|container| container.args.iter().flatten());
        arguments.any(|argument| argument.starts_with("--runtime-image=") && argument.ends_with(":other"))
    };
    wait::poll("the old operator is gone", DEADLINE, || async {
        let pods = operator::pods(&context.client).await?;
        Ok((!pods.is_empty() && pods.iter().all(is_new)).then_some(()))
    })
    .await
}

/// A strict JSON schema for each kind of the cluster's OpenAPI document, named as kubeconform looks for it: the cluster
/// itself says what it knows, and nothing is fetched.
fn write_schemas(openapi: &str, folder: &Path) -> Result<()> {
    let mut document: Value = serde_json::from_str(openapi)?;
    let mut definitions = document["definitions"].take();
    let all = definitions.as_object_mut().context("the document has definitions")?;
    let mut kinds = Vec::new();
    for (name, definition) in all.iter_mut() {
        close(definition);
        // A few types are strings or numbers, which OpenAPI 2 cannot say.
        if name.ends_with("IntOrString") || name.ends_with("Quantity") {
            *definition = json!({"type": ["string", "integer", "number"]});
        }
        for kind in definition["x-kubernetes-group-version-kind"]
            .as_array()
            .into_iter()
            .flatten()
        {
            kinds.push((name.clone(), kind.clone()));
        }
    }
    std::fs::write(
        folder.join("definitions.json"),
        json!({"definitions": definitions}).to_string(),
    )?;
    for (name, kind) in kinds {
        let text = |field: &str| kind[field].as_str().unwrap_or_default().to_lowercase();
        let group = text("group")
            .split('.')
            .next()
            .map(str::to_owned)
            .filter(|group| !group.is_empty());
        let suffix = group.map(|group| format!("-{group}")).unwrap_or_default();
        let file = folder.join(format!("{}{suffix}-{}.json", text("kind"), text("version")));
        std::fs::write(
            file,
            json!({"$ref": format!("definitions.json#/definitions/{name}")}).to_string(),
        )?;
    }
    Ok(())
}

/// Fields that an object does not have are refused, also in the objects in it, which a CRD writes in place.
fn close(schema: &mut Value) {
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(close);
        schema["additionalProperties"] = json!(false);
    } else if let Some(items) = schema.get_mut("items") {
        close(items);
    }
}

/// Two replicas run and one leads; when it is deleted the other one takes over.
async fn leader_changes_hands(context: &Context) -> Result<()> {
    let leases: Api<Lease> = Api::namespaced(context.client.clone(), install::NAMESPACE);
    let holder = |lease: Option<&Lease>| lease.and_then(|lease| lease.spec.as_ref()?.holder_identity.clone());
    let lease = leases
        .list(&ListParams::default())
        .await?
        .items
        .pop()
        .context("there is a lease")?;
    let name = lease.name_any();
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), install::NAMESPACE);
    let names: Vec<String> = operator::pods(&context.client)
        .await?
        .iter()
        .map(|pod| pod.name_any())
        .collect();
    // One that has ended may still hold it for a while.
    let held = |lease: Option<&Lease>| holder(lease).is_some_and(|holder| names.contains(&holder));
    let first = holder(Some(
        &wait::until(&leases, &name, "is held by a pod", DEADLINE, held).await?,
    ))
    .context("a holder")?;
    pods.delete(&first, &DeleteParams::default()).await?;
    let other = |lease: Option<&Lease>| holder(lease).is_some_and(|now| !now.is_empty() && now != first);
    wait::until(&leases, &name, "has another holder", Duration::from_secs(60), other)
        .await
        .map(drop)
}
