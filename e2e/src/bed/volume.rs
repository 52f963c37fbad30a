//! Static volumes: a folder of the bed for each claim, and for the full-disk case one that holds no more than it says.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{
    HostPathVolumeSource, ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PersistentVolumeSpec, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use kube::{Api, Client};

use crate::bed::{Bed, command};
use crate::image::USER;

/// A volume made for one claim. It is removed with [`Volume::remove`], or with the bed.
#[derive(Debug, Clone)]
pub struct Volume {
    bed: Bed,
    /// Name of the PersistentVolume, and of its folder.
    name: String,
    namespace: String,
    claim: String,
    capacity: String,
    limited: bool,
}

impl Volume {
    /// Makes a volume of `capacity` (a quantity, `1Gi`) that binds to the claim `namespace`/`claim`, present or still
    /// to come. Its folder belongs to the images' user. A volume with `limit_bytes` lies in memory and is full when it
    /// holds that much; any other ends with the disk.
    ///
    /// # Errors
    /// The bed does not run, or the API server refuses the volume.
    pub async fn create(
        bed: &Bed,
        client: &Client,
        (namespace, claim): (&str, &str),
        capacity: &str,
        limit_bytes: Option<u64>,
    ) -> Result<Self> {
        let volume = Self {
            bed: bed.clone(),
            name: format!("{namespace}-{claim}"),
            namespace: namespace.to_owned(),
            claim: claim.to_owned(),
            capacity: capacity.to_owned(),
            limited: limit_bytes.is_some(),
        };
        let folder = volume.folder();
        fs::create_dir_all(&folder)?;
        if let Some(bytes) = limit_bytes {
            let options = format!("size={bytes},uid={USER},gid={USER},mode=0770");
            let mut mount = bed.inside("mount")?;
            command::output(mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&folder))?;
        } else {
            chown(&folder, Some(USER), Some(USER))?;
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o770))?;
        }
        Api::<PersistentVolume>::all(client.clone())
            .create(&PostParams::default(), &volume.object())
            .await?;
        Ok(volume)
    }

    /// As [`Volume::create`] without a limit, where the volume may be there from an earlier time with its data.
    ///
    /// # Errors
    /// As [`Volume::create`].
    pub async fn ensure(bed: &Bed, client: &Client, (namespace, claim): (&str, &str), capacity: &str) -> Result<()> {
        let name = format!("{namespace}-{claim}");
        if Api::<PersistentVolume>::all(client.clone())
            .get_opt(&name)
            .await?
            .is_none()
        {
            Self::create(bed, client, (namespace, claim), capacity, None).await?;
        }
        Ok(())
    }

    /// The folder as this machine sees it, also where only the bed has it mounted.
    ///
    /// # Errors
    /// The bed does not run.
    pub fn path(&self) -> Result<PathBuf> {
        let init = self.bed.init().context("the bed does not run")?;
        let inside = self.folder();
        let inside = inside.strip_prefix("/").unwrap_or(&inside);
        Ok(PathBuf::from(format!("/proc/{}/root", init.pid)).join(inside))
    }

    /// A claim that this volume answers.
    #[must_use]
    pub fn claim(&self) -> PersistentVolumeClaim {
        PersistentVolumeClaim {
            metadata: ObjectMeta {
                name: Some(self.claim.clone()),
                namespace: Some(self.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(PersistentVolumeClaimSpec {
                access_modes: Some(vec!["ReadWriteOnce".into()]),
                storage_class_name: Some(String::new()),
                volume_name: Some(self.name.clone()),
                resources: Some(VolumeResourceRequirements {
                    requests: Some([("storage".to_owned(), Quantity(self.capacity.clone()))].into()),
                    ..VolumeResourceRequirements::default()
                }),
                ..PersistentVolumeClaimSpec::default()
            }),
            ..PersistentVolumeClaim::default()
        }
    }

    /// Removes the volume and what is in it.
    ///
    /// # Errors
    /// The API server refuses, or a pod still has it mounted.
    pub async fn remove(&self, client: &Client) -> Result<()> {
        Api::<PersistentVolume>::all(client.clone())
            .delete(&self.name, &DeleteParams::default())
            .await?;
        let folder = self.folder();
        if self.limited {
            command::output(self.bed.inside("umount")?.arg(&folder))?;
        }
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
    }

    fn folder(&self) -> PathBuf {
        self.bed.state().join("volumes").join(&self.name)
    }

    fn object(&self) -> PersistentVolume {
        PersistentVolume {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(PersistentVolumeSpec {
                capacity: Some([("storage".to_owned(), Quantity(self.capacity.clone()))].into()),
                access_modes: Some(
                    ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]
                        .map(String::from)
                        .to_vec(),
                ),
                persistent_volume_reclaim_policy: Some("Retain".into()),
                storage_class_name: Some(String::new()),
                claim_ref: Some(ObjectReference {
                    namespace: Some(self.namespace.clone()),
                    name: Some(self.claim.clone()),
                    ..ObjectReference::default()
                }),
                host_path: Some(HostPathVolumeSource {
                    path: self.folder().to_string_lossy().into_owned(),
                    type_: Some("Directory".into()),
                }),
                ..PersistentVolumeSpec::default()
            }),
            ..PersistentVolume::default()
        }
    }
}
