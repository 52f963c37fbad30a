//! The certificate of HTTPS.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::ServeError;
use crate::reload::Reloaded;

/// The certificate and its key, as they stand in the files now.
pub(crate) type Certificate = Arc<Reloaded<ServerConfig>>;

/// Reads a certificate chain and its key.
pub(crate) async fn certificate(certificate: PathBuf, key: PathBuf) -> Result<Certificate, ServeError> {
    Reloaded::start(vec![certificate, key], |files| config(&files[0], &files[1])).await
}

/// A certificate that is not the key's is refused, so that two files which change one after the other are taken together.
fn config(certificate: &[u8], key: &[u8]) -> Result<ServerConfig, String> {
    let chain = CertificateDer::pem_slice_iter(certificate)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("the certificate is not PEM: {error}"))?;
    if chain.is_empty() {
        return Err("the certificate's file has no PEM block CERTIFICATE".to_owned());
    }
    // What the parser says could quote the key.
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|_| "the key's file has no PEM block PRIVATE KEY that can be read".to_owned())?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| format!("certificate and key cannot be used: {error}"))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
