//! Reading a source: its files, one after the other in the order of their names, document by document.

mod charset;
mod glob;
mod html;
mod text;
mod warc;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use serde_json::Value;
use strata_artifact::{ArtifactError, HashingReader, hash_files};
use strata_contract::{FailureReason, FileEntry, Input, Source, SourceFormat};
use strata_stage::StageError;

/// Largest document in bytes, before extraction; a larger one is set aside and counted.
pub(crate) const DOCUMENT_LIMIT_BYTES: u64 = 10 * 1024 * 1024;
const BUFFER_BYTES: usize = 128 * 1024;
/// So many records that cannot be read are noise, however few a source has.
const NOISE_RECORDS: u64 = 10;
/// And so many of a hundred.
const NOISE_PERCENT: u64 = 1;

/// A document as it was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RawDocument {
    /// Where it is from: an address of the web, else the file and its place in it.
    pub(crate) origin: String,
    /// What was found.
    pub(crate) content: RawContent,
}

/// What a document holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RawContent {
    /// Running text.
    Text(String),
    /// Two transcripts.
    Pair { chosen: String, rejected: String },
    /// Nothing that can be read, for this reason.
    Nothing(&'static str),
}

/// Where documents go; `bytes` are those of the source's files that were read since the last call.
pub(crate) type Visit<'v> = dyn FnMut(RawDocument, u64) -> Result<(), StageError> + 'v;

/// The files of a source and their sizes in bytes.
pub(crate) fn files(source: &Source, volumes: &Path) -> Result<Vec<(String, u64)>, StageError> {
    let (base, names) = glob::expand(&source.uri.local_path(volumes))?;
    names
        .into_iter()
        .map(|name| {
            let path = base.join(&name);
            let size = fs::metadata(&path)
                .map_err(|error| ArtifactError::reading(&path, error))?
                .len();
            Ok((name, size))
        })
        .collect()
}

/// Hands records on, and counts those of a format's own that cannot be read.
struct Records<'r, 'v> {
    visit: &'r mut Visit<'v>,
    seen: u64,
    unreadable: u64,
    first: Option<StageError>,
}

impl Records<'_, '_> {
    fn push(&mut self, file: &mut SourceFile<'_>, origin: String, content: RawContent) -> Result<(), StageError> {
        self.seen += 1;
        (self.visit)(RawDocument { origin, content }, file.progress())
    }

    /// What stands for a record that cannot be read: it is dropped for `reason`.
    fn unreadable(&mut self, reason: &'static str, error: StageError) -> RawContent {
        self.unreadable += 1;
        self.first.get_or_insert(error);
        RawContent::Nothing(reason)
    }

    /// The first error, if the source has more of them than noise.
    fn finish(self) -> Result<(), StageError> {
        let Self { seen, unreadable, .. } = self;
        let Some(first) = self.first else {
            return Ok(());
        };
        let noise = unreadable <= NOISE_RECORDS || unreadable * 100 <= seen * NOISE_PERCENT;
        let message = format!("{}; {unreadable} of {seen} records cannot be read", first.message);
        if noise && unreadable < seen {
            tracing::warn!("{message}: they are dropped");
            return Ok(());
        }
        Err(StageError::new(first.reason, message))
    }
}

/// Reads every document of `source`; returns the source as an input, with its digest.
pub(crate) fn read(source: &Source, volumes: &Path, visit: &mut Visit<'_>) -> Result<Input, StageError> {
    let (base, names) = glob::expand(&source.uri.local_path(volumes))?;
    let mut entries = Vec::new();
    let mut records = Records {
        visit,
        seen: 0,
        unreadable: 0,
        first: None,
    };
    for name in names {
        let path = base.join(&name);
        let mut file = SourceFile::open(&path)?;
        read_file(&source.format, &name, &mut file, &mut records)?;
        let (bytes, sha256) = file.finish()?;
        entries.push(FileEntry {
            path: name,
            bytes,
            sha256,
        });
    }
    records.finish()?;
    let (digest, bytes) = hash_files(&entries);
    Ok(Input {
        name: source.name.clone(),
        uri: source.uri.clone(),
        digest: Some(digest),
        bytes: Some(bytes),
        resource: None,
    })
}

