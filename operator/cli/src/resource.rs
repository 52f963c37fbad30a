//! The four kinds as the commands show them: named as kubectl names them, read at one moment, reduced to what is shown.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};
use futures::try_join;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use strata_api::{AlignmentJob, Dataset, InferenceService, InputStatus, PretrainJob, ProgressStatus, RunInfo};
use strata_operator::engine::kind::{Kind, Ref, ResourceKind, Status as _};

use crate::cluster::{Connection, explain};

/// What a kind is called, besides its name: plural and short name, as `kubectl get` takes them.
const WORDS: [(ResourceKind, &[&str]); 4] = [
    (ResourceKind::Dataset, &["dataset", "datasets", "dset"]),
    (ResourceKind::PretrainJob, &["pretrainjob", "pretrainjobs", "pj"]),
    (ResourceKind::AlignmentJob, &["alignmentjob", "alignmentjobs", "aj"]),
    (
        ResourceKind::InferenceService,
        &["inferenceservice", "inferenceservices", "isvc"],
    ),
];
/// Objects that a list answers with at once.
const PAGE: u32 = 500;

/// A resource as a user names it: `KIND/NAME`, also as `kubectl get -o name` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named(pub Ref);

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let remedy = "write KIND/NAME, as alignmentjob/assistant";
        let (kind, name) = text
            .split_once('/')
            .ok_or_else(|| format!("no kind in {text:?}: {remedy}"))?;
        let word = kind.to_lowercase();
        let word = word.strip_suffix(".strata.dev").unwrap_or(&word);
        let Some((kind, _)) = WORDS.iter().find(|(_, words)| words.contains(&word)) else {
            let kinds = ResourceKind::ALL.map(ResourceKind::name).join(", ");
            return Err(format!("{kind} is none of {kinds}: {remedy}"));
        };
        if name.is_empty() {
            return Err(format!("no name in {text:?}: {remedy}"));
        }
        Ok(Self(Ref {
            kind: *kind,
            name: name.to_owned(),
        }))
    }
}

/// The verdict of the Ready condition about the present spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Ready {
    /// Done or serving.
    True,
    /// It goes on by itself, waits, or is suspended.
    Unknown,
    /// It needs a person.
    False,
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::True => "True",
            Self::Unknown => "Unknown",
            Self::False => "False",
        })
    }
}

/// A resource, reduced to what is shown of it.
#[derive(Clone, Debug)]
pub struct Item {
    /// The Ready condition.
    pub ready: Ready,
    /// Its reason; empty while there is none.
    pub reason: String,
    /// Its message.
    pub message: String,
    /// Whether the inputs of the present spec are all there.
    pub has_inputs: bool,
    /// How far the running attempt is.
    pub progress: Option<ProgressStatus>,
    /// Of an InferenceService: pods that answer, and all.
    pub replicas: Option<(i32, i32)>,
    /// Digest of what it published last.
    pub digest: Option<String>,
    /// What that was made from.
    pub inputs: Vec<InputStatus>,
    /// The run under way, or the last.
    pub run: Option<RunInfo>,
    /// What the spec refers to.
    pub refs: Vec<Ref>,
}

/// The resources of a namespace at one moment.
pub type Snapshot = BTreeMap<Ref, Item>;

/// Reads all four kinds.
pub async fn snapshot(connection: &Connection) -> Result<Snapshot> {
    let (datasets, pretrain_jobs, alignment_jobs, services) = try_join!(
        list::<Dataset>(connection),
        list::<PretrainJob>(connection),
        list::<AlignmentJob>(connection),
        list::<InferenceService>(connection),
    )?;
    let mut all = Snapshot::new();
    all.extend(datasets.iter().map(item));
    all.extend(pretrain_jobs.iter().map(item));
    all.extend(alignment_jobs.iter().map(item));
    all.extend(services.iter().map(|service| {
        let (name, mut shown) = item(service);
        let counts = service.status.as_ref();
        let count = |of: fn(&strata_api::InferenceServiceStatus) -> Option<i32>| counts.and_then(of).unwrap_or(0);
        shown.replicas = Some((count(|status| status.ready_replicas), count(|status| status.replicas)));
        (name, shown)
    }));
    Ok(all)
}

/// The resource called `name`, or what to do where there is none.
pub fn find<'a>(all: &'a Snapshot, name: &Ref, namespace: &str) -> Result<&'a Item> {
    let Some(item) = all.get(name) else {
        let same: Vec<String> = all
            .keys()
            .filter(|other| other.kind == name.kind)
            .map(ToString::to_string)
            .collect();
        let there = match same.is_empty() {
            true => format!(
                "there is no {} at all; `kubectl get strata --all-namespaces` lists everything",
                name.kind.name()
            ),
            false => format!("there is {}", same.join(", ")),
        };
        bail!("namespace {namespace} has no {name}: {there}");
    };
    Ok(item)
}

