//! The words of a test about Strata's resources: wait for a reason, read a status, ask the endpoint.

use std::fmt::Debug;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::Resource;
use kube::core::NamespaceResourceScope;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob, RunStatus};

use crate::bed::{Bed, command};
use crate::image::catalog;
use crate::{Context, wait};

/// What the four kinds have in common to a test.
pub trait Kind:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// The status about its run.
    fn run_status(&self) -> Option<&RunStatus>;
}

macro_rules! kinds {
    ($($kind:ty => $field:expr,)*) => {
        $(impl Kind for $kind {
            fn run_status(&self) -> Option<&RunStatus> {
                self.status.as_ref().map($field)
            }
        })*
    };
}

kinds! {
    Dataset => |status| status,
    PretrainJob => |status| status,
    AlignmentJob => |status| status,
    InferenceService => |status| &status.run_status,
}

/// Status, reason and message of a condition.
#[must_use]
pub fn condition<K: Kind>(object: &K, kind: &str) -> Option<(String, String, String)> {
    let condition = object
        .run_status()?
        .conditions
        .iter()
        .find(|condition| condition.type_ == kind)?;
    Some((
        condition.status.clone(),
        condition.reason.clone(),
        condition.message.clone(),
    ))
}

/// Waits until `name` is ready in its current generation; ends at once when it needs a person instead.
///
/// # Errors
/// It is not ready in time, or never will be; the message says what its condition says.
pub async fn ready<K: Kind>(context: &Context, name: &str, deadline: Duration) -> Result<K> {
    let settled = |object: Option<&K>| {
        object.is_some_and(|object| {
            let current = object.run_status().and_then(|status| status.observed_generation) == object.meta().generation;
            current && condition(object, "Ready").is_some_and(|(status, ..)| status != "Unknown")
        })
    };
    let object = wait::until(&context.api::<K>(), name, "is ready", deadline, settled).await?;
    let (status, reason, message) = condition(&object, "Ready").context("it has a condition")?;
    ensure!(
        status == "True",
        "{} {name} needs a person: {reason}: {message}",
        K::kind(&())
    );
    Ok(object)
}

/// Waits until the `Ready` condition of `name` has the status and the reason; returns its message.
///
/// # Errors
/// It does not in time.
pub async fn reason<K: Kind>(
    context: &Context,
    name: &str,
    status: &str,
    reason: &str,
    deadline: Duration,
) -> Result<String> {
    let has = |object: Option<&K>| {
        object
            .and_then(|object| condition(object, "Ready"))
            .is_some_and(|(s, r, _)| s == status && r == reason)
    };
    let what = format!("is {status} for {reason}");
    let object = wait::until(&context.api::<K>(), name, &what, deadline, has).await?;
    Ok(condition(&object, "Ready")
        .map(|(_, _, message)| message)
        .unwrap_or_default())
}

/// The figure `name` of a status.
///
/// # Errors
/// There is no such figure.
pub fn metric(status: &RunStatus, name: &str) -> Result<f64> {
    let text = status
        .metrics
        .get(name)
        .with_context(|| format!("no metric {name} in {:?}", status.metrics))?;
    text.parse().with_context(|| format!("metric {name} is {text:?}"))
}

/// `strata`, as a user of `bed` runs it.
///
/// # Errors
/// It was not compiled.
pub fn program(bed: &Bed) -> Result<Command> {
    let mut strata = Command::new(catalog::ours("strata")?);
    strata.env("KUBECONFIG", bed.kubeconfig()).env("NO_PROXY", "*");
    Ok(strata)
}

/// What `strata ARGUMENTS` prints in the test's namespace.
///
/// # Errors
/// It failed; the message holds what it said.
pub async fn run(context: &Context, arguments: &[&str]) -> Result<String> {
    let mut strata = program(&context.bed)?;
    strata.args(arguments).args(["--namespace", &context.namespace]);
    tokio::task::spawn_blocking(move || command::output(&mut strata)).await?
}

/// Objects of a kind in the test's namespace, applied from YAML as a user does.
///
/// # Errors
/// The server refuses it.
pub async fn apply(context: &Context, yaml: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("manifest.yaml");
    std::fs::write(&path, yaml)?;
    context
        .kubectl(["apply", "--server-side", "-f", &path.display().to_string()])
        .await
        .map(drop)
}
