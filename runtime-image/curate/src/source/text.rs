//! Plain text, cut into documents at blank lines, and lines of bounded length.

use std::io::{self, BufRead};

/// Reads a line with its end into `line`; false at the end of the input.
///
/// Of a line longer than `limit_bytes` the rest is passed over, and the line is longer than the limit by one byte.
pub(super) fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>, limit_bytes: u64) -> io::Result<bool> {
    line.clear();
    let read = io::Read::take(&mut *input, limit_bytes + 1).read_until(b'\n', line)?;
    if read as u64 > limit_bytes && line.last() != Some(&b'\n') {
        input.skip_until(b'\n')?;
    }
    Ok(read > 0)
}

/// Cuts a text into documents of at least `split_bytes`, each ending at the first blank line after that size; without it,
/// the whole text is one document.
pub(super) struct Splitter {
    split_bytes: u64,
    limit_bytes: u64,
    document: Vec<u8>,
    bytes: u64,
}

/// A document, or one that is larger than documents may be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Document(Vec<u8>),
    TooLarge,
}

impl Splitter {
    pub(super) fn new(split_bytes: Option<u64>, limit_bytes: u64) -> Self {
        Self {
            split_bytes: split_bytes.unwrap_or(u64::MAX),
            limit_bytes,
            document: Vec::new(),
            bytes: 0,
        }
    }

    /// Reads the next document; `None` at the end of the input. Documents of white space alone are passed over.
    pub(super) fn next(&mut self, input: &mut impl BufRead) -> io::Result<Option<Cut>> {
        let mut line = Vec::new();
        while read_line(input, &mut line, self.limit_bytes)? {
            let blank = line.iter().all(u8::is_ascii_whitespace);
            if blank && self.document.is_empty() && self.bytes == 0 {
                continue;
            }
            self.bytes += line.len() as u64;
            // Of a document that is too large nothing is held.
            match self.bytes > self.limit_bytes {
                true => self.document = Vec::new(),
                false => self.document.extend_from_slice(&line),
            }
            if blank && self.bytes >= self.split_bytes {
                return Ok(self.take());
            }
        }
        Ok(self.take())
    }

    fn take(&mut self) -> Option<Cut> {
        let document = std::mem::take(&mut self.document);
        match std::mem::take(&mut self.bytes) {
            0 => None,
            bytes if bytes > self.limit_bytes => Some(Cut::TooLarge),
            _ => Some(Cut::Document(document)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str, split_bytes: Option<u64>, limit_bytes: u64) -> Vec<Option<String>> {
        let mut input = text.as_bytes();
        let mut splitter = Splitter::new(split_bytes, limit_bytes);
        let mut found = Vec::new();
        while let Some(cut) = splitter.next(&mut input).unwrap() {
            found.push(match cut {
                Cut::Document(bytes) => Some(String::from_utf8(bytes).unwrap()),
                Cut::TooLarge => None,
            });
        }
        found
    }

    #[test]
    fn documents_end_at_the_first_blank_line_after_their_size() {
        let text = "\n\nA:\nHo.\n\nB:\nHi.\n\nC:\nHa ha.\n\n\nD:\nNo.\n";
        assert_eq!(split(text, None, 1000), [Some(text.trim_start().to_owned())]);
        let expected = ["A:\nHo.\n\nB:\nHi.\n\n", "C:\nHa ha.\n\n\n", "D:\nNo.\n"].map(|text| Some(text.to_owned()));
        assert_eq!(split(text, Some(12), 1000), expected);
        assert_eq!(split(" \n\n", Some(12), 1000), []);
    }

    #[test]
    fn a_document_that_is_too_large_is_set_aside_and_the_next_is_read() {
        let text = format!("{}\n\nsmall\n", "x".repeat(500));
        assert_eq!(split(&text, Some(10), 100), [None, Some("small\n".to_owned())]);
    }
}
