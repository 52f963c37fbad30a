//! Containers under the stage contract, on several nodes that begin together, and in queues where they wait for their turn: with
//! the real JobSet and the real Kueue.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use kube::ResourceExt as _;
use kube::api::ListParams;
use strata_api::{Dataset, InferenceService, PretrainJob, RunStatus};
use strata_contract::{Manifest, Uri};
use strata_e2e::bed::network::http;
use strata_e2e::demo::Forward;
use strata_e2e::image::catalog::{Name, SHELL};
use strata_e2e::neighbours::{JOBSET, KUEUE};
use strata_e2e::strata::{apply, condition, metric, ready, reason};
use strata_e2e::{Context, install, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(120);

/// Node 1 greets node 0, which publishes what it was told, and what the data set holds.
const PAIR: &str = r#"
    if [ "$STRATA_NODE_RANK" = 0 ]; then
      nc -l -p 7000 > "$STRATA_OUTPUT_DIR/greeting"
      cp "$STRATA_INPUTS_DIR/corpus/words" "$STRATA_OUTPUT_DIR/words"
      echo '{"metrics": {"bitsPerByte": 2.5}}' > "$STRATA_RESULT_FILE"
    else
      until echo "node $STRATA_NODE_RANK of $STRATA_NODE_COUNT" | nc -w 2 "$STRATA_COORDINATOR_ADDRESS" 7000; do sleep 0.2; done
    fi
"#;

/// Works for ever, until it is asked to stop; then it knows the next time where it was.
const PATIENT: &str = r#"
    if [ -e "$STRATA_STATE_DIR/saved" ]; then cp "$STRATA_STATE_DIR/saved" "$STRATA_OUTPUT_DIR/result"; exit 0; fi
    trap 'echo "as it was" > "$STRATA_STATE_DIR/saved"; exit 75' TERM
    while true; do sleep 0.1; done
"#;

/// Serves the files of the model.
const SERVER: &str = r#"
    mkdir /tmp/www && cp -r "$STRATA_MODEL_PATH/." /tmp/www && echo ok > /tmp/www/health
    echo 'tgi_batch_current_size 8' > /tmp/www/metrics && echo 'tgi_queue_size 40' >> /tmp/www/metrics
    exec httpd -f -p "$STRATA_PORT" -h /tmp/www
"#;

const QUEUES: &str = r#"
apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {name: e2e-urgent}
value: 1000
---
apiVersion: kueue.x-k8s.io/v1beta1
kind: ResourceFlavor
metadata: {name: e2e}
---
apiVersion: kueue.x-k8s.io/v1beta1
kind: ClusterQueue
metadata: {name: e2e}
spec:
  namespaceSelector: {}
  preemption: {withinClusterQueue: LowerPriority}
  resourceGroups:
  - coveredResources: [cpu, memory]
    flavors:
    - name: e2e
      resources: [{name: cpu, nominalQuota: 100m}, {name: memory, nominalQuota: 1Gi}]
"#;

const QUEUE: &str = r#"
apiVersion: kueue.x-k8s.io/v1beta1
kind: LocalQueue
metadata: {name: research}
spec: {clusterQueue: e2e}
"#;

/// A Dataset that a shell script makes, with more fields of its spec.
fn dataset(name: &str, script: &str, more: &str) -> String {
    let script = serde_json::to_string(script).expect("a text is written as JSON");
    format!(
        r#"
apiVersion: strata.dev/v1alpha1
kind: Dataset
metadata: {{name: {name}}}
spec:
  task: Pretraining
  sources: [{{name: a, documents: {{uri: pvc://artifacts/raw.txt, format: Text}}}}]
  encode: {{tokenizer: {{train: {{algorithm: BPE, vocabSize: 512}}}}, sequence: {{lengthTokens: 64}}}}
  storage: {{uri: pvc://artifacts}}
  engine: {{container: {{image: "{SHELL}", command: [sh, -ec], args: [{script}]}}}}
{more}
"#
    )
}

/// A PretrainJob on two nodes.
fn pair(name: &str, more: &str) -> String {
    let script = serde_json::to_string(PAIR).expect("a text is written as JSON");
    format!(
        r#"
apiVersion: strata.dev/v1alpha1
kind: PretrainJob
metadata: {{name: {name}}}
spec:
  datasets: [{{name: corpus}}]
  model: {{llama: {{hiddenSize: 64, layers: 2, heads: 4, contextTokens: 64}}}}
  training: {{tokens: 1000, batchTokens: 64, learningRate: "1e-3"}}
  evaluate: {{gates: [{{metric: bitsPerByte, max: "3"}}]}}
  storage: {{uri: pvc://artifacts}}
  hardware: {{nodeCount: 2}}
  engine: {{container: {{image: "{SHELL}", command: [sh, -ec], args: [{script}], env: [{{name: WHO, value: {name}}}]}}}}
  pod: {{resources: {{requests: {{cpu: 50m, memory: 32Mi}}}}}}
{more}
"#
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_begin_together_and_in_their_turn() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        context.bed.import(&[Name::Shell])?;
        // An interrupted run may have left them.
        leave(&context).await?;
        let artifacts = context.claim("artifacts", "1Gi", None).await?.path()?;

        an_image_that_knows_only_folders_publishes(&context, &artifacts).await?;
        two_nodes_find_each_other_without_jobset(&context, &artifacts).await?;
        a_container_serves_what_was_published(&context).await?;
        KUEUE.install(&context).await?;
        JOBSET.install(&context).await?;
        apply(&context, QUEUES).await?;
        apply(&context, QUEUE).await?;
        the_queue_decides_who_works(&context, &artifacts).await?;
        two_nodes_are_a_jobset_and_wait_as_one(&context, &artifacts).await?;
        leave(&context).await
    })
    .await;
}

/// Takes Kueue and JobSet out again; the queues first, which Kueue holds until nothing uses them.
async fn leave(context: &Context) -> Result<()> {
    let has_kueue = context
        .kubectl(["get", "crd", "clusterqueues.kueue.x-k8s.io"])
        .await
        .is_ok();
    if has_kueue {
        let of_test = [
            "delete",
            "--ignore-not-found",
            "--timeout=60s",
            "localqueues.kueue.x-k8s.io",
            "--all",
        ];
        context.kubectl(of_test).await?;
        let of_cluster = ["clusterqueues.kueue.x-k8s.io/e2e", "resourceflavors.kueue.x-k8s.io/e2e"];
        let delete = ["delete", "--ignore-not-found", "--timeout=60s"];
        context.kubectl(delete.iter().chain(&of_cluster)).await?;
    }
    context
        .kubectl(["delete", "--ignore-not-found", "priorityclass/e2e-urgent"])
        .await?;
    KUEUE.remove(&context.bed)?;
    JOBSET.remove(&context.bed)
}

async fn an_image_that_knows_only_folders_publishes(context: &Context, artifacts: &Path) -> Result<()> {
    let script = r#"echo "to be" > "$STRATA_OUTPUT_DIR/words"; echo '{"message": "made by a shell", "metrics": {"documents": 1}}' > "$STRATA_RESULT_FILE""#;
    apply(context, &dataset("corpus", script, "")).await?;
    let corpus: Dataset = ready(context, "corpus", DEADLINE).await?;
    let status = corpus.status.as_ref().context("a status")?;
    ensure!(
        (metric(status, "documents")? - 1.0).abs() < f64::EPSILON,
        "{:?}",
        status.metrics
    );
    let said = condition(&corpus, "Succeeded").context("a condition")?;
    ensure!(said.2 == "made by a shell", "{said:?}");
    ensure!(
        file(artifacts, status, "words")? == "to be\n",
        "what was written is published"
    );

    let bad = r#"echo '{"failure": "InputCorrupt", "message": "these are no words"}' > "$STRATA_RESULT_FILE"; exit 64"#;
    apply(context, &dataset("bad", bad, "")).await?;
    let message = reason::<Dataset>(context, "bad", "False", "InputCorrupt", DEADLINE).await?;
    ensure!(message.contains("these are no words"), "{message}");
    Ok(())
}

async fn two_nodes_find_each_other_without_jobset(context: &Context, artifacts: &Path) -> Result<()> {
    apply(context, &pair("pair", "")).await?;
    let pair: PretrainJob = ready(context, "pair", DEADLINE).await?;
    let status = pair.status.as_ref().context("a status")?;
    let job = status.run.as_ref().and_then(|run| run.job.clone()).context("a Job")?;
    let job = context.api::<Job>().get(&job).await?;
    let spec = job.spec.context("a spec")?;
    ensure!(
        spec.completion_mode.as_deref() == Some("Indexed") && spec.completions == Some(2),
        "{spec:?}"
    );
    greeted(artifacts, status)
}

fn greeted(artifacts: &Path, status: &RunStatus) -> Result<()> {
    let greeting = file(artifacts, status, "greeting")?;
    ensure!(greeting == "node 1 of 2\n", "node 0 was told {greeting:?}");
    let words = file(artifacts, status, "words")?;
    ensure!(words == "to be\n", "node 0 read {words:?}");
    Ok(())
}

async fn a_container_serves_what_was_published(context: &Context) -> Result<()> {
    let script = serde_json::to_string(SERVER)?;
    let service = format!(
        r#"
apiVersion: strata.dev/v1alpha1
kind: InferenceService
metadata: {{name: pair}}
spec:
  model: {{pretrainJob: {{name: pair}}}}
  engine: {{container: {{image: "{SHELL}", command: [sh, -ec], args: [{script}]}}}}
  autoscale: {{maxReplicas: 2, targets: {{waitingRequests: 4}}}}
  drain: 1s
"#
    );
    apply(context, &service).await?;
    let service: InferenceService = ready(context, "pair", DEADLINE).await?;
    let status = service.status.context("a status")?;
    let served = status.run_status.artifact.context("an artifact")?;
    ensure!(
        status.serving_digest.as_ref() == Some(&served.digest),
        "{:?}",
        status.serving_digest
    );
    let model: PretrainJob = ready(context, "pair", DEADLINE).await?;
    let made = model.status.and_then(|status| status.artifact).context("an artifact")?;
    ensure!(
        made.digest == served.digest,
        "what is served is what was made, without a step between"
    );
    let forward = Forward::start(context.bed.kubectl(), &context.namespace, "pair").await?;
    let answer = http()?
        .get(format!("{}/greeting", forward.url()))
        .send()
        .await?
        .text()
        .await?;
    ensure!(answer == "node 1 of 2\n", "the server answers {answer:?}");
    // It says of itself, in another server's words, that more wait than should.
    let has_grown = |service: Option<&InferenceService>| {
        let status = service.and_then(|service| service.status.as_ref());
        status.is_some_and(|status| {
            let change = status.scaling_history.first();
            let why = change.is_some_and(|change| change.to == 2 && change.message.contains("the queue"));
            why && status.ready_replicas == Some(2)
        })
    };
    wait::until(
        &context.api(),
        "pair",
        "has two pods, for its queue",
        DEADLINE,
        has_grown,
    )
    .await?;
    context
        .kubectl(["delete", "inferenceservice/pair", "--wait=false"])
        .await
        .map(drop)
}

/// There is room for one. It works until somebody more urgent comes, waits, and goes on from where it was.
async fn the_queue_decides_who_works(context: &Context, artifacts: &Path) -> Result<()> {
    let queued = "  scheduler: {kubernetes: {queue: research}}\n";
    let sized = "  pod: {resources: {requests: {cpu: 100m, memory: 32Mi}}}\n";
    let urgent = "  pod: {priorityClassName: e2e-urgent, resources: {requests: {cpu: 100m, memory: 32Mi}}}\n";
    apply(context, &dataset("patient", PATIENT, &format!("{queued}{sized}"))).await?;
    reason::<Dataset>(context, "patient", "Unknown", "Running", DEADLINE).await?;

    let quick = r#"echo x > "$STRATA_OUTPUT_DIR/x""#;
    apply(context, &dataset("next", quick, &format!("{queued}{sized}"))).await?;
    let said = reason::<Dataset>(context, "next", "Unknown", "Queued", DEADLINE);
    let message = said.await?;
    ensure!(message.starts_with("in queue research: "), "{message}");
    // Kueue's own words come with the next look, where it had none at the first.
    wait::poll("Kueue's words are quoted", DEADLINE, || async {
        let next = context.api::<Dataset>().get("next").await?;
        let said = condition(&next, "Ready")
            .map(|(_, _, message)| message)
            .unwrap_or_default();
        Ok(said.contains("insufficient unused quota for cpu").then_some(()))
    })
    .await?;
    // Whoever stops it takes it out of the queue.
    context
        .kubectl([
            "patch",
            "dataset/next",
            "--type=merge",
            "-p",
            r#"{"spec": {"suspend": true}}"#,
        ])
        .await?;
    reason::<Dataset>(context, "next", "Unknown", "Suspended", DEADLINE).await?;

    // Long enough for the other's status to be seen.
    let script = r#"sleep 3; echo x > "$STRATA_OUTPUT_DIR/x""#;
    apply(context, &dataset("urgent", script, &format!("{queued}{urgent}"))).await?;
    let message = reason::<Dataset>(context, "patient", "Unknown", "Preempted", DEADLINE).await?;
    ensure!(
        message.contains("in queue research: Preempted: Preempted to accommodate"),
        "{message}"
    );
    ready::<Dataset>(context, "urgent", DEADLINE).await?;
    let patient: Dataset = ready(context, "patient", DEADLINE).await?;
    let status = patient.status.as_ref().context("a status")?;
    ensure!(
        file(artifacts, status, "result")? == "as it was\n",
        "it went on from what it saved"
    );
    let run = status.run.as_ref().context("a run")?;
    ensure!(run.failures == 0, "a lost place is no failure: {run:?}");

    context
        .kubectl([
            "patch",
            "dataset/next",
            "--type=merge",
            "-p",
            r#"{"spec": {"suspend": false}}"#,
        ])
        .await?;
    ready::<Dataset>(context, "next", DEADLINE).await.map(drop)
}

async fn two_nodes_are_a_jobset_and_wait_as_one(context: &Context, artifacts: &Path) -> Result<()> {
    apply(
        context,
        &pair("twins", "  scheduler: {kubernetes: {queue: research}}\n"),
    )
    .await?;
    let twins: PretrainJob = ready(context, "twins", DEADLINE).await?;
    let status = twins.status.as_ref().context("a status")?;
    let name = status
        .run
        .as_ref()
        .and_then(|run| run.job.clone())
        .context("an attempt")?;
    let jobset = context
        .kubectl(["get", "jobset", &name, "-o", "jsonpath={.spec.suspend}"])
        .await?;
    ensure!(jobset == "false", "Kueue let it begin: {jobset:?}");
    let members = context
        .api::<Job>()
        .list(&ListParams::default().labels("strata.dev/name=twins"))
        .await?;
    ensure!(
        members
            .iter()
            .all(|job| job.owner_references().iter().any(|owner| owner.kind == "JobSet")),
        "its Job belongs to the JobSet"
    );
    let workloads = context
        .kubectl([
            "get",
            "workloads.kueue.x-k8s.io",
            "-o",
            "jsonpath={.items[*].metadata.ownerReferences[*].kind}",
        ])
        .await?;
    ensure!(workloads.contains("JobSet"), "it waited as a whole: {workloads}");
    greeted(artifacts, status)
}

/// A file of what a status says was published.
fn file(artifacts: &Path, status: &RunStatus, name: &str) -> Result<String> {
    let artifact = status.artifact.as_ref().context("an artifact")?;
    let uri: Uri = artifact.uri.parse()?;
    let Uri::Pvc { path, .. } = uri else {
        anyhow::bail!("{uri} is in no claim");
    };
    let run = artifacts.join(path);
    let manifest: Manifest = serde_json::from_str(&std::fs::read_to_string(run.join("manifest.json"))?)?;
    let path = run.join(&manifest.publication.content_path).join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}
