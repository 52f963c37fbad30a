//! Token files in Megatron's `.bin`/`.idx` format.
//!
//! `.bin` holds the tokens of all sequences, little-endian, one after the other. `.idx` is: magic `MMIDIDX\0\0`, u64
//! version 1, u8 token type (8: u16, 4: i32), u64 sequences, u64 documents + 1, i32 length of each sequence in tokens,
//! i64 byte offset of each in `.bin`, i64 sequence index at which each document starts, and the end. To Megatron each
//! packed sequence is a document, which it reads as it is.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use strata_artifact::{ArtifactError, Result};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const HEADER_BYTES: u64 = 9 + 8 + 1 + 8 + 8;

/// Width of a token in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    U16,
    I32,
}

impl TokenType {
    fn of_vocab(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::I32 }
    }

    fn code(self) -> u8 {
        match self {
            Self::U16 => 8,
            Self::I32 => 4,
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::U16 => 2,
            Self::I32 => 4,
        }
    }
}

/// Writes a token file sequence by sequence; holds 4 bytes a sequence until the index is written.
pub struct TokenWriter<W> {
    bin: W,
    kind: TokenType,
    lengths: Vec<i32>,
    tokens: u64,
}

impl<W: Write> TokenWriter<W> {
    /// Writes tokens of a vocabulary of `vocab_size` entries to `bin`.
    pub fn new(bin: W, vocab_size: u32) -> Self {
        Self {
            bin,
            kind: TokenType::of_vocab(vocab_size),
            lengths: Vec::new(),
            tokens: 0,
        }
    }

    /// Appends a sequence.
    pub fn push(&mut self, sequence: &[u32]) -> io::Result<()> {
        let wide = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        for &token in sequence {
            match self.kind {
                TokenType::U16 => {
                    let token = u16::try_from(token).map_err(|_| wide("a token is outside of the vocabulary"))?;
                    self.bin.write_all(&token.to_le_bytes())?;
                }
                TokenType::I32 => {
                    let token = i32::try_from(token).map_err(|_| wide("a token is outside of the vocabulary"))?;
                    self.bin.write_all(&token.to_le_bytes())?;
                }
            }
        }
        self.lengths
            .push(i32::try_from(sequence.len()).map_err(|_| wide("a sequence is too long"))?);
        self.tokens += sequence.len() as u64;
        Ok(())
    }

    /// Tokens written so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Sequences written so far.
    pub fn sequences(&self) -> u64 {
        self.lengths.len() as u64
    }

    /// Writes the index, and gives `bin` back.
    pub fn finish(self, mut idx: impl Write) -> io::Result<W> {
        let sequences = self.lengths.len() as u64;
        idx.write_all(MAGIC)?;
        idx.write_all(&1u64.to_le_bytes())?;
        idx.write_all(&[self.kind.code()])?;
        idx.write_all(&sequences.to_le_bytes())?;
        idx.write_all(&(sequences + 1).to_le_bytes())?;
        for length in &self.lengths {
            idx.write_all(&length.to_le_bytes())?;
        }
        let mut offset = 0i64;
        for length in &self.lengths {
            idx.write_all(&offset.to_le_bytes())?;
            offset += i64::from(*length) * self.kind.bytes() as i64;
        }
        for document in 0..=sequences as i64 {
            idx.write_all(&document.to_le_bytes())?;
        }
        Ok(self.bin)
    }
}

/// A token file that is read in place: nothing but what is asked for is held in memory. Reads from several threads.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    bin: File,
    idx: File,
    kind: TokenType,
    sequences: u64,
    tokens: u64,
}