fn read_file(
    format: &SourceFormat,
    name: &str,
    file: &mut SourceFile<'_>,
    records: &mut Records<'_, '_>,
) -> Result<(), StageError> {
    let limit = DOCUMENT_LIMIT_BYTES;
    match format {
        SourceFormat::WebCrawl => {
            while let Some(response) = warc::next_response(file, limit).map_err(|error| file.error(error))? {
                let content = match response.page {
                    Ok(warc::Page::Html(page)) => RawContent::Text(html::main_text(&page)),
                    Ok(warc::Page::Text(text)) => RawContent::Text(text),
                    Err(skip) => RawContent::Nothing(skip.name()),
                };
                records.push(file, response.url, content)?;
            }
        }
        SourceFormat::Html => {
            let mut page = Vec::new();
            file.take(limit + 1)
                .read_to_end(&mut page)
                .map_err(|error| file.error(error))?;
            let content = match page.len() as u64 > limit {
                true => RawContent::Nothing(warc::Skip::TooLarge.name()),
                false => match charset::decode(page, "") {
                    Some(page) => RawContent::Text(html::main_text(&page)),
                    None => RawContent::Nothing(warc::Skip::Charset.name()),
                },
            };
            records.push(file, name.into(), content)?;
        }
        SourceFormat::Text { split_bytes } => {
            let mut splitter = text::Splitter::new(*split_bytes, limit);
            let mut number = 0u64;
            while let Some(cut) = splitter.next(file).map_err(|error| file.error(error))? {
                number += 1;
                let content = match cut {
                    text::Cut::TooLarge => RawContent::Nothing(warc::Skip::TooLarge.name()),
                    text::Cut::Document(bytes) => match String::from_utf8(bytes) {
                        Ok(text) => RawContent::Text(text.trim_start_matches('\u{feff}').to_owned()),
                        Err(_) => {
                            records.unreadable("notUtf8", file.corrupt("a document that ends there is not UTF-8"))
                        }
                    },
                };
                let origin = if split_bytes.is_some() {
                    format!("{name}#{number}")
                } else {
                    name.into()
                };
                records.push(file, origin, content)?;
            }
        }
        SourceFormat::Jsonl { text_field } => {
            read_lines(name, file, records, &|line| match line.get(text_field.as_str()) {
                Some(Value::String(text)) => Ok(RawContent::Text(text.clone())),
                _ => Err(format!("has no text in the field {text_field:?}")),
            })?;
        }
        SourceFormat::PreferenceTranscripts => {
            read_lines(
                name,
                file,
                records,
                &|line| match (line.get("chosen"), line.get("rejected")) {
                    (Some(Value::String(chosen)), Some(Value::String(rejected))) => Ok(RawContent::Pair {
                        chosen: chosen.clone(),
                        rejected: rejected.clone(),
                    }),
                    _ => Err("has no texts in the fields \"chosen\" and \"rejected\"".to_owned()),
                },
            )?;
        }
    }
    Ok(())
}

