//! How a pod is asked, whatever for. A pod is whatever its user makes of it: it sends the operator nowhere else, no proxy stands in
//! between, and it does not fill the operator's memory.

use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Response};

/// Why an answer was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It broke off.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// It is larger than this many bytes.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

/// A client for pods, to be set up further.
pub fn client() -> ClientBuilder {
    // Also for plain HTTP no client is made without it. It fails where one is installed already, which is as good.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    Client::builder().redirect(Policy::none()).no_proxy()
}

/// A pod's address as it stands in a URL.
pub fn host(address: &str) -> String {
    match address.contains(':') {
        true => format!("[{address}]"),
        false => address.to_owned(),
    }
}

/// An answer of at most `limit_bytes`.
///
/// # Errors
/// It breaks off, or goes on beyond that.
pub async fn body(mut response: Response, limit_bytes: usize) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > limit_bytes {
            return Err(BodyError::TooLarge(limit_bytes));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
