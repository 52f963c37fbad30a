//! What the operator is to look after: copies of the samples in several namespaces, on claims that are always there.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim};
use kube::api::PostParams;
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};

use crate::fleet::{CONCURRENCY, LABEL, TAINT};
use crate::strata::{Kind, condition};
use crate::{install, wait};

/// Namespaces of the resources.
const NAMESPACES: usize = 10;
/// Namespace of the plain Jobs.
pub const JOBS: &str = "bench-jobs";
/// The samples that others refer to, with their files.
const INPUTS: [(&str, &str); 4] = [
    ("Dataset", "dataset-plays.yaml"),
    ("Dataset", "dataset-preferences.yaml"),
    ("PretrainJob", "pretrainjob-bard.yaml"),
    ("AlignmentJob", "alignmentjob-assistant.yaml"),
];
/// Of each kind, the sample that is copied.
const COPIED: [(&str, &str); 4] = [
    ("Dataset", "dataset-plays.yaml"),
    ("PretrainJob", "pretrainjob-bard.yaml"),
    ("AlignmentJob", "alignmentjob-assistant.yaml"),
    ("InferenceService", "inferenceservice-assistant.yaml"),
];

/// Where the resources are to be.
pub struct World {
    client: Client,
    /// Of each kind in each namespace.
    count: usize,
}

impl World {
    /// Namespaces, claims, and the inputs, published.
    ///
    /// # Errors
    /// The server refuses something, or the inputs are not published in time.
    pub async fn create(client: &Client, resources: usize) -> Result<Self> {
        let smallest = NAMESPACES * COPIED.len() * 4;
        ensure!(resources >= smallest, "at least {smallest} resources, please");
        let world = Self {
            client: client.clone(),
            count: resources / COPIED.len() / NAMESPACES,
        };
        world.namespace(JOBS).await?;
        for namespace in namespaces() {
            world.namespace(&namespace).await?;
            for claim in ["raw", "artifacts"] {
                world.claim(&namespace, claim).await?;
            }
            for (kind, file) in INPUTS {
                world.copy(kind, file, &namespace, None).await?;
            }
        }
        for namespace in namespaces() {
            let aligned = Api::<AlignmentJob>::namespaced(client.clone(), &namespace);
            wait::poll("the inputs are published", Duration::from_secs(300), || async {
                let aligned = aligned.get("assistant").await?;
                let ready = condition(&aligned, "Ready").is_some_and(|(status, ..)| status == "True");
                Ok(ready.then_some(()))
            })
            .await?;
        }
        Ok(world)
    }

    /// How many resources there will be in all.
    pub fn resources(&self) -> usize {
        self.count * NAMESPACES * COPIED.len()
    }

    /// Makes what is missing of each kind; how many that are.
    ///
    /// # Errors
    /// The server refuses one.
    pub async fn create_resources(&self) -> Result<usize> {
        let mut wanted = Vec::new();
        for number in 0..self.count {
            for namespace in namespaces() {
                for (kind, file) in COPIED {
                    let inputs = INPUTS.iter().filter(|(of, _)| *of == kind).count();
                    if number >= inputs {
                        wanted.push((kind, file, namespace.clone(), format!("copy-{number:04}")));
                    }
                }
            }
        }
        stream::iter(&wanted)
            .map(|(kind, file, namespace, name)| self.copy(kind, file, namespace, Some(name)))
            .buffer_unordered(CONCURRENCY)
            .try_for_each(|()| async { Ok(()) })
            .await?;
        Ok(wanted.len())
    }

    /// Makes so many plain Jobs, of about what an attempt's Job holds.
    ///
    /// # Errors
    /// The server refuses one.
    pub async fn create_jobs(&self, count: usize) -> Result<()> {
        let api = Api::<Job>::namespaced(self.client.clone(), JOBS);
        let jobs = (0..count).map(job).collect::<Result<Vec<_>>>()?;
        stream::iter(&jobs)
            .map(|job| {
                let api = api.clone();
                async move { api.create(&PostParams::default(), job).await }
            })
            .buffer_unordered(CONCURRENCY)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        Ok(())
    }

    async fn namespace(&self, name: &str) -> Result<()> {
        let object: Namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        let all = Api::<Namespace>::all(self.client.clone());
        all.create(&PostParams::default(), &object).await?;
        Ok(())
    }

    /// A claim and its volume, which any node can mount.
    async fn claim(&self, namespace: &str, name: &str) -> Result<()> {
        let volume = format!("{namespace}-{name}");
        let common = json!({"accessModes": ["ReadWriteMany"], "storageClassName": ""});
        let mut object = json!({"metadata": {"name": volume}, "spec": common});
        object["spec"]["capacity"] = json!({"storage": "1Gi"});
        object["spec"]["hostPath"] = json!({"path": "/nowhere"});
        object["spec"]["claimRef"] = json!({"namespace": namespace, "name": name});
        let object: PersistentVolume = serde_json::from_value(object)?;
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        volumes.create(&PostParams::default(), &object).await?;
        let mut claim = json!({"metadata": {"name": name}, "spec": common});
        claim["spec"]["volumeName"] = json!(volume);
        claim["spec"]["resources"] = json!({"requests": {"storage": "1Gi"}});
        let claim: PersistentVolumeClaim = serde_json::from_value(claim)?;
        let claims = Api::namespaced(self.client.clone(), namespace);
        claims.create(&PostParams::default(), &claim).await?;
        Ok(())
    }

    /// The sample in `file`, under another name if there is one, for pods on the fleet's nodes.
    async fn copy(&self, kind: &str, file: &str, namespace: &str, name: Option<&String>) -> Result<()> {
        match kind {
            "Dataset" => self.copy_as::<Dataset>(file, namespace, name).await,
            "PretrainJob" => self.copy_as::<PretrainJob>(file, namespace, name).await,
            "AlignmentJob" => self.copy_as::<AlignmentJob>(file, namespace, name).await,
            _ => self.copy_as::<InferenceService>(file, namespace, name).await,
        }
    }

    async fn copy_as<K>(&self, file: &str, namespace: &str, name: Option<&String>) -> Result<()>
    where
        K: Kind + Resource<Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned,
    {
        let path = install::samples().join(file);
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut object: Value = serde_yaml::from_str(&text)?;
        if let Some(name) = name {
            object["metadata"]["name"] = json!(name);
        }
        object["spec"]["pod"] = placed();
        let object: K = serde_json::from_value(object)?;
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let refused = || format!("the server refuses a copy of {file}");
        api.create(&PostParams::default(), &object)
            .await
            .with_context(refused)?;
        Ok(())
    }
}

fn namespaces() -> impl Iterator<Item = String> {
    (0..NAMESPACES).map(|number| format!("bench-{number}"))
}

/// Of a pod that is to run on the fleet's nodes.
fn placed() -> Value {
    json!({
        "nodeSelector": {LABEL.0: LABEL.1},
        "tolerations": [{"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}],
    })
}

fn job(number: usize) -> Result<Job> {
    let mut pod = placed();
    pod["restartPolicy"] = json!("Never");
    pod["containers"] = json!([{
        "name": "main", "image": "nothing:1", "command": ["strata-runtime", "curate"],
        "env": [{"name": "STRATA_CONFIG", "value": "/etc/strata/stage.json"}],
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
    }]);
    Ok(serde_json::from_value(json!({
        "metadata": {"name": format!("job-{number:05}"), "labels": {"bench": "jobs"}},
        "spec": {
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {"metadata": {"labels": {"bench": "jobs"}}, "spec": pod},
        },
    }))?)
}
