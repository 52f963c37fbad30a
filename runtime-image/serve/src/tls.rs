//! HTTPS: a listener whose connections have shaken hands before they count as connections.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

use crate::error::ServeError;
use crate::reload::Reloaded;

/// How long a client may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once. More wait in the system's queue of the socket.
const MAX_HANDSHAKES: usize = 256;

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

/// Connections that have shaken hands.
pub(crate) struct TlsListener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Accepts until the value is dropped.
    pub(crate) fn start(listener: TcpListener, address: SocketAddr, certificate: Certificate) -> Self {
        let (ready, receiver) = mpsc::channel(MAX_HANDSHAKES);
        tokio::spawn(accept(listener, certificate, ready));
        TlsListener {
            ready: receiver,
            address,
        }
    }
}

async fn accept(
    mut listener: TcpListener,
    certificate: Certificate,
    ready: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let next = async {
            let turn = handshakes.clone().acquire_owned().await;
            (turn, Listener::accept(&mut listener).await)
        };
        let (turn, (stream, address)) = tokio::select! {
            next = next => next,
            () = ready.closed() => return,
        };
        let (acceptor, ready) = (TlsAcceptor::from(certificate.get()), ready.clone());
        tokio::spawn(async move {
            let _turn = turn;
            // A token is sent as soon as it is there, not when a packet is full.
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                // It is closed if the server has stopped.
                Ok(Ok(stream)) => drop(ready.send((stream, address)).await),
                Ok(Err(error)) => tracing::debug!(%address, %error, "no TLS handshake"),
                Err(_) => tracing::debug!(%address, "no TLS handshake in time"),
            }
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(connection) => connection,
            // The accepting task is gone: there is nothing more to come.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.address)
    }
}