impl TokenFile {
    /// Opens the pair `stem.bin`, `stem.idx`, for instance `…/tokens/train`; header and sizes are checked.
    pub fn open(stem: &Path) -> Result<Self> {
        let with = |suffix: &str| {
            let mut path = stem.as_os_str().to_owned();
            path.push(suffix);
            PathBuf::from(path)
        };
        let (path, idx_path) = (with(".bin"), with(".idx"));
        let open = |path: &Path| {
            let file = File::open(path).map_err(|error| ArtifactError::reading(path, error))?;
            let bytes = file
                .metadata()
                .map_err(|error| ArtifactError::reading(path, error))?
                .len();
            Ok::<_, ArtifactError>((file, bytes))
        };
        let (bin, bin_bytes) = open(&path)?;
        let (idx, idx_bytes) = open(&idx_path)?;
        let corrupt = |detail: &str| ArtifactError::Corrupt {
            path: idx_path.clone(),
            detail: detail.into(),
        };
        let mut header = [0u8; HEADER_BYTES as usize];
        idx.read_exact_at(&mut header, 0)
            .map_err(|error| ArtifactError::reading(&idx_path, error))?;
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        if &header[..9] != MAGIC || number(9) != 1 {
            return Err(corrupt("it is no Megatron index of version 1"));
        }
        let kind = match header[17] {
            8 => TokenType::U16,
            4 => TokenType::I32,
            _ => return Err(corrupt("its tokens are neither u16 nor i32")),
        };
        let (sequences, documents) = (number(18), number(26));
        let expected = sequences
            .checked_mul(12)
            .zip(documents.checked_mul(8))
            .map(|(a, b)| a.saturating_add(b));
        if expected.and_then(|bytes| bytes.checked_add(HEADER_BYTES)) != Some(idx_bytes) {
            return Err(corrupt("its size does not match its header"));
        }
        let file = Self {
            path,
            bin,
            idx,
            kind,
            sequences,
            tokens: bin_bytes / kind.bytes(),
        };
        let end = match sequences {
            0 => 0,
            some => {
                let (offset, length) = file.place(some - 1)?;
                offset + length * kind.bytes()
            }
        };
        if end != bin_bytes {
            let detail = format!("its index says {end} bytes, it has {bin_bytes}");
            return Err(ArtifactError::Corrupt {
                path: file.path,
                detail,
            });
        }
        Ok(file)
    }

    /// Number of sequences.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// Number of tokens in all sequences.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Replaces `out` by the tokens of sequence `index`.
    pub fn sequence(&self, index: u64, out: &mut Vec<u32>) -> Result<()> {
        if index >= self.sequences {
            let detail = format!("sequence {index} was asked for, it has {}", self.sequences);
            return Err(ArtifactError::Corrupt {
                path: self.path.clone(),
                detail,
            });
        }
        let (offset, length) = self.place(index)?;
        self.tokens_at(offset, length, out)
    }

    /// Replaces `out` by up to `count` tokens from token `start` of the whole file on, across sequences.
    pub fn stream(&self, start: u64, count: u64, out: &mut Vec<u32>) -> Result<()> {
        let start = start.min(self.tokens);
        self.tokens_at(start * self.kind.bytes(), count.min(self.tokens - start), out)
    }

    /// Byte offset and length in tokens of sequence `index`, which lies inside of `.bin`.
    fn place(&self, index: u64) -> Result<(u64, u64)> {
        let (mut length, mut offset) = ([0u8; 4], [0u8; 8]);
        let read = |buffer: &mut [u8], at| {
            self.idx
                .read_exact_at(buffer, at)
                .map_err(|error| ArtifactError::reading(&self.path, error))
        };
        read(&mut length, HEADER_BYTES + index * 4)?;
        read(&mut offset, HEADER_BYTES + self.sequences * 4 + index * 8)?;
        let length = u64::try_from(i32::from_le_bytes(length)).ok();
        let offset = u64::try_from(i64::from_le_bytes(offset)).ok();
        match offset.zip(length) {
            Some((offset, length))
                if offset.saturating_add(length * self.kind.bytes()) <= self.tokens * self.kind.bytes() =>
            {
                Ok((offset, length))
            }
            _ => {
                let detail = format!("the index places sequence {index} outside of it");
                Err(ArtifactError::Corrupt {
                    path: self.path.clone(),
                    detail,
                })
            }
        }
    }

