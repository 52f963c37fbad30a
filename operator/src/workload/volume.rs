//! Volumes: which claim a pod mounts, where, and whether it may write.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, KeyToPath, PersistentVolumeClaimVolumeSource, SecretVolumeSource, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use strata_contract::{Uri, VOLUMES_DIR};

/// A Secret's keys as files in a folder. Who reads them sees changes, as the whole folder is mounted.
pub fn secret(name: &str, secret: &str, folder: &str, items: Vec<(String, &str)>) -> (Volume, VolumeMount) {
    let item = |(key, path): (String, &str)| KeyToPath {
        key,
        path: path.to_owned(),
        mode: None,
    };
    let volume = Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.to_owned()),
            items: Some(items.into_iter().map(item).collect()),
            // For the user and the group of the process alone.
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    };
    let mount = VolumeMount {
        name: name.to_owned(),
        mount_path: folder.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    (volume, mount)
}

/// An empty folder on the node's disk, which goes with the pod. One that holds more than `size` ends the pod.
pub fn empty(name: &str, folder: &str, size: Quantity) -> (Volume, VolumeMount) {
    let volume = Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: Some(size),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    };
    let mount = VolumeMount {
        name: name.to_owned(),
        mount_path: folder.to_owned(),
        ..VolumeMount::default()
    };
    (volume, mount)
}

/// Claims by name, each with whether it is only read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims(BTreeMap<String, bool>);

impl Claims {
    /// Adds the claim of something that is read.
    pub fn read(&mut self, uri: &Uri) {
        if let Some(claim) = uri.claim() {
            self.0.entry(claim.to_owned()).or_insert(true);
        }
    }

    /// Adds the claim of something that is written.
    pub fn write(&mut self, uri: &Uri) {
        if let Some(claim) = uri.claim() {
            self.0.insert(claim.to_owned(), false);
        }
    }

    /// The volumes and their mounts: every claim at `VOLUMES_DIR/CLAIM`.
    pub fn volumes(&self) -> (Vec<Volume>, Vec<VolumeMount>) {
        self.0
            .iter()
            .enumerate()
            .map(|(index, (claim, read_only))| {
                // A claim's name may hold dots, a volume's may not: so they are numbered.
                let name = format!("claim-{index}");
                let volume = Volume {
                    name: name.clone(),
                    persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                        claim_name: claim.clone(),
                        read_only: read_only.then_some(true),
                    }),
                    ..Volume::default()
                };
                let mount = VolumeMount {
                    name,
                    mount_path: format!("{VOLUMES_DIR}/{claim}"),
                    read_only: read_only.then_some(true),
                    ..VolumeMount::default()
                };
                (volume, mount)
            })
            .unzip()
    }
}
