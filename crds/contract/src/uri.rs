//! The URIs that name data: which claim a pod mounts for one, and where the pod then finds it.

use std::path::{Component, Path, PathBuf};
use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A place in storage: `pvc://CLAIM/PATH` in a cluster, `file:///PATH` on a machine.
///
/// The path of a source may hold the wildcards `*` and `**` in its last components; who reads it decides.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum Uri {
    /// A path in a PersistentVolumeClaim of the resource's namespace.
    Pvc {
        /// Name of the claim.
        claim: String,
        /// Path inside of the claim, without a leading slash; may be empty.
        path: String,
    },
    /// An absolute path on this machine.
    File(PathBuf),
}

/// Why a text is not a URI that Strata reads, and what to write instead.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UriError {
    /// Neither `pvc://` nor `file://`.
    #[error("{0:?} is not a URI that can be read here: write pvc://CLAIM/PATH (or file:///PATH outside of a cluster)")]
    Scheme(String),
    /// The claim's name cannot be a PersistentVolumeClaim's.
    #[error("{0:?} names no claim: write pvc://CLAIM/PATH with the name of a PersistentVolumeClaim")]
    Claim(String),
    /// The path leaves its root.
    #[error("the path in {0:?} must not hold '.', '..' or empty components")]
    Path(String),
}

impl Uri {
    /// The claim to mount, if there is one.
    pub fn claim(&self) -> Option<&str> {
        match self {
            Self::Pvc { claim, .. } => Some(claim),
            Self::File(_) => None,
        }
    }

    /// Where this URI's data is found, given the folder under which claims are mounted.
    pub fn local_path(&self, volumes: &Path) -> PathBuf {
        match self {
            Self::Pvc { claim, path } => volumes.join(claim).join(path),
            Self::File(path) => path.clone(),
        }
    }

    /// This place's child at `relative`, a slash-separated path of plain components.
    pub fn join(&self, relative: &str) -> Self {
        match self {
            Self::Pvc { claim, path } if path.is_empty() => Self::Pvc {
                claim: claim.clone(),
                path: relative.into(),
            },
            Self::Pvc { claim, path } => Self::Pvc {
                claim: claim.clone(),
                path: format!("{}/{relative}", path.trim_end_matches('/')),
            },
            Self::File(path) => Self::File(path.join(relative)),
        }
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let plain = |path: &str| path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if let Some(rest) = text.strip_prefix("pvc://") {
            let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
            let path = path.strip_suffix('/').unwrap_or(path);
            let claim_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
            if claim.is_empty() || claim.len() > 253 || claim.starts_with('.') || !claim.chars().all(claim_char) {
                return Err(UriError::Claim(text.into()));
            }
            if !path.is_empty() && !plain(path) {
                return Err(UriError::Path(text.into()));
            }
            return Ok(Self::Pvc {
                claim: claim.into(),
                path: path.into(),
            });
        }
        let Some(path) = text.strip_prefix("file://").filter(|path| path.starts_with('/')) else {
            return Err(UriError::Scheme(text.into()));
        };
        let path = PathBuf::from(path);
        match path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        {
            true => Ok(Self::File(path)),
            false => Err(UriError::Path(text.into())),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pvc { claim, path } => write!(f, "pvc://{claim}/{path}"),
            Self::File(path) => write!(f, "file://{}", path.display()),
        }
    }
}

impl TryFrom<String> for Uri {
    type Error = UriError;

    fn try_from(text: String) -> Result<Self, UriError> {
        text.parse()
    }
}

impl From<Uri> for String {
    fn from(uri: Uri) -> Self {
        uri.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_and_refused() {
        for (text, claim) in [
            ("pvc://raw/books/*.txt", Some("raw")),
            ("pvc://raw", Some("raw")),
            ("file:///tmp/a", None),
        ] {
            assert_eq!(text.parse::<Uri>().expect(text).claim(), claim);
        }
        for text in [
            "",
            "raw/books",
            "pvc://",
            "pvc://Raw/x",
            "pvc://raw/../x",
            "pvc://raw//x",
            "file://tmp",
            "s3://b/k",
        ] {
            assert!(text.parse::<Uri>().is_err(), "{text}");
        }
        let uri: Uri = "pvc://raw/a/".parse().expect("a valid uri");
        assert_eq!(uri.join("b/c").to_string(), "pvc://raw/a/b/c");
        assert_eq!(uri.local_path(Path::new("/v")), Path::new("/v/raw/a"));
    }
}
