//! Records between two passes: in a file, so that memory does not grow with the data.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

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

/// Writes records to a file, one after the other.
pub(crate) struct SpillWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl SpillWriter {
    pub(crate) fn create(path: PathBuf) -> Result<Self, ArtifactError> {
        let file = File::create(&path).map_err(|error| ArtifactError::writing(&path, error))?;
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
        file.into_inner()
            .map_err(|error| ArtifactError::writing(&path, error.into_error()))?;
        Ok(Spill { path })
    }
}

/// Records in a file.
pub(crate) struct Spill {
    path: PathBuf,
}

impl Spill {
    /// The records in their order.
    pub(crate) fn read(
        &self,
    ) -> Result<impl Iterator<Item = Result<Spilled, ArtifactError>> + Send + use<>, ArtifactError> {
        let path = self.path.clone();
        let file = File::open(&path).map_err(|error| ArtifactError::reading(&path, error))?;
        let mut file = BufReader::with_capacity(1 << 18, file);
        Ok(std::iter::from_fn(move || next(&mut file, &path).transpose()))
    }
}

fn next(file: &mut BufReader<File>, path: &Path) -> Result<Option<Spilled>, ArtifactError> {
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
