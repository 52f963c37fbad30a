//! A namespace for one test: random name, restricted pods, static volumes, everything dumped when the test fails, and
//! everything gone after it.

use std::ffi::OsStr;
use std::future::Future;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod, ServiceAccount};
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use rand::Rng;
use rand::distr::Alphanumeric;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strata_api::InferenceService;
use tokio::sync::OnceCell;

use crate::bed::Bed;
use crate::bed::command::{self, say};
use crate::bed::go::{self, Program};
use crate::bed::volume::Volume;
use crate::{dump, wait};

/// How long the namespace may take to come and to go; pods get 30 s to end.
const DEADLINE: Duration = Duration::from_secs(90);

/// How the names of test namespaces begin.
const PREFIX: &str = "e2e-";

/// What a test works with.
#[derive(Clone)]
pub struct Context {
    /// The cluster.
    pub bed: Bed,
    /// A client with all rights.
    pub client: Client,
    /// The test's own namespace.
    pub namespace: String,
    volumes: Arc<Mutex<Vec<Volume>>>,
}

/// Runs `test` in a namespace of its own, on the bed that `STRATA_E2E` names.
///
/// # Panics
/// The test failed or panicked; what was in the namespace is on standard error. Or there is no bed.
pub async fn with_temp_ns<F, Fut>(test: F)
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = Result<()>> + Send + 'static,
{
    let context = Context::begin().await.unwrap_or_else(|error| panic!("{error:#}"));
    // A task of its own, so that a panic in the test does not skip the dump.
    let outcome = tokio::spawn(test(context.clone())).await;
    let passed = matches!(outcome, Ok(Ok(())));
    if !passed {
        // The test harness shows what is printed only for a test that failed.
        eprintln!("{}", context.dump().await);
    }
    let removed = context.end().await;
    match outcome {
        Ok(Ok(())) => removed.unwrap_or_else(|error| panic!("the test passed, but left something: {error:#}")),
        Ok(Err(error)) => panic!("{error:#}"),
        Err(join) => std::panic::resume_unwind(join.into_panic()),
    }
}

impl Context {
    async fn begin() -> Result<Self> {
        let bed = Bed::from_env()?;
        let client = bed.client().await?;
        static CLEAN: OnceCell<()> = OnceCell::const_new();
        CLEAN.get_or_try_init(|| remove_left_over(&client)).await?;
        let random: String = rand::rng().sample_iter(Alphanumeric).take(6).map(char::from).collect();
        let name = format!("{PREFIX}{}", random.to_lowercase());
        let namespace = Namespace {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some([("pod-security.kubernetes.io/enforce".to_owned(), "restricted".to_owned())].into()),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        };
        Api::all(client.clone())
            .create(&PostParams::default(), &namespace)
            .await?;
        let context = Self {
            bed,
            client,
            namespace: name,
            volumes: Arc::default(),
        };
        // Until it is there, pods are refused.
        wait::until(&context.api::<ServiceAccount>(), "default", "exists", DEADLINE, |_| {
            true
        })
        .await?;
        Ok(context)
    }

    /// The objects of a kind in this namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates `object` in this namespace.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn create<K>(&self, object: &K) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        Ok(self.api().create(&PostParams::default(), object).await?)
    }

    /// A volume for the claim `claim`, which may come later (from a manifest, or from the operator).
    ///
    /// # Errors
    /// As [`Volume::create`].
    pub async fn volume(&self, claim: &str, capacity: &str, limit_bytes: Option<u64>) -> Result<Volume> {
        let volume = Volume::create(&self.bed, &self.client, (&self.namespace, claim), capacity, limit_bytes).await?;
        self.volumes
            .lock()
            .expect("no thread panics with the list in hand")
            .push(volume.clone());
        Ok(volume)
    }

    /// A claim with its volume, bound.
    ///
    /// # Errors
    /// As [`Volume::create`], or the claim is not bound in time.
    pub async fn claim(&self, claim: &str, capacity: &str, limit_bytes: Option<u64>) -> Result<Volume> {
        let volume = self.volume(claim, capacity, limit_bytes).await?;
        self.create(&volume.claim()).await?;
        let bound = |claim: Option<&PersistentVolumeClaim>| {
            claim.and_then(|c| c.status.as_ref()).and_then(|s| s.phase.as_deref()) == Some("Bound")
        };
        wait::until(&self.api(), claim, "is bound", DEADLINE, bound).await?;
        Ok(volume)
    }

    /// `kubectl ARGUMENTS` in this namespace; returns standard output.
    ///
    /// # Errors
    /// It failed; the message holds what it said.
    pub async fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        self.run(
            self.bed
                .kubectl()
                .args(["--namespace", &self.namespace])
                .args(arguments),
        )
        .await
    }

    /// Events, pods with their logs and our custom resources, as text: what a failed test prints.
    pub async fn dump(&self) -> String {
        dump::namespace(&self.client, &self.namespace).await
    }

    async fn run(&self, command: &mut Command) -> Result<String> {
        let line = format!("{command:?}");
        command.stdin(Stdio::null());
        let mut owned = Command::new(command.get_program());
        std::mem::swap(&mut owned, command);
        let run = tokio::process::Command::from(owned)
            .output()
            .await
            .with_context(|| format!("cannot run {line}"))?;
        if !run.status.success() {
            bail!(
                "{line} failed ({}):\n{}",
                run.status,
                command::tail(&String::from_utf8_lossy(&run.stderr), 30)
            );
        }
        Ok(String::from_utf8(run.stdout)?)
    }

    async fn end(&self) -> Result<()> {
        remove(&self.client, &self.namespace).await?;
        let volumes = std::mem::take(&mut *self.volumes.lock().expect("no thread panics with the list in hand"));
        for volume in volumes {
            volume.remove(&self.client).await?;
        }
        Ok(())
    }
}

/// Removes a namespace. Services go first: while there is a pod that may take minutes to end, Kubernetes looks again only after
/// half of them, however soon the pod is gone.
async fn remove(client: &Client, namespace: &str) -> Result<()> {
    let services: Api<InferenceService> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams::default();
    match services.delete_collection(&params, &ListParams::default()).await {
        // The kind is not installed.
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        answer => drop(answer?),
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let serving = ListParams::default().labels("app.kubernetes.io/component=serve");
    wait::poll("the serving pods are gone", DEADLINE, || async {
        Ok(pods.list(&serving).await?.items.is_empty().then_some(()))
    })
    .await?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    namespaces.delete(namespace, &params).await?;
    wait::until_gone(&namespaces, namespace, DEADLINE).await
}

/// Removes the namespaces of an interrupted run, whose pods would compete with this one's. A bed has one suite at a time,
/// and its test programs run one after the other: before the first test of this one, all there are is left over.
async fn remove_left_over(client: &Client) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let all = namespaces.list(&ListParams::default()).await?;
    for namespace in all
        .iter()
        .map(ResourceExt::name_any)
        .filter(|name| name.starts_with(PREFIX))
    {
        say(format_args!("removing {namespace}, left over from an interrupted run"));
        remove(client, &namespace).await?;
    }
    Ok(())
}

/// Where a tool of the tests lies.
///
/// # Errors
/// It was not compiled yet.
pub fn tool(program: Program) -> Result<impl AsRef<OsStr> + AsRef<Path>> {
    let path = go::path(program);
    if !path.exists() {
        bail!("{} is missing: `bed build --tools` compiles it", path.display());
    }
    Ok(path)
}
