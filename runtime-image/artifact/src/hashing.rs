//! Hashing bytes on their way.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use strata_contract::{FileEntry, hash_canonical, hex};

use crate::{ArtifactError, Result};

const BUFFER_BYTES: usize = 256 * 1024;

/// A reader that hashes what passes through it.
pub struct HashingReader<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> HashingReader<R> {
    /// Hashes what is read from `inner`.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads what is left, and returns the number of all bytes and their lower-case hex SHA-256.
    pub fn finish(mut self) -> io::Result<(u64, String)> {
        let mut buffer = vec![0; BUFFER_BYTES];
        while self.read(&mut buffer)? > 0 {}
        Ok((self.bytes, hex(&self.hash.finalize())))
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

/// A writer that hashes what passes through it.
pub struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Hashes what is written to `inner`.
    pub fn new(inner: W) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    /// The writer, the number of bytes that reached it and their lower-case hex SHA-256.
    pub fn finish(self) -> (W, u64, String) {
        (self.inner, self.bytes, hex(&self.hash.finalize()))
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(data)?;
        self.hash.update(&data[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Size in bytes and lower-case hex SHA-256 of the file at `path`.
pub fn hash_file(path: &Path) -> Result<(u64, String)> {
    let file = File::open(path).map_err(|error| ArtifactError::reading(path, error))?;
    HashingReader::new(file)
        .finish()
        .map_err(|error| ArtifactError::reading(path, error))
}

/// Digest (`sha256:HEX`) and size in bytes of several files as one input; `files` are sorted by path by the caller.
///
/// One file's digest is that of its bytes; several files' that of the list of paths, sizes and hashes.
pub fn hash_files(files: &[FileEntry]) -> (String, u64) {
    let bytes = files.iter().map(|file| file.bytes).sum();
    let hash = match files {
        [one] => one.sha256.clone(),
        many => hash_canonical(&many),
    };
    (format!("sha256:{hash}"), bytes)
}

/// Every file below `folder`, with its path relative to it, sorted by that path.
///
/// A link to a file counts as the file. One to a folder is an error, since it could lead in a circle, and so is one to
/// nothing: what a reader would follow must not be missing from the digest.
pub(crate) fn walk(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut folders = vec![(String::new(), folder.to_owned())];
    while let Some((prefix, folder)) = folders.pop() {
        let entries = std::fs::read_dir(&folder).map_err(|error| ArtifactError::reading(&folder, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| ArtifactError::reading(&folder, error))?;
            let path = entry.path();
            let kind = entry
                .file_type()
                .map_err(|error| ArtifactError::reading(&path, error))?;
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
                let detail = "its name is not UTF-8".to_owned();
                return Err(ArtifactError::Corrupt { path, detail });
            };
            if kind.is_dir() {
                folders.push((name + "/", path));
            } else if kind.is_file() || (kind.is_symlink() && links_to_file(&path)?) {
                files.push((name, path));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Whether the link at `path` leads to a regular file.
fn links_to_file(path: &Path) -> Result<bool> {
    let path = path.to_owned();
    match std::fs::metadata(&path) {
        Ok(target) if target.is_dir() => {
            let detail = "it is a link to a folder: put the folder itself there".to_owned();
            Err(ArtifactError::Corrupt { path, detail })
        }
        Ok(target) => Ok(target.is_file()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let detail = "it is a link to a file that is missing: put that there too".to_owned();
            Err(ArtifactError::Corrupt { path, detail })
        }
        Err(error) => Err(ArtifactError::reading(&path, error)),
    }
}
