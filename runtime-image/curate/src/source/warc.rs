//! WARC files (ISO 28500), record by record: the HTML inside of HTTP responses, and the text of WET's conversions.

use std::io::{self, BufRead, Read};

use flate2::read::{GzDecoder, ZlibDecoder};

use super::charset;

/// Bytes of a record's or response's header lines.
const HEADER_LIMIT_BYTES: usize = 64 * 1024;

/// A record that may hold a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    /// The address that was asked for.
    pub(super) url: String,
    /// The page, or why there is none.
    pub(super) page: Result<Page, Skip>,
}

/// A page as it is stored.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Page {
    Html(String),
    /// Its text, which someone else extracted.
    Text(String),
}

/// Why a response yields no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skip {
    /// Its status is not 200.
    Status,
    /// It is no HTML.
    MediaType,
    /// It is larger than a document may be.
    TooLarge,
    /// Its transfer or content encoding cannot be undone.
    Encoding,
    /// Its characters are not in the encoding that it says.
    Charset,
    /// Its HTTP header is no header.
    HttpHeader,
}

impl Skip {
    /// Name in figures.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Status => "httpStatus",
            Self::MediaType => "mediaType",
            Self::TooLarge => "tooLarge",
            Self::Encoding => "contentEncoding",
            Self::Charset => "charset",
            Self::HttpHeader => "httpHeader",
        }
    }
}

/// Reads the next response of `input`; `None` at its end. Records of other types are passed over.
///
/// An error of kind `InvalidData` says what is wrong with the record; `UnexpectedEof` that it ends too early.
pub(super) fn next_response(input: &mut impl BufRead, limit_bytes: u64) -> io::Result<Option<Response>> {
    loop {
        // Records end with two empty lines; tolerate any number.
        let version = loop {
            let Some(line) = read_line(input, HEADER_LIMIT_BYTES)? else {
                return Ok(None);
            };
            if !line.is_empty() {
                break line;
            }
        };
        if !version.starts_with(b"WARC/") {
            return Err(invalid("a record does not begin with WARC/"));
        }
        let header = read_header(input)?;
        let length: u64 = field(&header, "content-length")
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| invalid("a record has no Content-Length"))?;
        let is = |name: &str, value: &str| field(&header, name).is_some_and(|text| text.eq_ignore_ascii_case(value));
        let holds = |media_type: &str| field(&header, "content-type").is_some_and(|text| text.starts_with(media_type));
        let mut content = input.take(length);
        let page = if is("warc-type", "response") && holds("application/http") {
            read_response(&mut content, limit_bytes)?
        } else if is("warc-type", "conversion") && holds("text/plain") {
            read_body(&mut content, limit_bytes)?
                .and_then(|body| charset::decode(body, "").map(Page::Text).ok_or(Skip::Charset))
        } else {
            skip(&mut content)?;
            continue;
        };
        skip(&mut content)?;
        let url = field(&header, "warc-target-uri").unwrap_or_default();
        let url = url.trim_matches(['<', '>']).to_owned();
        return Ok(Some(Response { url, page }));
    }
}

