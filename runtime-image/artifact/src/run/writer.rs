//! A file of an artifact while it is written: hashed as it goes, named only when it is whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use strata_contract::FileEntry;

use super::Attempt;
use crate::hashing::HashingWriter;
use crate::{ArtifactError, Result};

/// A file of the artifact that is being written; dropped unfinished, it leaves nothing.
pub struct FileWriter<'a> {
    pub(super) attempt: &'a Attempt,
    pub(super) relative: String,
    pub(super) path: PathBuf,
    pub(super) partial: PathBuf,
    pub(super) writer: Option<BufWriter<HashingWriter<File>>>,
}

impl FileWriter<'_> {
    /// The error that a caller reports when writing to this file failed.
    pub fn error(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ArtifactError {
        ArtifactError::writing(&self.path, error)
    }

    /// Syncs the file, gives it its name, and makes it part of the artifact.
    pub fn finish(mut self) -> Result<FileEntry> {
        let writer = self
            .writer
            .take()
            .expect("the writer is there until the file is finished");
        let writing = |error: io::Error| ArtifactError::writing(&self.path, error);
        let (file, bytes, sha256) = writer
            .into_inner()
            .map_err(|error| writing(error.into_error()))?
            .finish();
        file.sync_all().map_err(writing)?;
        fs::rename(&self.partial, &self.path).map_err(writing)?;
        Ok(self.attempt.register(FileEntry {
            path: self.relative.clone(),
            bytes,
            sha256,
        }))
    }
}

impl Write for FileWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.writer
            .as_mut()
            .expect("the writer is there until the file is finished")
            .write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer
            .as_mut()
            .expect("the writer is there until the file is finished")
            .flush()
    }
}

impl Drop for FileWriter<'_> {
    fn drop(&mut self) {
        // What the buffer holds is dropped with it, not written: on a full disk that would fail again.
        if let Some(writer) = self.writer.take() {
            drop(writer.into_parts());
        }
        // Finished, the name is gone; otherwise what cannot be removed now is removed when the next attempt starts.
        fs::remove_file(&self.partial).ok();
    }
}