/// Reads JSON lines. What is wrong with a line is said by its number, never by its text.
fn read_lines(
    name: &str,
    file: &mut SourceFile<'_>,
    records: &mut Records<'_, '_>,
    parse: &dyn Fn(&Value) -> Result<RawContent, String>,
) -> Result<(), StageError> {
    let mut line = Vec::new();
    let mut number = 0u64;
    while text::read_line(file, &mut line, DOCUMENT_LIMIT_BYTES).map_err(|error| file.error(error))? {
        number += 1;
        let content = if line.len() as u64 > DOCUMENT_LIMIT_BYTES {
            RawContent::Nothing(warc::Skip::TooLarge.name())
        } else if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        } else {
            // An error of this parser into a `Value` holds a position, no text.
            match serde_json::from_slice(&line) {
                Err(error) => {
                    let error = file.corrupt(&format!("line {number} is not JSON: {error}"));
                    records.unreadable("notJson", error)
                }
                Ok(value) => match parse(&value) {
                    Ok(content) => content,
                    Err(what) => records.unreadable("noText", file.corrupt(&format!("line {number} {what}"))),
                },
            }
        };
        records.push(file, format!("{name}#{number}"), content)?;
    }
    Ok(())
}

/// A file that is being read: hashed as it is, decompressed if it is gzip, its position known for messages.
struct SourceFile<'p> {
    path: &'p Path,
    input: BufReader<Decoder>,
    /// Bytes consumed, after decompression.
    position: u64,
    /// Bytes of the file whose reading was told.
    told: u64,
}

enum Decoder {
    Plain(BufReader<HashingReader<File>>),
    Gzip(Box<MultiGzDecoder<BufReader<HashingReader<File>>>>),
}

impl Read for Decoder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(input) => input.read(buffer),
            Self::Gzip(input) => input.read(buffer),
        }
    }
}

impl<'p> SourceFile<'p> {
    fn open(path: &'p Path) -> Result<Self, ArtifactError> {
        let reading = |error| ArtifactError::reading(path, error);
        let file = File::open(path).map_err(reading)?;
        let mut file = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(file));
        let gzip = file.fill_buf().map_err(reading)?.starts_with(&[0x1f, 0x8b]);
        let decoder = match gzip {
            true => Decoder::Gzip(Box::new(MultiGzDecoder::new(file))),
            false => Decoder::Plain(file),
        };
        Ok(Self {
            path,
            input: BufReader::with_capacity(BUFFER_BYTES, decoder),
            position: 0,
            told: 0,
        })
    }

    /// Bytes of the file that were read since the last call.
    fn progress(&mut self) -> u64 {
        let file = match self.input.get_ref() {
            Decoder::Plain(file) => file,
            Decoder::Gzip(decoder) => decoder.get_ref(),
        };
        let bytes = file.get_ref().bytes();
        bytes - std::mem::replace(&mut self.told, bytes)
    }

    /// Size and hash of the file.
    fn finish(self) -> Result<(u64, String), ArtifactError> {
        let file = match self.input.into_inner() {
            Decoder::Plain(file) => file,
            Decoder::Gzip(decoder) => decoder.into_inner(),
        };
        file.into_inner()
            .finish()
            .map_err(|error| ArtifactError::reading(self.path, error))
    }

    fn error(&self, error: io::Error) -> StageError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.corrupt("it ends in the middle of a record"),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => self.corrupt(&error.to_string()),
            _ => ArtifactError::reading(self.path, error).into(),
        }
    }

    fn corrupt(&self, what: &str) -> StageError {
        let unit = match self.input.get_ref() {
            Decoder::Plain(_) => "byte",
            Decoder::Gzip(_) => "decompressed byte",
        };
        let message = format!("{} is damaged at {unit} {}: {what}", self.path.display(), self.position);
        StageError::new(FailureReason::InputCorrupt, message)
    }
}

