//! Who is answered, and over what.

use std::fs;
use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use reqwest::StatusCode;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::Running;

impl Running {
    /// The status of a request with these headers, and the error's code.
    async fn with(&self, path: &str, headers: &[(&str, &str)]) -> (u16, Value) {
        let mut request = self.client.get(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let status = response.status();
        let challenged = response.headers().contains_key("www-authenticate");
        assert_eq!(challenged, status == StatusCode::UNAUTHORIZED, "{path}");
        let body: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default();
        (status.as_u16(), body["error"]["code"].clone())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_keys_only_who_has_one_is_answered_and_a_new_one_counts_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    fs::write(&file, "old\n").unwrap();
    let arguments = format!("--api-key one --api-key two --api-key-file {}", file.display());
    let server = Running::start(&arguments).await;
    for (headers, status) in [
        (&[][..], 401),
        (&[("authorization", "Bearer one")], 200),
        (&[("authorization", "bearer two")], 200),
        (&[("api-key", "two")], 200),
        (&[("api-key", "old")], 200),
        (&[("api-key", "three")], 401),
        (&[("authorization", "Bearer on")], 401),
        (&[("authorization", "Bearer ")], 401),
        (&[("authorization", "Basic one")], 401),
        (&[("authorization", "one")], 401),
    ] {
        let (got, code) = server.with("/v1/models", headers).await;
        assert_eq!(got, status, "{headers:?}");
        assert_eq!(code == "invalid_api_key", status == 401, "{headers:?}");
    }
    for path in ["/openai/v1/models", "/tokenize", "/v1/nothing", "/version"] {
        assert_eq!(server.with(path, &[]).await.0, 401, "{path}");
    }
    for path in ["/health", "/ready", "/metrics", "/ping"] {
        assert_eq!(server.with(path, &[]).await.0, 200, "{path}");
    }
    let status = async |key: &str| server.with("/v1/models", &[("api-key", key)]).await.0;
    fs::write(&file, "new\n\n newer \n").unwrap();
    server
        .until("the new key counts", async || status("newer").await == 200)
        .await;
    assert_eq!((status("new").await, status("old").await), (200, 401));
    // A file that holds no key opens nothing and locks nobody out.
    fs::write(&file, "\n").unwrap();
    assert_eq!((status("new").await, status("").await), (200, 401));
    server.stop().await;
}

/// Writes a certificate for `localhost` with its key, and gives the certificate.
fn certify(folder: &std::path::Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    fs::write(folder.join("tls.key"), signing_key.serialize_pem()).unwrap();
    fs::write(folder.join("tls.crt"), cert.pem()).unwrap();
    cert.der().clone()
}

/// A connection to the server, if it presents `certificate`.
async fn connect(address: &str, certificate: &CertificateDer<'static>) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config))
        .connect("localhost".try_into().unwrap(), stream)
        .await
}

async fn get(stream: &mut TlsStream<TcpStream>, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_is_served_with_the_certificate_that_stands_in_the_files_now() {
    let folder = tempfile::tempdir().unwrap();
    let first = certify(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let arguments = format!("--ssl-certfile {} --ssl-keyfile {}", path("tls.crt"), path("tls.key"));
    let server = Running::begin(2048, &arguments).await;
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    server
        .until("the model is loaded", async || {
            let mut stream = connect(&address, &first).await.unwrap();
            get(&mut stream, "/ready").await.starts_with("HTTP/1.1 200 ")
        })
        .await;
    // Whoever shakes no hands holds up nobody.
    let _silent = TcpStream::connect(&address).await.unwrap();
    let mut kept = connect(&address, &first).await.unwrap();
    let second = certify(folder.path());
    server
        .until("the second certificate is presented", async || {
            connect(&address, &second).await.is_ok()
        })
        .await;
    assert!(connect(&address, &first).await.is_err());
    assert!(
        get(&mut kept, "/v1/models").await.contains("\"tiny\""),
        "connections outlive their certificate"
    );
    // Half a change leaves the last whole one.
    fs::write(folder.path().join("tls.crt"), "-----BEGIN CERT").unwrap();
    assert!(connect(&address, &second).await.is_ok());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_cannot_be_used_are_named_before_anything_is_served() {
    let folder = tempfile::tempdir().unwrap();
    certify(folder.path());
    fs::write(folder.path().join("empty"), "").unwrap();
    let key = fs::read_to_string(folder.path().join("tls.key")).unwrap();
    let secret = key.lines().nth(1).unwrap();
    for (arguments, words) in [
        ("--api-key-file F/none", "cannot read"),
        ("--api-key-file F/empty", "write one a line"),
        (
            "--ssl-certfile F/empty --ssl-keyfile F/tls.key",
            "no PEM block CERTIFICATE",
        ),
        (
            "--ssl-certfile F/tls.crt --ssl-keyfile F/tls.crt",
            "no PEM block PRIVATE KEY",
        ),
        (
            "--ssl-certfile F/tls.key --ssl-keyfile F/tls.key",
            "no PEM block CERTIFICATE",
        ),
    ] {
        let arguments = arguments.replace('F', folder.path().to_str().unwrap());
        let error = Running::refused(&arguments).await;
        let text = error.to_string();
        assert!(
            error.is_bad_input() && text.contains(words) && !text.contains(secret),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_says_which_request_it_is_to() {
    let server = Running::start("--api-key k").await;
    let id = async |path: &str, given: Option<&str>| {
        let request = server.client.get(format!("{}{path}", server.url)).bearer_auth("k");
        let request = match given {
            Some(id) => request.header("x-request-id", id),
            None => request,
        };
        let answer = request.send().await.unwrap();
        answer.headers()["x-request-id"].to_str().unwrap().to_owned()
    };
    for path in ["/health", "/v1/models", "/v1/nothing", "/v1/chat/completions"] {
        assert_eq!(id(path, Some("Trace-1.a_b:c/d")).await, "Trace-1.a_b:c/d", "{path}");
        let (one, other) = (id(path, None).await, id(path, None).await);
        assert!(one.starts_with("req_") && one != other, "{one} {other}");
        for odd in ["a b", "", "a\"", &"x".repeat(129)] {
            assert!(id(path, Some(odd)).await.starts_with("req_"), "{odd:?}");
        }
    }
    let refused = server
        .client
        .get(format!("{}/v1/models", server.url))
        .send()
        .await
        .unwrap();
    assert_eq!(
        (
            refused.status().as_u16(),
            refused.headers().contains_key("x-request-id")
        ),
        (401, true)
    );
    server.stop().await;
}