async fn list<K: Kind>(connection: &Connection) -> Result<Vec<K>> {
    let api: Api<K> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let mut all = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let what = || format!("list the {}s of namespace {}", K::KIND.name(), connection.namespace);
        let answer = api.list(&page).await.map_err(|error| explain(error, &what()))?;
        let next = answer.metadata.continue_.clone().filter(|token| !token.is_empty());
        all.extend(answer.items);
        let Some(token) = next else { return Ok(all) };
        page = page.continue_token(&token);
    }
}

fn item<K: Kind>(resource: &K) -> (Ref, Item) {
    let name = Ref {
        kind: K::KIND,
        name: resource.name_any(),
    };
    let known = resource
        .status()
        .map(|status| status.run_status().clone())
        .unwrap_or_default();
    // What is said about an older spec is no verdict on this one.
    let current = known.observed_generation == resource.meta().generation;
    let condition = |kind: &str| {
        known
            .conditions
            .iter()
            .find(|condition| current && condition.type_ == kind)
    };
    let ready = condition("Ready");
    let verdict = match ready.map(|condition| condition.status.as_str()) {
        Some("True") => Ready::True,
        Some("False") => Ready::False,
        _ => Ready::Unknown,
    };
    let silent = match resource.status() {
        None => "the operator has not seen it yet: `kubectl -n strata-system get pods` shows whether there is one",
        Some(_) => "the operator has not seen this spec yet",
    };
    let item = Item {
        ready: verdict,
        reason: ready.map(|condition| condition.reason.clone()).unwrap_or_default(),
        message: ready.map_or_else(|| silent.to_owned(), |condition| condition.message.clone()),
        has_inputs: condition("InputsReady").is_some_and(|condition| condition.status == "True"),
        progress: known.progress,
        replicas: None,
        digest: known.artifact.map(|artifact| artifact.digest),
        inputs: known.inputs,
        run: known.run,
        refs: resource.refs(),
    };
    (name, item)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A resource of a table: ready, reason and what it refers to.
    pub(crate) fn row(name: &str, ready: Ready, reason: &str, digest: Option<&str>, refs: &[&str]) -> (Ref, Item) {
        let read = |text: &str| text.parse::<Named>().expect("KIND/NAME").0;
        let item = Item {
            ready,
            reason: reason.into(),
            message: format!("{reason} it is"),
            has_inputs: reason != "WaitingForInput" && reason != "ReferenceNotFound",
            progress: None,
            replicas: None,
            digest: digest.map(Into::into),
            inputs: Vec::new(),
            run: None,
            refs: refs.iter().map(|text| read(text)).collect(),
        };
        (read(name), item)
    }

    #[test]
    fn resources_are_named_as_kubectl_names_them() {
        for text in [
            "InferenceService/chat",
            "inferenceservice/chat",
            "isvc/chat",
            "inferenceservices/chat",
            "inferenceservice.strata.dev/chat",
        ] {
            let named: Named = text.parse().unwrap();
            assert_eq!(named.0.to_string(), "InferenceService/chat", "{text}");
        }
        for (text, word) in [
            ("chat", "KIND/NAME"),
            ("pod/chat", "InferenceService"),
            ("isvc/", "no name"),
        ] {
            let said = text.parse::<Named>().unwrap_err();
            assert!(said.contains(word), "{text}: {said}");
        }
    }

    #[test]
    fn what_was_said_about_an_older_spec_is_no_verdict() {
        let read = |generation: i64| {
            let object = serde_json::json!({
                "apiVersion": "strata.dev/v1alpha1", "kind": "PretrainJob",
                "metadata": {"name": "base", "generation": generation},
                "spec": {"datasets": [{"name": "words"}], "training": {"tokens": 1, "batchTokens": 1, "learningRate": "1"},
                         "model": {"llama": {"hiddenSize": 32, "layers": 1, "heads": 2, "contextTokens": 32}}},
                "status": {"observedGeneration": 2, "conditions": [{"type": "Ready", "status": "True", "reason": "Published",
                           "message": "done", "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
            });
            let job: PretrainJob = serde_json::from_value(object).unwrap();
            item(&job).1
        };
        assert_eq!((read(2).ready, read(2).reason.as_str()), (Ready::True, "Published"));
        assert_eq!((read(3).ready, read(3).reason.as_str()), (Ready::Unknown, ""));
        assert_eq!(read(2).refs[0].to_string(), "Dataset/words");
    }
}
