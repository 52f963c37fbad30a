//! Reading an input: an artifact that a run published, or a file or folder that no manifest describes.

use std::fs;
use std::path::{Path, PathBuf};

use strata_contract::{FileEntry, Input, MANIFEST_FILE, Manifest};

use crate::hashing::{hash_file, hash_files, walk};
use crate::run::read_manifest;
use crate::{ArtifactError, Result};

/// How much of an artifact is verified when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// That each file is there in its size; [`Opened::file`] verifies a file's hash when it is asked for.
    Sizes,
    /// Each file's hash.
    Hashes,
}

/// An input that is there and, as far as [`Verify`] says, is what its digest says.
#[derive(Debug)]
pub struct Opened {
    input: Input,
    path: PathBuf,
    manifest: Option<Manifest>,
    verified: Verify,
}

/// Opens `input`. Where it carries a digest, what is there must have that digest.
///
/// A folder with a manifest is an artifact; anything else is a plain file or folder, which is hashed whole.
pub fn open(input: &Input, volumes: &Path, verify: Verify) -> Result<Opened> {
    let path = input.uri.local_path(volumes);
    if path.join(MANIFEST_FILE).is_file() {
        return open_artifact(input, &path, verify);
    }
    if let Some(resource) = &input.resource {
        let detail = format!("{} {} has not published there", resource.kind, resource.name);
        return Err(ArtifactError::NotFound {
            path: path.join(MANIFEST_FILE),
            detail,
        });
    }
    let files = match fs::metadata(&path)
        .map_err(|error| ArtifactError::reading(&path, error))?
        .is_dir()
    {
        true => walk(&path)?,
        false => vec![(input.name.clone(), path.clone())],
    };
    if files.is_empty() {
        return Err(ArtifactError::NotFound {
            path,
            detail: "the folder is empty".into(),
        });
    }
    let entries = files
        .into_iter()
        .map(|(name, path)| {
            hash_file(&path).map(|(bytes, sha256)| FileEntry {
                path: name,
                bytes,
                sha256,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let (digest, bytes) = hash_files(&entries);
    expect_digest(input, &path, &digest)?;
    let input = Input {
        digest: Some(digest),
        bytes: Some(bytes),
        ..input.clone()
    };
    Ok(Opened {
        input,
        path,
        manifest: None,
        verified: Verify::Hashes,
    })
}

fn open_artifact(input: &Input, run: &Path, verify: Verify) -> Result<Opened> {
    let manifest = read_manifest(run)?.ok_or_else(|| ArtifactError::NotFound {
        path: run.join(MANIFEST_FILE),
        detail: "it was there a moment ago".into(),
    })?;
    expect_digest(input, run, &manifest.digest)?;
    let path = run.join(&manifest.publication.content_path);
    for file in &manifest.content.files {
        let at = path.join(&file.path);
        let found = fs::metadata(&at)
            .map_err(|error| ArtifactError::reading(&at, error))?
            .len();
        if found != file.bytes {
            let detail = format!("its manifest says {} bytes, it has {found}", file.bytes);
            return Err(ArtifactError::Corrupt { path: at, detail });
        }
        if verify == Verify::Hashes {
            verify_hash(&at, file)?;
        }
    }
    let (digest, bytes) = (manifest.digest.clone(), manifest.content.bytes());
    let input = Input {
        digest: Some(digest),
        bytes: Some(bytes),
        ..input.clone()
    };
    Ok(Opened {
        input,
        path,
        manifest: Some(manifest),
        verified: verify,
    })
}

fn expect_digest(input: &Input, path: &Path, found: &str) -> Result<()> {
    match &input.digest {
        Some(asked) if asked != found => {
            let detail = format!("asked for is {asked}, there is {found}");
            Err(ArtifactError::Corrupt {
                path: path.to_owned(),
                detail,
            })
        }
        _ => Ok(()),
    }
}

fn verify_hash(path: &Path, file: &FileEntry) -> Result<()> {
    let (_, sha256) = hash_file(path)?;
    match sha256 == file.sha256 {
        true => Ok(()),
        false => {
            let detail = format!("its manifest says sha256 {}, it has {sha256}", file.sha256);
            Err(ArtifactError::Corrupt {
                path: path.to_owned(),
                detail,
            })
        }
    }
}

impl Opened {
    /// The input with the digest and size that were read; for the lineage.
    pub fn resolved(&self) -> Input {
        self.input.clone()
    }

    /// The artifact's content folder, or the plain file or folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest, if this is an artifact.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// Whether the artifact (or plain folder) has the file `relative`.
    pub fn has(&self, relative: &str) -> bool {
        match &self.manifest {
            Some(manifest) => manifest.content.files.iter().any(|file| file.path == relative),
            None => self.path.join(relative).is_file(),
        }
    }

    /// Path of the file `relative`, whose hash has been verified (of a plain folder: as it was when opened).
    pub fn file(&self, relative: &str) -> Result<PathBuf> {
        let path = self.path.join(relative);
        let Some(manifest) = &self.manifest else {
            fs::metadata(&path).map_err(|error| ArtifactError::reading(&path, error))?;
            return Ok(path);
        };
        let Some(file) = manifest.content.files.iter().find(|file| file.path == relative) else {
            let detail = format!(
                "the {:?} artifact {} has no such file",
                manifest.content.kind, manifest.digest
            );
            return Err(ArtifactError::NotFound { path, detail });
        };
        if self.verified == Verify::Sizes {
            verify_hash(&path, file)?;
        }
        Ok(path)
    }
}