    fn tokens_at(&self, offset: u64, length: u64, out: &mut Vec<u32>) -> Result<()> {
        let mut bytes = vec![0u8; (length * self.kind.bytes()) as usize];
        self.bin
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| ArtifactError::reading(&self.path, error))?;
        out.clear();
        match self.kind {
            TokenType::U16 => out.extend(
                bytes
                    .chunks_exact(2)
                    .map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))),
            ),
            TokenType::I32 => out.extend(
                bytes
                    .chunks_exact(4)
                    .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            ),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_contract::FailureReason;

    fn write(stem: &Path, vocab_size: u32, sequences: &[&[u32]]) {
        let mut writer = TokenWriter::new(Vec::new(), vocab_size);
        sequences.iter().for_each(|sequence| writer.push(sequence).unwrap());
        let mut idx = Vec::new();
        std::fs::write(stem.with_extension("bin"), writer.finish(&mut idx).unwrap()).unwrap();
        std::fs::write(stem.with_extension("idx"), idx).unwrap();
    }

    #[test]
    fn sequences_read_back_in_both_widths() {
        let folder = tempfile::tempdir().unwrap();
        let stem = folder.path().join("train");
        for vocab_size in [2048, 65_537] {
            let high = vocab_size - 1;
            write(&stem, vocab_size, &[&[1, 2, high], &[], &[4]]);
            let file = TokenFile::open(&stem).unwrap();
            assert_eq!((file.sequences(), file.tokens()), (3, 4));
            let mut tokens = Vec::new();
            for (index, expected) in [&[1, 2, high][..], &[], &[4]].iter().enumerate() {
                file.sequence(index as u64, &mut tokens).unwrap();
                assert_eq!(&tokens, expected);
            }
            file.stream(1, 100, &mut tokens).unwrap();
            assert_eq!(tokens, [2, high, 4]);
        }
        assert!(TokenWriter::new(Vec::new(), 2048).push(&[70_000]).is_err());
    }

    #[test]
    fn the_index_is_megatrons_byte_for_byte() {
        let mut writer = TokenWriter::new(Vec::new(), 2048);
        writer.push(&[258, 3]).unwrap();
        writer.push(&[4]).unwrap();
        let mut idx = Vec::new();
        assert_eq!(writer.finish(&mut idx).unwrap(), [2, 1, 3, 0, 4, 0]);
        let mut expected = b"MMIDIDX\0\0".to_vec();
        expected.extend([
            1, 0, 0, 0, 0, 0, 0, 0, 8, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0,
        ]);
        expected.extend([2, 0, 0, 0, 1, 0, 0, 0]);
        expected.extend([0i64, 4, 0, 1, 2].iter().flat_map(|n| n.to_le_bytes()));
        assert_eq!(idx, expected);
    }

    #[test]
    fn damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let stem = folder.path().join("train");
        let cut = |name: &str, bytes: usize| {
            let path = folder.path().join(name);
            let data = std::fs::read(&path).unwrap();
            std::fs::write(&path, &data[..data.len() - bytes]).unwrap();
        };
        for (name, bytes) in [("train.bin", 2), ("train.idx", 1), ("train.idx", 60)] {
            write(&stem, 2048, &[&[1, 2, 3], &[4]]);
            cut(name, bytes);
            let error = TokenFile::open(&stem).unwrap_err();
            assert_eq!(error.reason(), FailureReason::InputCorrupt, "{name}: {error}");
        }
        write(&stem, 2048, &[&[1, 2, 3], &[4]]);
        let mut idx = std::fs::read(folder.path().join("train.idx")).unwrap();
        idx[HEADER_BYTES as usize] = 200;
        std::fs::write(folder.path().join("train.idx"), idx).unwrap();
        let error = TokenFile::open(&stem)
            .unwrap()
            .sequence(0, &mut Vec::new())
            .unwrap_err();
        assert_eq!(error.reason(), FailureReason::InputCorrupt, "{error}");
    }
}
