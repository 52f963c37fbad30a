//! Nodes that are not there: kwok answers for them, so that a thousand cost one process.
//!
//! Pods on them run, and those of Jobs end well with a termination message; nothing is computed.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use crate::bed::Bed;
use crate::bed::go::{self, Program};
use crate::bed::process::Owned;
use crate::wait;

/// Label of the nodes that kwok plays; pods that are to run there select it.
pub const LABEL: (&str, &str) = ("strata.dev/fake", "true");
/// Taint on them, so that no other pod comes there.
pub const TAINT: &str = "strata.dev/fake";

/// Requests at a time when many objects are made.
pub const CONCURRENCY: usize = 32;

/// A running kwok. It ends with this value.
pub struct Fleet(Owned);

impl Fleet {
    /// Starts kwok on `bed`. Pods of Jobs end after `seconds`, and leave `message`.
    ///
    /// # Errors
    /// kwok cannot be compiled or started.
    pub fn start(bed: &Bed, seconds: u32, message: &str) -> Result<Self> {
        go::build(&go::FLEET)?;
        let stages = bed.state().join("kwok.yaml");
        fs::write(&stages, self::stages(seconds, message, bed.slot().host_address()))?;
        let log = File::create(bed.state().join("log/kwok.log"))?;
        let mut kwok = Command::new(go::path(Program::Kwok));
        kwok.args(["--config", &stages.display().to_string()])
            .args(["--kubeconfig", &bed.kubeconfig().display().to_string()])
            .arg(format!("--manage-nodes-with-label-selector={}={}", LABEL.0, LABEL.1))
            // No leases, which would be 33 writes a second for 1,000 nodes: the bed does not miss them.
            .arg("--node-lease-duration-seconds=0")
            .env("NO_PROXY", "*")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(Self(Owned::start(&mut kwok).context("kwok does not start")?))
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// It has ended.
    pub fn check(&mut self) -> Result<()> {
        let ended = self.0.0.try_wait()?;
        ensure!(
            ended.is_none(),
            "kwok ended: {ended:?}; its log is log/kwok.log of the bed"
        );
        Ok(())
    }
}

/// Makes `count` nodes and waits until all are ready.
///
/// # Errors
/// The server refuses one, or kwok does not make them ready in time.
pub async fn add_nodes(client: &Client, count: usize) -> Result<()> {
    let api = Api::<Node>::all(client.clone());
    let nodes = (0..count).map(node).collect::<Result<Vec<_>>>()?;
    stream::iter(nodes)
        .map(|node| {
            let api = api.clone();
            async move { api.create(&PostParams::default(), &node).await }
        })
        .buffer_unordered(CONCURRENCY)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let ours = ListParams::default().labels(&format!("{}={}", LABEL.0, LABEL.1));
    wait::poll("the nodes are ready", std::time::Duration::from_secs(180), || async {
        let nodes = api.list(&ours).await?;
        let usable = |node: &&Node| {
            let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
            wait::node_is_ready(Some(node)) && taints.into_iter().all(|taint| taint.key == TAINT)
        };
        Ok((nodes.iter().filter(usable).count() == count).then_some(()))
    })
    .await
}

fn node(number: usize) -> Result<Node> {
    let name = format!("fake-{number:04}");
    let room = json!({"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "110"});
    Ok(serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {
            LABEL.0: LABEL.1, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        }},
        "spec": {"taints": [{"key": TAINT, "value": "true", "effect": "NoSchedule"}]},
        "status": {"capacity": room, "allocatable": room},
    }))?)
}

/// What becomes of nodes and pods. All pods have the same address, on this machine: whoever asks one asks there.
fn stages(seconds: u32, message: &str, address: Ipv4Addr) -> String {
    // In YAML's single quotes, a quote is written twice.
    let message = message.replace('\'', "''");
    format!(
        r#"apiVersion: config.kwok.x-k8s.io/v1alpha1
kind: KwokConfiguration
options:
  # The 4 that are usual wait for a busy server most of the time. Without the others, which are the usual ones, kwok has none.
  podPlayStageParallelism: 32
  nodePlayStageParallelism: 4
  nodeLeaseParallelism: 4
  podsOnNodeSyncParallelism: 4
  cidr: 10.0.0.0/24
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: node-ready}}
spec:
  resourceRef: {{apiGroup: v1, kind: Node}}
  selector:
    matchExpressions:
    - {{key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}}
  next:
    statusTemplate: |
      conditions:
      - type: Ready
        status: "True"
        reason: KubeletReady
        message: a node that is not there
        lastHeartbeatTime: {{{{ Now | Quote }}}}
        lastTransitionTime: {{{{ Now | Quote }}}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: pod-runs}}
spec:
  resourceRef: {{apiGroup: v1, kind: Pod}}
  selector:
    matchExpressions:
    - {{key: .metadata.deletionTimestamp, operator: DoesNotExist}}
    - {{key: .status.phase, operator: In, values: [Pending]}}
  next:
    statusTemplate: |
      phase: Running
      podIP: {address}
      startTime: {{{{ Now | Quote }}}}
      conditions:
      {{{{ range $type := list "Initialized" "Ready" "ContainersReady" }}}}
      - {{type: {{{{ $type }}}}, status: "True", lastTransitionTime: {{{{ Now | Quote }}}}}}
      {{{{ end }}}}
      containerStatuses:
      {{{{ range .spec.containers }}}}
      - name: {{{{ .name | Quote }}}}
        image: {{{{ .image | Quote }}}}
        imageID: ""
        ready: true
        started: true
        restartCount: 0
        state: {{running: {{startedAt: {{{{ Now | Quote }}}}}}}}
      {{{{ end }}}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: pod-ends}}
spec:
  resourceRef: {{apiGroup: v1, kind: Pod}}
  selector:
    matchExpressions:
    - {{key: .metadata.deletionTimestamp, operator: DoesNotExist}}
    - {{key: .status.phase, operator: In, values: [Running]}}
    - {{key: '.metadata.ownerReferences.[].kind', operator: In, values: [Job]}}
  delay: {{durationMilliseconds: {milliseconds}}}
  next:
    statusTemplate: |
      phase: Succeeded
      containerStatuses:
      {{{{ range .spec.containers }}}}
      - name: {{{{ .name | Quote }}}}
        image: {{{{ .image | Quote }}}}
        imageID: ""
        ready: false
        started: false
        restartCount: 0
        state:
          terminated:
            exitCode: 0
            reason: Completed
            startedAt: {{{{ Now | Quote }}}}
            finishedAt: {{{{ Now | Quote }}}}
            message: '{message}'
      {{{{ end }}}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: pod-goes}}
spec:
  resourceRef: {{apiGroup: v1, kind: Pod}}
  selector:
    matchExpressions:
    - {{key: .metadata.deletionTimestamp, operator: Exists}}
  next: {{delete: true}}
"#,
        milliseconds = u64::from(seconds) * 1000,
    )
}