impl Read for SourceFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl BufRead for SourceFile<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.position += count as u64;
        self.input.consume(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;
    use strata_contract::Uri;

    fn read_bytes(format: SourceFormat, bytes: &[u8]) -> Result<Vec<RawDocument>, StageError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, bytes).unwrap();
        let source = Source {
            name: "s".into(),
            license: None,
            uri: Uri::File(path),
            format,
        };
        let mut documents = Vec::new();
        let mut read_bytes = 0;
        let input = read(&source, Path::new("/none"), &mut |document, more| {
            read_bytes += more;
            documents.push(document);
            Ok(())
        })?;
        assert_eq!(input.bytes, Some(bytes.len() as u64));
        assert!(read_bytes <= bytes.len() as u64);
        Ok(documents)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn jsonl() -> SourceFormat {
        SourceFormat::Jsonl {
            text_field: "text".into(),
        }
    }

    #[test]
    fn gzip_of_several_members_reads_as_one() {
        let bytes = [gzip(b"{\"text\":\"one\"}\n"), gzip(b"\n{\"text\":\"two\"}")].concat();
        let documents = read_bytes(jsonl(), &bytes).unwrap();
        let texts = ["one", "two"].map(|text| RawContent::Text(text.into()));
        assert_eq!(
            documents
                .into_iter()
                .map(|document| document.content)
                .collect::<Vec<_>>(),
            texts
        );
    }

    #[test]
    fn a_few_records_that_cannot_be_read_are_counted_and_more_than_noise_end_the_run() {
        let nothing = |documents: &[RawDocument]| -> Vec<&str> {
            let reason = |document: &RawDocument| match document.content {
                RawContent::Nothing(reason) => Some(reason),
                _ => None,
            };
            documents.iter().filter_map(reason).collect()
        };
        let lines = |good: usize, bad: &str| format!("{bad}{}", "{\"text\":\"one\"}\n".repeat(good));
        let bad = "{\"text\":\"\\ud800\"}\n{\"text\":null}\n{\"text\"\n";
        let documents = read_bytes(jsonl(), lines(5, bad).as_bytes()).unwrap();
        assert_eq!(nothing(&documents), ["notJson", "noText", "notJson"]);
        let text = SourceFormat::Text { split_bytes: Some(1) };
        assert_eq!(
            nothing(&read_bytes(text, b"one\n\n\xff\n\ntwo\n").unwrap()),
            ["notUtf8"]
        );

        let eleven = "[]\n".repeat(11);
        assert_eq!(
            read_bytes(jsonl(), lines(1089, &eleven).as_bytes()).unwrap().len(),
            1100
        );
        let error = read_bytes(jsonl(), lines(1088, &eleven).as_bytes()).unwrap_err();
        assert_eq!(error.reason, FailureReason::InputCorrupt);
        assert!(
            error.message.contains("/file is damaged at byte 3: line 1 has no text"),
            "{error}"
        );
        assert!(
            error.message.ends_with("; 11 of 1099 records cannot be read"),
            "{error}"
        );
    }

    #[test]
    fn damage_is_named_by_file_and_place_and_never_by_text() {
        let secret = "{\"chosen\":\"SECRET\",\"rejected\":5}\n";
        let whole = gzip("{\"text\":\"one\"}\n".repeat(500).as_bytes());
        let cases: [(SourceFormat, Vec<u8>, &str); 6] = [
            (
                SourceFormat::PreferenceTranscripts,
                secret.into(),
                "line 1 has no texts",
            ),
            (jsonl(), b"{\"text\":\"SECRET".to_vec(), "line 1 is not JSON"),
            (jsonl(), whole[..whole.len() - 9].to_vec(), "decompressed byte"),
            (jsonl(), [whole, b"garbage".to_vec()].concat(), "decompressed byte 7500"),
            (
                SourceFormat::Text { split_bytes: None },
                b"\xff\xfeS".to_vec(),
                "not UTF-8",
            ),
            (
                SourceFormat::WebCrawl,
                b"WARC/1.0\r\nContent-Length: 10\r\n\r\nabc".to_vec(),
                "byte 35: it ends",
            ),
        ];
        for (format, bytes, expected) in cases {
            let error = read_bytes(format, &bytes).unwrap_err();
            assert_eq!(error.reason, FailureReason::InputCorrupt, "{error}");
            assert!(
                error.message.contains(expected) && error.message.contains("/file is damaged"),
                "{error}"
            );
            assert!(!error.message.contains("SECRET"), "{error}");
        }
    }
}
