//! Writes the HTML files of a folder as a WARC file, as a crawler would: how `config/samples/data/pages.warc.gz` is made.
//!
//! `cargo run -p strata-curate --example make_warc -- config/samples/data/pages config/samples/data/pages.warc.gz`

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use flate2::{Compression, write::GzEncoder};
use sha2::{Digest, Sha256};

/// When the pages were "fetched"; fixed, so that the same pages give the same file.
const DATE: &str = "2026-11-24T00:00:00Z";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(folder), Some(output)) = (arguments.next(), arguments.next()) else {
        return Err("usage: make_warc FOLDER OUTPUT.warc.gz".into());
    };
    let mut pages: Vec<PathBuf> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_, Box<dyn Error>>>()?;
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "html"));
    pages.sort();

    let mut warc = File::create(output)?;
    let about = "software: strata make_warc\r\nformat: WARC File Format 1.0\r\n";
    warc.write_all(&record("warcinfo", None, "application/warc-fields", about.as_bytes())?)?;
    for page in pages {
        let html = fs::read(&page)?;
        let name = page
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or("a page's name is not UTF-8")?;
        let url = format!("https://stage.example.org/{name}");
        let mut http = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\n\r\n",
            html.len()
        )
        .into_bytes();
        http.extend_from_slice(&html);
        warc.write_all(&record(
            "response",
            Some(&url),
            "application/http; msgtype=response",
            &http,
        )?)?;
    }
    Ok(())
}

/// One record, a gzip member of its own, so that a reader can start at each.
fn record(kind: &str, url: Option<&str>, media_type: &str, content: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let hash = Sha256::digest([url.unwrap_or(kind).as_bytes(), content].concat());
    let hex: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let id = format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    );
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    write!(
        gzip,
        "WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Date: {DATE}\r\nWARC-Record-ID: <urn:uuid:{id}>\r\n"
    )?;
    if let Some(url) = url {
        write!(gzip, "WARC-Target-URI: {url}\r\n")?;
    }
    write!(
        gzip,
        "Content-Type: {media_type}\r\nContent-Length: {}\r\n\r\n",
        content.len()
    )?;
    gzip.write_all(content)?;
    gzip.write_all(b"\r\n\r\n")?;
    Ok(gzip.finish()?)
}
