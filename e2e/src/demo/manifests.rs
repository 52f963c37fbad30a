//! `config`, made to fit a cluster with an overlay, as a user would: images, the demo's label, claims.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::bed::command;
use crate::image::Built;

/// On all that the demo makes outside its namespace: only what has it is changed, and removed.
pub(super) const LABEL: &str = "strata.dev/demo";

/// What differs between clusters.
#[derive(Debug, Default)]
pub(super) struct Fit {
    /// Strata's images, by the names that the cluster knows.
    pub(super) images: Vec<Built>,
    /// The class of the claims; the cluster's default where there is none.
    pub(super) storage_class: Option<String>,
    /// Whether pods of several nodes use a claim.
    pub(super) several_nodes: bool,
}

impl Fit {
    /// The manifests of `folder` for this cluster.
    ///
    /// # Errors
    /// kubectl refuses; the message is its own.
    pub(super) fn render(&self, mut kubectl: Command, folder: &Path) -> Result<String> {
        let overlay = tempfile::tempdir()?;
        let here = overlay.path().canonicalize()?;
        let base = folder
            .canonicalize()
            .with_context(|| format!("cannot read {}", folder.display()))?;
        // kustomize takes no absolute paths.
        let up = "../".repeat(here.components().count() - 1);
        let base = format!("{up}{}", base.display().to_string().trim_start_matches('/'));
        std::fs::write(here.join("kustomization.yaml"), self.overlay(&base).to_string())?;
        command::output(kubectl.arg("kustomize").arg(&here))
    }

    fn overlay(&self, base: &str) -> Value {
        let images = self.images.iter().map(|image| {
            json!({
                "name": format!("strata.local/{}", image.name()),
                "newName": image.repository(),
                "newTag": image.tag(),
            })
        });
        // The image of the pods that resources start is an argument.
        let runtime = self.images.iter().find(|image| image.name() == "strata-runtime");
        let argument = runtime.map(|image| {
            let value = format!("--runtime-image={}", image.reference);
            let path = "/spec/template/spec/containers/0/args/0";
            patch("Deployment", &json!([{"op": "replace", "path": path, "value": value}]))
        });
        let modes = self
            .several_nodes
            .then(|| json!({"op": "replace", "path": "/spec/accessModes", "value": ["ReadWriteMany"]}));
        let class = self
            .storage_class
            .as_ref()
            .map(|class| json!({"op": "add", "path": "/spec/storageClassName", "value": class}));
        let claims: Vec<Value> = modes.into_iter().chain(class).collect();
        let claims = (!claims.is_empty()).then(|| patch("PersistentVolumeClaim", &json!(claims)));
        json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [base],
            "labels": [{"pairs": {(LABEL): "true"}}],
            "images": images.collect::<Vec<_>>(),
            "patches": argument.into_iter().chain(claims).collect::<Vec<_>>(),
        })
    }
}

fn patch(kind: &str, operations: &Value) -> Value {
    json!({"target": {"kind": kind}, "patch": operations.to_string()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_claims_fit_the_cluster() {
        let built = |name: &str| Built {
            reference: format!("registry.example.org/team/{name}:0123456789ab"),
            tar: "x".into(),
            digest: "sha256:x".into(),
        };
        let fit = Fit {
            images: vec![built("strata-operator"), built("strata-runtime")],
            storage_class: Some("shared".into()),
            several_nodes: true,
        };
        let overlay = fit.overlay("../config/samples");
        assert_eq!(
            overlay["images"][0],
            json!({"name": "strata.local/strata-operator", "newName": "registry.example.org/team/strata-operator", "newTag": "0123456789ab"})
        );
        let patches = overlay["patches"].to_string();
        for words in [
            "--runtime-image=registry.example.org/team/strata-runtime:0123456789ab",
            "ReadWriteMany",
            "shared",
        ] {
            assert!(patches.contains(words), "no {words} in {patches}");
        }
        assert_eq!(
            Fit::default().overlay("x")["patches"],
            json!([]),
            "nothing is to be changed"
        );
    }
}
