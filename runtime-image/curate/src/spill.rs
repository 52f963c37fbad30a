//! Records between two passes: in a file, so that memory does not grow with the data.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_artifact::ArtifactError;

use crate::dedup::Signature;
use crate::record::Record;

/// A record with what was worked out about its text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spilled {
    pub(crate) record: Record,
    /// Digest of the normalized text.
    pub(crate) digest: u128,
    /// Number of words.
    pub(crate) words: u64,
    /// Signature, if near duplicates are looked for.
    pub(crate) signature: Option<Signature>,
}

/// A file that has no name any more, so that it is gone with the process however that ends.
pub(crate) fn unnamed_file(path: &Path) -> Result<File, ArtifactError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    let file = file.map_err(|error| ArtifactError::writing(path, error))?;
    // A share that keeps the names of open files has this one removed with its folder.
    std::fs::remove_file(path).ok();
    Ok(file)
}

/// Writes records to a file, one after the other.
pub(crate) struct SpillWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl SpillWriter {
    pub(crate) fn create(path: PathBuf) -> Result<Self, ArtifactError> {
        let file = unnamed_file(&path)?;
        Ok(Self {
            path,
            file: BufWriter::with_capacity(1 << 18, file),
        })
    }

    pub(crate) fn push(&mut self, spilled: &Spilled) -> Result<(), ArtifactError> {
        let Spilled {
            record,
            digest,
            words,
            signature,
        } = spilled;
        let json = serde_json::to_vec(record).expect("a record serializes to JSON");
        let signature = signature.as_ref().map(Signature::to_bytes).unwrap_or_default();
        let mut write = || {
            self.file.write_all(&(json.len() as u64).to_le_bytes())?;
            self.file.write_all(&(signature.len() as u64).to_le_bytes())?;
            self.file.write_all(&digest.to_le_bytes())?;
            self.file.write_all(&words.to_le_bytes())?;
            self.file.write_all(&json)?;
            self.file.write_all(&signature)
        };
        write().map_err(|error: io::Error| ArtifactError::writing(&self.path, error))
    }

    /// Ends writing; the records can be read as often as needed.
    pub(crate) fn finish(self) -> Result<Spill, ArtifactError> {
        let Self { path, file } = self;
        let file = file
            .into_inner()
            .map_err(|error| ArtifactError::writing(&path, error.into_error()))?;
        Ok(Spill {
            path,
            file: Arc::new(file),
        })
    }
}

/// Records in a file.
pub(crate) struct Spill {
    path: PathBuf,
    file: Arc<File>,
}

impl Spill {
    /// The records in their order.
    pub(crate) fn read(&self) -> impl Iterator<Item = Result<Spilled, ArtifactError>> + Send + use<> {
        let (path, file) = (self.path.clone(), self.file.clone());
        let mut file = BufReader::with_capacity(1 << 18, FromStart { file, at: 0 });
        std::iter::from_fn(move || next(&mut file, &path).transpose())
    }
}

/// Some of the records in a file: those whose place in it is `true`.
pub(crate) struct Selected {
    pub(crate) spill: Spill,
    pub(crate) kept: Vec<bool>,
}

impl Selected {
    /// The records in their order.
    pub(crate) fn read(&self) -> impl Iterator<Item = Result<Spilled, ArtifactError>> + Send {
        self.spill
            .read()
            .zip(&self.kept)
            .filter_map(|(record, &kept)| (kept || record.is_err()).then_some(record))
    }
}

/// Reads a file from its start, whoever else reads it.
struct FromStart {
    file: Arc<File>,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

fn next(file: &mut BufReader<FromStart>, path: &Path) -> Result<Option<Spilled>, ArtifactError> {
    let reading = |error: io::Error| ArtifactError::reading(path, error);
    let mut header = [0u8; 40];
    match file.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(reading(error)),
    }
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let mut read = |bytes: u64| {
        let mut buffer = vec![0u8; bytes as usize];
        file.read_exact(&mut buffer).map(|()| buffer).map_err(reading)
    };
    let (json, signature) = (read(number(0))?, read(number(8))?);
    let record = serde_json::from_slice(&json).map_err(|error| ArtifactError::Corrupt {
        path: path.to_owned(),
        // Of the error only its place: its words could quote the record.
        detail: format!(
            "a record of this stage does not read back, line {} column {}",
            error.line(),
            error.column()
        ),
    })?;
    let digest = u128::from_le_bytes(header[16..32].try_into().expect("16 bytes"));
    let signature = (!signature.is_empty()).then(|| Signature::from_bytes(&signature));
    Ok(Some(Spilled {
        record,
        digest,
        words: number(32),
        signature,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Body;

    #[test]
    fn records_read_back_as_often_as_asked_and_leave_nothing_if_the_process_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = SpillWriter::create(folder.path().join("records")).unwrap();
        let record = |id: &str| Spilled {
            record: Record {
                id: id.into(),
                source: "s".into(),
                origin: "o".into(),
                language: "en".into(),
                language_score: 0.5,
                body: Body::Text("text".into()),
            },
            digest: 7,
            words: 1,
            signature: None,
        };
        let records = ["a", "b", "c"].map(record);
        records.iter().for_each(|record| writer.push(record).unwrap());
        let spill = writer.finish().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let read = |spill: &Spill| spill.read().map(Result::unwrap).collect::<Vec<_>>();
        assert_eq!(read(&spill), records);
        assert_eq!(read(&spill), records);
        let kept = vec![true, false, true];
        let selected = Selected { spill, kept };
        let ids: Vec<_> = selected.read().map(|record| record.unwrap().record.id).collect();
        assert_eq!(ids, ["a", "c"]);
    }
}
