//! The chart as its users meet it: linted, rendered, installed, upgraded under load, uninstalled without loss; and two
//! operators of which one leads.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use strata_api::Dataset;
use strata_e2e::bed::{command, go::Program};
use strata_e2e::namespace::tool;
use strata_e2e::strata::{apply, ready, reason};
use strata_e2e::{install, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(180);

#[tokio::test]
async fn the_chart_renders_what_kubernetes_knows() {
    with_temp_ns(|context| async move {
        let chart = install::chart();
        command::output(install::helm(&context.bed)?.arg("lint").arg("--strict").arg(&chart))?;
        let folder = tempfile::tempdir()?;
        write_schemas(&context.kubectl(["get", "--raw", "/openapi/v2"]).await?, folder.path())?;
        for settings in [
            &[][..],
            &["watchNamespace=team", "replicas=1", "defaultStorage=pvc://artifacts"],
        ] {
            let mut helm = install::helm(&context.bed)?;
            helm.args(["template", "strata"]).arg(&chart);
            for setting in settings {
                helm.args(["--set", setting]);
            }
            let path = folder.path().join("rendered.yaml");
            std::fs::write(&path, command::output(&mut helm)?)?;
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
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn an_upgrade_restarts_no_run_and_an_uninstall_keeps_resources_and_artifacts() {
    with_temp_ns(|context| async move {
        install::operator(&context.bed, &[])?;
        let raw = context.claim("raw", "1Gi", None).await?.path()?;
        context.claim("artifacts", "1Gi", None).await?;
        std::fs::write(raw.join("text.txt"), "To be, or not to be.\n".repeat(20))?;
        apply(
            &context,
            "apiVersion: strata.dev/v1alpha1\nkind: Dataset\nmetadata: {name: words}\nspec:\n  task: Pretraining\n  \
             storage: {uri: 'pvc://artifacts'}\n  sources:\n  - name: text\n    \
             documents: {uri: 'pvc://raw/text.txt', format: Text}\n",
        )
        .await?;
        let words: Dataset = ready(&context, "words", DEADLINE).await?;
        let before = words.status.context("a status")?;

        // Another image for pods: what is done stays done, under the image that did it.
        install::operator(&context.bed, &["runtimeImage.tag=other"])?;
        leader_changes_hands(&context).await?;
        let after: Dataset = ready(&context, "words", DEADLINE).await?;
        let after = after.status.context("a status")?;
        ensure!(
            after.run == before.run && after.artifact == before.artifact,
            "{after:?}"
        );

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
        apply(
            &context,
            "apiVersion: strata.dev/v1alpha1\nkind: Dataset\nmetadata: {name: words}\nspec:\n  task: Pretraining\n  \
             suspend: true\n  storage: {uri: 'pvc://artifacts'}\n  sources:\n  - name: text\n    \
             documents: {uri: 'pvc://raw/text.txt', format: Text}\n",
        )
        .await?;
        reason::<Dataset>(&context, "words", "Unknown", "Suspended", DEADLINE).await?;
        context
            .kubectl([
                "patch",
                "dataset",
                "words",
                "--type=merge",
                "-p",
                r#"{"spec":{"suspend":false}}"#,
            ])
            .await?;
        let again: Dataset = ready(&context, "words", DEADLINE).await?;
        let again = again.status.context("a status")?;
        ensure!(
            again.artifact == before.artifact,
            "the same content has the same digest: {again:?}"
        );
        Ok(())
    })
    .await;
}

/// A strict JSON schema for each kind of the cluster's OpenAPI document, named as kubeconform looks for it: the cluster
/// itself says what it knows, and nothing is fetched.
fn write_schemas(openapi: &str, folder: &Path) -> Result<()> {
    let mut document: Value = serde_json::from_str(openapi)?;
    let mut definitions = document["definitions"].take();
    let all = definitions.as_object_mut().context("the document has definitions")?;
    let mut kinds = Vec::new();
    for (name, definition) in all.iter_mut() {
        if definition.get("properties").is_some() {
            definition["additionalProperties"] = json!(false);
        }
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

/// Two replicas run and one leads; when it is deleted the other one takes over.
async fn leader_changes_hands(context: &strata_e2e::Context) -> Result<()> {
    let leases: Api<Lease> = Api::namespaced(context.client.clone(), install::NAMESPACE);
    let holder = |lease: Option<&Lease>| lease.and_then(|lease| lease.spec.as_ref()?.holder_identity.clone());
    let lease = leases
        .list(&ListParams::default())
        .await?
        .items
        .pop()
        .context("there is a lease")?;
    let name = lease.name_any();
    let held = |lease: Option<&Lease>| holder(lease).is_some_and(|holder| !holder.is_empty());
    let first = holder(Some(&wait::until(&leases, &name, "is held", DEADLINE, held).await?)).context("a holder")?;
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), install::NAMESPACE);
    let all = pods
        .list(&ListParams::default().labels("app.kubernetes.io/name=strata-operator"))
        .await?
        .items;
    let leader = all
        .iter()
        .find(|pod| first.contains(&pod.name_any()))
        .context("the holder is a pod")?;
    pods.delete(&leader.name_any(), &DeleteParams::default()).await?;
    let other = |lease: Option<&Lease>| holder(lease).is_some_and(|now| !now.is_empty() && now != first);
    wait::until(&leases, &name, "has another holder", Duration::from_secs(60), other)
        .await
        .map(drop)
}
