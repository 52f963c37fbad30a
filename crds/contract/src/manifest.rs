//! The manifest: the one file that makes an artifact published, and that says what made it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{GateResult, Input, Resource, Uri};

/// Name of the manifest's file in a run's folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// What kind of thing an artifact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ArtifactKind {
    /// HF-Datasets Parquet with a card; with token files and a tokenizer where the task is pretraining.
    Dataset,
    /// A model in HF layout, with its frozen evaluation set; a LoRA run adds the adapter in `adapter/`.
    Model,
    /// A GGUF file for serving, with tokenizer and chat template inside.
    QuantizedModel,
}

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FileEntry {
    /// Path relative to the content folder, slash-separated.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Lower-case hex SHA-256 of the file's bytes.
    pub sha256: String,
}

/// What an artifact is: everything that its digest covers. Two runs with the same content have the same digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Content {
    /// What kind of artifact this is.
    pub kind: ArtifactKind,
    /// Id of the run that made it: the hash of what determines the result.
    pub run_id: String,
    /// What it was made from, each with the digest that was read.
    pub inputs: Vec<Input>,
    /// The stage's configuration, as it was handed in.
    pub config: serde_json::Value,
    /// Its files, sorted by path.
    pub files: Vec<FileEntry>,
    /// Figures of the result by name, such as `bitsPerByte` or `documentsKept`.
    pub metrics: BTreeMap<String, f64>,
    /// The gates and how they were passed.
    pub gates: Vec<GateResult>,
    /// Facts a user should know about its origin, such as `dequantizedFrom: Q4_1`.
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
}

/// How and when an artifact was published; outside of its digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    /// The resource whose run published it.
    pub resource: Resource,
    /// Number of the attempt that published it, from 1.
    pub attempt: u32,
    /// Folder of the files, relative to the manifest: the attempt's own.
    pub content_path: String,
    /// When, in RFC 3339, UTC.
    pub time: String,
    /// Version of the code that made it.
    pub code_version: String,
}

/// A published artifact's manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// [`crate::CONTRACT_VERSION`] of the writer.
    pub contract_version: u32,
    /// `sha256:` and the hash of [`Manifest::content`] in canonical JSON.
    pub digest: String,
    /// What the digest covers.
    pub content: Content,
    /// What it does not cover.
    pub publication: Publication,
}

impl Content {
    /// `sha256:HEX` over this content as JSON with sorted keys.
    pub fn digest(&self) -> String {
        format!("sha256:{}", hash_canonical(self))
    }

    /// Sum of the files' sizes in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl Manifest {
    /// The reference that status, lineage and downstream inputs hold, given the run's folder.
    pub fn reference(&self, uri: &Uri) -> ArtifactRef {
        ArtifactRef {
            uri: uri.clone(),
            digest: self.digest.clone(),
            bytes: self.content.bytes(),
        }
    }
}

/// A published artifact, named for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactRef {
    /// Folder of the run that published it; the manifest is in it.
    pub uri: Uri,
    /// Digest of its content, `sha256:HEX`.
    pub digest: String,
    /// Size of its files in bytes.
    pub bytes: u64,
}

/// Lower-case hex SHA-256 of `value` as JSON whose object keys are sorted, so that equal values hash alike.
///
/// Every type of this crate can be written as JSON (string keys, finite or null numbers), so this cannot fail.
pub fn hash_canonical<T: Serialize>(value: &T) -> String {
    let value = serde_json::to_value(value).expect("types of the contract serialize to JSON");
    let mut text = String::new();
    write_canonical(&value, &mut text);
    hex(&Sha256::digest(text.as_bytes()))
}

/// Lower-case hex of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write_canonical(value: &serde_json::Value, out: &mut String) {
    use serde_json::Value;
    let comma = |first: &mut bool, out: &mut String| {
        if !std::mem::take(first) {
            out.push(',');
        }
    };
    let mut first = true;
    match value {
        Value::Object(map) => {
            out.push('{');
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort();
            for key in keys {
                comma(&mut first, out);
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(&map[key], out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for item in items {
                comma(&mut first, out);
                write_canonical(item, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn equal_values_hash_alike_whatever_the_order_of_their_keys() {
        let one = hash_canonical(&json!({"a": [1, {"x": "é", "b": null}], "c": 0.5}));
        assert_eq!(one, hash_canonical(&json!({"c": 0.5, "a": [1, {"b": null, "x": "é"}]})));
        assert_ne!(one, hash_canonical(&json!({"c": 0.5, "a": [{"b": null, "x": "é"}, 1]})));
    }
}
