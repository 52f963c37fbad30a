//! What can go wrong in storage, by what a person does about it.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use strata_contract::FailureReason;

/// Why something could not be read or published.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// There is nothing at this path.
    #[error("there is nothing at {path}{}", hint(.detail))]
    NotFound {
        /// The path.
        path: PathBuf,
        /// What was expected there; may be empty.
        detail: String,
    },
    /// It is there and cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is there and not what its manifest or its digest says.
    #[error("{path} is damaged: {detail}")]
    Corrupt {
        /// The path.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// It was published by a newer version.
    #[error("{path} has contract version {version}, newer than this image: use an image of that release")]
    Newer {
        /// The path.
        path: PathBuf,
        /// Version in the file.
        version: u32,
    },
    /// The volume is full, or the quota is used up.
    #[error("no space is left for {path}: free space on the volume or give it more")]
    Full {
        /// What was being written.
        path: PathBuf,
    },
    /// The volume refuses writes for another reason.
    #[error("cannot write {path}: {source}")]
    Unwritable {
        /// What was being written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A figure of the result is infinite or not a number.
    #[error("the metric {metric} is {value}, which is no figure to publish")]
    NotFinite {
        /// The metric.
        metric: String,
        /// Its value.
        value: f64,
    },
    /// A stage asked for something that no artifact can hold: a defect of the stage.
    #[error("{path:?} is not a name that an artifact can hold: {detail}")]
    Name {
        /// The name.
        path: String,
        /// What is wrong with it.
        detail: &'static str,
    },
}

fn hint(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(": {detail}")
    }
}

impl ArtifactError {
    /// The reason that the stage reports.
    pub fn reason(&self) -> FailureReason {
        match self {
            Self::NotFound { .. } => FailureReason::InputNotFound,
            Self::Unreadable { .. } => FailureReason::InputUnreadable,
            Self::Corrupt { .. } => FailureReason::InputCorrupt,
            Self::Newer { .. } => FailureReason::ConfigInvalid,
            Self::Full { .. } => FailureReason::StorageFull,
            Self::Unwritable { .. } => FailureReason::StorageUnwritable,
            Self::NotFinite { .. } => FailureReason::Diverged,
            Self::Name { .. } => FailureReason::Internal,
        }
    }

    /// `error` met while reading `path`.
    pub fn reading(path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::NotFound {
                path,
                detail: String::new(),
            },
            io::ErrorKind::UnexpectedEof => Self::Corrupt {
                path,
                detail: "it ends too early".into(),
            },
            _ => Self::Unreadable { path, source: error },
        }
    }

    /// `error` met while writing `path`; an I/O error may lie anywhere in its chain of sources, as libraries wrap it.
    pub fn writing(path: &Path, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let error = error.into();
        let mut cause: Option<&(dyn Error + 'static)> = Some(error.as_ref());
        while let Some(link) = cause {
            if let Some(io) = link.downcast_ref::<io::Error>() {
                if is_full(io) {
                    return Self::Full { path: path.to_owned() };
                }
                // An I/O error made from another error hides that one from `source`.
                cause = io
                    .get_ref()
                    .map(|inner| inner as &(dyn Error + 'static))
                    .or_else(|| io.source());
            } else {
                cause = link.source();
            }
        }
        let source = match error.downcast::<io::Error>() {
            Ok(io) => *io,
            Err(other) => io::Error::other(other),
        };
        Self::Unwritable {
            path: path.to_owned(),
            source,
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        || matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognized_inside_of_other_errors() {
        #[derive(Debug, thiserror::Error)]
        #[error("writing a column")]
        struct Outer(#[source] io::Error);
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let path = Path::new("data/x");
        for error in [
            ArtifactError::writing(path, full()),
            ArtifactError::writing(path, Outer(full())),
            ArtifactError::writing(path, io::Error::other(Outer(full()))),
        ] {
            assert_eq!(error.reason(), FailureReason::StorageFull, "{error}");
        }
        let denied = ArtifactError::writing(path, io::Error::from_raw_os_error(libc::EROFS));
        assert_eq!(denied.reason(), FailureReason::StorageUnwritable);
    }
}