/// Reads what is left of a record, unless it is too large.
fn read_body(content: &mut io::Take<&mut impl BufRead>, limit_bytes: u64) -> io::Result<Result<Vec<u8>, Skip>> {
    if content.limit() > limit_bytes {
        return Ok(Err(Skip::TooLarge));
    }
    let mut body = Vec::new();
    let expected = content.limit();
    match content.read_to_end(&mut body)? as u64 == expected {
        true => Ok(Ok(body)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads an HTTP response up to the end of `content`, or less if it has no page.
fn read_response(content: &mut io::Take<&mut impl BufRead>, limit_bytes: u64) -> io::Result<Result<Page, Skip>> {
    let head = read_line(content, HEADER_LIMIT_BYTES).and_then(|status| Ok((status, read_header(content)?)));
    let (status, header) = match head {
        Ok((status, header)) => (status.unwrap_or_default(), header),
        // The record is whole, and the response in it is not: the crawler's loss, not damage of the file.
        Err(_) if content.limit() == 0 => return Ok(Err(Skip::Status)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(Err(Skip::HttpHeader)),
        Err(error) => return Err(error),
    };
    if status.split(|&byte| byte == b' ').nth(1) != Some(b"200") {
        return Ok(Err(Skip::Status));
    }
    let media_type = field(&header, "content-type").unwrap_or_default().to_ascii_lowercase();
    if !["text/html", "application/xhtml+xml"]
        .iter()
        .any(|html| media_type.starts_with(html))
    {
        return Ok(Err(Skip::MediaType));
    }
    let mut body = match read_body(content, limit_bytes)? {
        Ok(body) => body,
        Err(skip) => return Ok(Err(skip)),
    };
    if field(&header, "transfer-encoding").is_some_and(|text| text.eq_ignore_ascii_case("chunked")) {
        // Many crawlers keep the header and store the body joined.
        if let Some(joined) = join_chunks(&body) {
            body = joined;
        }
    }
    let inflate = |reader: &mut dyn Read| -> Option<Result<Vec<u8>, Skip>> {
        let mut out = Vec::new();
        let read = reader.take(limit_bytes + 1).read_to_end(&mut out).ok()?;
        Some(if read as u64 > limit_bytes {
            Err(Skip::TooLarge)
        } else {
            Ok(out)
        })
    };
    let encoding = field(&header, "content-encoding")
        .unwrap_or_default()
        .to_ascii_lowercase();
    // A crawler that stores decoded bodies may still keep the header; the bytes say which it is.
    let inflated = match encoding.as_str() {
        "gzip" | "x-gzip" if body.starts_with(&[0x1f, 0x8b]) => inflate(&mut GzDecoder::new(body.as_slice())),
        "deflate" if body.first() == Some(&0x78) => inflate(&mut ZlibDecoder::new(body.as_slice())),
        _ => Some(Ok(body)),
    };
    Ok(match inflated {
        None => Err(Skip::Encoding),
        Some(Err(skip)) => Err(skip),
        Some(Ok(body)) => charset::decode(body, &media_type).map(Page::Html).ok_or(Skip::Charset),
    })
}

/// The body of a chunked transfer, if `body` is one.
fn join_chunks(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut joined = Vec::new();
    loop {
        let end = body.windows(2).position(|pair| pair == b"\r\n")?;
        let size = std::str::from_utf8(&body[..end]).ok()?.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        body = &body[end + 2..];
        if size == 0 {
            return Some(joined);
        }
        joined.extend_from_slice(body.get(..size)?);
        body = body.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

/// Reads header lines up to the empty one; names in lower case.
fn read_header(input: &mut impl BufRead) -> io::Result<Vec<(String, String)>> {
    let mut fields: Vec<(String, String)> = Vec::new();
    let mut left = HEADER_LIMIT_BYTES;
    loop {
        let line = read_line(input, left)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if line.is_empty() {
            return Ok(fields);
        }
        left = left.saturating_sub(line.len() + 2);
        let line = String::from_utf8_lossy(&line);
        match line.split_once(':') {
            Some((name, value)) => fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned())),
            // A folded line goes on with the value before it; anything else in a header is ignored, as browsers do.
            None => {
                if let (true, Some((_, value))) = (line.starts_with([' ', '\t']), fields.last_mut()) {
                    value.push_str(line.trim());
                }
            }
        }
    }
}

fn field<'f>(fields: &'f [(String, String)], name: &str) -> Option<&'f str> {
    fields
        .iter()
        .find(|(known, _)| known == name)
        .map(|(_, value)| value.as_str())
}

/// A line without its end; `None` at the end of the input.
fn read_line(input: &mut impl BufRead, limit_bytes: usize) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = input.take(limit_bytes as u64 + 1).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(match read > limit_bytes {
            true => invalid("a header is larger than 64 KiB"),
            false => io::ErrorKind::UnexpectedEof.into(),
        });
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(Some(line))
}

/// Passes over what is left of a record; its end must be there.
fn skip(content: &mut io::Take<&mut impl BufRead>) -> io::Result<()> {
    let expected = content.limit();
    match io::copy(content, &mut io::sink())? == expected {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn record(kind: &str, content: &[u8]) -> Vec<u8> {
        let media_type = match kind {
            "conversion" => "text/plain",
            _ => "application/http; msgtype=response",
        };
        let mut record = format!(
            "WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://x.example/\r\nContent-Type: {media_type}\r\n\
             Content-Length: {}\r\n\r\n",
            content.len()
        )
        .into_bytes();
        record.extend_from_slice(content);
        record.extend_from_slice(b"\r\n\r\n");
        record
    }

    fn pages(warc: &[u8], limit_bytes: u64) -> io::Result<Vec<Result<Page, Skip>>> {
        let mut input = warc;
        let mut pages = Vec::new();
        while let Some(response) = next_response(&mut input, limit_bytes)? {
            assert_eq!(response.url, "http://x.example/");
            pages.push(response.page);
        }
        Ok(pages)
    }

    #[test]
    fn pages_are_read_out_of_responses_and_the_rest_is_passed_over() {
        let html = |header: &str, body: &[u8]| {
            let mut http = format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{header}\r\n").into_bytes();
            http.extend_from_slice(body);
            record("response", &http)
        };
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"<p>packed").unwrap();
        let warc = [
            record("request", b"GET / HTTP/1.1\r\n\r\n"),
            html("", b"<p>plain"),
            html(
                "Transfer-Encoding: chunked\r\n",
                b"4\r\n<p>c\r\n6;x=1\r\nhunked\r\n0\r\n\r\n",
            ),
            html("Transfer-Encoding: chunked\r\n", b"<p>joined already"),
            html("Content-Encoding: gzip\r\n", &gzip.finish().unwrap()),
            html("Content-Encoding: gzip\r\n", b"\x1f\x8bbroken"),
            html("", b"<meta charset=windows-1252>na\xefve \x93x\x94"),
            html("", b"na\xefve"),
            record(
                "response",
                b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n<p>none",
            ),
            record("response", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\nxx"),
            record("response", b""),
            html("", &[b'x'; 300]),
            html(&format!("X: {}\r\n", "x".repeat(70_000)), b"<p>headless"),
            record("conversion", "Schön gesagt.".as_bytes()),
        ]
        .concat();
        let html_page = |text: &str| Ok(Page::Html(text.into()));
        let expected = [
            html_page("<p>plain"),
            html_page("<p>chunked"),
            html_page("<p>joined already"),
            html_page("<p>packed"),
            Err(Skip::Encoding),
            html_page("<meta charset=windows-1252>naïve “x”"),
            Err(Skip::Charset),
            Err(Skip::Status),
            Err(Skip::MediaType),
            Err(Skip::Status),
            Err(Skip::TooLarge),
            Err(Skip::HttpHeader),
            Ok(Page::Text("Schön gesagt.".into())),
        ];
        assert_eq!(pages(&warc, 200).unwrap(), expected);
    }

    #[test]
    fn damage_is_an_error_wherever_the_file_is_cut() {
        let warc = record(
            "response",
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>plain",
        );
        let complete = warc.len() - 4;
        for end in 1..complete {
            let error = pages(&warc[..end], 200).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {end}: {error}");
        }
        for bad in [&b"<html>\n"[..], b"WARC/1.0\r\nWARC-Type: response\r\n\r\n"] {
            assert_eq!(pages(bad, 200).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let endless = [b"WARC/1.0\r\nX: ".to_vec(), vec![b'x'; 70_000]].concat();
        assert_eq!(pages(&endless, 200).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
