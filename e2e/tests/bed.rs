//! The bed is a cluster that users would recognise: pods start without root, names resolve, Services answer, volumes
//! bind and fill, and what one user wrote can be counted.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{LogParams, PostParams};
use serde_json::json;
use strata_e2e::audit::{self, Write};
use strata_e2e::bed::{Bed, network::http};
use strata_e2e::image::catalog::{Name, SHELL};
use strata_e2e::{Context, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(60);

/// A pod that restricted namespaces admit: no root, no capabilities, a root file system that cannot be written.
fn pod(name: &str, script: &str) -> Result<Pod> {
    Ok(serde_json::from_value(json!({
        "metadata": { "name": name, "labels": { "app": name } },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{
                "name": "main", "image": SHELL, "command": ["sh", "-c", script],
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"] },
                },
            }],
        },
    }))?)
}

/// Runs `script` to its end and returns what it printed.
async fn run(context: &Context, pod: &Pod) -> Result<String> {
    let name = pod.metadata.name.as_deref().context("the pod has a name")?;
    context.create(pod).await?;
    wait::until(&context.api::<Pod>(), name, "has ended", DEADLINE, wait::pod_has_ended).await?;
    Ok(context.api::<Pod>().logs(name, &LogParams::default()).await?)
}

#[tokio::test]
async fn a_pod_without_root_reaches_a_service_by_its_name() {
    with_temp_ns(|context| async move {
        context.bed.import(&[Name::Shell])?;
        let mut server = pod(
            "hello",
            "echo hello from $(id -u) > /www/index.html && exec httpd -f -p 8080 -h /www",
        )?;
        let spec = server.spec.as_mut().context("the pod has a spec")?;
        spec.volumes = Some(serde_json::from_value(json!([{ "name": "www", "emptyDir": {} }]))?);
        let container = &mut spec.containers[0];
        container.volume_mounts = Some(serde_json::from_value(json!([{ "name": "www", "mountPath": "/www" }]))?);
        container.readiness_probe = Some(serde_json::from_value(
            json!({ "httpGet": { "path": "/", "port": 8080 }, "periodSeconds": 1 }),
        )?);
        context.create(&server).await?;
        let service: k8s_openapi::api::core::v1::Service = serde_json::from_value(json!({
            "metadata": { "name": "hello" },
            "spec": { "selector": { "app": "hello" }, "ports": [{ "port": 80, "targetPort": 8080 }] },
        }))?;
        let service = context.create(&service).await?;
        wait::until(&context.api::<Pod>(), "hello", "is ready", DEADLINE, wait::pod_is_ready).await?;

        let script = "wget -q -O - http://hello; touch /here 2>&1; nslookup nowhere.example 2>&1";
        let said = run(&context, &pod("client", script)?).await?;
        ensure!(said.contains("hello from 65532"), "no answer by name: {said}");
        ensure!(
            said.contains("Read-only file system"),
            "the root file system could be written: {said}"
        );
        ensure!(
            said.contains("NXDOMAIN"),
            "a name outside the cluster is not refused at once: {said}"
        );

        let inside = context.kubectl(["exec", "hello", "--", "id", "-u"]).await?;
        ensure!(inside.trim() == "65532", "exec ran as {inside}");

        let address = service
            .spec
            .and_then(|s| s.cluster_ip)
            .context("the Service has an address")?;
        let from_here = http()?.get(format!("http://{address}")).send().await?.text().await?;
        ensure!(
            from_here.contains("hello from 65532"),
            "the host does not reach the Service: {from_here}"
        );
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_volume_keeps_what_a_pod_wrote_and_a_limited_one_is_full_in_time() {
    with_temp_ns(|context| async move {
        context.bed.import(&[Name::Shell])?;
        let kept = context.claim("kept", "1Gi", None).await?;
        context.claim("small", "8Mi", Some(8 << 20)).await?;
        let script = "echo kept > /kept/file; dd if=/dev/zero of=/small/zeros bs=1M count=32 2>&1; ls -l /small";
        let mut writer = pod("writer", script)?;
        let spec = writer.spec.as_mut().context("the pod has a spec")?;
        spec.volumes = Some(serde_json::from_value(json!([
            { "name": "kept", "persistentVolumeClaim": { "claimName": "kept" } },
            { "name": "small", "persistentVolumeClaim": { "claimName": "small" } },
        ]))?);
        spec.containers[0].volume_mounts = Some(serde_json::from_value(
            json!([{ "name": "kept", "mountPath": "/kept" }, { "name": "small", "mountPath": "/small" }]),
        )?);
        let said = run(&context, &writer).await?;
        ensure!(said.contains("No space left on device"), "8 MiB took 32 MiB: {said}");
        ensure!(std::fs::read_to_string(kept.path()?.join("file"))? == "kept\n");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_pod_with_root_is_refused() {
    with_temp_ns(|context| async move {
        let mut rooted = pod("rooted", "true")?;
        rooted.spec.as_mut().context("the pod has a spec")?.security_context = None;
        let refused = context.create(&rooted).await.map(drop);
        let message = refused.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(
            message.contains("violates PodSecurity \"restricted"),
            "got: {message:?}"
        );
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn the_audit_log_counts_what_one_user_wrote() {
    with_temp_ns(|context| async move {
        let namespace = context.namespace.clone();
        let user = format!("system:serviceaccount:{namespace}:default");
        context
            .kubectl([
                "create",
                "rolebinding",
                "edit",
                "--clusterrole=edit",
                &format!("--serviceaccount={namespace}:default"),
            ])
            .await?;
        let since = audit::mark(&context.bed)?;
        let object: ConfigMap = serde_json::from_value(json!({ "metadata": { "name": "by-admin" } }))?;
        context
            .api::<ConfigMap>()
            .create(&PostParams::default(), &object)
            .await?;
        let act_as = format!("--as={user}");
        context.kubectl(["create", "configmap", "by-pod", &act_as]).await?;
        context.kubectl(["get", "configmaps", &act_as]).await?;
        let writes = audit::writes(&context.bed, &user, since)?;
        let expected = Write {
            verb: "create".into(),
            resource: "configmaps".into(),
            namespace,
            name: "by-pod".into(),
            code: 201,
        };
        ensure!(writes == [expected], "got {writes:?}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn up_leaves_a_healthy_bed_alone() -> Result<()> {
    let bed = Bed::from_env()?;
    let before = bed.init().context("the bed runs")?;
    bed.up().await?;
    ensure!(bed.init() == Some(before), "up started the bed again");
    Ok(())
}

#[tokio::test]
async fn a_failure_shows_what_the_pod_said() {
    with_temp_ns(|context| async move {
        context.bed.import(&[Name::Shell])?;
        run(&context, &pod("failing", "echo the reason; exit 3")?).await?;
        let dump = context.dump().await;
        for part in ["the reason", "\"exitCode\":3", "Scheduled Pod/failing"] {
            ensure!(dump.contains(part), "{part} is missing in:\n{dump}");
        }
        Ok(())
    })
    .await;
}
