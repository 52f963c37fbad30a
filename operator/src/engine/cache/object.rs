//! An object as the caches keep it: the JSON that decisions read, and nothing else.
//!
//! It is read from the wire without looking into spec and status, so there is no object on which a watch could break: one
//! that does not parse is an error of whoever looks at it. What no decision reads goes at once: managed fields and what
//! [`Cached::compact`] leaves out. Ten thousand objects are some thirty MB this way, and a quarter of that once
//! [packed](super::packed).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::Cached;

/// Prefixes of the annotations that are kept: decisions read no others, and users may put up to 256 KiB there.
const ANNOTATIONS: [&str; 2] = ["strata.dev/", "kueue.x-k8s.io/"];

/// An object of type `K`, compact.
pub struct Object<K> {
    /// Its metadata, as far as they are kept.
    pub metadata: ObjectMeta,
    /// Everything that is kept, as JSON.
    pub json: Arc<[u8]>,
    kind: PhantomData<fn() -> K>,
}

/// What an object is made of besides its metadata, unread.
pub struct Parts {
    /// What is wanted.
    pub spec: Option<Box<RawValue>>,
    /// What is.
    pub status: Option<Box<RawValue>>,
}

/// The metadata that are kept.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    owner_references: Option<Vec<OwnerReference>>,
}

#[derive(Deserialize)]
struct Wire {
    metadata: Metadata,
    #[serde(default)]
    spec: Option<Box<RawValue>>,
    #[serde(default)]
    status: Option<Box<RawValue>>,
}

#[derive(Serialize)]
struct Kept<'a> {
    metadata: &'a ObjectMeta,
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a RawValue>,
}

impl From<Metadata> for ObjectMeta {
    fn from(metadata: Metadata) -> Self {
        let mut annotations = metadata.annotations;
        if let Some(annotations) = &mut annotations {
            annotations.retain(|key, _| ANNOTATIONS.iter().any(|prefix| key.starts_with(prefix)));
        }
        Self {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            generation: metadata.generation,
            labels: metadata.labels,
            annotations: annotations.filter(|annotations| !annotations.is_empty()),
            creation_timestamp: metadata.creation_timestamp,
            deletion_timestamp: metadata.deletion_timestamp,
            owner_references: metadata.owner_references,
            ..Self::default()
        }
    }
}

impl Parts {
    /// Keeps of `part` what `T` names. What does not fit `T` stays as it is: whoever reads it says what is wrong.
    pub fn keep<T: Serialize + DeserializeOwned>(part: &mut Option<Box<RawValue>>) {
        let kept = part
            .as_ref()
            .and_then(|raw| serde_json::from_str::<T>(raw.get()).ok())
            .and_then(|kept| to_raw_value(&kept).ok());
        if kept.is_some() {
            *part = kept;
        }
    }
}

impl<'de, K: Cached> Deserialize<'de> for Object<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Wire { metadata, spec, status } = Wire::deserialize(deserializer)?;
        let metadata = ObjectMeta::from(metadata);
        let mut parts = Parts { spec, status };
        K::compact(&mut parts);
        let kept = Kept {
            metadata: &metadata,
            spec: parts.spec.as_deref(),
            status: parts.status.as_deref(),
        };
        let json = serde_json::to_vec(&kept).map_err(serde::de::Error::custom)?;
        Ok(Self {
            metadata,
            json: json.into(),
            kind: PhantomData,
        })
    }
}

impl<K> Clone for Object<K> {
    fn clone(&self) -> Self {
        Self {
            metadata: self.metadata.clone(),
            json: self.json.clone(),
            kind: PhantomData,
        }
    }
}

impl<K> fmt::Debug for Object<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.json))
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Object<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
